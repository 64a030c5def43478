"""CIDEr-D (arXiv 1411.5726) of one caption at a time, as the reward of self-critical training.

The figures are those of pycocoevalcap's scorer over the same references; that one scores whole corpora only, and
weighs its n-grams anew each time.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

N_GRAMS = 4
SIGMA = 6.0  # of the Gaussian length penalty, in words

Weights = list[dict[tuple[str, ...], float]]  # for n = 1 to 4, the tf-idf weight of each n-gram


def words(caption: str) -> list[str]:
    """Lower-case words; the full stop counts as one, so that a caption is paid for ending where people's do."""
    return re.findall(r"[a-z0-9']+|\.", caption.lower())


class CiderD:
    """Scores captions against the references of a fixed set of images.

    Args:
        references: The reference captions of each image; document frequencies are counted over them.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self.references = [[words(caption) for caption in captions] for captions in references]
        self.frequency = Counter(
            gram for captions in self.references for gram in {gram for caption in captions for gram in _grams(caption)}
        )
        self.log_images = math.log(len(references))

    def score(self, image: int, caption: str) -> float:
        """CIDEr-D of a caption of image number `image`; 10 is a perfect match with every reference."""
        tokens = words(caption)
        weights = self._weights(tokens)
        total = 0.0
        for reference in self.references[image]:
            penalty = math.exp(-((len(tokens) - len(reference)) ** 2) / (2 * SIGMA**2))
            # Weighed here, each time: the weights of all of COCO's references would fill 4 GB.
            pairs = zip(weights, self._weights(reference), strict=True)
            total += penalty * sum(_similarity(*pair) for pair in pairs) / N_GRAMS
        return 10 * total / len(self.references[image])

    def _weights(self, tokens: list[str]) -> Weights:
        weights: Weights = [{} for _ in range(N_GRAMS)]
        for gram, count in Counter(_grams(tokens)).items():
            weights[len(gram) - 1][gram] = count * (self.log_images - math.log(max(1, self.frequency[gram])))
        return weights


def _grams(tokens: list[str]) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for n in range(1, N_GRAMS + 1) for i in range(len(tokens) - n + 1)]


def _similarity(caption: dict, reference: dict) -> float:
    """Cosine with the caption's weights clipped to the reference's, so that repeating a word earns nothing."""
    norms = math.sqrt(sum(w * w for w in caption.values())) * math.sqrt(sum(w * w for w in reference.values()))
    if norms == 0:
        return 0.0
    return (
        sum(min(weight, reference.get(gram, 0.0)) * reference.get(gram, 0.0) for gram, weight in caption.items())
        / norms
    )
