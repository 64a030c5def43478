"""How time and memory grow: with prompt, batch, K, L and generated length, each beside the law it should follow."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eval.speed_base import Base, Setting, can_measure_memory, peak, reset_peak, timed, weight_bytes
from eval.speed_laws import (
    Fit,
    cache_bytes,
    decoding_bytes,
    fit,
    forward_flops,
    kept_bytes,
    passing_bytes,
    training_flops,
)
from eval.speed_rounds import Case, Contender, Sample
from eval.speed_rounds import interleave as run_in_turn
from eval.speed_training import OurSteps, full_batch
from mmadapter.llama import Llama
from mmadapter.sampling import Sampler, Sampling

SECONDS, MEGABYTES = "s", "MB more at the peak"
PROMPTS = (64, 128, 256, 512, 1024)  # tokens
BATCHES = (1, 2, 4, 8, 16, 32)  # rows that are decoded together
LENGTHS = (16, 32, 64, 128)  # new tokens
PROMPT_LENGTHS = (1, 10, 30, 100)  # K
START = 32  # tokens of a prompt where its length is not what varies
STEPS = 8  # tokens a row where their number is not what varies
ROWS, LENGTH = 2, 128  # of a training step
LAYERS, K = 30, 10  # where they are not what varies


@dataclass(frozen=True)
class Curve:
    """One thing that varies.

    Attributes:
        name: What it is, as an axis is labelled.
        sizes: Its values.
        make: Gives for a value what is to be timed.
        time_law: Gives for a value what the time should be a line over.
        memory_law: Likewise of the memory, in bytes.
        time_words: The law of the time, in words.
        memory_words: That of the memory.
    """

    name: str
    sizes: tuple[int, ...]
    make: Callable[[int], Callable[[], object]]
    time_law: Callable[[int], float]
    memory_law: Callable[[int], float]
    time_words: str
    memory_words: str


def growth(setting: Setting, base: Base) -> list[Case]:
    """A case for each curve; with `--plots` a picture of each."""
    cases = []
    for curve in curves(setting, base):
        case, fits = measure(setting, curve)
        cases.append(case)
        if setting.plots is not None:
            from eval.speed_plots import plot

            plot(Path(setting.plots) / f"growth-{curve.name.replace(' ', '-')}.png", curve, case, fits)
    return cases


def curves(setting: Setting, base: Base) -> list[Curve]:
    """What varies, in sizes that the base's context and depth allow."""
    dtype, config = setting.float_dtype, base.config
    llama, answering = base.session(dtype).llama, base.answering(dtype).llama
    item, weights = llama.output_weight.element_size(), weight_bytes(llama)
    layers = min(LAYERS, config.layers)
    depths = tuple(sorted({max(1, round(layers * part)) for part in (1 / 30, 1 / 4, 1 / 2, 3 / 4, 1)}))
    batch = full_batch(base.tokens(LENGTH, ROWS))

    def cached(rows: int) -> int:
        """Bytes of a number in the cache of so many rows."""
        return answering.new_cache(rows, 1).keys.element_size()

    def reading(rows: int) -> float:
        """Bytes while prompts of START tokens are read; up to some rows the cache may be in a wider format."""
        logits = rows * config.vocab_size * (item + 4)  # as they come, and in float32
        cache = cache_bytes(config, rows * (START + STEPS), cached(rows))
        return cache + passing_bytes(config, rows * START, item) + logits

    def generating(rows: int, start: int, new: int) -> Callable[[], object]:
        prompts = base.tokens(start, rows).tolist()
        return lambda: generate(answering, prompts, new)

    def training(adapted: int, prompt_length: int) -> Callable[[], object]:
        steps = OurSteps(base, dtype, adapted, prompt_length)
        return lambda: steps.step([batch])

    def step_flops(adapted: int, prompt_length: int) -> float:
        return training_flops(config, LENGTH, ROWS, adapted, prompt_length)

    return [
        Curve(
            "prompt length",
            tuple(size for size in PROMPTS if size < config.context),
            lambda size: generating(1, size, 1),
            lambda size: forward_flops(config, size),
            lambda size: cache_bytes(config, size, cached(1)) + passing_bytes(config, size, item),
            "a + b (2 N P T + 2 N H D T²)",
            "a + b T: cache, and one block's outputs",
        ),
        Curve(
            "batch",
            BATCHES,
            lambda size: generating(size, START, STEPS),
            lambda size: float(size),
            reading,
            "a + b B: the weights are read once",
            "a + b M: the cache, one block's outputs, logits",
        ),
        Curve(
            "K",
            PROMPT_LENGTHS,
            lambda size: training(layers, size),
            lambda size: step_flops(layers, size),
            lambda size: float(size),
            "a + b K, in operations",
            "a + b K",
        ),
        Curve(
            "L",
            depths,
            lambda size: training(size, K),
            lambda size: step_flops(size, K),
            lambda size: kept_bytes(config, size, ROWS * LENGTH, item),
            "a + b (N + L), in operations",
            "a + b L: inputs kept of the adapted layers",
        ),
        Curve(
            "generated length",
            tuple(size for size in LENGTHS if START + size < config.context),
            lambda size: generating(1, START, size),
            lambda size: decoding_bytes(config, weights, START, size, 1, cached(1)),
            lambda size: cache_bytes(config, START + size, cached(1)),
            "a + b n W + c n², in bytes read",
            "a + b n: the cache",
        ),
    ]


