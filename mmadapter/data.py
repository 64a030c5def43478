"""From texts and images to batches: token rows with labels, batches by length, image features cached on disk.

Shapes: B batch, T tokens, F width of the image features, V views of an image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Example:
    """One training row.

    Attributes:
        tokens: Prompt, response and end of sequence.
        prompt_tokens: How many of them are the prompt, which is not learnt.
        image: Row of the feature table, None for text.
    """

    tokens: tuple[int, ...]
    prompt_tokens: int
    image: int | None = None


def make_example(tokenizer, prompt: str, response: str, *, image: int | None = None, max_tokens: int = 512) -> Example:
    """Tokenises a row; the response ends with the model's end of sequence.

    A row of more than `max_tokens` loses the start of its prompt first, and of its response only what then still does
    not fit, so that something is always left to learn.

    Raises:
        ValueError: The response is empty.
    """
    if not response.strip():
        raise ValueError("the response is empty: there is nothing to learn from this row")
    head = tokenizer.encode(prompt)
    tail = [*tokenizer.encode(response, bos=False), tokenizer.eos_id][:max_tokens]
    head = head[max(0, len(head) + len(tail) - max_tokens) :]
    return Example((*head, *tail), len(head), image)


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


def length_batches(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator, pool: int = 50
) -> list[list[int]]:
    """One epoch of batches of rows of similar length, in random order.

    Rows are shuffled, sorted by length within pools of `pool` batches, cut into batches, and the batches shuffled:
    little padding, and no row's company is fixed.

    Args:
        lengths: Tokens of each row.
        generator: Decides the order; the same state gives the same epoch.

    Returns:
        Row indices of each batch; the last batches of an epoch may be smaller.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), batch_size * pool):
        part = sorted(order[start : start + batch_size * pool], key=lambda index: lengths[index])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def cached_features(encoder, paths: Sequence[Path], folder: Path, *, views: int = 1, seed: int = 0) -> Tensor:
    """Features of every image by a frozen encoder, computed once and kept in `folder`.

    View 0 is the image as it is; the others are random views of it (`image.augment`) drawn with `seed`. There is a file
    for each view; its name is a hash of the images' content, the encoder and its settings, the view and the seed, so
    nothing stale is read, and a run that was stopped goes on with the next view.

    Returns:
        float16 [V, number of images, F].
    """
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm

    from mmadapter import image, record

    content = hashlib.sha256()
    for path in paths:
        content.update(hashlib.sha256(path.read_bytes()).digest())
    settings = {"vision": asdict(encoder.config), "mean": encoder.mean, "std": encoder.std, "seed": seed}
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for view in range(views):
        key = hashlib.sha256((content.hexdigest() + json.dumps([settings, view], sort_keys=True)).encode()).hexdigest()
        file = folder / f"features-{key[:16]}.safetensors"
        if not file.exists():
            parts = []
            for start in tqdm(range(0, len(paths), 64), desc=f"image features, view {view + 1}/{views}", unit="batch"):
                batch = [image.load_image(path) for path in paths[start : start + 64]]
                if view:
                    batch = [
                        image.augment(photo, torch.Generator().manual_seed(hash((seed, view, start + index)) % 2**63))
                        for index, photo in enumerate(batch)
                    ]
                parts.append(encoder.features_of(batch).half())
            with record.replacing(file) as temporary:
                save_file({"features": torch.cat(parts)}, temporary)
        rows.append(load_file(file)["features"])
    return torch.stack(rows)
