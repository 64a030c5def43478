"""Answers of an instruction adapter and of its base, side by side, as Markdown and as JSON lines."""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.records import decoding, model_identity, prepare_outputs, provenance
from mmadapter.options import load_session
from mmadapter.prompts import template
from mmadapter.record import file_sha256, replacing
from mmadapter.rows import fields_of, records, text_field

if TYPE_CHECKING:
    from mmadapter.session import Session

TASK, TASK_VERSION = "instruct answers", 1
LINE_WIDTH = 100  # of an answer in Markdown


def run_answers(args: argparse.Namespace, command: str) -> int:
    """Asks both models and writes the answers."""
    from tqdm import tqdm

    from mmadapter.wording import task_sampling

    prepare_outputs(args.out)
    asked = read_instructions(args.instructions)
    # One for both: that of a chat, which an adapter may have its own of.
    sampling = task_sampling(None, "chat", {"max_new_tokens": args.max_new_tokens or 512, "seed": args.seed or 0})
    session = load_session(args)
    identity = model_identity(args)
    answers: dict[str, list[dict[str, str]]] = {}
    seconds = [0.0] * len(asked)  # of both models
    with tqdm(total=2 * len(asked), unit="answer") as bar:
        for model in ("adapter", "base"):
            if model == "base":
                session.adapter(None)
            prompts = session.prompts([None])
            answers[model] = []
            for number, (instruction, context) in enumerate(asked):
                began = time.monotonic()
                tokens = instruction_tokens(session, instruction, context)
                made = session.generate([tokens], sampling, prompts)[0]
                answers[model].append({"text": made.text.strip(), "finish": made.finish})
                seconds[number] += time.monotonic() - began
                bar.update()
    entries = [
        {"instruction": instruction, "input": context, "base": base, "adapter": adapter}
        for (instruction, context), base, adapter in zip(asked, answers["base"], answers["adapter"], strict=True)
    ]
    about = provenance(command, ("tokenizers",))
    settings = {
        **identity,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_new_tokens": sampling.max_new_tokens,
        "seed": sampling.seed,
        "sampling": decoding(sampling),
        "instructions_hash": file_sha256(args.instructions),
    }
    lines = []
    for entry, took in zip(entries, seconds, strict=True):
        line = {"task": TASK, "version": TASK_VERSION, "seconds": round(took, 2), "model": settings, **about}
        lines.append(json.dumps({**entry, **line}, ensure_ascii=False) + "\n")
    for path, text in (
        (args.out.with_suffix(".jsonl"), "".join(lines)),
        (args.out, markdown(entries, settings, about)),
    ):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"{len(entries)} instructions answered by both; {args.out}")
    return 0


def read_instructions(path: Path) -> list[tuple[str, str]]:
    """Instructions, each with its input, "" for none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not JSON rows of instruction, or of instruction and input.
    """
    asked = []
    for where, record in records(path):
        try:
            fields = fields_of(record)
            asked.append((text_field(fields, "instruction"), text_field(fields, "input", optional=True)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}; expected rows of instruction and, if wanted, input") from None
    return asked


def instruction_tokens(session: Session, instruction: str, context: str) -> list[int]:
    """The prompt: of an adapter in the template it was trained with, of the base as `Session.chat` asks it."""
    if session.about is not None:
        return session.tokenizer.encode(template(session.about.template).render(instruction, context))
    return session.chat_tokens(f"{instruction}\n\n{context}" if context else instruction)


def markdown(entries: Sequence[dict[str, Any]], settings: dict[str, Any], about: dict[str, Any]) -> str:
    """The answers, a section for each instruction."""
    parts = [
        f"# Answers of {settings['llama']} and of its adapter {settings['adapter']}\n",
        f"Made by `{about['command']}` at commit {about['git_commit']}: temperature {settings['temperature']}, top-p "
        f"{settings['top_p']}, repetition penalty {settings['repetition_penalty']}, seed {settings['seed']}, at most "
        f"{settings['max_new_tokens']} tokens. The base is asked "
        "as `python -m mmadapter chat --adapter none` asks it. Long lines are wrapped here; the JSON lines beside this "
        "file have the exact texts.\n",
    ]
    for number, entry in enumerate(entries, 1):
        parts.append(f"## {number}. {' '.join(entry['instruction'].split())}\n")
        if entry["input"]:
            parts.append(f"Input:\n\n{fenced(entry['input'])}")
        for model, title in (("base", "Base"), ("adapter", "Adapter")):
            cut = " (cut off)" if entry[model]["finish"] == "length" else ""
            parts.append(f"**{title}**{cut}\n\n{fenced(entry[model]['text'])}")
    return "\n".join(parts)


def fenced(text: str) -> str:
    """A text as a Markdown block that shows it as it is, whatever marks it holds, its long lines wrapped."""
    lines = []
    for line in text.splitlines():
        lines += textwrap.wrap(line, LINE_WIDTH, drop_whitespace=False, break_on_hyphens=False) or [""]
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n" + "".join(line.rstrip() + "\n" for line in lines) + f"{fence}\n"
