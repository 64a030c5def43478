"""The processes that train together: one alone, or those that torchrun started, on one machine or on many."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among those of its run.

    Attributes:
        rank: Its number, from 0.
        count: How many there are.
        local_rank: Its number among those of its machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def sum(self, values: Tensor) -> list[float]:
        """The sum over all processes of each of `values` [n]."""
        values = values.detach().clone()
        if self.count > 1:
            dist.all_reduce(values)
        return values.tolist()

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.count > 1:
            dist.barrier()


def join(device: str) -> tuple[Processes, torch.device]:
    """Joins the processes that torchrun started, if it did, and chooses the device of this one.

    Args:
        device: As torch names it; "auto" is the GPU of this process where there is one, else the CPU.

    Raises:
        ValueError: There is no such device.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"there is no device {device!r}; give auto, cpu, cuda or cuda:1") from None
    if chosen.type == "cuda":
        if (chosen.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"there is no device {device}: torch sees {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(chosen)
    if "WORLD_SIZE" not in os.environ:
        return Processes(), chosen
    if not dist.is_initialized():
        # The first process may compute image features for hours while the others wait.
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(hours=24))
    return Processes(dist.get_rank(), dist.get_world_size(), local_rank), chosen


def leave() -> None:
    """Ends what `join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()
