"""Memory that is freed stays with the process, which a child shows: this process is to stay as it is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mmadapter import memory

FAULTS = """
import resource, sys, torch
from mmadapter.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("no glibc")
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_the_next_large_tensor_takes_over_the_pages_of_the_last() -> None:
    faults = {}
    for what in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", FAULTS, what], capture_output=True, text=True, check=False)
        if done.stderr.strip() == "no glibc":
            pytest.skip("this C library has no mallopt")
        assert done.returncode == 0, done.stderr
        faults[what] = int(done.stdout)
    assert faults["keep"] < 100
    if faults["leave"] < 16:  # pages so large that there is nothing to gain
        pytest.skip("this system's pages are large")
    assert faults["leave"] > 2 * faults["keep"]


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.keep_freed_memory.__wrapped__() is False


def test_a_c_library_without_mallopt_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed_memory.__wrapped__() is False
