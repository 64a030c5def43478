"""Squares, tensors and random views of pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmadapter.image import augment, to_square, to_tensor

RED = (255, 0, 0)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def gradient(width: int, height: int) -> Image.Image:
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([columns, rows, columns], axis=2).astype(np.uint8))


def test_squash_keeps_the_whole_picture() -> None:
    square = np.asarray(to_square(gradient(90, 30), 12, "squash")).astype(int)
    assert square.shape == (12, 12, 3)
    assert square[:, 0, 0].max() < 20
    assert square[:, -1, 0].min() > 235


def test_squash_averages_what_it_shrinks() -> None:
    """Without antialiasing, fine stripes shrink to one colour or the other."""
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (256, 128))).convert("RGB")
    square = np.asarray(to_square(stripes, 16, "squash")).astype(int)
    assert np.abs(square[:, 1:-1] - 127.5).max() < 4


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (75, 75), (300, 150), (37, 111)])
def test_crop_is_clips_own_preprocessing(size: tuple) -> None:
    """The same geometry as torchvision's Resize and CenterCrop, which CLIP was trained with."""
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    image = gradient(*size)
    expected = np.asarray(CenterCrop(48)(Resize(48, InterpolationMode.BICUBIC)(image))).astype(int)
    got = np.asarray(to_square(image, 48, "crop")).astype(int)
    assert np.abs(got - expected)[2:-2, 2:-2].max() <= 1
    assert np.abs(got - expected).max() <= 6  # at the edges it does not see what lies beyond


def test_extreme_shapes_do_not_explode() -> None:
    """Scaling the shorter side of a 1 x 60000 strip to 224 first would need 9 GB."""
    strip = Image.new("RGB", (60000, 1), RED)
    for resize in ("squash", "crop"):
        square = to_square(strip, 224, resize)
        assert square.size == (224, 224)
        assert square.getpixel((100, 100)) == RED


def test_unknown_resize() -> None:
    with pytest.raises(ValueError, match='"squash" or "crop", got \'pad\''):
        to_square(NOISE, 8, "pad")


def test_to_tensor_normalises_each_channel() -> None:
    images = [Image.new("RGB", (4, 4), (255, 0, 51)), Image.new("RGB", (4, 4), (0, 255, 0))]
    pixels = to_tensor(images, (0.5, 0.25, 0.2), (0.5, 0.25, 0.1))
    assert pixels.shape == (2, 3, 4, 4)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[0, :, 3, 3], torch.tensor([1.0, -1.0, 0.0]))
    torch.testing.assert_close(pixels[1, :, 0, 0], torch.tensor([-1.0, 3.0, -2.0]))
    with pytest.raises(ValueError, match="at least one"):
        to_tensor([], (0.5,) * 3, (0.5,) * 3)


def views(number: int, seed: int, image: Image.Image = NOISE) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(seed)
    return [augment(image, generator) for _ in range(number)]


def test_augment_is_deterministic_and_varies() -> None:
    first, again, other = views(4, 0), views(4, 0), views(4, 1)
    assert [view.tobytes() for view in first] == [view.tobytes() for view in again]
    assert all(a.tobytes() != b.tobytes() for a, b in zip(first, other, strict=True))
    assert len({view.tobytes() for view in first}) == 4


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (640, 160)])
def test_augment_covers_60_to_100_percent(size: tuple) -> None:
    width, height = size
    shapes = [view.size for view in views(120, 0, gradient(*size))]
    shares = [w * h / (width * height) for w, h in shapes]
    ratios = [(w / h) / (width / height) for w, h in shapes]
    assert 0.59 < min(shares) < 0.64
    assert 0.94 < max(shares) <= 1
    assert 0.74 < min(ratios) < 0.85
    assert 1.18 < max(ratios) < 1.35


def test_augment_mirrors_half_the_time() -> None:
    brighter_left = 0
    for view in views(200, 0, gradient(64, 64)):
        pixels = np.asarray(view).astype(int)
        brighter_left += pixels[:, 0, 0].mean() > pixels[:, -1, 0].mean()
    assert 70 < brighter_left < 130


def test_augment_is_mild() -> None:
    means = [np.asarray(view).mean() for view in views(60, 0, Image.new("RGB", (32, 32), (100, 120, 140)))]
    assert 90 < min(means) < 105
    assert 135 < max(means) < 150


def test_augment_takes_the_smallest_picture() -> None:
    assert augment(Image.new("RGB", (1, 1), RED), torch.Generator().manual_seed(0)).size == (1, 1)
