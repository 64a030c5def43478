"""What it can do, in a minute: captions for the sample pictures, one turn of chat, and the time each took."""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from mmadapter.options import Parser, add_model_options, load_session, main_with_errors

PICTURES = Path(__file__).resolve().parents[1] / "assets" / "images"
QUESTION = "Tell me about alpacas."


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m mmadapter.demo",
        description=f"Example:\n  python -m mmadapter.demo\n\n{__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    arguments = parser.parse_args(argv)
    return main_with_errors(lambda: run(arguments), arguments.debug)


def run(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    arguments.adapter = arguments.adapter or "caption"
    session = load_session(arguments)
    print(f"loaded {arguments.llama} and adapter {arguments.adapter} in {time.perf_counter() - started:.1f} s\n")

    pictures = sorted(PICTURES.glob("*.jpg"))
    width = max(len(picture.name) for picture in pictures)
    for picture in pictures:
        began = time.perf_counter()
        caption = session.caption(picture)[0]
        print(f"  {picture.name:<{width}}  {caption}  ({time.perf_counter() - began:.1f} s)")

    session.adapter(None)
    print(f"\n> {QUESTION}")
    began = time.perf_counter()
    answer = session.chat(QUESTION, max_new_tokens=96, temperature=0.0)
    print(textwrap.fill(answer, 100, initial_indent="  ", subsequent_indent="  "))
    tokens = len(session.tokenizer.encode(answer, bos=False))
    seconds = time.perf_counter() - began
    print(f"  ({tokens} tokens in {seconds:.1f} s)\n")
    print("Your own: python -m mmadapter caption FOLDER    python -m mmadapter chat")
    return 0


if __name__ == "__main__":
    sys.exit(main())
