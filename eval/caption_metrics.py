"""The COCO caption metrics of pycocoevalcap, with its quirks kept away from the rest.

It prints to standard output, leaves Java processes running, waits for ever when one dies, and downloads the models of
SPICE unasked. Its numbers are not touched: they are those that papers report.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE")

# Java 16 and newer keep reflection out of these packages, and the serializer inside SPICE needs it.
SPICE_OPENS = " ".join(
    f"--add-opens=java.base/java.{package}=ALL-UNNAMED"
    for package in ("lang", "math", "util", "util.concurrent", "net", "text", "io")
)

# What the PTB tokenizer of COCO does, in little: clitics are words of their own (do n't, dog 's), hyphens, slashes and
# dots stay inside words, brackets become -lrb- and the like, and these marks are dropped.
PLAIN_TOKEN = re.compile(r"[a-z]+(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b|\w+(?:[-./:]\w+|(?<=\d),\d+)*|[^\w\s]")
PLAIN_DROPPED = frozenset("'`\"“”‘’.?!,:;-–—…")
PLAIN_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


@dataclass(frozen=True)
class CaptionScores:
    """The scores of a set of captions.

    Attributes:
        metrics: A number for each of `METRICS`, from 0 to 1 (CIDEr to 10); None for one that was left out.
        of_image: What each image has, in order. ROUGE_L, CIDEr and SPICE, whose means are the `metrics`; METEOR, whose
            mean is not; and the counts that BLEU and METEOR sum over images (`eval.caption_sums`): `BLEU` has the
            n-grams `matched` and their `total`, each for n from 1 to 4, the `length` of the caption and that of the
            reference nearest to it; `METEOR_statistics` is the line of METEOR itself.
        tokenizer: "ptb", COCO's, or "plain", see `plain_tokens`.
        left_out: Why, and what to do about it, for each metric that is None.
    """

    metrics: dict[str, float | None]
    of_image: list[dict[str, Any]]
    tokenizer: str
    left_out: dict[str, str]


def score_captions(references: Sequence[Sequence[str]], captions: Sequence[str]) -> CaptionScores:
    """Score one caption an image against that image's references.

    CIDEr weighs words by the references of all images given (Vedantam et al. 2015), so it is that of this set alone.
    METEOR and SPICE are left out where they cannot run, the others need no Java.

    Raises:
        ValueError: pycocoevalcap is missing, or its tokenizer fails although there is Java.
    """
    require_pycocoevalcap()
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    java = java_version() is not None
    tokens = ptb_tokens if java else plain_tokens
    gold = dict(enumerate(tokens(references)))  # image number -> its sentences, as pycocoevalcap takes them
    made = dict(enumerate(tokens([[caption] for caption in captions])))

    counter = BleuScorer(n=4)
    for number, references_of_image in gold.items():
        counter += (made[number][0], references_of_image)
    bleu, _ = counter.compute_score(option="closest")  # as pycocoevalcap's Bleu asks it, which hides the counts
    rouge, rouge_of_image = Rouge().compute_score(gold, made)
    cider, cider_of_image = Cider().compute_score(gold, made)
    of_image = [
        {"ROUGE_L": float(rouge), "CIDEr": float(cider), "BLEU": _bleu_counts(counts)}
        for rouge, cider, counts in zip(rouge_of_image, cider_of_image, counter.ctest, strict=True)
    ]
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    metrics |= {f"Bleu_{n}": float(score) for n, score in enumerate(bleu, 1)}
    metrics |= {"ROUGE_L": float(rouge), "CIDEr": float(cider)}
    left_out = {}
    for name, score in (("METEOR", meteor), ("SPICE", spice)):
        if not java:
            left_out[name] = (
                "it needs Java, and there is no working java on PATH; install a Java runtime, such as Debian's "
                "default-jre-headless"
            )
            continue
        try:
            metrics[name], each = score(gold, made)
        except MetricUnavailableError as error:
            left_out[name] = str(error)
        else:
            of_image = [{**own, **more} for own, more in zip(of_image, each, strict=True)]
    return CaptionScores(metrics, of_image, "ptb" if java else "plain", left_out)


def _bleu_counts(counts: dict[str, Any]) -> dict[str, Any]:
    length = counts["testlen"]
    return {
        "matched": counts["correct"],
        "total": counts["guess"],
        "length": length,
        "reference_length": min((abs(other - length), other) for other in counts["reflen"])[1],
    }


def require_pycocoevalcap() -> None:
    """Find out before an hour of captioning, not after it.

    Raises:
        ValueError: The package is not installed.
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ValueError("pycocoevalcap is needed to score captions; run: pip install pycocoevalcap")


class MetricUnavailableError(Exception):
    """A metric cannot be computed on this machine; the message says why and what to do."""


