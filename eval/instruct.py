"""What an instruction adapter adds to its base: the loss on rows kept aside, and answers side by side."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.records import adapter_hash, note, prepare_outputs, provenance, sees
from mmadapter.captions import read_text
from mmadapter.options import Parser, add_model_options, load_session, main_with_errors
from mmadapter.prompts import template
from mmadapter.record import file_sha256, replacing, write_json
from mmadapter.rows import BadRow, Row, fields_of, held_aside, read_rows, records, require_good, text_field

if TYPE_CHECKING:
    from torch import Tensor

    from mmadapter.adapter import Prompts
    from mmadapter.data import Batch, Example
    from mmadapter.llama import Llama
    from mmadapter.session import Session

DESCRIPTION = """\
python -m eval.instruct --data alpaca_data.json --adapter instruct --json scores.json
python -m eval.instruct --instructions eval/instructions.jsonl --adapter instruct --out answers.md

With --data: loss a token (nats) and perplexity of the responses in rows that training kept aside, of the adapter and
of its base without it, in the same template and on the same tokens. Which rows these are is what the adapter's record
says of its run; --held-out and --seed name others. With --instructions (JSON lines of instruction and input): answers
of the base, in its own chat template, and of the adapter, side by side in Markdown, and as JSON lines beside it.
"""
TASK_VERSION = 1
HELD_OUT = 500  # rows, where neither the options nor the adapter's record say how many
RESAMPLES = 10_000  # of the bootstrap
TEMPERATURE, TOP_P = 0.1, 0.75  # PAPER: decoding of instructions
LINE_WIDTH = 100  # of an answer in Markdown


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 1 after an error."""
    parser = build_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    if (args.data is None) == (args.instructions is None):
        parser.error("give either --data FILE or --instructions FILE")
    if args.adapter in (None, "none"):
        parser.error("give --adapter A: it is compared with its base")
    pairs = {"data": ("json", "images", "held_out", "batch_tokens"), "instructions": ("out", "max_new_tokens")}
    for mode, names in pairs.items():
        given = [name for name in names if getattr(args, name) is not None]
        if getattr(args, mode) is None and given:
            parser.error(f"--{given[0].replace('_', '-')} goes with --{mode}")
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
    group.add_argument("--batch-tokens", metavar="N", type=int, help="tokens of a forward pass (default: 2048)")
    group.add_argument("--json", metavar="OUT", type=Path, help="write scores, provenance and every row's loss to OUT")
    group = parser.add_argument_group("answers")
    group.add_argument("--instructions", metavar="FILE", type=Path, help="JSON lines of instruction and input")
    group.add_argument("--out", metavar="FILE.md", type=Path, help="the answers; FILE.jsonl is written beside it")
    group.add_argument("--max-new-tokens", metavar="N", type=int, help="longest answer (default: 512)")
    add_model_options(parser)
    return parser


# Loss


def run_losses(args: argparse.Namespace, command: str) -> int:
    """Measures both models, prints the table and writes the record."""
    prepare_outputs(args.json)
    for path in args.data:
        read_text(path)  # one that cannot be read is told before a large model is loaded
    session = load_session(args)
    recorded = session.about.training.get("run", {})
    held_out = args.held_out if args.held_out is not None else recorded.get("held_out", HELD_OUT)
    seed = args.seed if args.seed is not None else recorded.get("seed", 0)
    hashes = [file_sha256(path) for path in args.data]
    kept_aside = (recorded.get("held_out"), recorded.get("seed")) == (held_out, seed)
    kept_aside = kept_aside and session.about.training.get("data_hash") == hashes
    if not kept_aside:
        note(f"the record of {args.adapter} names other data, held_out or seed: it may have learnt these rows")

    rows, bad = read_data(args.data, args.images, session.about.template)
    rows = held_aside(rows, held_out, seed)[1]
    examples = make_examples(session, rows, recorded.get("max_tokens", 512))
    begin = time.monotonic()
    adapter, base, tokens = measure(session, rows, examples, args.batch_tokens or 2048)
    seconds = time.monotonic() - begin
    low, high = bootstrap_interval(adapter - base, tokens, seed=seed)
    count = int(tokens.sum())
    loss, base_loss = float(adapter.sum()) / count, float(base.sum()) / count

    print(f"{', '.join(path.name for path in args.data)}: {len(rows)} rows kept aside, {count} tokens")
    print(f"{'':10}{'loss':>9}{'perplexity':>12}")
    for name, value in (("base", base_loss), ("adapter", loss)):
        print(f"{name:10}{value:9.4f}{math.exp(value):12.3f}")
    print(f"{'difference':10}{loss - base_loss:9.4f}, 95% from {low:.4f} to {high:.4f} (bootstrap over rows)")
    if args.json is not None:
        record = {
            "loss": loss,
            "perplexity": math.exp(loss),
            "base_loss": base_loss,
            "base_perplexity": math.exp(base_loss),
            "difference": loss - base_loss,
            "difference_95": [low, high],
            "rows": len(rows),
            "tokens": count,
            "rows_left_out": len(bad),
            "task": "instruct",
            "version": TASK_VERSION,
            "held_out": held_out,
            "seed": seed,
            "kept_aside_in_training": kept_aside,
            "adapter": args.adapter,
            "adapter_hash": adapter_hash(args.adapter),
            "base": args.llama,
            "template": session.about.template,
            "dtype": str(session.llama.dtype).removeprefix("torch."),
            "bootstrap": {"resamples": RESAMPLES, "seed": seed},
            **provenance(command, ("tokenizers", "timm")),
            "data_hash": hashes,
            "seconds": round(seconds, 1),
            "predictions": [
                {"where": row.where, "tokens": int(n), "loss": float(own / n), "base_loss": float(other / n)}
                for row, n, own, other in zip(rows, tokens, adapter, base, strict=True)
            ],
        }
        write_json(args.json, record)
    return 0


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

    separator = template(session.about.template).separator
    most = min(max_tokens, session.llama.config.context)
    return [
        make_example(session.tokenizer, row.prompt, separator + row.response, max_tokens=most, where=row.where)
        for row in rows
    ]


