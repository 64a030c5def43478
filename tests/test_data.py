"""Rows always have something to learn, every row is in every epoch, and image features are computed once."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from mmadapter.config import VisionConfig
from mmadapter.data import IGNORE_INDEX, Example, cached_features, collate, length_batches, make_example


class Words:
    """A tokenizer of numbers in words: "7 8" is [7, 8], behind a beginning of sequence, 1; the end is 2."""

    eos_id = 2

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        return [1] * bos + [int(word) for word in text.split()]


def numbers(first: int, count: int) -> str:
    return " ".join(str(first + index) for index in range(count))


# ---- Rows.


def test_a_row_is_prompt_response_and_end() -> None:
    example = make_example(Words(), "10 11", "20 21 22", image=4)
    assert example == Example((1, 10, 11, 20, 21, 22, 2), 3, 4)
    assert make_example(Words(), "10", "20").image is None


def test_what_is_too_long_loses_the_start_of_its_prompt_first() -> None:
    prompt, response = numbers(10, 6), numbers(20, 3)
    example = make_example(Words(), prompt, response, max_tokens=7)
    assert example.tokens[-7:] == (13, 14, 15, 20, 21, 22, 2)[-len(example.tokens) :]
    assert len(example.tokens) == 7
    assert example.prompt_tokens == 3
    assert make_example(Words(), prompt, response, max_tokens=11).tokens == (1, *range(10, 16), 20, 21, 22, 2)


@pytest.mark.parametrize("max_tokens", [2, 3, 5, 8, 64])
def test_a_row_of_any_length_has_something_to_learn(max_tokens: int) -> None:
    """A prompt longer than the limit left a row whose labels were all ignored, and its loss was NaN."""
    for prompt, response in itertools.product((0, 1, 4, 9, 70), (1, 2, 5, 9, 70)):
        example = make_example(Words(), numbers(100, prompt), numbers(200, response), max_tokens=max_tokens)
        assert len(example.tokens) == min(max_tokens, prompt + response + 2)
        learnt = example.tokens[example.prompt_tokens :]
        whole = (*range(200, 200 + response), 2)
        assert learnt == whole[: len(learnt)]  # the response is cut at its end only, and only
        assert len(learnt) == min(len(whole), max_tokens)  # where it is too long by itself
        labels = collate([example]).labels
        assert (labels[:, 1:] != IGNORE_INDEX).any()


@pytest.mark.parametrize("response", ["", " \n"])
def test_an_empty_response_is_refused(response: str) -> None:
    with pytest.raises(ValueError, match="response is empty"):
        make_example(Words(), "10", response)


def test_a_batch_learns_the_responses_and_their_ends() -> None:
    ignored = IGNORE_INDEX
    batch = collate([Example((1, 10, 20, 2), 2, 5), Example((30, 2), 0), Example((1, 11, 12, 21, 22, 2), 3, 0)], 9)
    assert batch.tokens.tolist() == [[1, 10, 20, 2, 9, 9], [30, 2, 9, 9, 9, 9], [1, 11, 12, 21, 22, 2]]
    assert batch.labels.tolist() == [
        [ignored, ignored, 20, 2, ignored, ignored],
        [30, 2, ignored, ignored, ignored, ignored],
        [ignored, ignored, ignored, 21, 22, 2],
    ]
    assert batch.images.tolist() == [5, -1, 0]
    assert {batch.tokens.dtype, batch.labels.dtype, batch.images.dtype} == {torch.int64}


def test_padding_that_is_also_the_end_of_sequence_is_not_learnt() -> None:
    """Labels told apart by the id of the padding drop the true end where both are one token."""
    batch = collate([Example((1, 20, 2), 1), Example((1, 20, 21, 22, 2), 1)], pad_id=2)
    assert batch.labels[0].tolist() == [IGNORE_INDEX, 20, 2, IGNORE_INDEX, IGNORE_INDEX]


# ---- Epochs.

LENGTHS = torch.randint(5, 200, (503,), generator=torch.Generator().manual_seed(0)).tolist()


def epoch(seed: int, lengths: Sequence[int] = LENGTHS, batch_size: int = 8, **options: int) -> list[list[int]]:
    return length_batches(lengths, batch_size, torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("batch_size", [1, 8, 503, 1000])
@pytest.mark.parametrize("pool", [1, 3, 50])
def test_every_row_is_in_an_epoch_once(batch_size: int, pool: int) -> None:
    batches = epoch(1, batch_size=batch_size, pool=pool)
    assert sorted(itertools.chain(*batches)) == list(range(503))
    sizes = sorted((len(batch) for batch in batches), reverse=True)
    assert len(sizes) == -(-503 // batch_size)  # as the engine counts the steps of an epoch
    assert set(sizes[:-1]) <= {batch_size}


def test_an_epoch_is_its_generator_s_and_no_two_are_alike() -> None:
    assert epoch(1) == epoch(1)
    assert epoch(1) != epoch(2)
    generator = torch.Generator().manual_seed(1)
    assert length_batches(LENGTHS, 8, generator) != length_batches(LENGTHS, 8, generator)


def test_rows_of_a_batch_are_of_similar_length_and_batches_in_random_order() -> None:
    def padding(batches: list[list[int]]) -> int:
        return sum(max(LENGTHS[row] for row in batch) - LENGTHS[row] for batch in batches for row in batch)

    order = torch.randperm(503, generator=torch.Generator().manual_seed(1)).tolist()
    assert padding(epoch(1)) < 0.1 * padding([order[start : start + 8] for start in range(0, 503, 8)])
    longest = [max(LENGTHS[row] for row in batch) for batch in epoch(1)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))
    company = [next(set(batch) for batch in epoch(seed) if 7 in batch) for seed in (1, 2)]
    assert company[0] != company[1]


# ---- Image features.


class Colours:
    """An encoder whose features are an image's mean colour and its size; it counts the images it is shown."""

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, config: VisionConfig | None = None, fails_after: int = 10**9) -> None:
        self.config = config or VisionConfig("colours", ("final",), 8)
        self.seen, self.fails_after = 0, fails_after

    def features_of(self, images: Sequence[Image.Image]) -> Tensor:
        if self.seen + len(images) > self.fails_after:
            raise KeyboardInterrupt
        self.seen += len(images)
        colours = [torch.tensor(image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))) for image in images]
        sizes = [torch.tensor(image.size) for image in images]
        return torch.cat((torch.stack(colours), torch.stack(sizes)), 1).float()


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    paths = []
    for index in range(3):
        pixels = torch.randint(256, (20 + index, 30, 3), generator=generator, dtype=torch.uint8)
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(pixels.numpy()).save(paths[-1])
    return paths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "new" / "cache"


