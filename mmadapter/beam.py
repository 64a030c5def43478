"""Beam search over a batch, with a key/value cache.

Shapes: B rows, W beams a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event

import torch
from torch import Tensor

from mmadapter.adapter import Prompts, select_prompts
from mmadapter.llama import Llama
from mmadapter.sampling import Sampling, longer, penalised, prefill, row_limits, top_tokens

LINES = 16  # whose logits a CPU looks at together


def beam_search(
    llama: Llama,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: frozenset[int],
    prompts: Prompts | None = None,
    cancelled: Event | None = None,
) -> list[tuple[list[int], bool]]:
    """For each row the finished beam of the highest log-probability / length ** length_penalty.

    The length counts the stop token. A row ends when it has W finished beams and its best live one, at its present
    length, does not beat the worst of them; a row without a finished beam at the end gives its best live one.

    Returns:
        For each row its tokens without the stop token, and whether a stop token ended them.

    Raises:
        ValueError: A row is empty, or too long for the model's context.
    """
    W = sampling.beams
    limits = row_limits(llama, rows, sampling)
    cache, valid, logits = prefill(llama, rows, max(limits, default=0), prompts, W)
    read, V = cache.length, logits.shape[-1]
    stops = torch.tensor(sorted(stop_ids), device=llama.device, dtype=torch.long)
    most = W * (len(stops) + 1)  # a beam has a candidate for each stop token: of so many at least W go on
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in rows]  # best first, W at most
    live = [[[] for _ in range(W)] for _ in rows]  # the tokens of each row's beams, best first
    active = list(range(len(rows)))
    # All beams of a row are the same at the start: only the first may be extended. Where that leaves too few, beams of
    # log-probability -inf fill up, which nothing comes of.
    scores = torch.full((len(rows), W), float("-inf"), device=llama.device)
    scores[:, 0] = 0.0
    order = torch.arange(len(rows), device=llama.device).repeat_interleave(W)
    logits = logits[order]  # [B * W, V]
    for length in range(1, max(limits) + 1):
        if cancelled is not None and cancelled.is_set():
            break
        seen = [[*rows[row], *beam] for row in active for beam in live[row]]
        values, tokens = _candidates(logits, seen, sampling.repetition_penalty, min(most, V))
        each = tokens.shape[1]
        total = scores.view(-1, 1) + values  # [B * W, candidates of a beam]
        best, index = total.view(len(active), -1).topk(min(most, W * each), dim=-1)  # [B, candidates of a row]
        chosen = tokens.view(len(active), -1).gather(1, index)
        stopped = torch.isin(chosen, stops).tolist()
        goes_on, next_scores, next_tokens, parents = [], [], [], []
        for place, row in enumerate(active):
            beams = []
            parts = (best[place].tolist(), (index[place] // each).tolist(), chosen[place].tolist())
            for rank, (score, parent, token) in enumerate(zip(*parts, strict=True)):
                if not stopped[place][rank]:
                    beams.append((score, parent, token))
                elif rank < W and score > float("-inf"):
                    finished[row].append((score / length**sampling.length_penalty, live[row][parent]))
            beams = beams[:W]
            live[row] = [[*live[row][parent], token] for _, parent, token in beams]
            finished[row] = sorted(finished[row], key=lambda item: -item[0])[:W]
            open_end = len(finished[row]) < W or finished[row][-1][0] < beams[0][0] / length**sampling.length_penalty
            if open_end and length < limits[row]:
                goes_on.append(row)
                next_scores.append([score for score, _, _ in beams])
                next_tokens += [token for _, _, token in beams]
                parents += [place * W + parent for _, parent, _ in beams]
        others = length == 1 or len(goes_on) < len(active)  # else each line stays one of its row
        active = goes_on
        if not active:
            break
        scores = torch.tensor(next_scores, device=llama.device)
        parents = torch.tensor(parents, device=llama.device)
        # After the prefill a row has one line in the cache, which all its beams come from; later it has W.
        lines = order[parents] if length == 1 else parents
        cache.select(lines, 0 if others else read)
        if others:
            prompts = select_prompts(prompts, lines)
            valid = None if valid is None else valid[lines]
        valid = longer(valid)
        step = torch.tensor(next_tokens, device=llama.device)[:, None]  # [B * W, 1]
        logits = llama.raw_logits(llama.hidden(step, prompts=prompts, cache=cache, valid=valid)[:, -1])
    return [(found[0][1], True) if found else (beams[0], False) for found, beams in zip(finished, live, strict=True)]


def _candidates(
    logits: Tensor, seen: Sequence[list[int]], repetition_penalty: float, count: int
) -> tuple[Tensor, Tensor]:
    """The largest `count` log-probabilities of each line, float32, and their token ids, both [n, count], largest first.

    On a CPU a few lines at a time, so that their float32 logits stay in its cache.

    Args:
        logits: [n, V]; float32 ones are overwritten.
        seen: Tokens that each line has had.
    """
    found, lines = [], LINES if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), lines):
        part = penalised(logits[start : start + lines].float(), seen[start : start + lines], repetition_penalty)
        values, tokens = top_tokens(part, count)
        highest = values[:, :1]
        normaliser = highest + part.sub_(highest).exp_().sum(-1, keepdim=True).log()  # logsumexp, in the same memory
        found.append((values - normaliser, tokens))
    values, tokens = zip(*found, strict=True)
    return torch.cat(values), torch.cat(tokens)
