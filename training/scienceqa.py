"""Trains an adapter on ScienceQA, in the data set's official layout and prompt formats.

The data folder holds `problems.json`, `pid_splits.json` and `images/SPLIT/PID/FILE`. With an image encoder in the run
file, questions that have an image get an image token; text-only questions never do. Validation is on the split `val`,
or, with `held_out`, on that many training rows, half of them with images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmadapter.prompts import template
from mmadapter.rows import BadRow, Row
from mmadapter.scienceqa import Problem, held_out, parse_format, prompt_text, read_problems, response_text
from training.config import RunConfig
from training.launch import Data
from training.launch import main as launch

EXAMPLE = """\
Example:
  python -m training.scienceqa --config training/configs/scienceqa_image.toml --data DIR"""


def read(arguments: argparse.Namespace, config: RunConfig) -> Data:
    """The problems of `--data` as rows.

    Raises:
        FileNotFoundError, ValueError: See `scienceqa.read_problems` and `scienceqa.parse_format`.
    """
    form, wrap = parse_format(config.format), template(config.template)
    bad: list[BadRow] = []
    train = read_problems(arguments.data, "train", bad)
    if config.held_out:
        train, validation = held_out(train, config.held_out, config.seed)
    else:
        validation = read_problems(arguments.data, "val", bad)

    def row(problem: Problem) -> Row:
        image = problem.image if config.vision else None
        where = f"problems.json, pid {problem.pid}"
        if image is not None and not image.is_file():
            bad.append(BadRow(where, f"there is no picture {image}"))
        prompt = wrap.render(prompt_text(problem, form))
        return Row(prompt, response_text(problem, form, config.answer_form), image, where)

    return Data(
        train=[row(problem) for problem in train],
        validation=[row(problem) for problem in validation],
        files=[arguments.data / "problems.json", arguments.data / "pid_splits.json"],
        task="scienceqa",
        bad=bad,
        generation={"max_new_tokens": 64 if form.writes == "A" else 512, "stop": ["\n"]},
        settings={
            "format": config.format,
            "answer_form": config.answer_form,
            "score": "letter" if config.answer_form == "letter" else "likelihood",
        },
    )


def main(argv: Sequence[str] | None = None) -> int:
    def add_data(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="problems, splits and images")

    return launch(argv, read, script="scienceqa", about=f"{EXAMPLE}\n\n{__doc__}", add_data=add_data)


if __name__ == "__main__":
    sys.exit(main())
