"""Captions from files on disk to JSON lines, many at a time and one at a time; ten questions about one image."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from eval.speed_base import Base, Setting, timed
from eval.speed_rounds import Case, Comparison, Contender, Sample, Timed
from eval.speed_rounds import interleave as run_in_turn
from mmadapter.batch import caption_files, find_images
from mmadapter.demo import PICTURES
from mmadapter.image import load_image, to_square
from mmadapter.session import Session

QUANTITY = "captions/s"
BATCH = 32
SINGLE = 8  # pictures that are captioned one at a time: the first of the batch
WARM = 2
SHIFT = 2  # pixels by which a picture that is taken again is cut
QUESTIONS = tuple(
    f"What is {about}?"
    for about in (
        *("this", "in the middle", "on the left", "on the right", "the colour of the sky", "behind it", "the weather"),
        *("the person wearing", "the largest thing", "the mood of the picture"),
    )
)
ANSWER_TOKENS = 8
STAGES = ("encoder", "prefill", "decode")


def captioning(setting: Setting, base: Base) -> list[Case]:
    """Captions a second at batch 32 against one at a time, and where the time goes."""
    dtype = setting.float_dtype if setting.dtype == "auto" else setting.dtype
    name = setting.adapter or "caption"
    alone = base.answering(dtype)
    with tempfile.TemporaryDirectory() as folder:
        pictures = gather_pictures(Path(setting.images) if setting.images else PICTURES, BATCH, Path(folder))

        def caption(count: int, batch_size: int, watched: bool = False) -> tuple[Timed, dict[str, float]]:
            session = _fresh(setting, alone, name)
            seconds = dict.fromkeys(STAGES, 0.0)
            with watching(session, seconds) if watched else contextlib.nullcontext():
                found = caption_to_file(session, pictures[:count], Path(folder) / "captions.jsonl", batch_size)
            return found, seconds

        many, one = f"batch {BATCH}", "one at a time"
        contenders = [
            Contender(many, lambda: caption(BATCH, BATCH)[0], warm=lambda: caption(WARM, WARM)),
            Contender(one, lambda: caption(SINGLE, 1)[0], warm=lambda: caption(1, 1)),
        ]
        samples = run_in_turn(contenders, setting.rounds, QUANTITY)
        seeing = alone.with_adapter(name)
        notes = ["where the time goes, in ms a caption (the first batch's pictures are read before it, in the rest):"]
        facts: dict[str, object] = {}
        reading = read_seconds(seeing, pictures) / BATCH
        for label, count, batch_size in ((many, BATCH, BATCH), (one, SINGLE, 1)):
            whole, seconds = caption(count, batch_size, watched=True)
            parts = {"read the picture": reading, **{stage: seconds[stage] / count for stage in STAGES}}
            parts["all"] = whole.seconds / count
            parts["the rest"] = parts["all"] - sum(parts[stage] for stage in STAGES)
            facts[f"{label}, ms a caption"] = {part: round(1000 * value, 2) for part, value in parts.items()}
            notes.append(f"  {label}: " + ", ".join(f"{part} {1000 * value:.1f}" for part, value in parts.items()))
    settings = seeing.sampling("caption", {})
    facts |= {"dtype": dtype, "adapter": name, "beams": settings.beams, "pictures": BATCH, "one at a time, of": SINGLE}
    title = f"{BATCH} pictures from files to JSON lines against {SINGLE} one at a time, {settings.beams} beams, {dtype}"
    return [Case("captions", title, samples, [Comparison(many, one, QUANTITY, 6.0)], {}, facts, notes)]


def _fresh(setting: Setting, base: Session, adapter: str) -> Session:
    """A session on the same base that has seen no picture: one that has would not encode it again."""
    session = Session(
        base.llama,
        base.tokenizer,
        spec=setting.llama,
        vision=setting.vision,
        prompt_length=setting.prompt_length,
        gate=setting.gate,
    )
    session.adapter(adapter)
    return session


def gather_pictures(source: Path, count: int, folder: Path) -> list[str]:
    """The first `count` pictures of a folder; where it has fewer they are taken again, each time cut a little more, so
    that no two are one and every one has to be encoded.

    Raises:
        ValueError: There is no picture.
    """
    found, failed = find_images([str(source)])
    if not found:
        raise ValueError(f"{source}: {next(iter(failed.values()))}; give a folder of pictures with --images")
    pictures = found[:count]
    for number in range(len(pictures), count):
        again, which = divmod(number, len(found))
        image = load_image(found[which])
        cut = min(SHIFT * again, image.width - 1)
        path = folder / f"{number:04d}.jpg"
        image.crop((cut, 0, image.width, image.height)).save(path, quality=95)
        pictures.append(str(path))
    return pictures


def caption_to_file(session: Session, pictures: Sequence[str], out: Path, batch_size: int) -> Timed:
    """Captions files as `python -m mmadapter caption --out` does, with what it prints kept off the terminal.

    Raises:
        ValueError: A picture was not captioned.
    """
    out.unlink(missing_ok=True)
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        found = timed(
            len(pictures),
            str(session.llama.device),
            lambda: caption_files(lambda: session, pictures, {}, out=out, batch_size=batch_size, settings={}),
        )
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    failed = [line for line in lines if "error" in line]
    if failed or len(lines) != len(pictures):
        raise ValueError(f"{len(lines) - len(failed)} of {len(pictures)} pictures were captioned: {failed[:1]}")
    return found


def read_seconds(session: Session, pictures: Sequence[str]) -> float:
    """Seconds that one thread takes to decode pictures and to bring them to the encoder's size."""
    encoder = session.encoder
    began = time.perf_counter()
    for path in pictures:
        to_square(load_image(path), encoder.image_size, encoder.config.resize)
    return time.perf_counter() - began


