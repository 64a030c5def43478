"""Rows always have something to learn, every row is in every epoch, and image features are computed once."""

from __future__ import annotations

import collections
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
from mmadapter.data import (
    IGNORE_INDEX,
    PASS_TOKENS,
    Example,
    RowOrder,
    cached_features,
    collate,
    make_example,
    passes,
    seed_of,
)


class Words:
    """A tokenizer of numbers in words: "7 8" is [7, 8], behind the beginning of sequence, if there is one; the end is
    2."""

    eos_id = 2

    def __init__(self, bos_id: int | None = 1) -> None:
        self.bos_id = bos_id

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        return [self.bos_id] * (bos and self.bos_id is not None) + [int(word) for word in text.split()]


def numbers(first: int, count: int) -> str:
    return " ".join(str(first + index) for index in range(count))


# ---- Rows.


def test_a_row_is_prompt_response_and_end() -> None:
    example = make_example(Words(), "10 11", "20 21 22", image=4)
    assert example == Example((1, 10, 11, 20, 21, 22, 2), 3, 4)
    assert make_example(Words(), "10", "20").image is None


def test_what_is_too_long_loses_the_start_of_its_prompt_first() -> None:
    """But for the beginning of sequence, without which LLaMA's first token is read as none it has seen."""
    prompt, response = numbers(10, 6), numbers(20, 3)
    example = make_example(Words(), prompt, response, max_tokens=7)
    assert example == Example((1, 14, 15, 20, 21, 22, 2), 3)
    assert make_example(Words(), prompt, response, max_tokens=11).tokens == (1, *range(10, 16), 20, 21, 22, 2)
    assert make_example(Words(), prompt, response, max_tokens=4) == Example((1, 20, 21, 22), 1)
    assert make_example(Words(None), prompt, response, max_tokens=7) == Example((13, 14, 15, 20, 21, 22, 2), 3)


@pytest.mark.parametrize("max_tokens", [2, 3, 5, 8, 64])
@pytest.mark.parametrize("bos", [1, None])
def test_a_row_of_any_length_has_something_to_learn(max_tokens: int, bos: int | None) -> None:
    """A prompt longer than the limit left a row whose labels were all ignored, and its loss was NaN."""
    begun = bos is not None
    for prompt, response in itertools.product((0, 1, 4, 9, 70), (1, 2, 5, 9, 70)):
        example = make_example(Words(bos), numbers(100, prompt), numbers(200, response), max_tokens=max_tokens)
        assert len(example.tokens) == min(max_tokens, begun + prompt + response + 1)
        assert example.tokens[:1] == (bos,) or not begun
        learnt = example.tokens[example.prompt_tokens :]
        whole = (*range(200, 200 + response), 2)
        assert learnt == whole[: len(learnt)]  # the response is cut at its end only, and only
        assert len(learnt) == min(len(whole), max_tokens - begun)  # where it is too long by itself
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

LENGTHS = torch.randint(5, 200, (603,), generator=torch.Generator().manual_seed(0)).tolist()


def steps_of(count: int, *, lengths: Sequence[int] = LENGTHS, seed: int = 0, pool: int = 16) -> list[list[int]]:
    order = RowOrder(lengths, 8, seed, pool)
    return [order.step(step) for step in range(count)]


def padding(steps: list[list[int]]) -> int:
    return sum(max(LENGTHS[row] for row in step) - LENGTHS[row] for step in steps for row in step)


