"""Ask a model questions in batches: examples first, pictures encoded once, answers that are kept."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval.kept import Answered, Kept
from eval.qa_files import Gold, Question
from eval.records import decoding, images_hash, model_identity, note, sees
from mmadapter.captions import named
from mmadapter.options import load_session
from mmadapter.prompts import Template, question_text, template
from mmadapter.record import file_sha256
from mmadapter.rows import find_picture

if TYPE_CHECKING:
    from mmadapter.sampling import Sampling
    from mmadapter.session import Session

BATCH_SIZE = 32


def ask_model(
    args: argparse.Namespace,
    gold: Gold,
    split: str | None,
    questions: Sequence[Question],
    train: Sequence[Question],
) -> Answered:
    """The model's answers by id; what `--out` already holds is not asked again.

    Args:
        split: Of the questions; an id may be no more than a place in it.
        train: Where the examples of `--shots` come from.

    Raises:
        FileNotFoundError: A picture is not there, and the adapter sees.
        ValueError: There are too few train questions for the shots, or a question is too long for the model.
    """
    shots = draw_shots(train, questions, args.shots or 0, args.seed)
    session = load_session(args)
    # As `Session.answer`: the base has no template of its own.
    form = args.template or ("plain" if session.about is None else session.about.template)
    given = {"max_new_tokens": args.max_new_tokens, "temperature": 0.0, "beams": 1, "stop": ("\n",)}
    sampling = session.sampling("answer", given)
    model = {
        **model_identity(args),
        "template": form,
        "shots": [[shot.text, shot.answers[0]] for shot in shots],
        "max_new_tokens": sampling.max_new_tokens,
        "sampling": decoding(sampling),
        "data_hash": file_sha256(gold.path),
        "split": split,
    }
    ids = [question.id for question in questions]
    kept = Kept(args.out, model, ("id", "answer"), "answer", ids)
    todo = [question for question in questions if question.id not in kept.answers]
    pictures = {}
    if sees(session):
        pictures = find_pictures(
            questions, [args.images] if args.images else [gold.path.parent, gold.path.parent / "images"]
        )
    elif any(question.image for question in questions):
        note(f"{args.adapter if session.about else 'the base'} does not see: it is asked without the pictures")
    for batch in answer_batches(
        session, template(form), shots, todo, pictures, sampling, args.batch_size or BATCH_SIZE
    ):
        kept.add([{"id": key, "answer": text} for key, text in batch.items()])
    seen = {question.id: pictures[question.image] for question in questions if question.image in pictures}
    return Answered({key: kept.answers[key]["answer"] for key in ids}, model, kept.made, images_hash(seen))


def draw_shots(train: Sequence[Question], scored: Sequence[Question], count: int, seed: int) -> list[Question]:
    """Train questions with an answer, none of them scored; the seed chooses them.

    Raises:
        ValueError: There are too few.
    """
    asked = {(question.text, question.context, question.image) for question in scored}
    able = [q for q in train if q.answers[0] and (q.text, q.context, q.image) not in asked]
    if len(able) < count:
        raise ValueError(
            f"--shots {count} needs as many train questions that are not scored, and there are {len(able)}; give a "
            "file of them with --train"
        )
    return random.Random(seed).sample(able, count)


def find_pictures(questions: Sequence[Question], folders: Sequence[Path]) -> dict[str, Path]:
    """The file of every picture that a question names.

    Raises:
        FileNotFoundError: Some are not there; three are named.
    """
    found, missing = {}, []
    for name in dict.fromkeys(question.image for question in questions if question.image):
        try:
            found[name] = find_picture(name, folders)
        except ValueError:
            missing.append(name)
    if missing:
        places = " or ".join(map(str, folders))
        raise FileNotFoundError(f"{named(missing, 'picture')} not in {places}; give their folder with --images")
    return found


def answer_batches(
    session: Session,
    form: Template,
    shots: Sequence[Question],
    questions: Sequence[Question],
    pictures: dict[str, Path],
    sampling: Sampling,
    batch_size: int,
) -> Iterator[dict[str, str]]:
    """The first line of each answer by id, batch by batch.

    Questions about one picture follow each other, so that it is encoded once; without pictures the longest come first,
    so that memory that does not suffice is known at once, and a batch has little padding.

    Raises:
        ValueError: A question is too long for the model's context.
    """
    from tqdm import tqdm

    from mmadapter.image import load_image, to_square

    tokenizer, context = session.tokenizer, session.llama.config.context
    examples = "".join(f"{_prompt(form, shot)}{form.separator}{shot.answers[0]}\n\n" for shot in shots)
    rows = {question.id: tokenizer.encode(examples + _prompt(form, question)) for question in questions}
    too_long = [f"id {key} with {len(row)} tokens" for key, row in rows.items() if len(row) >= context]
    if too_long:
        raise ValueError(
            f"{named(too_long, 'question')} too long: the model's context holds {context}, {len(shots)} examples and "
            "the answer included; take fewer --shots or another --llama"
        )
    if pictures:
        place = {name: number for number, name in enumerate(pictures)}
        ordered = sorted(questions, key=lambda question: place.get(question.image, -1))
    else:
        ordered = sorted(questions, key=lambda question: -len(rows[question.id]))
    with tqdm(total=len(questions), unit="question", disable=not questions) as bar:
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            squares = {  # each file is decoded once for a batch; the session keeps the features beyond it
                name: to_square(load_image(pictures[name]), session.encoder.image_size, session.encoder.config.resize)
                for name in dict.fromkeys(question.image for question in batch)
                if name in pictures
            }
            prompts = session.prompts([squares.get(question.image) for question in batch])
            made = session.generate([rows[question.id] for question in batch], sampling, prompts)
            yield {question.id: answer.text.strip() for question, answer in zip(batch, made, strict=True)}
            bar.update(len(batch))


def _prompt(form: Template, question: Question) -> str:
    return form.render(question_text(question.text), question.context)