@contextlib.contextmanager
def watching(session: Session, seconds: dict[str, float]) -> Iterator[None]:
    """Adds up what the encoder takes, and the model's passes over prompts (prefill) and over single tokens (decode)."""
    device = str(session.llama.device)

    def adding(function: Callable, stage: Callable[..., str]) -> Callable:
        def wrapped(*args: Any, **options: Any) -> Any:
            results = []
            found = timed(1, device, lambda: results.append(function(*args, **options)))
            seconds[stage(*args)] += found.seconds
            return results[0]

        return wrapped

    def width(tokens: Tensor) -> str:
        return "prefill" if tokens.shape[1] > 1 else "decode"

    with (
        replaced(session.encoder, "features_of", lambda plain: adding(plain, lambda *_: "encoder")),
        replaced(session.llama, "hidden", lambda plain: adding(plain, width)),
        replaced(session.llama, "raw_logits", lambda plain: adding(plain, lambda *_: "decode")),
    ):
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Puts a wrapped method in front of an object's own for a while."""
    setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        delattr(owner, name)


def questions(setting: Setting, base: Base) -> list[Case]:
    """Ten questions about one image: how often it is encoded, and what the first and each later one take."""
    dtype = setting.float_dtype if setting.dtype == "auto" else setting.dtype
    name = setting.adapter or "caption"
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder:
        pictures = gather_pictures(Path(setting.images) if setting.images else PICTURES, setting.rounds, Path(folder))
        session = _fresh(setting, base.answering(dtype), name)
        session.answer(load_image(pictures[0]).rotate(90), QUESTIONS[0], max_new_tokens=ANSWER_TOKENS, beams=1)  # warm
        for number, picture in enumerate(pictures):
            times, encoded = ask_all(session, picture)
            samples.append(Sample("image encodings", "for ten questions", number, float(encoded)))
            samples.append(Sample("first question", "s", number, times[0].seconds, times[0].seconds, 1))
            later = sum(found.seconds for found in times[1:]) / (len(times) - 1)
            samples.append(Sample("later question", "s", number, later, later * (len(times) - 1), len(times) - 1))
            samples.append(Sample("questions", "for ten questions", number, float(len(QUESTIONS))))
    comparisons = [
        Comparison("image encodings", "questions", "for ten questions", 0.11, at_most=True),
        Comparison("first question", "later question", "s"),
    ]
    facts = {"dtype": dtype, "adapter": name, "tokens an answer": ANSWER_TOKENS, "questions": list(QUESTIONS)}
    title = f"ten questions about one image, answers of at most {ANSWER_TOKENS} tokens, {dtype}"
    return [Case("questions", title, samples, comparisons, {}, facts)]


def ask_all(session: Session, picture: str) -> tuple[list[Timed], int]:
    """Asks every question about a file; returns the time of each, and how many images were encoded."""
    encoded: list[int] = []

    def counting(plain: Callable) -> Callable:
        def wrapped(images: Sequence) -> Tensor:
            encoded.append(len(images))
            return plain(images)

        return wrapped

    def ask(question: str) -> Timed:
        settings = {"max_new_tokens": ANSWER_TOKENS, "beams": 1}
        return timed(1, str(session.llama.device), lambda: session.answer(picture, question, **settings))

    with replaced(session.encoder, "features_of", counting):
        return [ask(question) for question in QUESTIONS], sum(encoded)
