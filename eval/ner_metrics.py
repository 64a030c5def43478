"""Precision, recall and F1 of named entities by the rules of the HIPE shared tasks (Ehrmann et al. 2022).

Strict takes an entity as right if its type and both its boundaries are; fuzzy, if its type is and it overlaps. Entities
are paired within a document: first those that agree in all, then, in reading order, each predicted one with the first
gold one that it overlaps and that has no partner yet, whatever its type. So each gold entity counts once. A prediction
that is paired with a gold entity of another type is a false positive of the gold entity's type; that is how the
published scores by type are counted (the sum over types, ALL, does not depend on it).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from eval.hipe import Span

MATCHES = ("strict", "fuzzy")
Counts = Counter[tuple[str, str, str]]  # how often, by match, type, and TP, FP or FN


def count_spans(gold: Sequence[Span], predicted: Sequence[Span], nowhere: Sequence[str] = ()) -> Counts:
    """Counts one document.

    Args:
        gold: Its entities, in reading order.
        predicted: No two of them share a token.
        nowhere: Types of predicted entities that do not stand in the document: each is a false positive.
    """
    counts: Counts = Counter()
    exact = set(gold) & set(predicted)
    free = [span for span in gold if span not in exact]
    for span in sorted(predicted, key=lambda span: span.start):
        if span in exact:
            counts.update((match, span.type, "TP") for match in MATCHES)
            continue
        partner = next((other for other in free if span.start < other.end and other.start < span.end), None)
        if partner is not None:
            free.remove(partner)
        charged = span.type if partner is None else partner.type
        counts["strict", charged, "FP"] += 1
        counts["fuzzy", charged, "TP" if partner is not None and partner.type == span.type else "FP"] += 1
    counts.update((match, kind, "FP") for match in MATCHES for kind in nowhere)
    for kind, number in Counter(span.type for span in gold).items():
        for match in MATCHES:
            counts[match, kind, "FN"] = number - counts[match, kind, "TP"]
    return counts


def scores(counts: Counts) -> dict[str, dict[str, dict[str, float]]]:
    """P, R, F1, TP, FP, FN by match and by ALL or type; a rate of nothing is 0, as in the published scores."""
    types = sorted({kind for (_, kind, _), number in counts.items() if number})
    return {
        match: {
            "ALL": rates({name: sum(counts[match, kind, name] for kind in types) for name in ("TP", "FP", "FN")}),
            **{kind: rates({name: counts[match, kind, name] for name in ("TP", "FP", "FN")}) for kind in types},
        }
        for match in MATCHES
    }


def rates(counts: Mapping[str, int]) -> dict[str, float]:
    """Precision, recall and F1 of counts, between 0 and 1, beside the counts themselves."""
    right, wrong, missed = counts["TP"], counts["FP"], counts["FN"]
    return {
        "P": right / (right + wrong) if right else 0.0,
        "R": right / (right + missed) if right else 0.0,
        "F1": 2 * right / (2 * right + wrong + missed) if right else 0.0,
        **counts,
    }
