"""From texts and images to batches: token rows with labels, the rows of each step, image features cached on disk.

Shapes: B batch, T tokens, F width of the image features, V views of an image.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mmadapter.tokenizer import Tokenizer
    from mmadapter.vision import ImageEncoder

IGNORE_INDEX = -100
PASS_TOKENS = 64  # what a forward and backward pass costs beside its tokens, in tokens (0.11 s at 600 tokens/s)


@dataclass(frozen=True)
class Example:
    """One training row.

    Attributes:
        tokens: Prompt, response and end of sequence.
        prompt_tokens: How many of them are the prompt, which is not learnt.
        image: Row of the feature table, None for text.
        where: Names the row in errors.
    """

    tokens: tuple[int, ...]
    prompt_tokens: int
    image: int | None = None
    where: str = ""


def make_example(
    tokenizer: Tokenizer,
    prompt: str,
    response: str,
    *,
    image: int | None = None,
    max_tokens: int = 512,
    where: str = "",
) -> Example:
    """Tokenises a row; the response ends with the model's end of sequence.

    A row of more than `max_tokens` loses the start of its prompt first (what stands behind the beginning-of-sequence
    token), and of its response only what then still does not fit, so that something is always left to learn.

    Raises:
        ValueError: The response is empty.
    """
    if not response.strip():
        raise ValueError("the response is empty: there is nothing to learn from this row")
    head = tokenizer.encode(prompt)
    begin = head[:1] if head and head[0] == tokenizer.bos_id else []
    tail = [*tokenizer.encode(response, bos=False), tokenizer.eos_id][: max_tokens - len(begin)]
    head = head[len(begin) :]
    cut = max(0, len(begin) + len(head) + len(tail) - max_tokens)
    head = begin + head[cut:]
    return Example((*head, *tail), len(head), image, where)


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to the longest.

    Attributes:
        tokens: [B, T].
        labels: [B, T], IGNORE_INDEX at the prompt and the padding.
        images: Row of the feature table for each row, -1 for text, [B].
    """

    tokens: Tensor
    labels: Tensor
    images: Tensor


def collate(examples: Sequence[Example], pad_id: int = 0) -> Batch:
    longest = max(len(example.tokens) for example in examples)
    tokens = torch.full((len(examples), longest), pad_id)
    labels = torch.full((len(examples), longest), IGNORE_INDEX)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        tokens[row, :length] = torch.tensor(example.tokens)
        labels[row, example.prompt_tokens : length] = tokens[row, example.prompt_tokens : length]
    images = torch.tensor([-1 if example.image is None else example.image for example in examples])
    return Batch(tokens, labels, images)


def seed_of(*parts: int) -> int:
    """One seed from several numbers, such as a run's seed and a step: the same everywhere and for ever."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


class RowOrder:
    """The rows that each step takes: one shuffle of all of them after the other, cut into steps of similar length.

    The rows of `pool` steps are sorted by length before they are cut, and those steps then come in random order: little
    padding, and no row's company is fixed. What a step takes is a function of the seed and its number alone, so a
    resumed run goes on exactly where it was.

    Args:
        lengths: Tokens of each row.
        pool: Steps that are cut together; 1 leaves every step a plain random draw. Of few rows no more than a quarter
            are cut together: all of them would be the same steps in every epoch, or steps of copies of one row.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, pool: int = 1) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.pool = max(1, min(pool, len(lengths) // (4 * batch_size)))
        self._epoch, self._order = -1, []
        self._number, self._steps = -1, []

    def step(self, step: int) -> list[int]:
        """Row indices of a step, `batch_size` of them."""
        number, place = divmod(step, self.pool)
        if number != self._number:
            size = self.pool * self.batch_size
            rows = [self._row(index) for index in range(number * size, (number + 1) * size)]
            rows.sort(key=lambda row: self.lengths[row])
            generator = torch.Generator().manual_seed(seed_of(self.seed, number, self.pool))
            order = torch.randperm(self.pool, generator=generator).tolist()
            self._number = number
            self._steps = [rows[part * self.batch_size : (part + 1) * self.batch_size] for part in order]
        return self._steps[place]

    def _row(self, index: int) -> int:
        """The row at place `index` of the endless sequence of shuffles."""
        epoch, place = divmod(index, len(self.lengths))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.lengths), generator=generator).tolist()
        return self._order[place]