def ptb_tokens(sentences: Sequence[Sequence[str]]) -> list[list[str]]:
    """Tokenize as the COCO benchmark does (Stanford's PTB tokenizer): lower case, punctuation dropped, blanks between.

    Raises:
        ValueError: The Java program did not give a line for every sentence.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    records: dict[int | str, list[dict[str, str]]] = {
        # It works on lines: any character that ends a line in Java would move all later sentences to wrong images.
        number: [{"caption": " ".join(sentence.split())} for sentence in group]
        for number, group in enumerate(sentences)
    }
    records["end"] = [{"caption": "end"}]  # comes back in its place only if every line before it did
    with quiet() as said:
        try:
            tokens = ptbtokenizer.PTBTokenizer().tokenize(records)
        except PermissionError:
            folder = Path(ptbtokenizer.__file__).parent
            raise ValueError(
                f"pycocoevalcap writes to {folder}, which is read-only; install it in your own venv"
            ) from None
        log = last_line(said)
    if tokens.get("end") != ["end"]:
        raise ValueError(f"pycocoevalcap's tokenizer did not tokenize every sentence; Java said: {log}")
    return [tokens[number] for number in range(len(sentences))]


def plain_tokens(sentences: Sequence[Sequence[str]]) -> list[list[str]]:
    """Tokenize without Java, nearly as `ptb_tokens`: lower case, the same punctuation dropped, blanks between.

    Of the 41,485 captions of Flickr8k and of a COCO sample all but 20 come out the same; abbreviations ("Mr.", "U.S.")
    and "cannot" do not.
    """
    return [
        [
            " ".join(
                PLAIN_BRACKETS.get(token, token)
                for token in PLAIN_TOKEN.findall(sentence.lower().replace("’", "'"))
                if token not in PLAIN_DROPPED
            )
            for sentence in group
        ]
        for group in sentences
    ]


def meteor(
    references: dict[int, list[str]], captions: dict[int, list[str]]
) -> tuple[float, list[dict[str, float | str]]]:
    """METEOR 1.5 (Denkowski and Lavie 2014) of tokenized sentences; its Java process is gone afterwards.

    Returns:
        The score of all images, and `METEOR` and `METEOR_statistics` of each (see `CaptionScores`).

    Raises:
        MetricUnavailableError: The Java process ended early, or its data is not installed.
    """
    from pycocoevalcap.meteor import meteor as module

    folder = Path(module.__file__).parent
    needed = (folder / module.METEOR_JAR, folder / "data" / "paraphrase-en.gz")
    missing = [path.name for path in needed if not path.is_file()]
    if missing:
        raise MetricUnavailableError(f"{', '.join(missing)} is not in {folder}; reinstall pycocoevalcap")
    scorer = module.Meteor()
    process = scorer.meteor_p
    statistics = []
    ask = scorer._stat

    def listen(caption: str, references_of_image: list[str]) -> str:
        statistics.append(ask(caption, references_of_image))
        return statistics[-1]

    scorer._stat = listen  # it asks for each image's line once, and keeps none of them
    try:
        score, each = scorer.compute_score(references, captions)
        return float(score), [
            {"METEOR": own, "METEOR_statistics": line} for own, line in zip(each, statistics, strict=True)
        ]
    except (BrokenPipeError, ValueError):  # ValueError: it read the empty line of an ended process as a number
        process.kill()
        said = " ".join(process.stderr.read().decode(errors="replace").split()) or "nothing"
        raise MetricUnavailableError(f"its Java process ended early; it said: {said:.300}") from None
    finally:
        if scorer.lock.locked():  # else its __del__ waits for ever after an error
            scorer.lock.release()
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def spice(references: dict[int, list[str]], captions: dict[int, list[str]]) -> tuple[float, list[dict[str, float]]]:
    """SPICE (Anderson et al. 2016) of tokenized sentences, only where its parser's models are already installed.

    Returns:
        The mean over images, and `SPICE` of each.

    Raises:
        MetricUnavailableError: They are not, or the Java program fails.
    """
    from pycocoevalcap.spice import get_stanford_models
    from pycocoevalcap.spice import spice as module

    library = Path(get_stanford_models.__file__).parent / get_stanford_models.SPICELIB
    jars = [library / f"{get_stanford_models.JAR}{suffix}.jar" for suffix in ("", "-models")]
    if not all(jar.is_file() for jar in jars):
        raise MetricUnavailableError(
            f"its parser's models ({' and '.join(jar.name for jar in jars)}) are not in pycocoevalcap/spice/lib; "
            "download them with: python -m pycocoevalcap.spice.get_stanford_models"
        )
    before = os.environ.get("JDK_JAVA_OPTIONS")
    with quiet() as said:
        os.environ["JDK_JAVA_OPTIONS"] = f"{before or ''} {SPICE_OPENS}".strip()
        try:
            score, each = module.Spice().compute_score(references, captions)
        except (subprocess.CalledProcessError, OSError, ValueError) as error:
            log = last_line(said)
            raise MetricUnavailableError(f"its Java program failed ({error}); it said: {log:.300}") from None
        finally:
            if before is None:
                del os.environ["JDK_JAVA_OPTIONS"]
            else:
                os.environ["JDK_JAVA_OPTIONS"] = before
    if math.isnan(score):
        raise MetricUnavailableError("it gave no number for one of the captions")
    return float(score), [{"SPICE": float(parts["All"]["f"])} for parts in each]


@cache
def java_version() -> str | None:
    """The first line of `java -version`; None where there is no java, or one that does not run."""
    try:
        done = subprocess.run(["java", "-version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return (done.stderr or done.stdout).strip().split("\n")[0]


@contextlib.contextmanager
def quiet() -> Iterator[IO[bytes]]:
    """Send both outputs of this process and of those it starts to a file, which is yielded."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as said:
        kept = [os.dup(1), os.dup(2)]
        try:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            yield said
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in enumerate(kept, 1):
                os.dup2(copy, number)
                os.close(copy)


def last_line(said: IO[bytes]) -> str:
    """The last thing that was said, for an error; of a Java exception its message, not where it was thrown."""
    said.seek(0)
    lines = [line.strip() for line in said.read().decode(errors="replace").split("\n")]
    return next((line for line in reversed(lines) if line and not line.startswith(("at ", "..."))), "nothing")
