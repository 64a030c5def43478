"""Trains an adapter on instructions: Alpaca's, or any rows of instruction, input and output, with or without images.

Rows of question and answer are taken as well. `--data` names JSON or JSON lines files (mmadapter/rows.py says what a
row may hold). Where they name splits, rows of the split `train` are taken. Some rows are kept aside for validation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmadapter.rows import held_aside, read_rows
from training.config import RunConfig
from training.launch import Data
from training.launch import main as launch

EXAMPLE = """\
Example:
  python -m training.alpaca --config training/configs/alpaca_instruct.toml --data alpaca_data.json"""


def read(arguments: argparse.Namespace, config: RunConfig) -> Data:
    """Rows of the files in `--data`.

    Raises:
        FileNotFoundError, ValueError: See `rows.read_rows`.
    """
    good, bad = [], []
    for path in arguments.data:
        rows, left = read_rows(path, arguments.images, config.template, split="train")
        # Files in different folders may have one name.
        good += [replace(row, where=str(path.parent / row.where)) for row in rows]
        bad += [replace(row, where=str(path.parent / row.where)) for row in left]
    train, validation = held_aside(good, config.held_out, config.seed)
    task = "answer" if config.vision else "instruct"
    generation = {"max_new_tokens": 30, "stop": ["\n"]} if config.vision else {}
    return Data(train, validation, arguments.data, task, bad, generation)


def main(argv: Sequence[str] | None = None) -> int:
    def add_data(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--data", type=Path, nargs="+", required=True, metavar="FILE", help="rows, JSON or JSON lines"
        )
        parser.add_argument(
            "--images", type=Path, metavar="DIR", help="pictures (default: beside the rows, or images/)"
        )

    return launch(argv, read, script="alpaca", about=f"{EXAMPLE}\n\n{__doc__}", add_data=add_data)


if __name__ == "__main__":
    sys.exit(main())
