"""What the evaluations share: the fields of every result file, and answers that a stopped run goes on from."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapter.record import file_sha256, git_commit

if TYPE_CHECKING:
    from mmadapter.session import Session

# What a base in a folder is made of: its tensors and its shape.
BASE_FILES = ("*.safetensors", "consolidated.*.pth", "config.json", "params.json")
PICTURE_PACKAGES = ("pillow", "open_clip_torch")  # what, beside timm, a picture is read and encoded with


def check_options(
    parser: argparse.ArgumentParser, args: argparse.Namespace, *, model_only: Sequence[str], from_one: Sequence[str]
) -> None:
    """Ends the program (misuse) unless answers come from a file or from a model, and no option is of the other kind.

    Args:
        model_only: Options about a model that answers, None where they are not given.
        from_one: Options that are numbers from 1.
    """
    if (args.predictions is None) == (args.adapter is None):
        parser.error("give either --predictions FILE or --adapter A (none is the base model)")
    given = [name for name in model_only if getattr(args, name) is not None]
    if args.predictions is not None and given:
        parser.error(f"--{given[0].replace('_', '-')} is about a model that answers; it goes with --adapter")
    for name in from_one:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")


def add_out_option(group: argparse._ActionsContainer) -> None:
    """Adds `--out`, the file of `kept_answers`."""
    group.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="keep the model's answers as JSON lines; a run that was stopped goes on from there",
    )


def result_record(
    args: argparse.Namespace,
    command: str,
    started: float,
    *,
    task: str,
    version: int,
    scores: Mapping[str, Any],
    settings: Mapping[str, Any],
    model: Mapping[str, Any] | None,
    data_hash: object,
    predictions: Sequence[Mapping[str, Any]],
    packages: Sequence[str],
    **programs: str | None,
) -> dict[str, Any]:
    """The content of a result file: for every task the same fields around its own scores and settings.

    Args:
        args: Of the command line, which may have `seed`, `shots`, `limit` and `predictions`. Where the answers come
            from a file, `seed` and `shots` are those that its model was asked with, as far as it says.
        command: The command line itself.
        started: `time.monotonic()` when it began.
        task: Which evaluation this is.
        version: Of the task; another one gives other scores for the same answers.
        scores: They come first, under their own names.
        settings: What else the scores are about, such as the split.
        model: What decided the answers, begun by `model_identity`; None where that is not known.
        data_hash: SHA-256 of what is scored against.
        predictions: What was answered to each example, and how it scored.
        packages: As for `provenance`.
        **programs: As for `provenance`.
    """
    known = model or {}
    from_file = getattr(args, "predictions", None)
    shots, seed = known.get("shots"), args.seed
    shot_count = len(shots) if isinstance(shots, list) else getattr(args, "shots", None) or 0
    if from_file is not None and shot_count:
        seed = known.get("seed")  # this command's chose no shots
    return {
        **scores,
        "task": task,
        "version": version,
        "limit": getattr(args, "limit", None),
        "seed": seed,
        "shots": shot_count,
        **settings,
        "adapter": known.get("adapter"),
        "adapter_hash": known.get("adapter_hash"),
        "base": known.get("llama"),
        "base_hash": known.get("base_hash"),
        "base_fingerprint": known.get("base_fingerprint"),
        "model": model,
        **provenance(command, packages, **programs),
        "data_hash": data_hash,
        "predictions_hash": None if from_file is None else file_sha256(from_file),
        "seconds": round(time.monotonic() - started, 1),
        "predictions": predictions,
    }


def provenance(command: str, packages: Sequence[str], **programs: str | None) -> dict[str, Any]:
    """What any result is recorded with: the command, the commit, versions and the time (UTC).

    Args:
        command: The command line that gives the result.
        packages: Those that had a part in it, beside mmadapter and torch; the version of one not installed is None.
        **programs: Versions of what else had, beside Python.
    """
    found = {"python": sys.version.split()[0], **programs}
    for package in ("mmadapter", "torch", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return {
        "command": command,
        "git_commit": git_commit(),
        "versions": found,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def prepare_outputs(*paths: Path | None) -> None:
    """Makes the folders of the files that a command will write: better now than after an hour of work.

    Raises:
        ValueError: A path is a folder.
    """
    for path in paths:
        if path is not None:
            if path.is_dir():
                raise ValueError(f"{path} is a folder; give a file name")
            path.parent.mkdir(parents=True, exist_ok=True)


def model_identity(args: argparse.Namespace) -> dict[str, Any]:
    """The model that the options name, by name and by content: one trained anew under the same name is another.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: The adapter or the base is not there or damaged.
    """
    from mmadapter.options import resolve_dtype

    return {
        **{name: getattr(args, name) for name in ("llama", "adapter", "vision", "prompt_length", "gate")},
        "dtype": str(resolve_dtype(args.dtype, args.device)).removeprefix("torch."),
        **({"seed": args.seed} if args.shots else {}),  # without shots it decides nothing
        "adapter_hash": None if args.adapter == "none" else adapter_hash(args.adapter),
        **base_identity(args.llama),
    }


def base_identity(spec: str) -> dict[str, Any]:
    """SHA-256 of a base's weight files, and its fingerprint of shapes and vocabulary; no tensor is loaded.

    Of a folder it is the hash of its files' names and hashes.
    """
    from mmadapter.checkpoint import Fingerprint
    from mmadapter.weights import open_weights

    weights = open_weights(spec)
    tokenizer = weights.tokenizer()
    fingerprint = Fingerprint.of(weights.config, None if tokenizer is None else tokenizer.tokens())
    if weights.path.is_file():
        digest = file_sha256(weights.path)
    else:
        files = sorted(path for pattern in BASE_FILES for path in weights.path.glob(pattern))
        digest = hashlib.sha256("".join(f"{path.name} {file_sha256(path)}\n" for path in files).encode()).hexdigest()
    return {"base_hash": digest, "base_fingerprint": dataclasses.asdict(fingerprint)}


def adapter_hash(name: str) -> str:
    """SHA-256 of the adapter's weights: one trained anew under the same name is another model."""
    from mmadapter.checkpoint import FILE_NAME, find_adapter

    path = find_adapter(name)
    if path.is_dir():
        names = (FILE_NAME, "adapter_model.safetensors", "adapter_model.bin")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds no adapter: none of {', '.join(names)} is in it")
        path = found[0]
    return file_sha256(path)


