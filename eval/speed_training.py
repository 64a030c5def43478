"""Training: a step against peft's on the same tensors, its memory, and real rows in batches by length against padding.

`python -m eval.speed_training JOB` runs the steps of one contender in a process of its own and prints its memory.
"""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from eval.speed_base import (
    Base,
    Setting,
    arithmetic_limit,
    can_measure_memory,
    child_environment,
    peak,
    python,
    reset_peak,
    synchronize,
    timed,
)
from eval.speed_laws import training_flops
from eval.speed_peers import Absent, peft_model
from eval.speed_rounds import Case, Comparison, Contender, Sample
from eval.speed_rounds import interleave as run_in_turn
from mmadapter.data import Batch, Example, RowOrder, collate, make_example, passes
from mmadapter.model import AdaptedLlama
from mmadapter.prompts import template
from mmadapter.rows import read_rows

QUANTITY = "tokens/s"
ROWS, LENGTH = 8, 128
LAYERS, PROMPT_LENGTH = 30, 10
RATE = 1e-3
MEMORY_STEPS = 2  # the second one meets the optimiser's state, too
OURS, PEFT = "ours", "peft"
MEGABYTES, STEP_MEGABYTES = "MB at the peak", "MB that steps add"

# Of the rows that are padded or grouped: what a run of training/ does with batches of 8.
MAX_TOKENS = 512
STEP_ROWS, STEPS = 8, 3
DRAWN = 1024  # rows of the file that take part in the draw
BATCH_TOKENS = 2048


class OurSteps:
    """Steps of our training: the loss of `AdaptedLlama`, its gradient, AdamW."""

    def __init__(self, base: Base, dtype: str, layers: int, prompt_length: int) -> None:
        self.device = base.setting.device
        adapter = base.adapter(layers, prompt_length)
        self.model = AdaptedLlama(base.session(dtype).llama, adapter).train()
        self.optimizer = torch.optim.AdamW(adapter.parameters(), lr=RATE)

    def step(self, batches: Sequence[Batch]) -> float:
        """One optimiser step over the rows of several forward passes; returns the mean loss a target."""
        targets = sum(int((batch.labels[:, 1:] >= 0).sum()) for batch in batches)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches:
            loss = self.model(batch.tokens.to(self.device), batch.labels.to(self.device)) / targets
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        return total


class PeftSteps:
    """Steps of peft's AdaptionPrompt, as its users train it: the model's own loss, its gradient, AdamW.

    Raises:
        Absent: peft takes no part.
    """

    def __init__(self, base: Base, dtype: str, layers: int, prompt_length: int) -> None:
        self.device = base.setting.device
        self.model = peft_model(base.session(dtype).llama, layers, prompt_length)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE)

    def step(self, batches: Sequence[Batch]) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches:
            tokens, labels = batch.tokens.to(self.device), batch.labels.to(self.device)
            loss = self.model(input_ids=tokens, labels=labels, use_cache=False).loss / len(batches)
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        return total


STEPPERS = {OURS: OurSteps, PEFT: PeftSteps}


def full_batch(tokens: Tensor) -> Batch:
    """A batch in which every position is a target, [B, T]."""
    return Batch(tokens, tokens.clone(), torch.full((len(tokens),), -1))


