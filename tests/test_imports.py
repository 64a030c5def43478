"""Imports go one way (DESIGN, section 3), have no effects, and what is slow to import is imported where it is used."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("mmadapter", "training", "eval", "app")
FILES = {part: sorted((ROOT / part).rglob("*.py")) for part in PARTS}
ALL = [path for part in PARTS for path in FILES[part]]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """Full names of all modules that a file imports, those inside functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ""
            if node.level:
                own = module_name(path).split(".") + ([""] if path.name == "__init__.py" else [])
                package = ".".join(own[: -node.level])
            module = ".".join(filter(None, (package, node.module)))
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return names


def packages(path: Path, **options: bool) -> set[str]:
    return {name.partition(".")[0] for name in imported(path, **options)}


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_there_are_files_to_look_at() -> None:
    assert len(FILES["mmadapter"]) > 20
    assert FILES["training"]
    assert FILES["eval"]


def test_the_reader_of_imports_sees_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "training" / "engine.py"
    path.parent.mkdir()
    path.write_text(
        "import a.b as c\nfrom d import e\ndef f():\n    import g\n    from . import h\n    from ..i import j\n"
    )
    assert imported(path) == {"a.b", "d", "d.e", "g", "training", "training.h", "i", "i.j"}
    assert imported(path, top_level_only=True) == {"a.b", "d", "d.e"}


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    allowed = {own, "mmadapter"}
    assert packages(path) & {*PARTS, "tests"} <= allowed
    if own != "app":
        assert "gradio" not in packages(path)
    assert not packages(path) & {"transformers", "peft", "pytest"}  # they check the code; it does without them


def test_the_light_imports_of_the_command_line() -> None:
    """torch takes seconds to import, and `--help` has to answer at once."""
    heavy = (
        "torch",
        "torchvision",
        "open_clip",
        "timm",
        "numpy",
        "tokenizers",
        "gguf",
        "huggingface_hub",
        "safetensors",
    )
    result = python(
        "-c",
        "import sys, mmadapter, mmadapter.cli; mmadapter.cli.build_parser(); "
        f"print([name for name in {heavy} if name in sys.modules])",
    )
    assert result.stdout == "[]\n", result.stderr


def test_help_runs() -> None:
    result = python("-m", "mmadapter", "--help")
    assert result.returncode == 0
    assert result.stderr == ""
    assert "python -m mmadapter caption" in result.stdout
    for command in ("caption", "answer", "chat", "weights", "info"):
        assert command in result.stdout
    assert python("-m", "mmadapter").returncode == 2
    assert python("-m", "mmadapter", "nonsense").returncode == 2


IMPORT_ALL = """
import importlib, sys

def audit(event, details):
    # Libraries may ask the system where a shared object lies (ldconfig).
    if event == "socket.connect" or event == "subprocess.Popen" and "ldconfig" not in str(details):
        print(event, details)

modules, sys.argv = sys.argv[1:], ["x", "--no-such-option"]
sys.addaudithook(audit)
for name in modules:
    importlib.import_module(name)
"""


def test_importing_has_no_effects(tmp_path: Path) -> None:
    """No arguments are read, nothing is printed, fetched or written, by any module."""
    modules = [module_name(path) for path in ALL if path.name != "__main__.py"]
    home, cache = tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    places = {"HOME": str(home), "MMADAPTER_CACHE": str(cache)}
    result = python("-c", IMPORT_ALL, *modules, **places, PYTHONDONTWRITEBYTECODE="1")
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert list(home.iterdir()) == []
    assert not cache.exists()


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_load_hides_missing_keys(path: Path) -> None:
    """`strict=False` let the published code run with tensors missing; a bare `except` hides as much."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            loads = getattr(node.func, "attr", "") == "load_state_dict"
            lax = [k for k in node.keywords if k.arg == "strict" and getattr(k.value, "value", None) is not True]
            assert not (loads and lax), f"line {node.lineno}"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"line {node.lineno}"
