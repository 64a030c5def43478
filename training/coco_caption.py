"""Trains a caption adapter on COCO Caption, or on any data set in COCO's or Karpathy's annotation format.

The data folder holds the annotation file and the pictures: `dataset_*.json` (Karpathy's split) beside `images/`, or
`annotations/captions_*.json` beside the folders the file names are in.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from mmadapter.captions import CaptionedImage, named, read_captions
from mmadapter.prompts import CAPTION_INSTRUCTION, template
from mmadapter.rows import BadRow, Row
from training.config import RunConfig
from training.launch import Data
from training.launch import main as launch

EXAMPLE = """\
Example:
  python -m training.coco_caption --config training/configs/flickr8k_caption.toml --data DIR"""


def caption_text(raw: str) -> str:
    """One reference as it is learnt: lower case, one space between words, one full stop at the end."""
    return " ".join(raw.lower().split()).rstrip(" .") + "."


def read_data(
    folder: Path, seed: int, held_out: int = 0, bare: list[CaptionedImage] | None = None
) -> tuple[list[CaptionedImage], list[CaptionedImage], Path]:
    """Training and validation images of a data folder, and the annotation file they come from.

    Karpathy's file says its splits; of COCO's files the one of the training set is taken, and some images are held out
    of it by `seed`.

    Args:
        held_out: Captions that the images held out have at least; 0 is one image in ten, at most 1,000.
        bare: See `captions.read_captions`.

    Raises:
        FileNotFoundError: The folder or its annotations are not there.
        ValueError: There is more than one `dataset_*.json`, or the annotations cannot be read, or leave too few images
            to train on (2) or to validate on (1).
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no data folder {folder}; give the one that holds the annotations and the pictures")
    karpathy = sorted(folder.glob("dataset_*.json"))
    if len(karpathy) > 1:
        raise ValueError(
            f"{folder} has {named([file.name for file in karpathy], 'split file')}; leave one of them there"
        )
    if karpathy:
        (path,) = karpathy
        images = read_captions(path, bare=bare)
        train = [image for image in images if image.split in ("train", "restval")]
        validation = [image for image in images if image.split == "val"]
    else:
        coco = sorted(
            folder.glob("annotations/captions_*.json"), key=lambda file: ("train" not in file.name, file.name)
        )
        if not coco:
            raise FileNotFoundError(f"{folder} has neither a dataset_*.json nor annotations/captions_*.json")
        path = coco[0]
        images = read_captions(path, bare=bare)
        random.Random(seed).shuffle(images)
        totals = itertools.accumulate(len(image.captions) for image in images)
        count = sum(total < held_out for total in totals) + 1 if held_out else max(1, min(1000, len(images) // 10))
        train, validation = images[count:], images[:count]
    if len(train) < 2 or not validation:
        raise ValueError(f"{path} has {len(train)} training and {len(validation)} validation images; it takes 2 and 1")
    return train, validation, path


def caption_rows(
    folder: Path, images: Sequence[CaptionedImage], prompt_template: str, source: str
) -> tuple[list[Row], list[BadRow]]:
    """One row for each reference caption; pictures lie in the data folder or in one of the folders directly in it.

    Returns:
        All rows, and the bad ones among them: those whose picture is not there.
    """
    prompt = template(prompt_template).render(CAPTION_INSTRUCTION)
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    rows, bad = [], []
    for image in images:
        path = next((place / image.file_name for place in places if (place / image.file_name).is_file()), None)
        for number, caption in enumerate(image.captions, 1):
            where = f"{source}, {image.file_name}, caption {number}"
            if path is None:
                bad.append(BadRow(where, f"picture {image.file_name} is neither in {folder} nor in a folder in it"))
            elif not caption_text(caption).strip("."):
                bad.append(BadRow(where, "the caption is empty or no text"))
                continue
            rows.append(Row(prompt, caption_text(caption), path, where))
    return rows, bad


def read(arguments: argparse.Namespace, config: RunConfig) -> Data:
    """The captions of `--data` as rows.

    Raises:
        FileNotFoundError, ValueError: See `read_data`; or the run file names no image encoder.
    """
    if not config.vision:
        raise ValueError("captions need an image encoder; give one with --vision, such as efficientnet-lite2")
    bare: list[CaptionedImage] = []
    train, validation, annotations = read_data(arguments.data, config.seed, config.held_out, bare)
    used = [image for image in bare if image.split in (None, "train", "restval", "val")]
    sides = [caption_rows(arguments.data, side, config.template, annotations.name) for side in (train, validation)]
    return Data(
        train=sides[0][0],
        validation=sides[1][0],
        files=[annotations],
        task="caption",
        bad=[
            *(BadRow(f"{annotations.name}, {image.file_name}", "it has no captions") for image in used),
            *(bad for _, side in sides for bad in side),
        ],
        generation={"beams": config.beams, "length_penalty": config.length_penalty, "max_new_tokens": 30},
    )


def main(argv: Sequence[str] | None = None) -> int:
    def add_data(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="annotations and pictures")

    return launch(argv, read, script="coco_caption", about=f"{EXAMPLE}\n\n{__doc__}", add_data=add_data)


if __name__ == "__main__":
    sys.exit(main())
