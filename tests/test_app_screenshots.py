"""The command that takes the README's pictures of the page, with a tiny random model."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import tiny_session
from PIL import Image

from app import screenshots

pytestmark = [
    pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium on this machine"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed"),
]


def test_every_picture_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")  # the command sets them, and they are put back
    tiny, out = tiny_session.build(tmp_path / "tiny"), tmp_path / "out"
    assert screenshots.main(["--out", str(out), "--llama", str(tiny.llama), "--adapter", str(tiny.sees)]) == 0
    told = re.findall(r"[a-z-]+\.png", screenshots.DESCRIPTION)
    assert sorted(path.name for path in out.iterdir()) == sorted(told)
    seen = set()
    for name in told:
        with Image.open(out / name) as picture:
            width, height = screenshots.PHONE if name == "phone.png" else screenshots.DESK
            assert picture.size == (width * 1.5, height * 1.5)
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100, f"{name} is blank"
            seen.add(picture.tobytes())
    assert len(seen) == len(told)
