"""The processes that train together: one alone, or those that torchrun started, on one machine or on many."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

STEP = timedelta(minutes=30)  # no process waits longer for the others within a step, loading aside
PREPARATION = timedelta(hours=24)  # one process of a machine may compute image features for hours while others wait
FIRST_SPEAKS = 2.0  # seconds in which the first process may end the job with an error that all of them have

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of its run.

    Attributes:
        rank: Its number, from 0.
        count: How many there are.
        local_rank: Its number among those of its machine.
        group: Through which they exchange what lies in the memory of the CPU.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def sum(self, values: Tensor) -> list[float]:
        """The sum over all processes of each of `values` [n], on any device; it is exact to float64."""
        values = values.detach().to("cpu", torch.float64, copy=True)
        if self.count > 1:
            dist.all_reduce(values, group=self.group)
        return values.tolist()

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.count > 1:
            dist.barrier(group=self.group)

    def of_first(self, value: T) -> T:
        """The value that the first process gives; what the others give does not matter."""
        held = [value if self.is_first else None]
        if self.count > 1:
            dist.broadcast_object_list(held, src=0, group=self.group)
        return held[0]

    def of_all(self, value: T) -> list[T]:
        """The value that each process gives, in their order."""
        held = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(held, value, group=self.group)
        return held

    def once_a_machine(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process of this machine; it is called in no other."""
        return self.of_all(make() if self.local_rank == 0 else None)[self.rank - self.local_rank]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process of each machine does what is inside, then the others, which find what it made."""
        if self.local_rank:
            self.wait()
        yield
        if not self.local_rank:
            self.wait()

    def require_same(self, what: str, value: object) -> None:
        """Stops where processes differ in what all of them must have: they would learn apart, or wait for ever.

        Args:
            what: The value's name in the error.
            value: Anything whose `repr` says all of it.

        Raises:
            ValueError: They differ.
        """
        hashes = self.of_all(hashlib.sha256(repr(value).encode()).hexdigest())
        other = [rank for rank, found in enumerate(hashes) if found != hashes[0]]
        if other:
            raise ValueError(
                f"process {other[0]} has other {what} than process 0; give all machines the same files and options"
            )


@contextmanager
def joined(device: str) -> Iterator[tuple[Processes, torch.device]]:
    """Joins the processes that torchrun started, if it did, and chooses the device of this one.

    After an error the connection stays: to close one is a collective act, in which NCCL waits for the others. See
    `ended`.

    Args:
        device: As torch names it; "auto" is the GPU of this process where there is one, else the CPU.

    Raises:
        ValueError: There is no such device, or not one for each process.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = _device(device, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield Processes(), chosen
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=STEP)
    # NCCL takes tensors of the GPU alone, and counts a long wait as a failure.
    group = dist.new_group(backend="gloo", timeout=PREPARATION)
    yield Processes(dist.get_rank(), dist.get_world_size(), local_rank, group), chosen
    if ours:
        dist.destroy_process_group()


@contextmanager
def naming_errors() -> Iterator[None]:
    """Among several processes, an error says which one it comes from.

    The others wait a moment before they raise theirs: what they all fail at, such as a bad row, the first one says
    alone, for torchrun ends the others as soon as one has failed.
    """
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        yield
    except Exception as error:
        if count == 1:
            raise
        if rank:
            time.sleep(FIRST_SPEAKS)
            print(file=sys.stderr)  # the first one's progress bar stands on this line
        named = f"process {rank} of {count}: "
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower()):
            reason = re.sub(r"^\[\S+\] ", "", str(error).partition("\n")[0]).partition(". ")[0]
            raise ConnectionError(f"{named}lost the others ({reason}); another process says why") from error
        if isinstance(error, (ValueError, OSError, ArithmeticError)):
            raise ValueError(f"{named}{error}") from error
        raise RuntimeError(f"{named}{type(error).__name__}: {error}") from error


def ended(run: Callable[[], int]) -> int:
    """The exit status of a command line; but where it failed while joined to others, this process ends at once.

    The others wait for it in a collective call, torchrun waits for its end before it ends them, and an orderly exit of
    Python might wait for them in turn: NCCL finishes what is under way before it lets go.
    """
    try:
        status = run()
    except Exception:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        status = 1
    if status and dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


@contextmanager
def noted_signals() -> Iterator[dict[str, signal.Signals]]:
    """While it lasts, SIGTERM or the first Ctrl-C is noted as "signal" in what it gives; a second Ctrl-C acts as ever.

    A second SIGTERM changes nothing: cluster schedulers send one to every process, and torchrun passes its own on.
    """
    asked: dict[str, signal.Signals] = {}
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may have handlers
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: FrameType | None) -> None:
        asked.setdefault("signal", signal.Signals(number))
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    for kind in before:
        signal.signal(kind, note)
    try:
        yield asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes a folder, and keeps other runs out of it for as long as this process lives and is inside.

    Raises:
        ValueError: Another process is at work there.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process trains in {folder}; wait until it ends, or choose another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(held)


def _device(name: str, local_rank: int, local_count: int) -> torch.device:
    """The device of a process, by what its run file calls it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise ValueError(f"there is no device {name!r}; give auto, cpu, cuda or cuda:1") from None
    if chosen.type != "cuda":
        return chosen
    if chosen.index is not None and local_count > 1:
        raise ValueError(f"{local_count} processes of this machine cannot share {name}; give --device auto")
    index, found = local_rank if chosen.index is None else chosen.index, torch.cuda.device_count()
    if index >= found:
        few = f"start at most {found} processes on this machine" if 0 < found < local_count else "give --device cpu"
        raise ValueError(f"there is no device cuda:{index}: torch sees {found} GPUs; {few}")
    return torch.device("cuda", index)