def measure(
    session: Session, rows: Sequence[Row], examples: Sequence[Example], batch_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of every row with the adapter and without it, summed over its tokens, and how many these are.

    Returns:
        Three float64 [rows].
    """
    import torch
    from tqdm import tqdm

    from mmadapter.data import IGNORE_INDEX, collate, passes

    adapter, base, tokens = torch.zeros(3, len(rows), dtype=torch.float64)
    blind = None if sees(session) else session.prompts([None])  # made once: all rows share them
    cut = passes([len(example.tokens) for example in examples], batch_tokens)
    for part in tqdm(cut, unit="batch", desc="loss"):
        batch = collate([examples[row] for row in part])
        prompts = blind if blind is not None else session.prompts([rows[row].image for row in part])
        adapter[part] = row_losses(session.llama, batch, prompts)
        base[part] = row_losses(session.llama, batch, None)
        tokens[part] = (batch.labels[:, 1:] != IGNORE_INDEX).sum(1).double()
    return adapter, base, tokens


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


# Answers


def run_answers(args: argparse.Namespace, command: str) -> int:
    """Asks both models and writes the answers."""
    from tqdm import tqdm

    from mmadapter.sampling import Sampling

    prepare_outputs(args.out)
    asked = read_instructions(args.instructions)
    sampling = Sampling(args.max_new_tokens or 512, TEMPERATURE, TOP_P, seed=args.seed or 0)
    session = load_session(args)
    trained = adapter_hash(args.adapter)
    answers: dict[str, list[dict[str, str]]] = {}
    with tqdm(total=2 * len(asked), unit="answer") as bar:
        for model in ("adapter", "base"):
            if model == "base":
                session.adapter(None)
            prompts = session.prompts([None])
            answers[model] = []
            for instruction, context in asked:
                tokens = instruction_tokens(session, instruction, context)
                made = session.generate([tokens], sampling, prompts)[0]
                answers[model].append({"text": made.text.strip(), "finish": made.finish})
                bar.update()
    entries = [
        {"instruction": instruction, "input": context, "base": base, "adapter": adapter}
        for (instruction, context), base, adapter in zip(asked, answers["base"], answers["adapter"], strict=True)
    ]
    about = provenance(command, ("tokenizers",))
    settings = {
        "llama": args.llama,
        "adapter": args.adapter,
        "adapter_hash": trained,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
        "seed": sampling.seed,
        "instructions_hash": file_sha256(args.instructions),
    }
    lines = [json.dumps({**entry, "model": settings, **about}, ensure_ascii=False) + "\n" for entry in entries]
    for path, text in (
        (args.out.with_suffix(".jsonl"), "".join(lines)),
        (args.out, markdown(entries, settings, about)),
    ):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"{len(entries)} instructions answered by both; {args.out}")
    return 0


def read_instructions(path: Path) -> list[tuple[str, str]]:
    """Instructions, each with its input, "" for none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not JSON rows of instruction, or of instruction and input.
    """
    asked = []
    for where, record in records(path):
        try:
            fields = fields_of(record)
            asked.append((text_field(fields, "instruction"), text_field(fields, "input", optional=True)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}; expected rows of instruction and, if wanted, input") from None
    return asked


def instruction_tokens(session: Session, instruction: str, context: str) -> list[int]:
    """The prompt: of an adapter in the template it was trained with, of the base as `Session.chat` asks it."""
    if session.about is not None:
        return session.tokenizer.encode(template(session.about.template).render(instruction, context))
    return session.chat_tokens(f"{instruction}\n\n{context}" if context else instruction)


def markdown(entries: Sequence[dict[str, Any]], settings: dict[str, Any], about: dict[str, Any]) -> str:
    """The answers, a section for each instruction."""
    parts = [
        f"# Answers of {settings['llama']} and of its adapter {settings['adapter']}\n",
        f"Made by `{about['command']}` at commit {about['git_commit']}: temperature {settings['temperature']}, top-p "
        f"{settings['top_p']}, seed {settings['seed']}, at most {settings['max_new_tokens']} tokens. The base is asked "
        "as `python -m mmadapter chat --adapter none` asks it. Long lines are wrapped here; the JSON lines beside this "
        "file have the exact texts.\n",
    ]
    for number, entry in enumerate(entries, 1):
        parts.append(f"## {number}. {' '.join(entry['instruction'].split())}\n")
        if entry["input"]:
            parts.append(f"Input:\n\n{fenced(entry['input'])}")
        for model, title in (("base", "Base"), ("adapter", "Adapter")):
            cut = " (cut off)" if entry[model]["finish"] == "length" else ""
            parts.append(f"**{title}**{cut}\n\n{fenced(entry[model]['text'])}")
    return "\n".join(parts)


def fenced(text: str) -> str:
    """A text as a Markdown block that shows it as it is, whatever marks it holds, its long lines wrapped."""
    lines = []
    for line in text.splitlines():
        lines += textwrap.wrap(line, LINE_WIDTH, drop_whitespace=False, break_on_hyphens=False) or [""]
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n" + "".join(line.rstrip() + "\n" for line in lines) + f"{fence}\n"


if __name__ == "__main__":
    sys.exit(main())
