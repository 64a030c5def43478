"""Ask a model the questions of ScienceQA: how it is asked, examples, batches, answers that are kept."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.kept import Answered, Kept
from eval.records import decoding, images_hash, model_identity, sees
from mmadapter.options import load_session
from mmadapter.prompts import template
from mmadapter.record import file_sha256
from mmadapter.scienceqa import (
    ANSWER_FORMS,
    Format,
    Problem,
    choice_texts,
    held_out,
    parse_answer,
    parse_format,
    prompt_text,
    read_problems,
    response_text,
)

if TYPE_CHECKING:
    from mmadapter.choices import Scores
    from mmadapter.sampling import Sampling
    from mmadapter.session import Session

SCORES = ("letter", "likelihood")
NORMALISATIONS = ("sum", "mean")


@dataclass(frozen=True)
class Task:
    """How a model is asked.

    Attributes:
        form: What it reads and writes.
        answer_form: "letter" or "text": how it names an option.
        score: "letter" takes the answer that it writes, "likelihood" the option that it finds likeliest.
        normalise: "sum" or "mean" of an option's log-probabilities over its tokens, for "likelihood".
    """

    form: Format
    answer_form: str
    score: str
    normalise: str


def ask_model(args: argparse.Namespace, problems: Sequence[Problem]) -> Answered:
    """The model's answers by pid; what `--out` already holds is not asked again."""
    shots = draw_shots(args, problems) if args.shots else []
    session = load_session(args)
    task = choose_task(args, session)
    pictures = {problem.pid: problem.image for problem in problems if problem.image is not None and sees(session)}
    for pid, path in pictures.items():
        if not path.is_file():
            raise FileNotFoundError(f"there is no image {path}, of pid {pid}; complete the data")
    sampling = task_sampling(task)
    model = {
        **model_identity(args),
        "format": str(task.form),
        "answer_form": task.answer_form,
        "score": task.score,
        "normalise": task.normalise if task.score == "likelihood" else None,
        "sampling": decoding(sampling) if task.score == "letter" else None,
        "shots": [shot.pid for shot in shots],
        "data_hash": data_hash(args.data),
    }
    pids = [problem.pid for problem in problems]
    kept = Kept(args.out, model, ("pid", "answer"), "prediction", pids)
    todo = [problem for problem in problems if problem.pid not in kept.answers]
    for batch in answer_batches(session, task, sampling, todo, shots, args.batch_size or 16):
        kept.add(batch)
    return Answered({pid: kept.answers[pid] for pid in pids}, model, kept.made, images_hash(pictures))


def draw_shots(args: argparse.Namespace, problems: Sequence[Problem]) -> list[Problem]:
    """Train questions that are not scored; `--seed` chooses them."""
    scored = {problem.pid for problem in problems}
    train = read_problems(args.data, "train")
    if args.held_out is not None:  # also what --limit leaves out of the held-out part stays out
        train = held_out(train, args.held_out, args.seed)[0]
    train = [problem for problem in train if problem.pid not in scored]
    if len(train) < args.shots:
        raise ValueError(f"--shots {args.shots} needs as many train questions that are not scored; got {len(train)}")
    return random.Random(args.seed).sample(train, args.shots)


def choose_task(args: argparse.Namespace, session: Session) -> Task:
    """The options, where one is not given what the adapter's metadata say, and else the defaults.

    Raises:
        ValueError: The metadata hold something else, or likelihood is asked of a format that does not begin with the
            answer.
    """
    training = {} if session.about is None else session.about.training
    form = args.format or parse_format(str(training.get("format", "QCM-A")))
    chosen = {}
    for name, allowed, default in (
        ("answer_form", ANSWER_FORMS, "letter"),
        ("score", SCORES, "letter"),
        ("normalise", NORMALISATIONS, "mean"),
    ):
        chosen[name] = getattr(args, name) or training.get(name, default)
        if chosen[name] not in allowed:
            raise ValueError(
                f"adapter {args.adapter} says {name} {chosen[name]!r}, expected {' or '.join(allowed)}; "
                f"give --{name.replace('_', '-')}"
            )
    if chosen["score"] == "likelihood" and not form.writes.startswith("A"):
        raise ValueError(f"--score likelihood needs a format that begins its output with the answer, got {form}")
    return Task(form, **chosen)


