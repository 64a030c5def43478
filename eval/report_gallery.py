"""Examples to look at: the best, the worst and random ones of the first run, with what every run said."""

from __future__ import annotations

import base64
import dataclasses
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.report_runs import Run
from eval.report_tasks import Gold
from mmadapter.captions import CaptionedImage
from mmadapter.scienceqa import LETTERS, Problem

TASKS = ("scienceqa", "caption", "qa")
SIDE = 448  # pixels of a picture's longer side in the page


@dataclass(frozen=True)
class Said:
    """What one run said to an example.

    Attributes:
        label: The run.
        text: Its caption or answer.
        score: What it got for it, in words.
        right: None where it is not a matter of right and wrong.
    """

    label: str
    text: str
    score: str
    right: bool | None = None


@dataclass(frozen=True)
class Card:
    """One example.

    Attributes:
        id: As the score files have it.
        question: "" for captions.
        context: What the question is about, "" for none.
        choices: Each option and whether it is the right one; empty where there are none.
        references: What people wrote.
        said: By every run, in their order.
        picture: Its name as the data have it, "" for none.
        uri: The picture as a JPEG in a data URI, "" where there is none.
        size: Of the picture in the page, width and height.
    """

    id: str
    question: str
    context: str
    choices: tuple[tuple[str, bool], ...]
    references: tuple[str, ...]
    said: tuple[Said, ...]
    picture: str = ""
    uri: str = ""
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Section:
    """Some cards, and how they were chosen."""

    name: str
    title: str
    about: str
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Gallery:
    """The sections, and the names of pictures that were looked for in vain, or that cannot be read."""

    sections: tuple[Section, ...]
    lost: tuple[str, ...]


def make_gallery(
    runs: Sequence[Run], gold: Gold | None, images: Path | None, *, count: int = 12, seed: int = 0
) -> Gallery | None:
    """Chooses examples by the first run's scores; of equal ones, the seed decides.

    Args:
        gold: The questions or references, where the score files do not hold them.
        images: Folder of the pictures.
        count: Cards of a section.

    Returns:
        None where there is nothing to look at: entities, losses, and ScienceQA without its questions.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    first = runs[0]
    if images is not None and not images.is_dir():
        raise FileNotFoundError(f"there is no folder {images}; give the one that holds the pictures")
    if first.task not in TASKS or count < 1 or (first.task == "scienceqa" and gold is None):
        return None
    order = list(first.examples)
    random.Random(seed).shuffle(order)
    goodness = {own: _goodness(first, own, gold) for own in order}
    ranked = sorted(order, key=goodness.__getitem__)
    best, worst = {
        "scienceqa": (
            "Right answers of {}, the surest first.",
            "Wrong answers of {}, furthest from the right one first.",
        ),
        "caption": ("Highest CIDEr of {} first.", "Lowest CIDEr of {} first."),
        "qa": ("Highest F1 of {} first, then exact match.", "Lowest F1 of {} first."),
    }[first.task]
    if first.task == "scienceqa" and not _has_probabilities(first):
        best, worst = "Right answers of {}, drawn at random.", "Wrong answers of {}, drawn at random."
    chosen = {
        "best": ("Best", best.format(first.label), ranked[: -count - 1 : -1]),
        "worst": ("Worst", worst.format(first.label), ranked[:count]),
        "random": ("Random", f"Drawn with seed {seed}, whatever the scores.", order[:count]),
    }
    if len(runs) > 1:
        second = runs[1]
        apart = {own: _goodness(second, own, gold)[0] - goodness[own][0] for own in order}
        if first.task == "scienceqa" and not all(map(_has_probabilities, runs[:2])):
            apart = {own: second.examples[own]["correct"] - first.examples[own]["correct"] for own in order}
        differing = [own for own in sorted(order, key=lambda own: -abs(apart[own])) if apart[own]][:count]
        if differing:
            about = f"Where {second.label} and {first.label} are furthest apart."
            chosen["apart"] = ("Furthest apart", about, differing)
    lost: dict[str, None] = {}
    sections = tuple(
        Section(name, title, about, tuple(_card(own, runs, gold, images, lost) for own in ids))
        for name, (title, about, ids) in chosen.items()
    )
    return Gallery(sections, tuple(lost))


def _has_probabilities(run: Run) -> bool:
    return any("probabilities" in example for example in run.examples.values())


def _goodness(run: Run, own: str, gold: Gold | None) -> tuple[float, float]:
    """How good an example's result is; the second number decides between equals."""
    example = run.examples[own]
    if run.task == "caption":
        return (example.get("CIDEr") or 0.0, 0.0)
    if run.task == "qa":
        return (example["f1"], example["exact_match"])
    probabilities = example.get("probabilities")
    sure = probabilities[gold[own].answer] if probabilities else 0.0
    return (float(example["correct"]) + sure, 0.0)