@pytest.mark.parametrize("pool", [1, 7, 16])
@pytest.mark.parametrize("rows", [4, 16, 56])
def test_every_row_is_taken_once_an_epoch(rows: int, pool: int) -> None:
    """Also where an epoch does not end with a step, nor a step with an epoch."""
    taken = itertools.chain(*steps_of(112, lengths=LENGTHS[:rows], pool=pool))
    assert collections.Counter(taken) == dict.fromkeys(range(rows), 112 * 8 // rows)


@pytest.mark.parametrize("rows", [8, 30, 100, 603])
def test_no_step_holds_a_row_twice(rows: int) -> None:
    """Sixteen steps sorted together would hold each row of a small data set several times, side by side: of 8 rows, a
    step would be one of them 8 times."""
    pool = max(1, min(16, rows // 32))
    for step in steps_of(rows // 8 // pool * pool, lengths=LENGTHS[:rows]):  # later steps may begin in the next epoch
        assert len(set(step)) == 8


@pytest.mark.parametrize("step", [1, 15, 16, 40, 125, 126])
@pytest.mark.parametrize("pool", [1, 16])
def test_a_step_is_its_seed_s_and_its_number_s(step: int, pool: int) -> None:
    """A resumed run begins in the middle of an epoch, and of the steps that were cut together."""
    whole = steps_of(130, pool=pool)
    torch.manual_seed(99)
    order = RowOrder(LENGTHS, 8, 0, pool)
    assert [order.step(number) for number in range(step, 130)] == whole[step:]
    assert order.step(0) == whole[0]
    assert steps_of(130, seed=1, pool=pool) != whole


def test_rows_of_a_step_are_of_similar_length_and_steps_in_random_order() -> None:
    steps = steps_of(75)
    assert padding(steps) < 0.15 * padding(steps_of(75, pool=1))
    longest = [max(LENGTHS[row] for row in step) for step in steps[:16]]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


@pytest.mark.parametrize("rows", [64, 603])
def test_a_row_meets_others_in_every_epoch(rows: int) -> None:
    """All rows of a small data set sorted at once are the same steps for ever."""
    steps = steps_of(rows // 8 * 2, lengths=LENGTHS[:rows])
    halves = steps[: rows // 8], steps[rows // 8 :]
    first, second = ({row: set(step) for step in half for row in step} for half in halves)
    assert sum(first[row] == second[row] for row in first.keys() & second.keys()) < rows / 20


# ---- Forward passes.


def cost(lengths: Sequence[int], cut: list[list[int]]) -> int:
    return sum(len(part) * max(lengths[row] for row in part) + PASS_TOKENS for part in cut)


@pytest.mark.parametrize("batch_tokens", [0, 1, 199, 400, 2048, 10**6])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_passes_hold_every_row_once_and_no_more_tokens_than_asked_for(batch_tokens: int, processes: int) -> None:
    lengths = LENGTHS[:48]
    ranks = [passes(lengths, batch_tokens, rank, processes) for rank in range(processes)]
    assert sorted(itertools.chain(*itertools.chain(*ranks))) == list(range(48))
    assert len({len(cut) for cut in ranks}) == 1, "a process with a pass more would wait for the others for ever"
    for part in itertools.chain(*ranks):
        tokens = len(part) * max(lengths[row] for row in part)
        assert not batch_tokens or tokens <= batch_tokens or len(part) == 1
    if batch_tokens == 0:
        assert [len(cut) for cut in ranks] == [1] * processes
    if batch_tokens == 1:
        assert all(len(part) == 1 for part in itertools.chain(*ranks))


def test_passes_are_cut_where_they_cost_least() -> None:
    """Against every way to cut ten rows in the order of their lengths."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        lengths = torch.randint(5, 200, (10,), generator=generator).tolist()
        order = sorted(range(10), key=lambda row: -lengths[row])
        ways = []
        for places in itertools.chain(*(itertools.combinations(range(1, 10), n) for n in range(10))):
            ends = (0, *places, 10)
            cut = [order[start:end] for start, end in itertools.pairwise(ends)]
            if all(len(part) == 1 or len(part) * lengths[part[0]] <= 500 for part in cut):
                ways.append(cost(lengths, cut))
        found = passes(lengths, 500)
        assert cost(lengths, found) == min(ways) < max(ways)
        assert 1 < len(found) < 10


def test_the_last_processes_may_have_no_row_but_take_part_in_every_pass() -> None:
    """As with validation rows that the processes do not divide."""
    assert [passes([5, 9, 7], 9, rank, 2) for rank in (0, 1)] == [[[1], [0]], [[2], []]]
    assert passes([], 100) == passes([], 0) == []


# ---- Image features.


class Colours:
    """An encoder whose features are an image's mean colour and its size; it counts the images it is shown."""

    widths = (3, 2)

    def __init__(self, config: VisionConfig | None = None, fails_after: int = 10**9) -> None:
        self.config = config or VisionConfig("colours", ("final",), 8)
        self.seen, self.fails_after = 0, fails_after

    def fingerprint(self) -> str:
        return repr(self.config)

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
    digest = hashlib.sha256(Colours().fingerprint().encode())
    for path in photos:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    cached_features(Colours(), photos, folder, views=2, seed=5)
    keys = [hashlib.sha256(f"{digest.hexdigest()}{view}".encode()).hexdigest() for view in ((0, 0), (1, 5))]
    assert set(os.listdir(folder)) == {f"features-{key[:16]}.safetensors" for key in keys}


def test_no_images_need_no_encoder_and_no_file(folder: Path) -> None:
    """Text rows alone may be held out beside rows with images."""
    assert cached_features(Colours(fails_after=0), [], folder, views=2).shape == (2, 0, 5)
    assert not folder.exists()


def test_features_that_float16_cannot_hold_are_an_error_that_names_the_picture(
    photos: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be infinite in the cache, and the loss NaN an hour later."""
    encoder = Colours()
    monkeypatch.setattr(encoder, "features_of", lambda images: torch.tensor([[1.0], [7e4], [1.0]]))
    with pytest.raises(ValueError, match="do not fit float16; take another encoder or scale") as error:
        cached_features(encoder, photos, folder)
    assert str(photos[1]) in str(error.value)
    assert os.listdir(folder) == []


def test_a_seed_of_several_numbers_is_the_same_for_ever() -> None:
    assert seed_of(0, 1) == 46666290180431037
    assert len({seed_of(*parts) for parts in itertools.product(range(20), range(20))}) == 400
    assert seed_of(1, 23) != seed_of(12, 3)
