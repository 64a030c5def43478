"""What a run would train, what it would need, and how long it would take, from two of its steps."""

from __future__ import annotations

import itertools
import resource
import sys
import time

import torch

from training.engine import Trainer


def describe(trainer: Trainer) -> str:
    """Parameters, rows, steps, memory and time of a run; no weight is changed and nothing is written."""
    config, adapter, llama = trainer.config, trainer.adapter, trainer.model.llama
    parts: dict[str, int] = {}
    for name, parameter in adapter.named_parameters():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    rows, lengths = trainer.train_examples, sorted(len(row.tokens) for row in trainer.train_examples)
    targets = sum(len(row.tokens) - row.prompt_tokens for row in rows)
    seconds = _trial(trainer)
    minutes = seconds * trainer.steps / 60
    frozen = sum(parameter.numel() for parameter in llama.parameters())
    return "\n".join(
        (
            f"trained     {sum(parts.values()):,} parameters: "
            + ", ".join(f"{name} {count:,}" for name, count in parts.items()),
            f"frozen      {frozen:,} parameters of {config.llama} in {config.dtype} on {llama.device}",
            f"rows        {len(rows):,} ({sum(row.image is not None for row in rows):,} with an image), "
            f"{len(trainer.validation_examples):,} for validation",
            f"tokens      {sum(lengths) / len(rows):.1f} a row (the median {lengths[len(rows) // 2]}, the longest "
            f"{lengths[-1]}), {targets / len(rows):.1f} of them learnt",
            f"steps       {trainer.steps:,} of {config.batch_size} rows: "
            f"{trainer.steps * config.batch_size / len(rows):.2f} epochs, {trainer.warmup} steps of warm-up",
            f"memory      {_peak_bytes(llama.device) / 2**30:.2f} GiB at the most, in a step of the longest rows",
            f"time        {seconds:.2f} s a step, {minutes:.0f} minutes in all, without validation and image features",
        )
    )


def _trial(trainer: Trainer) -> float:
    """Seconds of one typical step, after one of the longest rows, which needs the most memory."""
    by_length = sorted(trainer.train_examples, key=lambda row: -len(row.tokens))
    longest = list(itertools.islice(itertools.cycle(by_length), trainer.config.batch_size))  # as of few rows in a step
    typical = [trainer.train_examples[row] for row in trainer.order.step(0)]
    for rows in (longest, typical):
        _finish(trainer.model.llama.device)
        started = time.perf_counter()
        trainer.accumulate(rows)
        _finish(trainer.model.llama.device)
        seconds = time.perf_counter() - started
    trainer.optimizer.zero_grad(set_to_none=True)
    return seconds


def _finish(device: torch.device) -> None:
    """Waits for what a GPU is still at."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(device: torch.device) -> int:
    """Most memory in use so far: of the device, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
