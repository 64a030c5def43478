"""Ask a model for the named entities of passages, in batches: examples first, answers that are kept."""

from __future__ import annotations

import argparse
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.hipe import Document, Passage, passages
from eval.kept import Answered, Kept
from eval.ner_texts import PROMPTS, input_text, instruction, response_text
from eval.records import decoding, model_identity
from mmadapter.captions import named
from mmadapter.options import load_session
from mmadapter.prompts import Template, template
from mmadapter.record import file_sha256

if TYPE_CHECKING:
    from mmadapter.sampling import Sampling
    from mmadapter.session import Session

BATCH_SIZE = 32
MAX_NEW_TOKENS = 384


@dataclass(frozen=True)
class Request:
    """How a model is asked.

    Attributes:
        form: The template around the instruction and the passage.
        prompt: "json" or "iob".
        instruction: What it is told to do.
    """

    form: Template
    prompt: str
    instruction: str

    def render(self, passage: Passage) -> str:
        """The text before the response."""
        return self.form.render(self.instruction, input_text(passage, self.prompt))

    def example(self, passage: Passage) -> str:
        """A passage with its answer, before the next one."""
        return f"{self.render(passage)}{self.form.separator}{response_text(passage, self.prompt)}\n\n"


def ask_model(
    args: argparse.Namespace,
    asked: Sequence[Passage],
    train: Sequence[Document],
    types: Collection[str],
    words: int,
) -> Answered:
    """The model's texts by passage; what `--out` already holds is not asked again.

    Args:
        train: Where the examples of `--shots` come from.
        types: Those that the prompt names.
        words: The most words of a passage.

    Raises:
        FileNotFoundError: The model is not there.
        ValueError: There are too few examples, or a passage is too long for the model's context.
    """
    from mmadapter.sampling import Sampling

    shots = draw_shots(train, {passage.document.id for passage in asked}, words, args.shots or 0, args.seed)
    session = load_session(args)
    # An empty line ends the answer: so do the examples, and both kinds of answers do without one.
    sampling = Sampling(max_new_tokens=args.max_new_tokens or MAX_NEW_TOKENS, stop=("\n\n",))
    prompt = choose_prompt(args.prompt, args.adapter, {} if session.about is None else session.about.training)
    # As `Session.answer`: the base has no template of its own.
    form = args.template or ("plain" if session.about is None else session.about.template)
    model = {
        **model_identity(args),
        "prompt": prompt,
        "types": sorted(types),
        "template": form,
        "shots": [[shot.id, shot.text] for shot in shots],
        "passage_words": words,
        "max_new_tokens": sampling.max_new_tokens,
        "sampling": decoding(sampling),
        "data_hash": file_sha256(args.gold),
    }
    ids = [passage.id for passage in asked]
    kept = Kept(args.out, model, ("id", "text"), "answer", ids)
    todo = [passage for passage in asked if passage.id not in kept.answers]
    request = Request(template(form), prompt, instruction(prompt, types))
    shown = {passage.id: passage.text for passage in todo}
    for batch in answer_batches(session, request, shots, todo, sampling, args.batch_size or BATCH_SIZE):
        kept.add([{"id": name, "text": text, "passage": shown[name]} for name, text in batch.items()])
    return Answered({name: kept.answers[name]["text"] for name in ids}, model, kept.made)


def choose_prompt(given: str | None, adapter: str, training: Mapping[str, Any]) -> str:
    """The option, where it is not given what the adapter's metadata say, and else `json`.

    Raises:
        ValueError: The metadata say something else.
    """
    prompt = given or training.get("prompt", "json")
    if prompt not in PROMPTS:
        raise ValueError(f"adapter {adapter} says prompt {prompt!r}, expected {' or '.join(PROMPTS)}; give --prompt")
    return prompt


def draw_shots(train: Sequence[Document], scored: Collection[str], words: int, count: int, seed: int) -> list[Passage]:
    """Passages with at least one entity, each of them whole, of documents that are not scored; the seed chooses them.

    Raises:
        ValueError: There are too few.
    """
    if not count:
        return []
    able = [
        passage
        for document in train
        if document.id not in scored
        for passage in passages(document, words)
        if passage.spans() and not passage.cuts()
    ]
    if len(able) < count:
        raise ValueError(
            f"--shots {count} needs as many passages with entities, of documents that are not scored, and there are "
            f"{len(able)}; give a file of them with --train"
        )
    return random.Random(seed).sample(able, count)


def answer_batches(
    session: Session,
    request: Request,
    shots: Sequence[Passage],
    asked: Sequence[Passage],
    sampling: Sampling,
    batch_size: int,
) -> Iterator[dict[str, str]]:
    """Texts by passage, batch by batch, the longest first, so that memory that does not suffice is known at once.

    Raises:
        ValueError: A passage is too long for the model's context.
    """
    from tqdm import tqdm

    tokenizer, context = session.tokenizer, session.llama.config.context
    examples = "".join(request.example(shot) for shot in shots)
    rows = {passage.id: tokenizer.encode(examples + request.render(passage)) for passage in asked}
    too_long = [f"{name} with {len(row)} tokens" for name, row in rows.items() if len(row) >= context]
    if too_long:
        raise ValueError(
            f"{named(too_long, 'passage')} too long: the model's context holds {context}, {len(shots)} examples and "
            "the answer included; take fewer --passage-words or --shots, or another --llama"
        )
    ordered = sorted(rows, key=lambda name: -len(rows[name]))
    prompts = session.prompts([None])
    with tqdm(total=len(ordered), unit="passage", disable=not ordered) as bar:
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            made = session.generate([rows[name] for name in batch], sampling, prompts)
            yield {name: answer.text.strip() for name, answer in zip(batch, made, strict=True)}
            bar.update(len(batch))
