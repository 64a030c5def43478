"""What an instruction adapter adds to its base: the loss on rows kept aside, and answers side by side."""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval.instruct_answers import run_answers
from eval.records import (
    Start,
    add_result_options,
    check_result_options,
    images_hash,
    model_identity,
    note,
    prepare_outputs,
    result_record,
    sees,
    write_result,
)
from mmadapter.captions import read_text
from mmadapter.options import Parser, add_model_options, load_session, main_with_errors
from mmadapter.prompts import template
from mmadapter.record import file_sha256
from mmadapter.rows import BadRow, Row, held_aside, read_rows, require_good

if TYPE_CHECKING:
    from torch import Tensor

    from mmadapter.adapter import Prompts
    from mmadapter.data import Batch, Example
    from mmadapter.llama import Llama
    from mmadapter.session import Session

DESCRIPTION = """\
python -m eval.instruct --data alpaca_data.json --adapter instruct --json scores.json
python -m eval.instruct --data alpaca_data.json --adapter none --shots 3 --json scores.json
python -m eval.instruct --instructions eval/instructions.jsonl --adapter instruct --out answers.md

With --data: loss a token (nats) and perplexity of the responses in rows that training kept aside, of the adapter and
of its base without it, in the same template and on the same tokens. Which rows these are is what the adapter's record
says of its run; --held-out and --seed name others. --shots puts other rows with their responses before each, which
with --adapter none shows what examples do for the base. With --instructions (JSON lines of instruction and input):
answers of the base, in its own chat template, and of the adapter, side by side in Markdown, and as JSON lines beside
it.
"""
TASK_VERSION = 1
HELD_OUT = 500  # rows, where neither the options nor the adapter's record say how many
RESAMPLES = 10_000  # of the bootstrap
FORM = "alpaca"  # the template that the base is asked in, without an adapter that has its own


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 1 after an error."""
    parser = build_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    if (args.data is None) == (args.instructions is None):
        parser.error("give either --data FILE or --instructions FILE")
    if args.adapter is None or (args.adapter == "none" and args.instructions is not None):
        parser.error("give --adapter A: it is compared with its base (with --data also none, the base alone)")
    pairs = {
        "data": ("json", "examples", "images", "held_out", "shots", "batch_tokens"),
        "instructions": ("out", "max_new_tokens"),
    }
    for mode, names in pairs.items():
        given = [name for name in names if getattr(args, name) is not None]
        if getattr(args, mode) is None and given:
            parser.error(f"--{given[0].replace('_', '-')} goes with --{mode}")
    check_result_options(parser, args)
    if args.instructions is not None and (args.out is None or args.out.suffix != ".md"):
        parser.error("--instructions needs --out FILE.md for the answers")
    for name in ("batch_tokens", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.held_out is not None and args.held_out < 0:
        parser.error("--held-out must be at least 0, which is one row in twenty, at most 500")
    command = shlex.join(["python", "-m", "eval.instruct", *arguments])
    run = run_losses if args.data is not None else run_answers
    return main_with_errors(lambda: run(args, command), args.debug)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m eval.instruct",
        usage="%(prog)s (--data FILE... | --instructions FILE --out FILE.md) --adapter A [options]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, help="of the rows kept aside, or of the answers (default: the run's, or 0)")
    group = parser.add_argument_group("loss")
    group.add_argument("--data", metavar="FILE", type=Path, nargs="+", help="the rows that training was given")
    group.add_argument("--images", metavar="DIR", type=Path, help="pictures (default: beside the rows, or images/)")
    group.add_argument("--held-out", metavar="N", type=int, help=f"rows kept aside (default: the run's, or {HELD_OUT})")
    group.add_argument("--shots", type=int, choices=range(4), help="other rows with responses shown before each")
    group.add_argument("--batch-tokens", metavar="N", type=int, help="tokens of a forward pass (default: 2048)")
    add_result_options(group, "every row's loss")
    group = parser.add_argument_group("answers")
    group.add_argument("--instructions", metavar="FILE", type=Path, help="JSON lines of instruction and input")
    group.add_argument("--out", metavar="FILE.md", type=Path, help="the answers; FILE.jsonl is written beside it")
    group.add_argument("--max-new-tokens", metavar="N", type=int, help="longest answer (default: 512)")
    add_model_options(parser)
    return parser


def run_losses(args: argparse.Namespace, command: str) -> int:
    """Measures both models, prints the table and writes the record."""
    started = Start.now()
    prepare_outputs(args.json, args.examples)
    for path in args.data:
        read_text(path)  # one that cannot be read is told before a large model is loaded
    session = load_session(args)
    recorded = {} if session.about is None else session.about.training.get("run", {})
    held_out = args.held_out if args.held_out is not None else recorded.get("held_out", HELD_OUT)
    seed = args.seed if args.seed is not None else recorded.get("seed", 0)
    hashes = [file_sha256(path) for path in args.data]
    kept_aside = None  # the base has learnt none of them here
    if session.about is not None:
        kept_aside = (recorded.get("held_out"), recorded.get("seed")) == (held_out, seed)
        kept_aside = kept_aside and session.about.training.get("data_hash") == hashes
    if kept_aside is False:
        note(f"the record of {args.adapter} names other data, held_out or seed: it may have learnt these rows")

    form = form_of(session)
    rows, bad = read_data(args.data, args.images, form)
    others, rows = held_aside(rows, held_out, seed)
    shots = draw_shots(others, args.shots or 0, seed)
    shown = shot_tokens(session, shots)
    examples = make_examples(session, rows, recorded.get("max_tokens", 512))
    require_room(examples, len(shown), session.llama.config.context)
    adapter, base, tokens = measure(session, rows, examples, args.batch_tokens or 2048, shown)
    low, high = bootstrap_interval(adapter - base, tokens, seed=seed)
    count = int(tokens.sum())
    loss, base_loss = float(adapter.sum()) / count, float(base.sum()) / count

    table = {"base": base_loss}
    if args.adapter != "none" or shots:
        name = "base" if args.adapter == "none" else "adapter"
        table[f"{name}, {len(shots)} shot{'s' if len(shots) > 1 else ''}" if shots else name] = loss
    width = max(map(len, (*table, "difference")))
    print(f"{', '.join(path.name for path in args.data)}: {len(rows)} rows kept aside, {count} tokens")
    print(f"{'':{width}}{'loss':>9}{'perplexity':>12}")
    for name, value in table.items():
        print(f"{name:{width}}{value:9.4f}{math.exp(value):12.3f}")
    if len(table) > 1:
        interval = f"95% from {low:.4f} to {high:.4f} (bootstrap over rows)"
        print(f"{'difference':{width}}{loss - base_loss:9.4f}, {interval}")
    if args.json is not None:
        record = result_record(
            args,
            command,
            started,
            task="instruct",
            version=TASK_VERSION,
            scores={
                "loss": loss,
                "perplexity": math.exp(loss),
                "base_loss": base_loss,
                "base_perplexity": math.exp(base_loss),
                "difference": loss - base_loss,
                "difference_95": [low, high],
                "rows": len(rows),
                "tokens": count,
            },
            settings={
                "rows_left_out": len(bad),
                "seed": seed,
                "held_out": held_out,
                "kept_aside_in_training": kept_aside,
                "bootstrap": {"resamples": RESAMPLES, "seed": seed},
            },
            model={**model_identity(args), "template": form, "shots": [shot.where for shot in shots]},
            data_hash=hashes,
            images_hash=images_hash({row.where: row.image for row in rows if row.image is not None and sees(session)}),
            predictions=[
                {"where": row.where, "tokens": int(n), "loss": float(own / n), "base_loss": float(other / n)}
                for row, n, own, other in zip(rows, tokens, adapter, base, strict=True)
            ],
            packages=("tokenizers", "timm"),
        )
        write_result(args, record)
    return 0


def draw_shots(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Rows without a picture, none of them scored; the seed chooses them.

    Raises:
        ValueError: There are too few.
    """
    able = [row for row in rows if row.image is None]
    if len(able) < count:
        raise ValueError(
            f"--shots {count} needs as many rows without pictures that are not kept aside, and there are {len(able)}; "
            "take fewer --shots or a smaller --held-out"
        )
    return random.Random(seed).sample(able, count)


