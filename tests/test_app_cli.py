"""`python -m app` as a user types it, on the tiny model."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tiny_session

from app.cli import MOST_REQUESTS, build_parser, main, offered_adapters
from app.ui import THREADS
from mmadapter import checkpoint

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "app" / "README.md"
# Runs the command line and tells of every connection to another machine, and of every name that is looked up.
WATCHED = """
import sys

def audit(event, details):
    if event == "socket.connect":
        address = details[1]
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1"):
            print("CONNECTS", address, file=sys.stderr, flush=True)
    if event == "socket.getaddrinfo" and details[0] not in ("127.0.0.1", "localhost", None):
        print("LOOKS UP", details[0], file=sys.stderr, flush=True)

sys.addaudithook(audit)
from app.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tiny_session.Tiny:
    return tiny_session.build(tmp_path_factory.mktemp("tiny"))


class Served:
    """`python -m app` in a process of its own."""

    def __init__(self, folder: Path, *words: object, **places: Path) -> None:
        self.log, self.uploads = folder / "log.jsonl", folder / "temporary"
        self.uploads.mkdir()
        places["TMPDIR"] = self.uploads
        self.process = subprocess.Popen(
            [sys.executable, "-c", WATCHED, "--port", "0", "--log", str(self.log), *map(str, words)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **{name: str(path) for name, path in places.items()}},
            stdout=subprocess.PIPE,
            stderr=open(folder / "stderr", "w+"),  # noqa: SIM115 - closed with the process
            text=True,
        )
        self.stderr = folder / "stderr"
        line = self.process.stdout.readline()
        found = re.fullmatch(r"Open (http://127\.0\.0\.1:\d+) \(Ctrl-C ends\)\n", line)
        assert found, line + self.stderr.read_text()
        self.url = found[1]

    def interrupt(self) -> str:
        """Ctrl-C; the rest of standard output."""
        self.process.send_signal(signal.SIGINT)  # nothing happens where it has ended
        try:
            return self.process.communicate(timeout=60)[0]
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """On the tiny base with the adapter that sees, called "caption"."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(tiny.sees, folder / "caption")
    words = ["--llama", tiny.llama, "--adapter", folder / "caption", "--dtype", "float32"]
    made = Served(folder, *words, HOME=folder, MMADAPTER_CACHE=folder / "cache")
    yield made
    if made.process.returncode is None:
        made.interrupt()


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs the command line on a base that is not there: (exit status, standard output, standard error)."""
    monkeypatch.setenv("MMADAPTER_CACHE", str(tmp_path / "cache"))  # feedback is kept there

    def run_command(*words: object) -> tuple[int, str, str]:
        try:
            status = main(["--llama", "/no/such/base", *map(str, words)])
        except SystemExit as leaving:
            status = leaving.code
        return status, *capsys.readouterr()

    return run_command


# Help and misuse