def passes(lengths: Sequence[int], batch_tokens: int, rank: int = 0, processes: int = 1) -> list[list[int]]:
    """Cuts the rows of a step into forward passes of similar length, and deals each pass over the processes.

    Rows are sorted by length and cut where the padded tokens, and `PASS_TOKENS` for each pass, sum up to the least. A
    row longer than `batch_tokens` has a pass of its own. Every process gets the same number of passes, as collective
    communication needs; a pass may leave the last ones nothing where `processes` does not divide the number of rows.

    Args:
        lengths: Tokens of each row.
        batch_tokens: Most tokens of a pass of one process, padding included; 0 puts all rows into one pass.

    Returns:
        Row indices of each pass of process `rank`.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    if not batch_tokens:
        return [order[rank::processes]] if order else []
    groups = [order[start : start + processes] for start in range(0, len(order), processes)]  # a row for each process
    longest = [lengths[group[0]] for group in groups]
    # Of the first so many groups: the least cost, and where their last pass begins.
    cost, cut = [0.0] + [math.inf] * len(groups), [0] * (len(groups) + 1)
    for end in range(1, len(groups) + 1):
        for start in range(end - 1, -1, -1):
            tokens = (end - start) * longest[start]
            if tokens > batch_tokens and start < end - 1:
                break
            if cost[start] + tokens + PASS_TOKENS < cost[end]:
                cost[end], cut[end] = cost[start] + tokens + PASS_TOKENS, start
    result, end = [], len(groups)
    while end:
        result.append([row for group in groups[cut[end] : end] for row in group[rank : rank + 1]])
        end = cut[end]
    return result[::-1]


def cached_features(
    encoder: ImageEncoder, paths: Sequence[Path], folder: Path, *, views: int = 1, seed: int = 0
) -> Tensor:
    """Features of every image by a frozen encoder, computed once and kept in `folder`.

    View 0 is the image as it is; the others are random views of it (`image.augment`) drawn with `seed`. There is a file
    for each view; its name is a hash of the images' content, of the encoder's weights and settings, and of the view, so
    nothing stale is read, and a run that was stopped goes on with the next view.

    Returns:
        float16 [V, number of images, F].

    Raises:
        FileNotFoundError, ValueError: An image cannot be read, or its features do not fit float16.
    """
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm

    from mmadapter import image, record

    if not paths:
        return torch.zeros(views, 0, sum(encoder.widths), dtype=torch.float16)
    content = hashlib.sha256(encoder.fingerprint().encode())
    for path in paths:
        content.update(hashlib.sha256(path.read_bytes()).digest())
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for view in range(views):
        key = hashlib.sha256((content.hexdigest() + repr((view, seed if view else 0))).encode()).hexdigest()
        file = folder / f"features-{key[:16]}.safetensors"
        if not file.exists():
            parts = []
            for start in tqdm(range(0, len(paths), 64), desc=f"image features, view {view + 1}/{views}", unit="batch"):
                batch = [image.load_image(path) for path in paths[start : start + 64]]
                if view:
                    batch = [
                        image.augment(photo, torch.Generator().manual_seed(seed_of(seed, view, start + index)))
                        for index, photo in enumerate(batch)
                    ]
                part = encoder.features_of(batch).half()
                if not part.isfinite().all():
                    row = start + int((~part.isfinite().all(1)).nonzero()[0])
                    raise ValueError(f"the features of {paths[row]} do not fit float16; take another encoder or scale")
                parts.append(part)
            with record.replacing(file) as temporary:
                save_file({"features": torch.cat(parts).cpu()}, temporary)
        rows.append(load_file(file)["features"])
    return torch.stack(rows)