def shot_tokens(session: Session, shots: Sequence[Row]) -> tuple[int, ...]:
    """The examples as tokens, without a beginning of sequence."""
    separator = template(form_of(session)).separator
    text = "".join(f"{shot.prompt}{separator}{shot.response}\n\n" for shot in shots)
    return tuple(session.tokenizer.encode(text, bos=False)) if text else ()


def require_room(examples: Sequence[Example], shown: int, context: int) -> None:
    """Raises a ValueError where `shown` tokens of examples and a row are more than the model's context holds."""
    longest = max(examples, key=lambda example: len(example.tokens))
    if shown and shown + len(longest.tokens) > context:
        raise ValueError(
            f"{longest.where} has {len(longest.tokens)} tokens and the examples {shown}: the model's context holds "
            f"{context}; take fewer --shots, another --seed or another --llama"
        )


def form_of(session: Session) -> str:
    """The template that the rows are asked in: the adapter's, and of the base alone `FORM`."""
    return FORM if session.about is None else session.about.template


def read_data(paths: Sequence[Path], images: Path | None, form: str) -> tuple[list[Row], list[BadRow]]:
    """Rows of the files as `training.alpaca` reads them; bad ones are left out and said so."""
    rows: list[Row] = []
    bad: list[BadRow] = []
    for path in paths:
        good, left = read_rows(path, images, form, split="train")
        rows += good
        bad += left
    require_good(bad, skip=True)
    return rows, bad