def _card(own: str, runs: Sequence[Run], gold: Gold | None, images: Path | None, lost: dict[str, None]) -> Card:
    example = runs[0].examples[own]
    known = None if gold is None else gold[own]
    if isinstance(known, Problem):
        candidates = []
        name = ""
        if known.image is not None:
            name = "/".join(known.image.parts[-3:])  # SPLIT/PID/FILE
            candidates = [known.image] if images is None else _places(images, name)
        said = tuple(_choice_said(run, own, known) for run in runs)
        choices = tuple((choice, index == known.answer) for index, choice in enumerate(known.choices))
        card = Card(own, known.question, known.hint, choices, (), said, name)
    elif runs[0].task == "caption":
        name = own
        candidates = _places(images, own)
        references = known.captions if isinstance(known, CaptionedImage) else ()
        said = tuple(
            Said(run.label, run.examples[own]["caption"], _number(run.examples[own].get("CIDEr"), "CIDEr {:.2f}"))
            for run in runs
        )
        card = Card(own, "", "", (), references, said, name)
    else:
        name = example.get("image", "")
        candidates = _places(images, name)
        said = tuple(
            Said(run.label, one["answer"], f"F1 {one['f1']:.0f}", right=one["exact_match"] == 100)
            for run in runs
            for one in [run.examples[own]]
        )
        card = Card(own, example["question"], "", (), tuple(dict.fromkeys(example["references"])), said, name)
    return _with_picture(card, candidates, lost)


def _choice_said(run: Run, own: str, problem: Problem) -> Said:
    example = run.examples[own]
    answer, probabilities = example["answer"], example.get("probabilities")
    if answer is None or not 0 <= answer < len(problem.choices):
        text = f"no choice: “{example['text']}”" if example.get("text") else "no choice"
        return Said(run.label, text, "", right=bool(example["correct"]))
    sure = f"{100 * probabilities[answer]:.0f}%" if probabilities else ""
    return Said(run.label, f"({LETTERS[answer]}) {problem.choices[answer]}", sure, right=bool(example["correct"]))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _places(folder: Path | None, name: str) -> list[Path]:
    """Where a picture may lie: below the folder as it is called, below its `images`, or right in it.

    Nowhere else, whatever a score file says: of an absolute name, only the last part counts.
    """
    path = Path(name)
    if folder is None or not name or ".." in path.parts:
        return []
    if path.is_absolute():
        return [folder / path.name]
    return [folder / path, folder / "images" / path, folder / path.name]


def _with_picture(card: Card, candidates: Sequence[Path], lost: dict[str, None]) -> Card:
    """The card with the first of the files that is there; `lost` takes the name if none is, or it is no picture."""
    if not candidates:
        return card
    from mmadapter.image import load_image

    found = next((path for path in candidates if path.is_file()), None)
    try:
        if found is None:
            raise FileNotFoundError(card.picture)
        image = load_image(found)
    except (OSError, ValueError):
        lost[card.picture] = None
        return card
    image.thumbnail((SIDE, SIDE))
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=82, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(packed.getvalue()).decode("ascii")
    return dataclasses.replace(card, uri=uri, size=image.size)
