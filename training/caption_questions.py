"""Makes questions about photos out of their captions, as COCO-QA does (Ren, Kiros and Zemel 2015, arXiv 1505.02074).

Patterns of words take the place of COCO-QA's parser: they fit the short sentences that people write under photos. Kinds
of question: what is there (the caption itself is the answer), what someone is doing, a colour, a number, a place, and
whether something can be seen, half of them with the answer no.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmadapter.captions import CaptionedImage, image_path, read_captions
from mmadapter.options import Parser, main_with_errors
from mmadapter.record import replacing, require_place

DESCRIPTION = """\
python -m training.caption_questions --annotations flickr8k/dataset_flickr8k.json --images flickr8k/images \\
    --out flickr8k_questions.jsonl

Makes rows of question, answer, image and split, for training.alpaca and eval.qa, out of COCO's or Karpathy's captions.
Of pictures below the folder of --out the rows hold the way from there, and are found without an option. Of others they
hold the way below --images: give training.alpaca and eval.qa the same --images. So the file is the same everywhere.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COLOURS = _words("black white brown red blue green yellow orange pink purple gray grey tan golden silver")
NUMBERS = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8"}
PEOPLE = _words("man woman boy girl child baby person lady toddler player skier surfer climber cyclist")
ANIMALS = _words("dog cat horse bird")
MANY = _words("men women boys girls children players people dogs cats horses birds")
SINGULAR = dict(zip(MANY, _words("man woman boy girl child player person dog cat horse bird"), strict=True))
THINGS = _words(
    """
    ball hat shirt jacket coat dress helmet car bike bicycle boat toy frisbee uniform umbrella motorcycle flower
    building couch chair table bench bag backpack collar rope kite truck bus train surfboard skateboard snowboard
    sweater skirt cap suit vest
    """
)
PLACES = _words(
    """
    water grass snow beach street field pool park air road woods sidewalk forest ocean mountain hill river lake sand
    yard track room kitchen city crowd stage court ice path trail stairs bench wall rock boat couch bed table dirt mud
    lawn playground fountain ramp
    """
)
COMMON = _words("man woman boy girl child dog")  # a no about these is worth as much as one about a train

_COLOUR = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(PEOPLE + ANIMALS + THINGS)})\b")
_NUMBER = re.compile(rf"\b({'|'.join(NUMBERS)}) (?:\w+ ){{0,2}}?({'|'.join(MANY)})\b")
_DOING = re.compile(
    rf"^(?:a|an|the|one)? ?(?:\w+ ){{0,2}}?({'|'.join(PEOPLE + ANIMALS)}) (?:is )?(\w{{2,}}ing\b(?: \w+){{0,4}})"
)
_PLACE = re.compile(rf"\b((?:in|on|at) (?:the|a|an) (?:\w+ )?(?:{'|'.join(PLACES)}))\b(?! \w+ing)")
_LAST_WORDS = re.compile(r"(?: (?:a|an|the|of|in|on|at|with|to|and|his|her|its|by|for|from|over|into|as))+$")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 1 after an error."""
    parser = Parser(
        prog="python -m training.caption_questions",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--annotations", metavar="FILE", type=Path, required=True, help="the captions")
    parser.add_argument("--images", metavar="DIR", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="JSON lines")
    parser.add_argument(
        "--each", metavar="N", type=int, default=2, help="questions about a photo at most (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the questions (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    if arguments.each < 1:
        parser.error(f"--each must be at least 1, got {arguments.each}")
    return main_with_errors(lambda: run(arguments), arguments.debug)


def run(arguments: argparse.Namespace) -> int:
    """Writes the rows and says how many there are."""
    require_place(arguments.out)
    images = read_captions(arguments.annotations)
    below = _way_below(arguments.images, arguments.out.parent)
    rows = []
    for image in images:
        name = (below or Path()) / image_path(arguments.images, image).relative_to(arguments.images)
        generator = random.Random(f"{arguments.seed} {image.image_id}")
        for question, answer in choose(image, arguments.each, generator):
            row = {"image": name.as_posix(), "question": question, "answer": answer}
            rows.append(row if image.split is None else {**row, "split": image.split.replace("restval", "train")})
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(arguments.out) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{len(rows)} questions about {len(images)} photos in {arguments.out}")
    if below is None:
        print(
            f"the photos are not below the folder of {arguments.out}: give training.alpaca and eval.qa --images "
            f"{arguments.images}",
            file=sys.stderr,
        )
    return 0


def _way_below(folder: Path, top: Path) -> Path | None:
    """The way from `top` to a folder in it; None of one elsewhere, whose way would be another on every machine.

    Links are not followed: a folder that is linked into `top` is in it.
    """
    own, above = (Path(os.path.abspath(path)) for path in (folder, top))
    return own.relative_to(above) if own.is_relative_to(above) else None


def choose(image: CaptionedImage, count: int, generator: random.Random) -> list[tuple[str, str]]:
    """Some questions about a photo and their answers: of different kinds, and none of them asked twice."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for kind, question, answer in questions(image.captions, generator):
        kinds.setdefault(kind, []).append((question, answer))
    chosen = generator.sample(sorted(kinds), min(count, len(kinds)))
    return [generator.choice(kinds[kind]) for kind in chosen]


def questions(captions: Sequence[str], generator: random.Random) -> Iterator[tuple[str, str, str]]:
    """All that the captions of one photo answer: kind, question, answer.

    Where captions contradict each other (a man in a red shirt, and in an orange one), both answers are there.
    """
    plain = [re.sub(r"[^\w' ]", "", " ".join(caption.lower().split())).strip() for caption in captions]
    for text in filter(None, plain):
        yield "scene", "what can be seen in the photo ?", text
        if doing := _DOING.search(text):
            yield "doing", f"what is the {doing[1]} doing ?", _LAST_WORDS.sub("", doing[2])
        for colour in _COLOUR.finditer(text):
            yield "colour", f"what is the color of the {colour[2]} ?", colour[1]
        if number := _NUMBER.search(text):
            yield "number", f"how many {number[2]} are there ?", NUMBERS[number[1]]
        if place := _PLACE.search(text):
            yield "place", "where is it ?", place[1]
    words = {SINGULAR.get(word, word) for text in plain for word in text.split()}
    known = PEOPLE + ANIMALS + THINGS
    there, absent = [word for word in known if word in words], [word for word in known if word not in words]
    if words.intersection((*PEOPLE, "someone", "rider", "guy", "kid", "group")):
        # Who is a person in one caption may be called a man in none: only of photos without people is a no sure.
        absent = [word for word in absent if word not in PEOPLE]
    if there and generator.random() < 0.5:
        yield "seen", f"is there a {generator.choice(there)} in the photo ?", "yes"
    else:
        common = [word for word in absent if word in COMMON]
        word = generator.choice(common if common and generator.random() < 0.5 else absent)
        yield "seen", f"is there a {word} in the photo ?", "no"


if __name__ == "__main__":
    sys.exit(main())
