"""Decoding: one stream in every number format against the peers, and with an adapter and an image against without."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from eval.speed_base import FLOATS, Base, Setting, memory_limit, synchronize, weight_bytes
from eval.speed_laws import decoding_bytes
from eval.speed_peers import Absent, decode_with_transformers, llama_cpp_decoder, packed_model, transformers_model
from eval.speed_rounds import Case, Comparison, Contender, Timed
from eval.speed_rounds import interleave as run_in_turn
from mmadapter.adapter import Prompts
from mmadapter.llama import Llama
from mmadapter.options import DTYPES
from mmadapter.sampling import Sampler, Sampling

QUANTITY = "tokens/s"
START = 32  # tokens of the prompt
NEW = 64  # tokens that are timed
BATCHES = {"cpu": (1,), "cuda": (1, 64)}
ADAPTER_LAYERS, PROMPT_LENGTH = 30, 10  # of the adapter of a random base


def decode(
    llama: Llama, rows: Sequence[Sequence[int]], new: int, prompts: Prompts | None = None
) -> tuple[Timed, list[list[int]]]:
    """Greedy decoding, timed from the first new token on: what comes before is the prompt's cost.

    Returns:
        The time of `new` tokens a row, and all new tokens of each row.
    """
    device = str(llama.device)
    with torch.inference_mode():
        sampler = Sampler(llama, rows, Sampling(max_new_tokens=new + 1), prompts)
        sampler.step()
        synchronize(device)
        started = time.perf_counter()
        for _ in range(new):
            sampler.step()
        synchronize(device)
        seconds = time.perf_counter() - started
    return Timed(seconds, new * len(rows)), [seen[len(row) :] for seen, row in zip(sampler.seen, rows, strict=True)]


def decoding(setting: Setting, base: Base) -> list[Case]:
    """Decoding against transformers and llama.cpp, a case for each batch size."""
    return [_decoding(setting, base, batch) for batch in BATCHES[setting.kind]]


def _decoding(setting: Setting, base: Base, batch: int) -> Case:
    left_out: dict[str, str] = {}
    contenders: list[Contender] = []
    comparisons: list[Comparison] = []
    facts: dict[str, object] = {"batch": batch, "prompt tokens": START, "new tokens": NEW}
    tokens = base.tokens(START, batch)
    rows = tokens.tolist()
    wanted = [name for name in DTYPES if name != "auto"] if setting.dtype == "auto" else [setting.dtype]
    made: dict[str, list[list[int]]] = {}
    shared: dict[str, float] = {}
    for dtype in wanted:
        name = f"ours {dtype}"
        try:
            llama = base.answering(dtype).llama
        except ValueError as error:
            if dtype in FLOATS or setting.dtype != "auto":
                raise
            left_out[name] = str(error)
            continue
        facts[f"{name}, MB of weights"] = round(weight_bytes(base.session(dtype).llama) / 1e6, 1)
        made[dtype] = decode(llama, rows, NEW)[1]
        contenders.append(Contender(name, _ours(llama, rows)))
    try:
        for dtype in [dtype for dtype in FLOATS if dtype in made] or [setting.float_dtype]:
            name = f"transformers {dtype}"
            model = transformers_model(base.session(dtype).llama)
            prompt = tokens.to(setting.device)
            theirs = decode_with_transformers(model, prompt, NEW)[1]
            if dtype in made:
                shared[dtype] = agreement(made[dtype], theirs)
            contenders.append(Contender(name, _theirs(model, prompt)))
    except Absent as reason:
        left_out["transformers"] = str(reason)
    if batch == 1 and setting.kind == "cpu":
        try:
            if base.gguf is None:
                raise Absent("the base is no GGUF file")
            model = packed_model(base.gguf)
            contenders.append(Contender("transformers packed", _theirs(model, tokens)))
        except Absent as reason:
            left_out["transformers packed"] = str(reason)
        try:
            run = llama_cpp_decoder(base.gguf, setting.threads, START + NEW + 8)
            contenders.append(Contender("llama.cpp", _llama_cpp(run, rows[0])))
        except Absent as reason:
            left_out["llama.cpp"] = str(reason)
    widest = setting.float_dtype if setting.float_dtype in made else next(iter(made))
    llama = base.session(widest).llama
    item = base.answering(widest).llama.new_cache(batch, 1).keys.element_size()
    read = decoding_bytes(base.config, weight_bytes(llama), START, NEW, batch, item) / (NEW * batch)
    limit = memory_limit(setting, read)
    contenders.append(Contender(f"{limit.name} {widest}", limit.run))
    facts[f"{widest}, bytes read a token"] = round(read)
    samples = run_in_turn(contenders, setting.rounds, QUANTITY)
    present = {contender.name for contender in contenders}
    for dtype in made:
        same = f"transformers {dtype}"
        other = same if same in present else f"transformers {setting.float_dtype}"
        for to, aim in ((other, 1.5), ("transformers packed", 1.5), ("llama.cpp", 1.0)):
            if to in present:
                comparisons.append(Comparison(f"ours {dtype}", to, QUANTITY, aim))
    comparisons.append(Comparison(f"ours {widest}", f"{limit.name} {widest}", QUANTITY))
    streams = "one stream" if batch == 1 else f"{batch} streams"
    title = f"decoding {streams}, {NEW} tokens after {START}, greedy"
    facts["share of tokens that ours and transformers have alike"] = shared
    notes = [
        f"ours and transformers in {dtype} chose {share:.0%} of the tokens alike" for dtype, share in shared.items()
    ]
    return Case("decoding", title, samples, comparisons, left_out, facts, notes)


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of the tokens that are the same until the first that is not: rounding may choose between two likely ones,
    and what follows is another text."""
    same = total = 0
    for mine, other in zip(ours, theirs, strict=True):
        total += len(mine)
        for a, b in zip(mine, other, strict=True):
            if a != b:
                break
            same += 1
    return round(same / total, 4)