def task_sampling(task: Task) -> Sampling:
    """How an answer is written, for the score "letter": an answer alone takes few tokens."""
    from mmadapter.sampling import Sampling

    return Sampling(max_new_tokens=64 if task.form.writes == "A" else 512, stop=("\n",))


def answer_batches(
    session: Session,
    task: Task,
    sampling: Sampling,
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    batch_size: int,
) -> Iterator[list[dict[str, Any]]]:
    """Answers batch by batch, the longest questions first, so that memory that does not suffice is known at once.

    Each has `pid`, `answer` and, by the task's score, the `text` that the model wrote or what `likeliest` gives.

    Raises:
        ValueError: A question is too long for the model's context.
    """
    from tqdm import tqdm

    from mmadapter.choices import log_likelihoods

    tokenizer, about, context = session.tokenizer, session.about, session.llama.config.context
    wrap = template("bare" if about is None else about.template)
    examples = "".join(
        f"{prompt_text(shot, task.form)} {response_text(shot, task.form, task.answer_form)}\n\n" for shot in shots
    )
    rows = {
        problem.pid: tokenizer.encode(wrap.render(examples + prompt_text(problem, task.form))) for problem in problems
    }
    ordered = sorted(problems, key=lambda problem: -len(rows[problem.pid]))
    too_long = [problem.pid for problem in ordered if len(rows[problem.pid]) >= context]
    if too_long:
        raise ValueError(
            f"{len(too_long)} questions are too long, such as pid {too_long[0]} with {len(rows[too_long[0]])} tokens: "
            f"the model's context holds {context}, {len(shots)} examples and the answer included; take fewer --shots, "
            "a shorter --format or another --llama"
        )
    # An adapter was trained to stop after its answer; what the base writes next is not known.
    end = [tokenizer.eos_id] if about is not None and task.form.writes == "A" else []
    with tqdm(total=len(problems), unit="question", disable=not problems) as bar:
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            tokens = [rows[problem.pid] for problem in batch]
            prompts = session.prompts([problem.image if sees(session) else None for problem in batch])
            if task.score == "letter":
                texts = [made.text.strip() for made in session.generate(tokens, sampling, prompts)]
                yield [
                    {"pid": problem.pid, "answer": parse_answer(text, problem.choices, task.answer_form), "text": text}
                    for problem, text in zip(batch, texts, strict=True)
                ]
            else:
                endings = [
                    [
                        [*tokenizer.encode(wrap.separator + text, bos=False), *end]
                        for text in choice_texts(problem, task.answer_form)
                    ]
                    for problem in batch
                ]
                scored = log_likelihoods(session.llama, tokens, endings, prompts)
                yield [
                    {"pid": problem.pid, **likeliest(scores, task.normalise)}
                    for problem, scores in zip(batch, scored, strict=True)
                ]
            bar.update(len(batch))


def likeliest(scores: Scores, normalise: str) -> dict[str, Any]:
    """The likeliest choice as `answer`, and of each choice its probability, summed log-probability and tokens."""
    values = scores.total if normalise == "sum" else scores.mean()
    return {
        "answer": int(values.argmax()),
        "probabilities": [round(value, 4) for value in values.softmax(0).tolist()],
        "log_likelihoods": [round(value, 4) for value in scores.total.tolist()],
        "tokens": scores.tokens.tolist(),
    }


def data_hash(folder: Path) -> dict[str, str]:
    return {name: file_sha256(folder / name) for name in ("problems.json", "pid_splits.json")}
