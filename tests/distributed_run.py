"""What torchrun starts where a test has to look into the processes, or to make one of them fail.

    torchrun ... distributed_run.py PLAN

PLAN is JSON: `runs`, for each rank a list of command lines of training.alpaca, run one after the other; `records`, a
folder for what each process saw in them; and perhaps `fail`, [rank, step], where an error is thrown in, or `nan`, where
the loss is none.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from training import alpaca
from training.engine import Trainer


def held_blocks(trainer: Trainer) -> dict[str, float]:
    """What this process holds of the blocks: the share that is spread, what is not, and whole copies beside it."""
    spread = whole = 0
    kept = set()
    for name, parameter in trainer.model.llama.layers.named_parameters():
        if isinstance(parameter, DTensor):
            memory = parameter.to_local().untyped_storage()  # not the view's size: it may be a view of the whole
            spread, whole = spread + memory.nbytes() // parameter.element_size(), whole + parameter.numel()
        else:
            kept.add(name.partition(".")[2])
    shape = trainer.model.llama.layers[0].feed_forward.w1.weight.shape
    gc.collect()
    copies = sum(
        1
        for thing in gc.get_objects()
        if isinstance(thing, torch.Tensor)
        and not isinstance(thing, DTensor)
        and thing.shape == shape
        and thing.untyped_storage().nbytes() >= thing.numel() * thing.element_size()
    )
    return {"spread": spread, "whole": whole, "kept": sorted(kept), "copies": copies}


def main() -> int:
    plan = json.loads(sys.argv[1])
    rank = int(os.environ["RANK"])
    records = Path(plan["records"])
    train, step, loss_of = Trainer.train, Trainer._step, Trainer.loss_of

    def recorded_train(self: Trainer) -> float | None:
        result = train(self)
        seen = {"step": self.step, "stopped": self.stopped and int(self.stopped), **held_blocks(self)}
        (records / f"{self.folder.name}-{rank}.json").write_text(json.dumps(seen))
        return result

    def failing_step(self: Trainer, *arguments: object) -> dict[str, float]:
        if plan.get("fail") == [rank, self.step]:
            (records / "failed").write_text(str(time.time()))
            raise OSError("the disk of a test is full")
        return step(self, *arguments)

    def broken_loss(self: Trainer, *arguments: object, **options: object) -> torch.Tensor:
        found = loss_of(self, *arguments, **options)
        return found * math.nan if plan.get("nan") == [rank, self.step] else found

    Trainer.train, Trainer._step, Trainer.loss_of = recorded_train, failing_step, broken_loss
    runs = plan["runs"][rank % len(plan["runs"])]
    if len(runs) > 1:
        dist.init_process_group("gloo")  # one connection for all runs: torchrun's store knows of one alone
    return max(alpaca.main(argv) for argv in runs)


if __name__ == "__main__":
    sys.exit(main())
