"""What the evaluations share: their common options, and the fields of every result file."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapter.record import file_sha256, git_commit, replacing, require_place, write_json

if TYPE_CHECKING:
    from eval.kept import Made
    from mmadapter.sampling import Sampling
    from mmadapter.session import Session

# What a base in a folder is made of: its tensors and its shape.
BASE_FILES = ("*.safetensors", "consolidated.*.pth", "config.json", "params.json")
PICTURE_PACKAGES = ("pillow", "open_clip_torch")  # what, beside timm, a picture is read and encoded with


@dataclasses.dataclass(frozen=True)
class Start:
    """When a command began, and at which commit; a later one may be checked out before it ends.

    Attributes:
        time: Of `time.monotonic`.
        commit: As `git_commit` gives it.
    """

    time: float
    commit: str | None

    @classmethod
    def now(cls) -> Start:
        return cls(time.monotonic(), git_commit())


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


def add_result_options(group: argparse._ActionsContainer, each: str) -> None:
    """Adds `--json` and `--examples`, the files of `write_result`.

    Args:
        each: What is kept of every example, such as "every answer".
    """
    group.add_argument("--json", metavar="OUT", type=Path, help=f"write scores, provenance and {each} to OUT")
    group.add_argument(
        "--examples",
        metavar="FILE",
        type=Path,
        help=f"write {each} as JSON lines to FILE, in the folder of OUT, and to OUT its name and SHA-256",
    )


def check_result_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program (misuse) unless `--examples` names a file beside that of `--json`."""
    if args.examples is not None:
        if args.json is None:
            parser.error("--examples goes with --json OUT")
        if args.examples.resolve().parent != args.json.resolve().parent or args.examples.name == args.json.name:
            parser.error("--examples must be another file in the folder of --json, where eval.report looks for it")


def result_record(
    args: argparse.Namespace,
    command: str,
    started: Start,
    *,
    task: str,
    version: int,
    scores: Mapping[str, Any],
    settings: Mapping[str, Any],
    model: Mapping[str, Any] | None,
    data_hash: object,
    predictions: Sequence[Mapping[str, Any]],
    packages: Sequence[str],
    made: Made | None = None,
    images_hash: str | None = None,
    **programs: str | None,
) -> dict[str, Any]:
    """The content of a result file: for every task the same fields around its own scores and settings.

    Args:
        args: Of the command line, which may have `seed`, `shots`, `limit` and `predictions`. Where the answers come
            from a file, `seed` and `shots` are those that its model was asked with, as far as it says.
        command: The command line itself.
        started: When it began. `seconds` are those since then and those that earlier runs took over the answers.
        task: Which evaluation this is.
        version: Of the task; another one gives other scores for the same answers.
        scores: They come first, under their own names.
        settings: What else the scores are about, such as the split.
        model: What decided the answers, begun by `model_identity`; None where that is not known.
        data_hash: SHA-256 of what is scored against.
        predictions: What was answered to each example, and how it scored.
        packages: As for `provenance`.
        made: How the answers came about; None where all were made here.
        images_hash: What the function of that name gives for the pictures that the model saw, None where it saw none.
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
        "git_commit": started.commit,
        "answers_made_by": [started.commit or "unknown"] if made is None else list(made.commits),
        "data_hash": data_hash,
        "images_hash": images_hash,
        "predictions_hash": None if from_file is None else file_sha256(from_file),
        "seconds": round(time.monotonic() - started.time + (0.0 if made is None else made.seconds), 1),
        "predictions": predictions,
    }


def provenance(command: str, packages: Sequence[str], **programs: str | None) -> dict[str, Any]:
    """What any result is recorded with: the command, the commit, versions and the time (UTC).

    Args:
        command: The command line that gives the result.
        packages: As for `versions`.
        **programs: As for `versions`.
    """
    return {
        "command": command,
        "git_commit": git_commit(),
        "versions": versions(packages, **programs),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions(packages: Sequence[str], **programs: str | None) -> dict[str, str | None]:
    """Versions of Python, mmadapter, torch, numpy and of what else had a part in a result.

    Args:
        packages: The version of one not installed is None.
        **programs: Versions of what is no package.
    """
    found = {"python": sys.version.split()[0], **programs, "mmadapter": own_version()}
    for package in ("torch", "numpy", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


@functools.cache
def own_version() -> str | None:
    """The version of this package as installed, else as its `pyproject.toml` says."""
    try:
        return metadata.version("mmadapter")
    except metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"] if project.is_file() else None


def write_result(args: argparse.Namespace, record: Mapping[str, Any]) -> None:
    """Writes a result file to `--json`, if one is asked for; its predictions to `--examples`, if that is given."""
    if args.json is None:
        return
    if args.examples is not None:
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in record["predictions"]]
        with replacing(args.examples) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
        record = {name: value for name, value in record.items() if name != "predictions"}
        record["predictions_file"] = args.examples.name
        record["predictions_file_hash"] = file_sha256(args.examples)
    write_json(args.json, record)


def images_hash(pictures: Mapping[str, Path]) -> str | None:
    """SHA-256 of the ids and file contents of pictures, in the order of the ids; None where there are none.

    Args:
        pictures: Files by the ids of their examples.
    """
    digests = {path: file_sha256(path) for path in set(pictures.values())}
    lines = [f"{name} {digests[pictures[name]]}\n" for name in sorted(pictures)]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None


def prepare_outputs(*paths: Path | None) -> None:
    """Makes the folders of the files that a command will write: better now than after an hour of work.

    Raises:
        ValueError: A path is a folder, or nothing can be written there.
    """
    for path in paths:
        if path is not None:
            require_place(path)
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


def decoding(sampling: Sampling) -> dict[str, Any]:
    """All settings of a decoding, those left to the adapter or the task too, as JSON gives them back."""
    return {**dataclasses.asdict(sampling), "stop": list(sampling.stop)}


def task_decoding(adapter: str, task: str, settings: Mapping[str, object]) -> dict[str, Any]:
    """The `decoding` that `Session.sampling` would give, of an adapter that is not loaded.

    Args:
        adapter: As `--adapter`; "none" is the base model.
    """
    from mmadapter.checkpoint import FILE_NAME, find_adapter, read_about
    from mmadapter.wording import task_sampling

    about = None
    if adapter != "none":
        path = find_adapter(adapter)
        path = path / FILE_NAME if path.is_dir() else path
        # Other kinds of adapters have no settings of their own.
        about = read_about(path) if path.suffix == ".safetensors" and path.is_file() else None
    return decoding(task_sampling(about, task, settings))


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


def note(message: str) -> None:
    """Says something beside the result, on standard error."""
    print(message, file=sys.stderr, flush=True)


def sees(session: Session) -> bool:
    """Whether the adapter in use was trained with images; the others are asked without, also where there is one."""
    return session.about is not None and session.about.vision is not None
