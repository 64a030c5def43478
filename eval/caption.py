"""Score image captions as the COCO benchmark does: BLEU, METEOR, ROUGE-L, CIDEr and SPICE.

The scores are pycocoevalcap's, over a prediction file or over the captions that a model makes here.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.caption_metrics import METRICS, CaptionScores, java_version, require_pycocoevalcap, score_captions
from eval.records import kept_line, note, prepare_outputs, provenance, read_kept
from mmadapter.captions import (
    CaptionedImage,
    base_name,
    image_path,
    match_predictions,
    read_captions,
    select_split,
)
from mmadapter.options import Parser, add_model_options, load_session, main_with_errors
from mmadapter.record import file_sha256, write_json

DESCRIPTION = """\
python -m eval.caption --annotations dataset_flickr8k.json --predictions captions.jsonl --json scores.json
python -m eval.caption --annotations dataset_flickr8k.json --adapter caption --images flickr8k/images

Scores captions against the sentences that people wrote: Bleu_1 to Bleu_4, METEOR, ROUGE_L, CIDEr and SPICE, computed
by pycocoevalcap. Annotations are COCO's JSON or Karpathy's dataset_*.json. Predictions are COCO results
([{"image_id": 42, "caption": "..."}]) or the JSON lines that `python -m mmadapter caption --out FILE` writes.
METEOR, SPICE and COCO's tokenizer are Java programs; what cannot be computed is left out and said so.
"""
TASK_VERSION = 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 1 after an error."""
    parser = build_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    if (args.predictions is None) == (args.adapter is None):
        parser.error("give either --predictions FILE or --adapter A (none is the base model)")
    if (args.adapter is None) != (args.images is None):
        parser.error("--adapter and --images go together: the model needs the pictures")
    if args.predictions is not None and args.predictions_out is not None:
        parser.error("--predictions-out keeps what --adapter makes; with --predictions there is nothing to keep")
    if args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--batch-size and --limit must be at least 1")
    command = shlex.join(["python", "-m", "eval.caption", *arguments])
    return main_with_errors(lambda: run(args, command), args.debug)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m eval.caption",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--annotations", metavar="FILE", type=Path, required=True, help="the human captions")
    parser.add_argument("--predictions", metavar="FILE", type=Path, help="captions to score, one for every image")
    parser.add_argument("--images", metavar="DIR", type=Path, help="folder of the pictures, for --adapter")
    parser.add_argument("--split", help="split of a Karpathy file (default: test); COCO annotations have none")
    parser.add_argument("--limit", metavar="N", type=int, help="score the first N images only")
    parser.add_argument("--json", metavar="OUT", type=Path, help="write scores, provenance and every caption to OUT")
    parser.add_argument(
        "--predictions-out",
        metavar="FILE",
        type=Path,
        help="keep the model's captions as JSON lines; a run that was stopped goes on from there",
    )
    parser.add_argument("--batch-size", metavar="N", type=int, default=32, help="images at once (default: %(default)s)")
    parser.add_argument("--beams", metavar="N", type=int, help="beam search width (default: the adapter's own)")
    parser.add_argument(
        "--shots", type=int, choices=range(4), default=0, help="captions of train photos shown to the model first"
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the shots (default: %(default)s)")
    add_model_options(parser)
    return parser


def run(args: argparse.Namespace, command: str) -> int:
    """Collect the captions, score them, print the table and write the record."""
    require_pycocoevalcap()
    prepare_outputs(args.json, args.predictions_out)
    known = read_captions(args.annotations)
    split = None
    if known[0].split is not None:
        split = args.split or "test"
        images = select_split(known, split, args.annotations)
    else:
        images = known
        if args.split is not None:
            note(f"{args.annotations} is COCO annotations, which have no splits: all of it is scored")
    images = images[: args.limit]

    if args.predictions is not None:
        captions, passed_over = match_predictions(args.predictions, images, known)
        predictions_hash = file_sha256(args.predictions)
        if passed_over:
            note(f"{passed_over} captions of images that are not scored here are passed over")
    else:
        captions = caption_images(args, images, known)
        lines = [prediction_line(args, image, caption) for image, caption in zip(images, captions, strict=True)]
        predictions_hash = hashlib.sha256("".join(lines).encode()).hexdigest()

    scores = score_captions([image.captions for image in images], captions)
    for metric, reason in scores.left_out.items():
        note(f"{metric} is left out: {reason}")
    if scores.tokenizer != "ptb":
        note("the plain tokenizer stands in for COCO's, which is a Java program: the last digits can differ")
    print_table(args.annotations, split, images, scores)
    if args.json is not None:
        record = {
            **scores.metrics,
            "n": len(images),
            "references": sum(len(image.captions) for image in images),
            "split": split,
            "tokenizer": scores.tokenizer,
            "left_out": scores.left_out,
            "task": "caption",
            "version": TASK_VERSION,
            "model": None if args.adapter is None else model_settings(args),
            **provenance(command, ("pycocoevalcap", "numpy"), java=java_version()),
            "data_hash": file_sha256(args.annotations),
            "predictions_hash": predictions_hash,
            "examples": [
                {"image": image.file_name, "caption": caption, "CIDEr": cider}
                for image, caption, cider in zip(images, captions, scores.cider_of_image, strict=True)
            ],
        }
        write_json(args.json, record)
    return 0


def caption_images(
    args: argparse.Namespace, images: Sequence[CaptionedImage], known: Sequence[CaptionedImage]
) -> list[str]:
    """The model's caption of each image; those that `--predictions-out` already holds are not made again."""
    paths = {image.file_name: image_path(args.images, image) for image in images}
    # The base alone does not see: with examples, even none, it is asked all the same, for the score of guessing.
    blind = args.adapter == "none"
    shots = {"examples": draw_shots(args, known) if args.shots else []} if args.shots or blind else {}
    captions = {}
    if args.predictions_out is not None:
        kept = read_kept(
            args.predictions_out, model_settings(args), ("image", "caption"), "caption", "--predictions-out"
        )
        captions = {line["image"]: line["caption"] for line in kept}
    todo = [image for image in images if image.file_name not in captions]
    if len(todo) < len(images):
        note(
            f"{len(images) - len(todo)} of {len(images)} captions are in {args.predictions_out}; delete it to redo them"
        )
    if todo:
        session = load_session(args)
        begin = time.monotonic()
        chunk_size = 8 * args.batch_size  # enough to keep the session's batches busy, little enough to lose on a stop
        for start in range(0, len(todo), chunk_size):
            chunk = todo[start : start + chunk_size]
            made = session.caption(
                [paths[image.file_name] for image in chunk], batch_size=args.batch_size, beams=args.beams, **shots
            )
            captions.update({image.file_name: text for image, text in zip(chunk, made, strict=True)})
            if args.predictions_out is not None:
                with args.predictions_out.open("a", encoding="utf-8") as file:
                    file.writelines(prediction_line(args, image, captions[image.file_name]) for image in chunk)
            done = start + len(chunk)
            note(f"{done} of {len(todo)} captions, {done / (time.monotonic() - begin):.1f} a second")
    return [captions[image.file_name] for image in images]


def draw_shots(args: argparse.Namespace, known: Sequence[CaptionedImage]) -> list[str]:
    """Human captions of `--shots` train photos, never of one that is scored; `--seed` chooses them."""
    train = [image for image in known if image.split == "train"]
    if (args.split or "test") == "train" or len(train) < args.shots:
        raise ValueError(f"--shots takes captions of train photos that are not scored; {args.annotations} has none")
    generator = random.Random(args.seed)
    return [generator.choice(image.captions) for image in generator.sample(train, args.shots)]


def model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides a caption: kept with every prediction, so that two models' captions cannot mix in one file."""
    names = ("llama", "adapter", "vision", "prompt_length", "gate", "beams", "shots", "seed")
    return {name: getattr(args, name) for name in names}


def prediction_line(args: argparse.Namespace, image: CaptionedImage, caption: str) -> str:
    return kept_line({"image": image.file_name, "caption": caption}, model_settings(args))


def print_table(annotations: Path, split: str | None, images: Sequence[CaptionedImage], scores: CaptionScores) -> None:
    references = sum(len(image.captions) for image in images)
    print(
        f"{base_name(str(annotations))}{f', {split}' if split else ''}: {len(images)} images, {references} references"
    )
    for metric in METRICS:
        value = scores.metrics[metric]
        print(f"  {metric:8} {'left out' if value is None else f'{value:8.4f}'}")


if __name__ == "__main__":
    sys.exit(main())
