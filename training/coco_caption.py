"""Trains a caption adapter on COCO Caption, or on any data set in COCO's or Karpathy's annotation format.

The data folder holds the annotation file and the pictures: `dataset_*.json` (Karpathy's split) beside `images/`, or
`annotations/captions_*.json` beside the folders the file names are in.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmadapter.captions import CaptionedImage, read_captions
from mmadapter.checkpoint import FILE_NAME, AdapterFile, save_adapter
from mmadapter.config import VisionConfig
from mmadapter.data import Example, cached_features, make_example
from mmadapter.options import Parser, main_with_errors
from mmadapter.prompts import CAPTION_INSTRUCTION, template
from mmadapter.record import file_sha256, git_commit
from mmadapter.tokenizer import Tokenizer
from mmadapter.vision import ImageProjection, load_encoder
from mmadapter.weights.store import cache_folder
from training.cider import CiderD
from training.config import add_overrides, overrides_of, read_config
from training.engine import Features, Trainer, open_base
from training.self_critical import SelfCritical

EXAMPLE = """\
Example:
  python -m training.coco_caption --config training/configs/flickr8k_caption.toml --data DIR"""


def caption_text(raw: str) -> str:
    """One reference as it is learnt: lower case, one space between words, one full stop at the end."""
    return " ".join(raw.lower().split()).rstrip(" .") + "."


def caption_examples(
    images: Sequence[CaptionedImage],
    tokenizer: Tokenizer,
    prompt_template: str,
    *,
    first_image: int = 0,
    max_tokens: int = 512,
) -> list[Example]:
    """One row for each reference caption; image i of the list is row `first_image` + i of the feature table."""
    form = template(prompt_template)
    prompt = form.render(CAPTION_INSTRUCTION)
    return [
        make_example(tokenizer, prompt, form.separator + caption_text(caption), image=index, max_tokens=max_tokens)
        for index, image in enumerate(images, first_image)
        for caption in image.captions
        if caption.strip()
    ]


def read_data(folder: Path, seed: int) -> tuple[list[CaptionedImage], list[CaptionedImage], Path]:
    """Training and validation images of a data folder, and the annotation file they come from.

    Karpathy's file says its splits; of COCO's files the one of the training set is taken, and one image in ten (at most
    1,000) is held out of it by `seed`.

    Raises:
        FileNotFoundError: The folder or its annotations are not there.
        ValueError: The annotations cannot be read, or leave too few images to train on (2) or to validate on (1).
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no data folder {folder}; give the one that holds the annotations and the pictures")
    karpathy = sorted(folder.glob("dataset_*.json"))
    if karpathy:
        path = karpathy[0]
        images = read_captions(path)
        train = [image for image in images if image.split in ("train", "restval")]
        validation = [image for image in images if image.split == "val"]
    else:
        coco = sorted(
            folder.glob("annotations/captions_*.json"), key=lambda file: ("train" not in file.name, file.name)
        )
        if not coco:
            raise FileNotFoundError(f"{folder} has neither a dataset_*.json nor annotations/captions_*.json")
        path = coco[0]
        images = read_captions(path)
        random.Random(seed).shuffle(images)
        held_out = max(1, min(1000, len(images) // 10))
        train, validation = images[held_out:], images[:held_out]
    if len(train) < 2 or not validation:
        raise ValueError(f"{path} has {len(train)} training and {len(validation)} validation images; it takes 2 and 1")
    return train, validation, path


def picture_paths(folder: Path, images: Sequence[CaptionedImage]) -> list[Path]:
    """Where the pictures lie: in the data folder, or in one of the folders directly in it.

    Raises:
        FileNotFoundError: A picture is in none of them; the first such is named.
    """
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    paths = []
    for image in images:
        path = next((place / image.file_name for place in places if (place / image.file_name).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"picture {image.file_name} is neither in {folder} nor in a folder in it")
        paths.append(path)
    return paths


def feature_source(table: Tensor) -> Features:
    """Looks up cached features: in training a random view of each photo, in validation the photo as it is.

    Args:
        table: [V, images, F].
    """

    def lookup(rows: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            return table[0, rows].float()
        views = torch.randint(len(table), rows.shape, generator=generator)
        return table[views, rows].float()

    return lookup


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m training.coco_caption",
        usage="%(prog)s --config FILE --data DIR [--out DIR] [overrides of the run file]",
        description=f"{EXAMPLE}\n\n{__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="run file (TOML)")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="annotations and pictures")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/ and the run file's name)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_overrides(parser)
    arguments = parser.parse_args(argv)
    return main_with_errors(lambda: run(arguments), arguments.debug)


def run(arguments: argparse.Namespace) -> int:
    config = read_config(arguments.config, overrides_of(arguments))
    out = arguments.out or Path("runs") / arguments.config.stem
    torch.manual_seed(config.seed)
    train_images, val_images, annotations = read_data(arguments.data, config.seed)
    train_paths = picture_paths(arguments.data, train_images)
    val_paths = picture_paths(arguments.data, val_images)

    # Everything that may be refused comes before the image features, which may take hours.
    vision = VisionConfig(config.vision, config.scales, config.image_size, config.resize)
    encoder = load_encoder(vision, dtype=getattr(torch, config.dtype))
    base = open_base(config)
    projection = ImageProjection(
        sum(encoder.widths),
        base.config.width,
        config.projection_width,
        dropout=config.dropout,
        feature_dropout=config.feature_dropout,
        scale=config.prompt_std,
    )
    model = base.with_adapter(config, projection)

    cache = cache_folder() / "features"
    train_features = cached_features(encoder, train_paths, cache, views=config.views, seed=config.seed)
    val_features = cached_features(encoder, val_paths, cache)
    table = feature_source(torch.cat((train_features, val_features.expand(config.views, -1, -1)), dim=1))
    if not config.init:  # an adapter that was trained keeps the statistics it was trained with
        projection.set_statistics(train_features[0].float())

    rows = {"tokenizer": base.tokenizer, "prompt_template": config.template, "max_tokens": config.max_tokens}
    train = caption_examples(train_images, **rows)
    validation = caption_examples(val_images, **rows, first_image=len(train_images))
    objective = None
    if config.objective == "cider":
        train = list({example.image: example for example in train}.values())  # one row an image: which does not matter
        question = base.tokenizer.encode(template(config.template).render(CAPTION_INSTRUCTION))
        reward = CiderD([[caption_text(caption) for caption in image.captions] for image in train_images])
        objective = SelfCritical(base.tokenizer, question, reward, samples=config.samples)
    trainer = Trainer(
        model,
        config,
        out,
        train=train,
        validation=validation,
        features=table,
        objective=objective,
        record={"data": annotations.name, "data_hash": file_sha256(annotations), "git_commit": git_commit()},
    )
    loss = trainer.train()
    about = AdapterFile(
        adapter=trainer.model.adapter.config,
        task="caption",
        template=config.template,
        base=config.llama,
        fingerprint=base.fingerprint,
        vision=encoder.config,
        projection_width=config.projection_width,
        generation={"beams": config.beams, "length_penalty": config.length_penalty, "max_new_tokens": 30},
        training={"data": annotations.stem, "licence": config.licence, "rows": len(train), "steps": trainer.step},
        scores={"val_loss": round(loss, 4)},
        git_commit=git_commit(),
    )
    save_adapter(out / FILE_NAME, trainer.kept_state(), about)
    print(f"validation loss {loss:.4f}; adapter in {out / FILE_NAME}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