def _ours(llama: Llama, rows: Sequence[Sequence[int]], prompts: Prompts | None = None):
    return lambda: decode(llama, rows, NEW, prompts)[0]


def _theirs(model: torch.nn.Module, prompt: torch.Tensor):
    return lambda: decode_with_transformers(model, prompt, NEW)[0]


def _llama_cpp(run, row: Sequence[int]):
    return lambda: run(row, NEW)


def adapter_cost(setting: Setting, base: Base) -> list[Case]:
    """Decoding with an adapter and an image against the base model alone."""
    from mmadapter.demo import PICTURES

    dtype = setting.float_dtype if setting.dtype == "auto" else setting.dtype
    session = base.answering(dtype)
    rows = base.tokens(START).tolist()
    facts: dict[str, object] = {"dtype": dtype, "prompt tokens": START, "new tokens": NEW}
    if setting.shape is not None:
        layers = min(ADAPTER_LAYERS, base.config.layers)
        prompts = base.random_prompts(session.llama, layers, PROMPT_LENGTH)
        name = f"random adapter, K={PROMPT_LENGTH}, L={layers}"
    else:
        seeing = session.with_adapter(setting.adapter or "caption")
        prompts = seeing.prompts([sorted(PICTURES.glob("*.jpg"))[0]])
        shape = seeing.about.adapter
        name = "adapter and image"
        facts |= {"adapter": seeing.adapter_name, "K": shape.prompt_length, "L": shape.layers}
    contenders = [Contender("base", _ours(session.llama, rows)), Contender(name, _ours(session.llama, rows, prompts))]
    samples = run_in_turn(contenders, 2 * setting.rounds, QUANTITY)  # the difference is small
    title = f"decoding with an adapter against the base, {NEW} tokens after {START}, {dtype}"
    return [Case("adapter", title, samples, [Comparison(name, "base", QUANTITY, 0.97)], {}, facts)]