def kept_line(answer: dict[str, Any], model: dict[str, Any]) -> str:
    """A line of a file of answers: the answer, and the settings that decided it.

    With these, two models' answers cannot mix in one file.
    """
    return json.dumps({**answer, "model": model}, ensure_ascii=False) + "\n"


def keep(path: Path | None, answers: Iterable[dict[str, Any]], model: dict[str, Any]) -> None:
    """Adds answers to the file that a stopped run goes on from, if there is to be one."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(kept_line(answer, model) for answer in answers)


def kept_answers(
    path: Path | None, model: dict[str, Any], fields: Sequence[str], what: str, option: str, wanted: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """What `read_kept` gives, by the first field; how many of the wanted ones that are is said on standard error."""
    if path is None:
        return {}
    answers = {answer[fields[0]]: answer for answer in read_kept(path, model, fields, what, option)}
    asked = list(wanted)
    found = sum(key in answers for key in asked)
    if found:
        note(f"{found} of {len(asked)} {what}s are in {path}; delete it to redo them")
    return answers


def read_kept(path: Path, model: dict[str, Any], fields: Sequence[str], what: str, option: str) -> list[dict[str, Any]]:
    """The answers that an earlier run of the same model left in `path`, none if there is no such file.

    A line that the earlier run was stopped in is cut off the file.

    Args:
        fields: What every answer has, the first of them at its beginning.
        what: What an answer is called in errors, such as "caption".
        option: The option that names the file.

    Raises:
        ValueError: The file holds something else, or another model's answers; it stays as it is.
    """
    if not path.exists():
        return []
    not_kept = f"is no {what} that this command kept; name another {option}"
    content = path.read_bytes()
    complete, _, torn = content.rpartition(b"\n")
    answers = []
    for number, line in enumerate(filter(None, complete.split(b"\n")), 1):
        try:
            answer = json.loads(line)
            other = answer.pop("model")
            fits = all(field in answer for field in fields) and isinstance(other, dict)
        except (ValueError, KeyError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise ValueError(f"{path}, line {number} {not_kept}")
        if other != model:
            raise ValueError(
                f"{path} holds {what}s of another model ({_differences(other, model)}); delete it or name another "
                f"{option}"
            )
        answers.append(answer)
    if torn:
        if not f'{{"{fields[0]}": '.encode().startswith(torn[: len(fields[0]) + 5]):
            raise ValueError(f"{path}, last line {not_kept}")
        os.truncate(path, len(content) - len(torn))
    return answers


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Where two models' settings differ, the first three of them."""
    found = []
    for name in (*here, *(there.keys() - here.keys())):
        if there.get(name) != here.get(name):
            old, new = (f"{json.dumps(settings.get(name), ensure_ascii=False):.60}" for settings in (there, here))
            found.append(f"{name} {old} there, {new} now" if old != new else f"other {name}")
    return "; ".join(found[:3]) or "it says less about its settings"


def kept_model(path: Path) -> dict[str, Any] | None:
    """The model whose answers a file of predictions holds, None where the file does not say or there are several."""
    model = None
    with path.open(encoding="utf-8-sig") as file:
        for line in filter(str.strip, file):
            try:
                found = json.loads(line).get("model")
            except (ValueError, AttributeError):
                return None
            if not isinstance(found, dict) or found != (model or found):
                return None
            model = found
    return model


def note(message: str) -> None:
    """Says something beside the result, on standard error."""
    print(message, file=sys.stderr, flush=True)


def sees(session: Session) -> bool:
    """Whether the adapter in use was trained with images; the others are asked without, also where there is one."""
    return session.about is not None and session.about.vision is not None
