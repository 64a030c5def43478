"""How right an answer is: exact match and F1 as SQuAD counts them, and WUPS, which forgives near misses.

SQuAD: Rajpurkar et al. 2016, arXiv 1606.05250. WUPS: Malinowski and Fritz 2014, arXiv 1410.0210.
"""

from __future__ import annotations

import functools
import io
import math
import os
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

Similarity = Callable[[str, str], float]  # of two words or terms, from 0 to 1

WUPS_THRESHOLDS = {"wups_0.9": 0.9, "wups_0.0": 0.0}
BELOW_THRESHOLD = 0.1  # what a similarity below the threshold is multiplied by

SYSTEM_WORDNET = ("/usr/share/wordnet",)
WORDNET_FILES = tuple(f"{kind}.{part}" for kind in ("data", "index") for part in ("noun", "verb", "adj", "adv"))
LEXICOGRAPHER_FILES = 45
GET_WORDNET = "install Debian's wordnet-base, or run python -m nltk.downloader wordnet"

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NUMBER = re.compile(r"[-+]?\d[\d.,]*")


def normalise(text: str) -> str:
    """Lower case without (ASCII) punctuation, articles and more than one blank between words; SQuAD's rule."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the answer is one of the references after `normalise`, else 0."""
    return float(normalise(answer) in map(normalise, references))


def f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of the precision and recall of words, of the reference that it is highest for.

    Where the answer or the reference has no words (an unanswerable question), it is 1 if neither has, else 0.
    """
    return max(_f1(normalise(answer).split(), normalise(reference).split()) for reference in references)


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = (Counter(answer) & Counter(reference)).total()
    return 2 * common / (len(answer) + len(reference))


def wups(answer: str, references: Sequence[str], similarity: Similarity, threshold: float) -> float:
    """Malinowski and Fritz's score of a set of answers, of the reference that it is highest for.

    Answers are separated by commas. Each counts by its nearest one on the other side, those of a side are multiplied,
    and of the two sides the lower product is the score. A similarity below the threshold is worth a tenth.

    Args:
        similarity: Wu-Palmer similarity; see `wordnet_similarity`.
        threshold: 0.9 wants nearly the same thing, 0.0 takes every similarity as it is.
    """

    def weighted(one: str, other: str) -> float:
        value = similarity(one, other)
        return value if value >= threshold else BELOW_THRESHOLD * value

    def covered(items: Sequence[str], by: Sequence[str]) -> float:
        return math.prod(max(weighted(item, other) for other in by) for item in items)

    given = answer_set(answer)
    sides = [(given, answer_set(reference)) for reference in references]
    return max(min(covered(a, t), covered(t, a)) if a and t else float(a == t) for a, t in sides)


def answer_set(text: str) -> list[str]:
    """The different answers between commas, as WordNet writes terms: "Wine glass, cup." is wine_glass and cup."""
    items = ("_".join(part.lower().replace("_", " ").strip(" .").split()) for part in text.split(","))
    return list(dict.fromkeys(filter(None, items)))


def wordnet_similarity() -> Similarity:
    """Wu-Palmer similarity (Wu and Palmer 1994) of the nearest noun senses of two terms in WordNet.

    The same term has 1, whether WordNet knows it or not; one that it does not know has 0 with any other.

    Raises:
        LookupError: nltk or WordNet is not installed; the message says what to do.
    """
    wordnet = open_wordnet()

    @functools.cache
    def senses(term: str) -> list:
        return wordnet.synsets(term, pos="n")

    @functools.cache
    def similarity(one: str, other: str) -> float:
        if one == other:
            return 1.0
        pairs = (a.wup_similarity(b) for a in senses(one) for b in senses(other))
        return max((value for value in pairs if value is not None), default=0.0)

    return similarity


def open_wordnet() -> WordNetCorpusReader:
    """WordNet of nltk's data, else that of the system: the folder `WNSEARCHDIR` names, or Debian's.

    Raises:
        LookupError: nltk is not installed, or there is no WordNet at any of these places.
    """
    try:
        from nltk.corpus import wordnet
    except ImportError:
        raise LookupError(f"nltk is not installed; run pip install nltk, and for its WordNet {GET_WORDNET}") from None
    try:
        wordnet.ensure_loaded()
        return wordnet
    except LookupError:
        pass
    folders = [*filter(None, [os.environ.get("WNSEARCHDIR")]), *SYSTEM_WORDNET]
    for folder in folders:
        if all((Path(folder) / name).is_file() for name in WORDNET_FILES):
            return _read_wordnet(folder)
    raise LookupError(f"there is no WordNet in nltk's data nor in {' or '.join(folders)}; {GET_WORDNET}")


@functools.cache
def _read_wordnet(folder: str) -> WordNetCorpusReader:
    """Reads the database files that WordNet's own programs use, by nltk, which expects a little more than they."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class SystemWordNet(WordNetCorpusReader):
        def open(self, file: str) -> IO[str]:
            if file == "lexnames":  # names of the lexicographers' files; no package has the list, and nothing shows it
                return io.StringIO("".join(f"{number}\tunnamed\t0\n" for number in range(LEXICOGRAPHER_FILES)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """A mapping to the WordNet of nltk's data, for other languages: there is none to map to."""

    if folder not in nltk.data.path:  # nltk reads nowhere else
        nltk.data.path.append(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there are no other languages
        return SystemWordNet(folder, None)


def answer_type(reference: str) -> str:
    """What kind of answer a question has: "unanswerable", "number", "one word" or "several words"."""
    if _NUMBER.fullmatch(reference.strip()):
        return "number"
    words = len(normalise(reference).split())
    return "unanswerable" if not reference.strip() else "one word" if words <= 1 else "several words"