def make_examples(session: Session, rows: Sequence[Row], max_tokens: int) -> list[Example]:
    """The rows as tokens, cut as in training."""
    from mmadapter.data import make_example

    separator = template(form_of(session)).separator
    most = min(max_tokens, session.llama.config.context)
    return [
        make_example(session.tokenizer, row.prompt, separator + row.response, max_tokens=most, where=row.where)
        for row in rows
    ]


def measure(
    session: Session, rows: Sequence[Row], examples: Sequence[Example], batch_tokens: int, shown: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of every row by the session's model and by its base, summed over the row's tokens, and how many these are.

    Args:
        shown: Tokens that the session's model reads before each row, and the base does not.

    Returns:
        Three float64 [rows].
    """
    import torch
    from tqdm import tqdm

    from mmadapter.data import IGNORE_INDEX, collate, passes

    adapter, base, tokens = torch.zeros(3, len(rows), dtype=torch.float64)
    seen = sees(session)
    shared = None if seen else session.prompts([None])  # made once, for all rows
    prefixed = [_after(shown, example, session.tokenizer.bos_id) for example in examples] if shown else examples
    cut = passes([len(example.tokens) for example in prefixed], batch_tokens)
    for part in tqdm(cut, unit="batch", desc="loss"):
        batch = collate([examples[row] for row in part])
        base[part] = row_losses(session.llama, batch, None)
        if session.about is None and not shown:
            adapter[part] = base[part]
        else:
            prompts = session.prompts([rows[row].image for row in part]) if seen else shared
            adapter[part] = row_losses(session.llama, collate([prefixed[row] for row in part]), prompts)
        tokens[part] = (batch.labels[:, 1:] != IGNORE_INDEX).sum(1).double()
    return adapter, base, tokens


def _after(shown: tuple[int, ...], example: Example, bos_id: int | None) -> Example:
    """The row behind the examples: its own tokens and labels stay what they are."""
    begin = example.tokens[:1] if example.tokens[0] == bos_id else ()
    tokens = (*begin, *shown, *example.tokens[len(begin) :])
    return dataclasses.replace(example, tokens=tokens, prompt_tokens=example.prompt_tokens + len(shown))


def row_losses(llama: Llama, batch: Batch, prompts: Prompts | None) -> Tensor:
    """Cross-entropy in nats, summed over the labelled tokens of each row, float64 [B].

    Logits are computed only where there is a label, a few at a time.
    """
    import torch
    import torch.nn.functional as F

    from mmadapter.data import IGNORE_INDEX
    from mmadapter.loss import CHUNK

    with torch.inference_mode():
        tokens, targets = batch.tokens.to(llama.device), batch.labels[:, 1:].to(llama.device)
        wanted = targets != IGNORE_INDEX  # [B, T - 1]
        hidden = llama.hidden(tokens[:, :-1], prompts=prompts)[wanted]  # [n, C]
        each = [
            F.cross_entropy(llama.logits(states), expected, reduction="none")
            for states, expected in zip(hidden.split(CHUNK), targets[wanted].split(CHUNK), strict=True)
        ]
        # On the CPU, which has float64 everywhere and adds in one order.
        owner = wanted.nonzero()[:, 0].cpu()
        return torch.zeros(len(tokens), dtype=torch.float64).index_add_(0, owner, torch.cat(each).double().cpu())


def bootstrap_interval(
    difference: Tensor, tokens: Tensor, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95% interval of the mean difference a token, from rows drawn again with replacement.

    Args:
        difference: Summed over each row's tokens, [rows].
        tokens: Of each row, [rows].
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    means = []
    for start in range(0, resamples, 1000):
        drawn = torch.randint(len(tokens), (min(1000, resamples - start), len(tokens)), generator=generator)
        means.append(difference[drawn].sum(1) / tokens[drawn].sum(1))
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


if __name__ == "__main__":
    sys.exit(main())