def training(setting: Setting, base: Base) -> list[Case]:
    """A step of equal batches, ours against peft's, and the memory of each in a process of its own."""
    dtype, layers = setting.float_dtype, min(LAYERS, base.config.layers)
    batch = full_batch(base.tokens(LENGTH, ROWS))
    left_out: dict[str, str] = {}
    facts: dict[str, object] = {"dtype": dtype, "K": PROMPT_LENGTH, "L": layers, "rows": ROWS, "tokens a row": LENGTH}
    flops = training_flops(base.config, LENGTH, ROWS, layers, PROMPT_LENGTH)
    contenders, losses = [], {}
    for name, kind in STEPPERS.items():
        try:
            stepper = kind(base, dtype, layers, PROMPT_LENGTH)
        except Absent as reason:
            left_out[name] = str(reason)
            continue
        losses[name] = stepper.step([batch])  # the gates are zero, so it is that of the base, the same for both
        contenders.append(Contender(name, _counted(stepper, [batch], batch.tokens.numel())))
    limit = arithmetic_limit(setting, dtype, flops / batch.tokens.numel())
    facts |= {"operations a token": round(flops / batch.tokens.numel()), "loss of the first step": losses}
    notes = ["loss of the first step: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())]
    samples = run_in_turn([*contenders, limit], setting.rounds, QUANTITY)
    contenders.clear()
    comparisons = [
        Comparison(OURS, PEFT, QUANTITY, 1.5),
        Comparison(OURS, limit.name, QUANTITY),
        Comparison(OURS, PEFT, MEGABYTES, 1.0, at_most=True),
        Comparison(OURS, PEFT, STEP_MEGABYTES, 1.0, at_most=True),
    ]
    why_not = can_measure_memory(setting.device)
    if why_not is not None:
        left_out["memory"] = why_not
    else:
        for name in STEPPERS.keys() - left_out.keys():
            samples += _memory_of(setting, name)
    title = f"a step of {ROWS} x {LENGTH} tokens, every position a target, K={PROMPT_LENGTH}, L={layers}, {dtype}"
    return [Case("training", title, samples, comparisons, left_out, facts, notes)]


def _counted(stepper: OurSteps | PeftSteps, batches: Sequence[Batch], work: int) -> Callable:
    return lambda: timed(work, stepper.device, lambda: stepper.step(batches))


def _memory_of(setting: Setting, name: str) -> list[Sample]:
    """Runs this module for one contender and reads what it prints.

    Raises:
        OSError: It failed.
    """
    job = json.dumps({"contender": name, **dataclasses.asdict(setting)})
    command = python("-m", "eval.speed_training", job)
    done = subprocess.run(command, env=child_environment(setting.threads), capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise OSError(f"the process that measures the memory of {name} failed: {reason}")
    found = json.loads(done.stdout.splitlines()[-1])
    return [Sample(name, quantity, 0, found[quantity]) for quantity in (MEGABYTES, STEP_MEGABYTES)]


def measure_memory(setting: Setting, name: str) -> dict[str, float]:
    """The peak of the memory over some steps of one contender, in MB."""
    base = Base(setting)
    layers = min(LAYERS, base.config.layers)
    stepper = STEPPERS[name](base, setting.float_dtype, layers, PROMPT_LENGTH)
    batch = full_batch(base.tokens(LENGTH, ROWS))
    before = reset_peak(setting.device)
    for _ in range(MEMORY_STEPS):
        stepper.step([batch])
    synchronize(setting.device)
    highest = peak(setting.device)
    return {MEGABYTES: highest / 1e6, STEP_MEGABYTES: (highest - before) / 1e6}


# ---- Real rows.


def read_examples(setting: Setting, base: Base) -> list[Example]:
    """Rows of `--data` as they are trained on, `DRAWN` of them drawn with the seed.

    Raises:
        FileNotFoundError, ValueError: See `rows.read_rows`.
    """
    rows, _ = read_rows(Path(setting.data), template_name="alpaca", split="train")
    if len(rows) < STEP_ROWS:
        raise ValueError(f"{setting.data} has {len(rows)} rows, and a step takes {STEP_ROWS}; give a longer file")
    rows = random.Random(setting.seed).sample(rows, min(DRAWN, len(rows)))
    tokenizer, separator = base.session(setting.float_dtype).tokenizer, template("alpaca").separator
    return [
        make_example(tokenizer, row.prompt, separator + row.response, max_tokens=MAX_TOKENS, where=row.where)
        for row in rows
    ]


def padded(rows: Sequence[Example], length: int) -> Batch:
    """The rows as one batch, each padded on the right to `length` tokens."""
    batch = collate(rows)
    more = length - batch.tokens.shape[1]
    return Batch(
        torch.nn.functional.pad(batch.tokens, (0, more), value=0),
        torch.nn.functional.pad(batch.labels, (0, more), value=-100),
        batch.images,
    )


def grouped_passes(rows: Sequence[Example]) -> list[Batch]:
    """A step's forward passes as training cuts them: by length."""
    cut = passes([len(row.tokens) for row in rows], BATCH_TOKENS)
    return [collate([rows[index] for index in part]) for part in cut]


def padded_passes(rows: Sequence[Example]) -> list[Batch]:
    """A step's forward passes with every row padded to `MAX_TOKENS`, of no more tokens than the others'."""
    taken = max(1, BATCH_TOKENS // MAX_TOKENS)
    return [padded(rows[start : start + taken], MAX_TOKENS) for start in range(0, len(rows), taken)]


def real_rows(setting: Setting, base: Base) -> list[Case]:
    """The same rows, the same steps: batches by length against every row padded to 512 tokens."""
    dtype, layers = setting.float_dtype, min(LAYERS, base.config.layers)
    examples = read_examples(setting, base)
    order = RowOrder([len(row.tokens) for row in examples], STEP_ROWS, setting.seed, pool=STEPS)
    steps = [[examples[index] for index in order.step(number)] for number in range(STEPS)]
    useful = sum(len(row.tokens) for step in steps for row in step)
    stepper = OurSteps(base, dtype, layers, PROMPT_LENGTH)
    names = ("by length", f"padded to {MAX_TOKENS}")
    plans = [[cut(step) for step in steps] for cut in (grouped_passes, padded_passes)]

    def train(plan: list[list[Batch]]) -> Callable:
        return lambda: timed(useful, setting.device, lambda: [stepper.step(batches) for batches in plan])

    contenders = [Contender(name, train(plan), warm=train(plan[:1])) for name, plan in zip(names, plans, strict=True)]
    computed = [sum(batch.tokens.numel() for step in plan for batch in step) for plan in plans]
    facts = {"dtype": dtype, "K": PROMPT_LENGTH, "L": layers, "rows": STEP_ROWS * STEPS, "steps": STEPS}
    facts |= {"useful tokens": useful, **{f"tokens {name}": count for name, count in zip(names, computed, strict=True)}}
    quantity = f"useful {QUANTITY}"
    samples = run_in_turn(contenders, setting.rounds, quantity)
    title = f"{STEPS} steps of {STEP_ROWS} rows of {Path(setting.data).name}, {useful} tokens, {dtype}"
    return [Case("rows", title, samples, [Comparison(*names, quantity, 4.0)], {}, facts)]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the memory of one contender as JSON; the job is JSON, too: the contender and a `Setting`."""
    job = json.loads((sys.argv[1:] if argv is None else argv)[0])
    name = job.pop("contender")
    setting = Setting(**job)
    torch.set_num_threads(setting.threads)
    print(json.dumps(measure_memory(setting, name)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
