"""Starting: from the start of a process to the first token, and to the text of `--help`, against transformers and a
bare interpreter."""

from __future__ import annotations

import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

from eval.speed_base import Base, Setting, child_environment, python
from eval.speed_peers import Absent, require
from eval.speed_rounds import Case, Comparison, Contender, Sample, Timed
from eval.speed_rounds import interleave as run_in_turn

QUANTITY, PROCESSOR = "s", "s of the processor"
PROMPT = "What is the capital of France?"
HELP_ROUNDS = 3  # for each round of the others: it is over soon
OURS, THEIRS, HELP, BARE = "ours", "transformers", "--help", "bare interpreter"
TOKENIZER = "transformers, its tokenizer alone"

# What a user of transformers writes: folder, GGUF file or nothing, number format, device and text are its arguments.
THEIR_PROGRAM = """
import sys, time
import torch, transformers
folder, file, dtype, device, text = sys.argv[1:]
options = {"gguf_file": file} if file else {}
began = time.perf_counter()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
tokenizing = time.perf_counter() - began
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options).to(device)
tokens = tokenizer(text, return_tensors="pt").to(device)
found = model.generate(**tokens, max_new_tokens=1, do_sample=False)
print("token", int(found[0, -1]), "after", tokenizing, flush=True)
"""


def start(setting: Setting, base: Base) -> list[Case]:
    """Process start to first token, and to help."""
    return [_first_token(setting, base), _help(setting)]


def _first_token(setting: Setting, base: Base) -> Case:
    dtype = setting.float_dtype if setting.dtype == "auto" else setting.dtype
    left_out: dict[str, str] = {}
    ours = python("-m", "mmadapter", "chat", "--llama", setting.llama, "--dtype", dtype, "--device", setting.device)
    ours += ["--prompt", PROMPT, "--max-new-tokens", "4"]
    starts = {OURS: Starts(lambda: first_output(ours, setting.threads))}
    try:
        require("transformers")
        theirs = python("-c", THEIR_PROGRAM, *_their_file(base), setting.float_dtype, setting.device, PROMPT)
        starts[THEIRS] = Starts(lambda: first_output(theirs, setting.threads, "token "))
    except Absent as reason:
        left_out[THEIRS] = str(reason)
    samples = measure(starts, setting.rounds)
    if THEIRS in starts:
        tokenizing = [float(start.line.split()[-1]) for start in starts[THEIRS].last(setting.rounds)]
        samples += [Sample(TOKENIZER, QUANTITY, number, seconds) for number, seconds in enumerate(tokenizing)]
    comparisons = [
        Comparison(OURS, THEIRS, QUANTITY, 0.5, at_most=True),
        Comparison(OURS, THEIRS, PROCESSOR),
    ]
    title = f"process start to first token on a warm cache, the same file, {dtype}"
    return Case("start", title, samples, comparisons, left_out, {"dtype": dtype, "prompt": PROMPT})


def _help(setting: Setting) -> Case:
    helping, bare = python("-m", "mmadapter", "--help"), python("-c", "print()")
    starts = {
        HELP: Starts(lambda: first_output(helping, setting.threads, to_end=True)),
        BARE: Starts(lambda: first_output(bare, setting.threads, to_end=True)),
    }
    comparisons = [
        Comparison(HELP, BARE, QUANTITY, 0.3, at_most=True, difference=True),
        Comparison(HELP, BARE, PROCESSOR, difference=True),
    ]
    samples = measure(starts, HELP_ROUNDS * setting.rounds)
    return Case("start", "python -m mmadapter --help, from start to end", samples, comparisons)


def measure(starts: dict[str, Starts], rounds: int) -> list[Sample]:
    """Seconds until the output, and those of the processor, which a neighbour's load does not lengthen as much."""
    samples = run_in_turn([Contender(name, run) for name, run in starts.items()], rounds, QUANTITY)
    for name, run in starts.items():
        samples += [Sample(name, PROCESSOR, number, start.processor) for number, start in enumerate(run.last(rounds))]
    return samples


class Start(NamedTuple):
    """One start of a process.

    Attributes:
        seconds: From the start to the output that was waited for.
        line: The output.
        processor: Seconds that the processor worked for the whole process.
    """

    seconds: float
    line: str
    processor: float


class Starts:
    """A process that is started again and again, and all that was noted of it."""

    def __init__(self, run: Callable[[], Start]) -> None:
        self.run, self.noted = run, []

    def __call__(self) -> Timed:
        self.noted.append(self.run())
        return Timed(self.noted[-1].seconds, 1)

    def last(self, count: int) -> list[Start]:
        """The latest starts: those of the warm-up came before."""
        return self.noted[-count:]


def _their_file(base: Base) -> list[str]:
    """Folder and GGUF file (or nothing) for transformers.

    Raises:
        Absent: It does not read the base.
    """
    if base.gguf is not None:
        return [str(base.gguf.parent), base.gguf.name]
    folder = base.path if base.path.is_dir() else base.path.parent
    if not (folder / "config.json").is_file():
        raise Absent("transformers reads GGUF files and Hugging Face's folders only")
    return [str(folder), ""]


def first_output(command: list[str], threads: int, wanted: str = "", to_end: bool = False) -> Start:
    """Starts a process and waits for its first output.

    Args:
        wanted: How the line begins that is waited for; none is the first character of all.
        to_end: Waits for the end of the process.

    Raises:
        OSError: The process failed, or ended without that output.
    """
    before, began = _processor_of_children(), time.perf_counter()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,  # a pipe that nobody reads fills up
        subprocess.Popen(
            command, env=child_environment(threads), stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        ) as process,
    ):
        line = process.stdout.read(1)
        while wanted and line:
            line += process.stdout.readline()
            if line.startswith(wanted):
                break
            line = process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.stdout.read()
        process.wait()
        if to_end:
            seconds = time.perf_counter() - began
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if process.returncode or not line:
        reason = (said or ["it said nothing"])[-1]
        raise OSError(f"{' '.join(command[1:4])[:60]} ... gave no first token: {reason}")
    return Start(seconds, line, _processor_of_children() - before)


def _processor_of_children() -> float:
    """Seconds that the processor has worked for processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