def test_features_are_computed_once(photos: list[Path], folder: Path) -> None:
    encoder = Colours()
    features = cached_features(encoder, photos, folder, views=3)
    assert features.shape == (3, 3, 5)
    assert features.dtype == torch.float16
    assert encoder.seen == 9
    assert torch.equal(features[0], Colours().features_of([Image.open(path) for path in photos]).half())
    other = Colours()
    assert torch.equal(cached_features(other, photos, folder, views=3), features)
    assert torch.equal(cached_features(other, photos, folder), features[:1])
    assert other.seen == 0
    assert len(os.listdir(folder)) == 3


def test_views_are_random_but_the_same_anywhere(photos: list[Path], folder: Path, tmp_path: Path) -> None:
    """Views drawn from one running generator would depend on what was drawn before them."""
    features = cached_features(Colours(), photos, folder, views=3, seed=1)
    for view, other in ((1, 0), (2, 0), (2, 1)):
        assert not torch.equal(features[view], features[other])
    same = [photos[0]] * 2
    views = cached_features(Colours(), same, folder, views=2, seed=1)
    assert torch.equal(views[0, 0], views[0, 1])
    assert not torch.equal(views[1, 0], views[1, 1])  # each place its own view
    assert torch.equal(cached_features(Colours(), photos, tmp_path / "elsewhere", views=3, seed=1), features)
    assert not torch.equal(cached_features(Colours(), photos, folder, views=3, seed=2)[1], features[1])


def test_a_stopped_run_goes_on_with_the_next_view(photos: list[Path], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        cached_features(Colours(fails_after=6), photos, folder, views=3)
    assert len(os.listdir(folder)) == 2
    encoder = Colours()
    features = cached_features(encoder, photos, folder, views=3)
    assert encoder.seen == 3
    assert torch.equal(features, cached_features(Colours(), photos, tmp_path / "whole", views=3))


def test_a_failed_write_leaves_nothing(photos: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(tensors: dict, file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fails)
        with pytest.raises(OSError, match="no space left"):
            cached_features(Colours(), photos, folder)
    assert os.listdir(folder) == []


def test_features_go_by_content_not_by_name(photos: list[Path], folder: Path) -> None:
    features = cached_features(Colours(), photos, folder)
    renamed = [path.rename(path.with_name(f"other-{path.name}")) for path in photos]
    encoder = Colours()
    assert torch.equal(cached_features(encoder, renamed, folder), features)
    assert encoder.seen == 0
    assert torch.equal(
        cached_features(encoder, renamed[::-1], folder), features.flip(1)
    )  # another order is another file
    Image.new("RGB", (30, 20), "red").save(renamed[1])
    changed = cached_features(encoder, renamed, folder)
    assert torch.equal(changed[:, [0, 2]], features[:, [0, 2]])
    assert changed[0, 1].tolist() == [255, 0, 0, 30, 20]


@pytest.mark.parametrize(
    "config",
    [
        VisionConfig("colours", ("final",), 16),
        VisionConfig("colours", ("final",), 8, "crop"),
        VisionConfig("colours", ("1", "final"), 8),
        VisionConfig("others", ("final",), 8),
    ],
    ids=str,
)
def test_another_encoder_or_preprocessing_is_not_read_from_the_cache(
    photos: list[Path], folder: Path, config: VisionConfig
) -> None:
    cached_features(Colours(), photos, folder)
    encoder = Colours(config)
    cached_features(encoder, photos, folder)
    assert encoder.seen == 3


def test_names_in_the_cache_are_the_same_in_every_process(photos: list[Path], folder: Path) -> None:
    """Python's hash of a text differs from process to process; a name made from it would never be found again."""
    digest = hashlib.sha256()
    for path in photos:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    cached_features(Colours(), photos, folder)
    (name,) = os.listdir(folder)
    settings = (
        '{"mean": [0.5, 0.5, 0.5], "seed": 0, "std": [0.25, 0.25, 0.25], "vision": {"encoder": "colours", '
        '"image_size": 8, "resize": "squash", "scales": ["final"]}}'
    )
    key = hashlib.sha256((digest.hexdigest() + f"[{settings}, 0]").encode()).hexdigest()
    assert name == f"features-{key[:16]}.safetensors"
