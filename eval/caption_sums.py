"""Caption scores from what each image adds to them, so that images can be drawn anew: BLEU and METEOR are of sums.

The formulas are those of the programs that gave the scores, pycocoevalcap's BLEU and METEOR 1.5.
Shapes: I images, S sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.statistics import Pooled, Ratio, Sums

MEANS = ("ROUGE_L", "CIDEr", "SPICE")
# English settings of METEOR 1.5 (Denkowski and Lavie 2014, section 5): of recall in the harmonic mean, of the penalty's
# power and size, of content words, and of matches by form, stem, synonym and paraphrase.
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
MATCHERS = np.array([1.0, 0.6, 0.8, 0.6])
STATISTICS = 23  # numbers in a line, of which these are
WORDS, FUNCTION_WORDS, MATCHES, CHUNKS, MATCHED = slice(0, 2), slice(2, 4), slice(4, 20), 20, slice(21, 23)


def caption_sums(examples: Sequence[Mapping[str, Any]]) -> dict[str, Sums]:
    """The scores by name, each from what its images add; those that the images of an older file lack are not there.

    Args:
        examples: The images of a score file of eval.caption (`CaptionScores.of_image`).

    Raises:
        TypeError, KeyError: The images do not hold what eval.caption writes.
    """
    found: dict[str, Sums] = {}
    for name in MEANS:
        own = [example.get(name) for example in examples]
        if None not in own:
            found[name] = Ratio.mean(own)
    counts = [example.get("BLEU") for example in examples]
    if None not in counts:
        lengths = [[own["length"], own["reference_length"]] for own in counts]
        for n in range(1, 5):
            rows = [[*ends, *own["matched"][:n], *own["total"][:n]] for ends, own in zip(lengths, counts, strict=True)]
            found[f"Bleu_{n}"] = Pooled(_table(rows, 2 + 2 * n), bleu)
    lines = [example.get("METEOR_statistics") for example in examples]
    if None not in lines:
        columns = _table([line.split() for line in lines], STATISTICS)
        matches = columns[:, MATCHES].reshape(-1, 4, 2, 2).sum(axis=(1, 2))  # [I, 2]
        same = (matches == columns[:, WORDS]).all(axis=1) & (columns[:, CHUNKS] == 1)
        columns[same, CHUNKS] = 0  # METEOR does not count the one chunk of a caption that is a reference
        found["METEOR"] = Pooled(columns, meteor)
    return found


def bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU-n [...] (Papineni et al. 2002) of sums [..., 2 + 2n].

    These are the captions' length, that of the references nearest to it, the matched n-grams for 1 to n and all of
    them. As in pycocoevalcap, what is nothing counts as a little more than nothing.
    """
    length, reference_length = sums[..., 0], sums[..., 1]
    matched, total = np.split(sums[..., 2:], 2, axis=-1)  # [..., n] each
    precision = ((matched + 1e-15) / (total + 1e-9)).prod(axis=-1) ** (1 / matched.shape[-1])
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    return precision * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def meteor(sums: np.ndarray) -> np.ndarray:
    """METEOR [...] of sums [..., 23] of its statistics.

    These are the words of caption and reference, the function words of each; for each of the four matchers the matched
    content words of caption and reference and the matched function words of each; the chunks that matches stand in;
    and the matched words of each.
    """
    words, function = sums[..., WORDS], sums[..., FUNCTION_WORDS]  # [..., 2]: of caption and reference
    matches = sums[..., MATCHES].reshape(*sums.shape[:-1], 4, 2, 2)  # [..., matcher, content or function, side]
    weights = np.array([DELTA, 1 - DELTA])
    # Weighted matches of each side over its weighted words: precision and recall, [..., 2].
    right = np.einsum("...mks,m,k->...s", matches, MATCHERS, weights)
    all_words = DELTA * (words - function) + (1 - DELTA) * function
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = np.moveaxis(right / all_words, -1, 0)
        mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
        score = mean * (1 - GAMMA * (sums[..., CHUNKS] / sums[..., MATCHED].mean(axis=-1)) ** BETA)
    return np.where((precision > 0) & (recall > 0), score, 0.0)


def _table(rows: Sequence[Sequence[object]], width: int) -> np.ndarray:
    """Numbers of each image, float64 [I, width]."""
    if any(len(row) != width for row in rows):
        raise TypeError(f"expected {width} numbers of each image")
    try:
        return np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise TypeError(str(error)) from None
