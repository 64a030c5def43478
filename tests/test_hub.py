"""hf:ORG/NAME, against a small server that answers as the Hugging Face hub does."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from weight_files import CONFIG, edit_json, random_state, write_huggingface

from mmadapter.weights import load_state_dict, open_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Serves one repository, org/tiny, at the revisions main and v1."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.served: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.split("?")[0].removeprefix("/api/models").lstrip("/")
        organisation, name, kind, rest = path.split("/", 3)  # kind: resolve, revision or tree
        repository = f"{organisation}/{name}"
        if repository == "org/gated":
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        if repository != "org/tiny":
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        revision, _, file = rest.partition("/")
        if revision not in ("main", "v1", COMMIT):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        files = {entry.name: entry for entry in self.server.folder.iterdir()}
        if not file:
            # Clients of different versions list the files by one or the other of these two.
            tree = [
                {"type": "file", "path": name, "size": entry.stat().st_size, "oid": "0"}
                for name, entry in files.items()
            ]
            described = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            content = json.dumps(tree if kind == "tree" else described).encode()
            return self.answer(200, {"Content-Type": "application/json"}, content)
        if file not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        content = files[file].read_bytes()
        if self.command == "GET":
            self.server.served.append(file)
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.answer(200, {"ETag": tag, "X-Repo-Commit": COMMIT}, content)

    do_HEAD = do_GET  # noqa: N815 - the name that the server looks for

    def answer(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    folder = write_huggingface(tmp_path / "repository", CONFIG)
    (folder / "pytorch_model.bin").write_bytes(b"the same weights again")
    (folder / "consolidated.safetensors").write_bytes(b"and again")
    server = Hub(folder)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def refused(spec: str, kind: type[Exception]) -> str:
    with pytest.raises(kind) as error:
        open_weights(spec, progress=False)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("spec", ["hf:org/tiny", "hf:org/tiny@v1"])
def test_a_repository_is_fetched_once(hub: Hub, spec: str) -> None:
    weights = open_weights(spec, progress=False)
    assert weights.spec == spec
    assert weights.config == CONFIG
    state = load_state_dict(weights, torch.float32)
    assert all(torch.equal(state[name], tensor) for name, tensor in random_state().items())
    assert "model.safetensors" in hub.served
    assert not {"pytorch_model.bin", "consolidated.safetensors"} & set(hub.served)

    served = list(hub.served)
    assert open_weights(spec, progress=False).config == CONFIG
    assert hub.served == served
    hub.shutdown()
    hub.server_close()
    assert open_weights(spec, progress=False).config == CONFIG  # without a network, and without waiting for one


def test_a_model_of_another_kind_is_refused_before_its_weights_are_fetched(hub: Hub) -> None:
    edit_json(hub.folder / "config.json", architectures=["GPT2LMHeadModel"])
    assert "GPT2LMHeadModel" in refused("hf:org/tiny", ValueError)
    assert hub.served == ["config.json"]


def test_what_the_hub_refuses(hub: Hub) -> None:
    assert "is gated: accept its licence" in refused("hf:org/gated", PermissionError)
    assert "the hub has no org/none" in refused("hf:org/none", FileNotFoundError)
    assert "has no revision 'v2'" in refused("hf:org/tiny@v2", FileNotFoundError)
    assert "expected hf:ORG/NAME" in refused("hf:a/b/c", ValueError)
    (hub.folder / "config.json").unlink()
    assert "has no config.json" in refused("hf:org/tiny", FileNotFoundError)


def test_no_safetensors(hub: Hub) -> None:
    (hub.folder / "model.safetensors").unlink()
    (hub.folder / "consolidated.safetensors").unlink()
    assert "has no whole set of *.safetensors" in refused("hf:org/tiny", FileNotFoundError)


def test_a_fetch_that_was_cut_off_is_taken_up_again(hub: Hub) -> None:
    """Guards against taking what is left in the hub's cache for the whole repository."""
    open_weights("hf:org/tiny", progress=False)
    (lost,) = (hub.folder.parent / "cache").glob("*/snapshots/*/model.safetensors")
    lost.unlink()
    assert open_weights("hf:org/tiny", progress=False).config == CONFIG


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's pauses between its attempts
    hub.shutdown()
    hub.server_close()
    assert "the hub cannot be reached" in refused("hf:org/tiny", ConnectionError)