def generate(llama: Llama, rows: Sequence[Sequence[int]], new: int) -> None:
    """Reads the prompts and chooses `new` tokens for each row."""
    with torch.inference_mode():
        sampler = Sampler(llama, rows, Sampling(max_new_tokens=new))
        for _ in range(new):
            sampler.step()


def measure(setting: Setting, curve: Curve) -> tuple[Case, dict[str, Fit]]:
    """Times every size in turn, then takes the memory of each, and sets both beside their law.

    Returns:
        The case, whose contenders are the sizes, and the fit of each quantity.
    """
    work = {size: curve.make(size) for size in curve.sizes}

    def contender(size: int) -> Contender:
        return Contender(str(size), lambda: timed(1, setting.device, work[size]))

    samples = run_in_turn([contender(size) for size in curve.sizes], setting.rounds, SECONDS)
    laws = {SECONDS: (curve.time_law, curve.time_words)}
    why_not = can_measure_memory(setting.device)
    if why_not is None:
        laws[MEGABYTES] = (lambda size: curve.memory_law(size) / 1e6, curve.memory_words)
        for size in curve.sizes:
            before = reset_peak(setting.device)
            work[size]()
            samples.append(Sample(str(size), MEGABYTES, 0, (peak(setting.device) - before) / 1e6))
    fits, notes, facts = {}, [], {}
    for quantity, (law, words) in laws.items():
        expected, measured = [law(size) for size in curve.sizes], medians(samples, curve.sizes, quantity)
        found = fits[quantity] = fit(expected, measured)
        facts[quantity] = {
            "sizes": list(curve.sizes),
            "law": words,
            "expected": [found.at(value) for value in expected],
            "measured": measured,
            **vars(found),
        }
        notes.append(f"{quantity} over the law {words}: r² {found.r2:.3f}, at most {found.worst:.0%} off")
    left_out = {} if why_not is None else {"memory": why_not}
    return Case("growth", f"with {curve.name}, {setting.float_dtype}", samples, [], left_out, facts, notes), fits


def medians(samples: Sequence[Sample], sizes: Sequence[int], quantity: str) -> list[float]:
    """The median of each size, in their order."""
    return [
        statistics.median(s.value for s in samples if (s.contender, s.quantity) == (str(size), quantity))
        for size in sizes
    ]
