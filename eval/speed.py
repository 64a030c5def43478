"""Measure speed against the peers, in turn and as ratios: training, decoding, captioning, starting, growth."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval.records import base_identity, note, prepare_outputs, provenance
from mmadapter.options import Parser, add_model_options, main_with_errors
from mmadapter.record import require_place, write_json

if TYPE_CHECKING:
    from eval.speed_base import Base, Setting
    from eval.speed_rounds import Case

DESCRIPTION = """\
python -m eval.speed --json speed.json
python -m eval.speed --only decoding adapter --rounds 5
python -m eval.speed --only rows --data alpaca_data.json
python -m eval.speed --device cuda --shape llama-7b

Sets mmadapter beside transformers, peft and llama.cpp: the same weights, batch, number format and threads, in turn
within one run. A machine's speed moves with its load, so what counts are the ratios: each is taken within a round, and
the table shows the median over the rounds and the outermost ones. A peer that is not installed is left out and named.

Cases:
  training   a training step, every position a target, against peft's AdaptionPrompt; and the memory of both
  rows       training on real rows (--data): batches by length against every row padded to 512 tokens
  decoding   one stream in each number format against transformers and llama.cpp (on CUDA also 64 streams)
  adapter    decoding with an adapter and an image against the base alone
  captions   captions of 32 files at once against one at a time, and where the time goes
  questions  ten questions about one image: how often it is encoded
  start      process start to first token against transformers; --help against a bare interpreter
  growth     time and memory over prompt, batch, K, L and generated length, beside the law they should follow
"""
TASK_VERSION = 1
ROUNDS = 3
CASES = ("training", "rows", "decoding", "adapter", "captions", "questions", "start", "growth")
NEED_WEIGHTS = ("rows", "captions", "questions", "start")  # a tokenizer or an image encoder, which no random base has
PACKAGES = ("transformers", "peft", "llama-cpp-python", "kernels", "tokenizers", "numpy", "gguf")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 1 after an error."""
    parser = build_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    check(parser, args)
    command = shlex.join(["python", "-m", "eval.speed", *arguments])
    return main_with_errors(lambda: run(args, command), args.debug)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m eval.speed", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=CASES, help="cases to measure (default: all)")
    parser.add_argument("--rounds", metavar="N", type=int, default=ROUNDS, help="of each case (default: %(default)s)")
    parser.add_argument("--threads", metavar="N", type=int, help="of every contender (default: what torch takes)")
    parser.add_argument("--json", metavar="OUT", type=Path, help="write every sample, the ratios and provenance to OUT")
    parser.add_argument("--plots", metavar="DIR", type=Path, help="write plots of the case growth to DIR")
    parser.add_argument("--data", metavar="FILE", type=Path, help="Alpaca rows, for the case rows")
    parser.add_argument("--images", metavar="DIR", type=Path, help="pictures to caption (default: assets/images)")
    parser.add_argument("--shape", metavar="NAME", help="a base of random weights of that shape, such as llama-7b")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and drawn rows (default: %(default)s)")
    add_model_options(parser)
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program (misuse) where options do not go together."""
    for name in ("rounds", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.adapter == "none":
        parser.error("--adapter names the adapter that is set beside the base; none is no adapter")
    if args.shape is not None:
        given = [name for name in ("adapter", "vision") if getattr(args, name) is not None]
        if args.llama != parser.get_default("llama"):
            given.append("llama")
        if given:
            parser.error(f"--shape is a base of random weights; leave --{given[0]} out")
        needing = [name for name in args.only or () if name in NEED_WEIGHTS]
        if needing:
            parser.error(f"the case {needing[0]} needs a base with a tokenizer; leave --shape out")
    if "rows" in (args.only or ()) and args.data is None:
        parser.error("the case rows trains on real rows; give them with --data FILE")
    if args.plots is not None and "growth" not in (args.only or CASES):
        parser.error("--plots shows the case growth; name it in --only")


def run(args: argparse.Namespace, command: str) -> int:
    """Measures case after case, prints each table when it is there and writes the record."""
    started = time.monotonic()
    prepare_outputs(args.json)
    for path, option in ((args.data, "--data FILE"), (args.images, "--images DIR")):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"there is no {path}; give one that is with {option}")
    if args.plots is not None:
        require_place(args.plots, folder=True)
    import torch

    from eval.speed_base import Base, machine
    from eval.speed_rounds import record, table

    threads = torch.get_num_threads() if args.threads is None else args.threads
    torch.set_num_threads(threads)
    setting = setting_of(args, threads)
    base = Base(setting)
    found: list[Case] = []
    skipped: dict[str, str] = {}
    identity: dict[str, object] = {"base": args.llama if args.shape is None else args.shape}
    if args.json is not None and args.shape is None:
        identity |= base_identity(args.llama)

    def keep() -> None:
        """Writes what is measured so far: a case that fails takes nothing with it."""
        if args.json is None:
            return
        content = {
            "task": "speed",
            "version": TASK_VERSION,
            "cases": [record(case) for case in found],
            "left_out": skipped,
            "settings": dataclasses.asdict(setting),
            "machine": machine(setting.device),
            **identity,
            **provenance(command, PACKAGES),
            "seconds": round(time.monotonic() - started, 1),
        }
        write_json(args.json, content)

    for name in args.only or CASES:
        why_not = reason_to_skip(name, setting)
        if why_not is not None:
            skipped[name] = why_not
            print(f"{name}: left out: {why_not}\n", flush=True)
        else:
            note(f"{name} ...")
            for case in measurement(name)(setting, base):
                found.append(case)
                print(table(case), end="\n\n", flush=True)
        keep()
    return 0


def setting_of(args: argparse.Namespace, threads: int) -> Setting:
    """The options as the cases take them.

    Raises:
        ValueError: There is no such shape or device.
    """
    import torch

    from eval.speed_base import Setting
    from mmadapter.info import SHAPES

    if args.shape is not None and args.shape not in SHAPES:
        raise ValueError(f"no shape {args.shape!r}; there are {', '.join(SHAPES)}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {args.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    fields = {field.name for field in dataclasses.fields(Setting)}
    given = {name: value for name, value in vars(args).items() if name in fields}
    paths = {name: None if given[name] is None else str(given[name]) for name in ("data", "images", "plots")}
    return Setting(**{**given, **paths, "threads": threads})


def reason_to_skip(name: str, setting: Setting) -> str | None:
    """Why a case cannot be measured with these options, None where it can."""
    if setting.shape is not None and name in NEED_WEIGHTS:
        return "it needs a tokenizer or an image encoder, which a base of random weights has not"
    if name == "rows" and setting.data is None:
        return "give rows with --data FILE"
    return None


def measurement(name: str) -> Callable[[Setting, Base], list[Case]]:
    """The function that measures a case; its module is imported when it is needed."""
    if name in ("training", "rows"):
        from eval.speed_training import real_rows, training

        return {"training": training, "rows": real_rows}[name]
    if name in ("decoding", "adapter"):
        from eval.speed_decoding import adapter_cost, decoding

        return {"decoding": decoding, "adapter": adapter_cost}[name]
    if name in ("captions", "questions"):
        from eval.speed_captioning import captioning, questions

        return {"captions": captioning, "questions": questions}[name]
    if name == "start":
        from eval.speed_start import start

        return start
    from eval.speed_growth import growth

    return growth


if __name__ == "__main__":
    sys.exit(main())