def test_help_opens_with_an_example_and_needs_no_libraries():
    script = (
        "import sys; from app.cli import build_parser; build_parser().print_help(); "
        "print([name for name in ('torch', 'gradio', 'fastapi', 'uvicorn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert lines[0] == "python -m app"
    assert lines[-1] == "[]"
    for option in ("--host", "--port", "--auth", "--allow-anyone", "--queue", "--feedback", "--llama", "--dtype"):
        assert f"  {option}" in done.stdout
    build_parser().parse_args(lines[1].split()[3:])  # the second example is one that the parser takes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "65536"], "--port: must be a whole number from 0 to 65535, got '65536'"),
        (["--port", "-1"], "--port"),
        (["--max-batch", "0"], "--max-batch: must be a whole number from 1, got '0'"),
        (["--queue", "x"], "--queue: must be a whole number from 1, got 'x'"),
        (["--auth", "anna"], "--auth must be USER:PASSWORD, neither of them empty"),
        (["--auth", ":secret"], "--auth must be USER:PASSWORD"),
        (["--auth", "anna:"], "--auth must be USER:PASSWORD"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_misuse_is_told_in_one_line(run, words, message):
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1"])
def test_beyond_this_machine_nobody_is_let_in_by_accident(run, host):
    status, _, err = run("--host", host, "--port", 0)
    assert status == 1
    assert err == (
        f"error: --host {host} lets other machines in; give --auth USER:PASSWORD, or --allow-anyone for everybody\n"
    )


def test_more_requests_than_the_page_has_threads_for_are_refused(run):
    assert MOST_REQUESTS < THREADS
    status, _, err = run("--port", 0, "--queue", 193)
    assert (status, err) == (1, "error: --max-batch and --queue take at most 200 requests together, got 201\n")


def test_with_credentials_or_the_owners_word_it_goes_on_to_load(run):
    for words in (["--auth", "anna:secret"], ["--allow-anyone"]):
        status, _, err = run("--host", "0.0.0.0", "--port", 0, *words)
        assert status == 1
        assert "Loading /no/such/base ..." in err
        assert "lets other machines in" not in err


def test_a_port_in_use_is_told_before_anything_is_loaded(run):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, _, err = run("--port", port)
    assert status == 1
    assert err == f"error: cannot serve at 127.0.0.1 port {port}: Address already in use; choose another --port\n"


def test_a_file_that_cannot_be_made_is_told_before_anything_is_loaded(run, tmp_path):
    for option in ("--log", "--feedback"):
        status, _, err = run("--port", 0, option, tmp_path / "missing" / "x.jsonl")
        assert status == 1
        assert err == (
            f"error: {option} {tmp_path}/missing/x.jsonl: there is no folder {tmp_path}/missing; make it first\n"
        )


def test_feedback_is_kept_in_the_cache_folder_unless_it_is_turned_off(run, tmp_path):
    kept = tmp_path / "cache" / "feedback.jsonl"
    assert "Feedback is kept" not in run("--port", 0, "--feedback", "none")[2]
    assert not kept.exists()
    assert f"Feedback is kept in {kept}\n" in run("--port", 0)[2]
    assert kept.read_bytes() == b""


def test_the_environment_stays_as_it_was(run, monkeypatch):
    """Settings of other libraries are made for the app alone."""
    monkeypatch.setenv("DO_NOT_TRACK", "mine")
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    before = dict(os.environ)
    assert run("--port", 0)[0] == 1
    assert dict(os.environ) == before


# Which adapters


def test_all_adapters_that_fit_are_offered_the_wanted_one_first(tiny, tmp_path, monkeypatch):
    shipped, cache = tmp_path / "shipped", tmp_path / "cache"
    monkeypatch.setattr(checkpoint, "SHIPPED", shipped)
    monkeypatch.setenv("MMADAPTER_CACHE", str(cache))
    session = tiny.load()
    assert offered_adapters(session, None) == []
    for name, folder in (("zebra", tiny.tuned), ("instruct", tiny.reads), ("caption", tiny.sees), ("able", tiny.sees)):
        shutil.copytree(folder, shipped / name)
    shutil.copytree(tiny.sees, cache / "adapters" / "mine")
    shutil.copytree(tiny.reads, cache / "adapters" / "caption")
    (shipped / "notes").mkdir()
    ours = checkpoint.read_about(tiny.sees / checkpoint.FILE_NAME)
    (shipped / "other").mkdir()
    fingerprint = checkpoint.Fingerprint(**{**vars(ours.fingerprint), "layers": 99})
    checkpoint.save_adapter(
        shipped / "other" / checkpoint.FILE_NAME, {}, checkpoint.AdapterFile(ours.adapter, fingerprint=fingerprint)
    )
    assert offered_adapters(session, None) == ["caption", "instruct", "able", "mine", "zebra"]
    assert offered_adapters(session, "zebra") == ["zebra", "caption", "instruct", "able", "mine"]
    assert offered_adapters(session, str(tiny.reads)) == [
        str(tiny.reads),
        "caption",
        "instruct",
        "able",
        "mine",
        "zebra",
    ]
    elsewhere = str(tiny.sees.parent / "caption")
    assert offered_adapters(session, elsewhere) == [elsewhere, "instruct", "able", "mine", "zebra"]
    assert offered_adapters(session, "none") == []
    assert offered_adapters(session, None, ours.vision.encoder) == offered_adapters(session, None)
    with pytest.raises(ValueError, match="no adapter here was trained on the images of 'timm:another'; leave --vision"):
        offered_adapters(session, None, "timm:another")


# Served


def test_the_page_and_the_api_are_served(served):
    page = httpx.get(served.url, timeout=20)
    assert page.status_code == 200
    assert [model["id"] for model in httpx.get(f"{served.url}/v1/models").json()["data"]] == [
        "mmadapter", "caption", "base"
    ]  # fmt: skip


def snippets() -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    return blocks


@pytest.mark.parametrize("code", snippets(), ids=lambda code: code.split("\n")[0])
def test_the_readmes_snippets_run(served, code, monkeypatch, capsys):
    """Against the server of the tiny model, which has a port of its own."""
    assert "http://127.0.0.1:7860" in code
    monkeypatch.chdir(ROOT)
    exec(compile(code.replace("http://127.0.0.1:7860", served.url), str(README), "exec"), {})
    assert len(capsys.readouterr().out.strip()) > 0


def test_the_readme_names_every_option():
    options = {word for action in build_parser()._actions for word in action.option_strings if word.startswith("--")}
    text = README.read_text(encoding="utf-8")
    model = {
        "--llama",
        "--adapter",
        "--vision",
        "--device",
        "--dtype",
        "--prompt-length",
        "--gate",
        "--debug",
        "--help",
    }
    assert [option for option in sorted(options - model) if f"`{option}" not in text] == []


def test_control_c_ends_it_and_leaves_nothing(tiny, served):
    """The last test of the process that the others have used, whose output tells of theirs, too."""
    files = {"files": ("x.png", tiny.picture(0).read_bytes())}
    (path,) = httpx.post(f"{served.url}/gradio_api/upload", files=files, timeout=20).json()
    assert Path(path).is_file()
    assert served.uploads in Path(path).parents
    assert served.interrupt() == "Ended.\n"
    assert served.process.returncode == 0
    assert list(served.uploads.iterdir()) == []
    told = served.stderr.read_text()
    kept, rest = told.split("\n", 1)
    assert re.fullmatch(r"Feedback is kept in .*/cache/feedback\.jsonl", kept)
    assert re.fullmatch(r"Loading .*/llama \.\.\.\nLoaded in [\d.]+ s; adapters: caption\n", rest), told
    for word in ("CONNECTS", "LOOKS UP", "Traceback", "WARNING"):
        assert word not in told, told
    with pytest.raises(httpx.ConnectError):
        httpx.get(served.url)


def test_a_cache_folder_that_cannot_be_written_stops_nothing(monkeypatch, tmp_path, capsys):
    from app.cli import open_feedback

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMADAPTER_CACHE", str(tmp_path / "file" / "cache"))
    assert open_feedback(None) is None
    assert capsys.readouterr().err.startswith("Feedback is not kept: cannot keep feedback in ")
    with pytest.raises(OSError, match="give a file that can be written"):
        open_feedback(tmp_path / "file" / "feedback.jsonl")


@pytest.mark.slow
def test_the_default_weights_answer_without_a_network(tmp_path):
    """No option at all: a caption, an answer, and a streamed answer of the API, by the adapters that ship."""
    from gradio_client import Client, handle_file
    from openai import OpenAI

    served = Served(tmp_path, "--feedback", "none")
    try:
        client = Client(served.url, analytics_enabled=False, verbose=False, download_files=tmp_path / "files")
        photo = handle_file(str(ROOT / "assets/images/hopper.jpg"))
        assert len(client.predict(photo, api_name="/caption").split()) > 4
        answer = client.predict(photo, "What is she wearing?", ["a hat", "a helmet"], api_name="/answer")
        assert sum(answer["probabilities"]) == pytest.approx(1.0)
        api = OpenAI(base_url=f"{served.url}/v1", api_key="none")
        asked = [{"role": "user", "content": "Tell me about alpacas."}]
        stream = api.chat.completions.create(model="mmadapter", messages=asked, max_tokens=12, stream=True)
        assert sum(bool(chunk.choices[0].delta.content) for chunk in stream) > 4
        assert served.interrupt() == "Ended.\n"
    finally:
        served.process.kill()
    told = served.stderr.read_text()
    assert "adapters: caption, " in told
    for word in ("CONNECTS", "LOOKS UP", "Traceback"):
        assert word not in told
