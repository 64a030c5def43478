"""Score image captions as the COCO benchmark does: BLEU, METEOR, ROUGE-L, CIDEr and SPICE.

The scores are pycocoevalcap's, over a prediction file or over the captions that a model makes here.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.caption_metrics import METRICS, CaptionScores, java_version, require_pycocoevalcap, score_captions
from eval.kept import Answered, Kept, scored_file
from eval.records import (
    PICTURE_PACKAGES,
    Start,
    add_out_option,
    add_result_options,
    check_options,
    check_result_options,
    images_hash,
    model_identity,
    note,
    prepare_outputs,
    result_record,
    task_decoding,
    write_result,
)
from mmadapter.captions import (
    CaptionedImage,
    base_name,
    image_path,
    match_predictions,
    read_captions,
    select_split,
)
from mmadapter.options import Parser, add_model_options, load_session, main_with_errors
from mmadapter.record import file_sha256

DESCRIPTION = """\
python -m eval.caption --annotations dataset_flickr8k.json --predictions captions.jsonl --json scores.json
python -m eval.caption --annotations dataset_flickr8k.json --adapter caption --images flickr8k/images

Scores captions against the sentences that people wrote: Bleu_1 to Bleu_4, METEOR, ROUGE_L, CIDEr and SPICE, computed
by pycocoevalcap. Annotations are COCO's JSON or Karpathy's dataset_*.json. Predictions are COCO results
([{"image_id": 42, "caption": "..."}]) or the JSON lines that `python -m mmadapter caption --out FILE` writes.
METEOR, SPICE and COCO's tokenizer are Java programs; what cannot be computed is left out and said so.
"""
TASK_VERSION = 1
BATCH_SIZE = 32
MODEL_ONLY = ("out", "train", "shots", "batch_size", "beams")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 1 after an error."""
    parser = build_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    check_options(parser, args, model_only=MODEL_ONLY, from_one=("batch_size", "limit", "beams"))
    check_result_options(parser, args)
    if (args.adapter is None) != (args.images is None):
        parser.error("--adapter and --images go together: the model needs the pictures")
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
    add_result_options(parser, "every caption")
    add_out_option(parser)
    parser.add_argument("--batch-size", metavar="N", type=int, help=f"images at once (default: {BATCH_SIZE})")
    parser.add_argument("--beams", metavar="N", type=int, help="beam search width (default: the adapter's own)")
    parser.add_argument("--shots", type=int, choices=range(4), help="captions of train photos shown to the model first")
    parser.add_argument(
        "--train", metavar="FILE", type=Path, help="annotations for --shots (default: split train of --annotations)"
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the shots (default: %(default)s)")
    add_model_options(parser)
    return parser


def run(args: argparse.Namespace, command: str) -> int:
    """Collect the captions, score them, print the table and write the record."""
    started = Start.now()
    require_pycocoevalcap()
    prepare_outputs(args.json, args.examples, args.out)
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
        matched, passed_over = match_predictions(args.predictions, images, known)
        names = [image.file_name for image in images]
        asked = Answered(dict(zip(names, matched, strict=True)), *scored_file(args.predictions, "image", names))
        if passed_over:
            note(f"{passed_over} captions of images that are not scored here are passed over")
    else:
        asked = caption_images(args, images, known)
    captions = [asked.answers[image.file_name] for image in images]

    scores = score_captions([image.captions for image in images], captions)
    for metric, reason in scores.left_out.items():
        note(f"{metric} is left out: {reason}")
    if scores.tokenizer != "ptb":
        note("the plain tokenizer stands in for COCO's, which is a Java program: the last digits can differ")
    print_table(args.annotations, split, images, scores)
    if args.json is not None:
        record = result_record(
            args,
            command,
            started,
            task="caption",
            version=TASK_VERSION,
            scores={
                **scores.metrics,
                "n": len(images),
                "references": sum(len(image.captions) for image in images),
            },
            settings={"split": split, "tokenizer": scores.tokenizer, "left_out": scores.left_out},
            model=asked.model,
            made=asked.made,
            data_hash=file_sha256(args.annotations),
            images_hash=asked.images_hash,
            predictions=[
                {"image": image.file_name, "caption": caption, **own}
                for image, caption, own in zip(images, captions, scores.of_image, strict=True)
            ],
            packages=(
                *("tokenizers", "timm", "pycocoevalcap", "numpy"),
                *(() if args.adapter is None else PICTURE_PACKAGES),
            ),
            java=java_version(),
        )
        write_result(args, record)
    return 0


def caption_images(
    args: argparse.Namespace, images: Sequence[CaptionedImage], known: Sequence[CaptionedImage]
) -> Answered:
    """The model's captions by file name; those that `--out` already holds are not made again."""
    paths = {image.file_name: image_path(args.images, image) for image in images}
    shots = draw_shots(args, images, known)
    identity = model_identity(args)
    sampling = task_decoding(args.adapter, "caption", {"beams": args.beams})
    model = {**identity, "beams": sampling["beams"], "sampling": sampling, "shots": shots}
    older = {**identity, "beams": args.beams, "shots": shots}
    # The base alone does not see: with examples, even none, it is asked all the same, for the score of guessing.
    blind = {"examples": shots} if shots or args.adapter == "none" else {}
    kept = Kept(args.out, model, ("image", "caption"), "caption", paths, older)
    todo = [name for name in paths if name not in kept.answers]
    if todo:
        from tqdm import tqdm

        session = load_session(args)
        batch_size = args.batch_size or BATCH_SIZE
        chunk_size = 8 * batch_size  # enough to keep the session's batches busy, little enough to lose on a stop
        with tqdm(total=len(todo), unit="image") as bar:
            for start in range(0, len(todo), chunk_size):
                chunk = todo[start : start + chunk_size]
                made = session.caption(
                    [paths[name] for name in chunk], batch_size=batch_size, beams=args.beams, **blind
                )
                kept.add([{"image": name, "caption": caption} for name, caption in zip(chunk, made, strict=True)])
                bar.update(len(chunk))
    seen = {} if args.adapter == "none" else paths
    return Answered({name: kept.answers[name]["caption"] for name in paths}, model, kept.made, images_hash(seen))


def draw_shots(
    args: argparse.Namespace, scored: Sequence[CaptionedImage], known: Sequence[CaptionedImage]
) -> list[str]:
    """Human captions of `--shots` train photos, never of one that is scored; `--seed` chooses them.

    Raises:
        ValueError: There are too few such photos.
    """
    if not args.shots:
        return []
    source = known if args.train is None else read_captions(args.train)
    asked = {base_name(image.file_name) for image in scored}
    own_file = args.train is not None  # all of a file without splits is for training
    train = [
        image
        for image in source
        if (image.split == "train" or (own_file and image.split is None)) and base_name(image.file_name) not in asked
    ]
    if len(train) < args.shots:
        raise ValueError(
            f"--shots {args.shots} takes captions of as many train photos that are not scored, and "
            f"{args.train or args.annotations} has {len(train)} of them; give annotations that have with --train"
        )
    generator = random.Random(args.seed)
    return [generator.choice(image.captions) for image in generator.sample(train, args.shots)]


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
