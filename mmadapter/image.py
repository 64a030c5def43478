"""Reading pictures: whatever comes in leaves as 8-bit RGB, then as a square, then as a tensor.

Shapes: B batch, S side of the square in pixels. `load_image` is the one place where an image becomes RGB.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import threading
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageEnhance, ImageOps, UnidentifiedImageError

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray

# What a walk through a folder takes for a picture.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2",
)  # fmt: skip

# More pixels than this are refused before they are decoded: 3 bytes each would fill hundreds of megabytes.
MAX_PIXELS = 128_000_000

# EXIF orientation -> what puts the picture upright (EXIF 2.3, tag 0x0112).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Warning filters belong to the whole process; the lock keeps two threads from restoring each other's.
_FILTERS_LOCK = threading.Lock()


def load_image(source: ImageSource) -> Image.Image:
    """Reads a picture as upright 8-bit RGB.

    Transparency is laid over white, the EXIF orientation is applied, of an animation the first frame is taken, and
    16-bit values are scaled to 8 bits. Integer ("I") and float ("F") pixels carry no range with them: they are taken as
    0..255 when they fit it (0..1 for floats that fit that), else as 0..65535, else from 0 to their maximum; with
    negative values, from their minimum to their maximum. Colour profiles are not applied.

    Args:
        source: The path of a file, the bytes of one, a Pillow image (its current frame), or an array of H x W (grey),
            H x W x 1, H x W x 3 (RGB) or H x W x 4 (RGBA): uint8, uint16 (0..65535), bool, or float from 0 to 1.

    Returns:
        A new image in mode RGB that no longer carries EXIF data; the source stays as it was.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a folder, not an image, damaged, without pixels, or has more than `MAX_PIXELS`; or an array of
            another shape, dtype or range.
    """
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else "the image"
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source))
    if isinstance(source, Image.Image):
        return _decode(source, name)
    if isinstance(source, bytes | bytearray | memoryview):
        with _open(io.BytesIO(source), name) as image:
            return _decode(image, name)
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"an image is a path, bytes, a Pillow image or an array, got {type(source).__name__}")
    with _open_file(source) as image:
        return _decode(image, name)


def check_image(path: str | os.PathLike) -> None:
    """Raises what `load_image` would raise for the file, in less time: a JPEG is decoded at an eighth of its size.

    The whole file is read and its compressed data decoded, so that a picture cut short is found.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: As `load_image`.
    """
    with _open_file(path) as image:
        _decode(image, os.fspath(path), small=True)


def to_square(image: Image.Image, size: int, resize: str) -> Image.Image:
    """Makes the image a square, with bicubic filtering over every source pixel (antialiased).

    Args:
        image: An RGB image.
        size: Side of the square, S, in pixels.
        resize: "squash" (the whole image, stretched) or "crop" (the shorter side becomes S, then the middle is cut out:
            the geometry of CLIP's own preprocessing).

    Raises:
        ValueError: `resize` is neither.
    """
    if resize == "squash":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    if resize != "crop":
        raise ValueError(f'resize must be "squash" or "crop", got {resize!r}')
    # The cut is made in the source: scaling a strip of 10 x 10000 pixels first would need gigabytes.
    box = [0.0, 0.0, *image.size]  # left, top, right, bottom
    for axis, side in enumerate(image.size):
        scaled = size * side // min(image.size)
        start = round((scaled - size) / 2)
        box[axis], box[axis + 2] = start * side / scaled, min((start + size) * side / scaled, side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=tuple(box))


def to_tensor(images: Sequence[Image.Image], mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Stacks squares of one size into the pixels an encoder takes.

    Args:
        images: RGB images, S x S.
        mean: Mean of each channel, of values from 0 to 1, that is taken away.
        std: Standard deviation of each channel, divided by afterwards.

    Returns:
        Float32 pixels [B, 3, S, S] (in channels-last memory, as convolutions like it).

    Raises:
        ValueError: There is no image.
    """
    if not images:
        raise ValueError("got no image, expected at least one")
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # [B, S, S, 3]
    pixels = pixels.to(torch.float32).div_(255)
    pixels = pixels.sub_(torch.tensor(mean)).div_(torch.tensor(std))
    return pixels.permute(0, 3, 1, 2)  # [B, 3, S, S]


def augment(image: Image.Image, generator: torch.Generator) -> Image.Image:
    """Draws a random view of a training photo.

    A crop of 60 to 100% of the area whose aspect ratio is 3/4 to 4/3 of the photo's own (so that a view may be the
    whole photo whatever its shape), mirrored half the time, with brightness, contrast and saturation changed by up to
    20%.

    Args:
        image: An RGB image.
        generator: A CPU generator; every call takes the same number of draws from it.

    Returns:
        An RGB image of the crop's size.
    """
    draws = torch.rand(8, generator=generator).tolist()
    area = 0.6 + 0.4 * draws[0]
    widest = math.log(min(4 / 3, 1 / area))  # a wider crop of that area would stand out of the photo
    ratio = math.exp(widest * (2 * draws[1] - 1))
    width = max(1, round(image.width * math.sqrt(area * ratio)))
    height = max(1, round(image.height * math.sqrt(area / ratio)))
    left = round((image.width - width) * draws[2])
    top = round((image.height - height) * draws[3])
    view = image.crop((left, top, left + width, top + height))
    if draws[4] < 0.5:
        view = ImageOps.mirror(view)
    for enhance, draw in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), draws[5:], strict=True
    ):
        view = enhance(view).enhance(0.8 + 0.4 * draw)
    return view


@contextlib.contextmanager
def _open_file(path: str | os.PathLike) -> Iterator[Image.Image]:
    """Opens an image file and reads its header."""
    name = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{name} not found; give the path of an image file")
    if os.path.isdir(path):
        raise ValueError(f"{name} is a folder, expected an image file; give one of the files in it")
    if not os.path.isfile(path):
        raise ValueError(f"{name} is not a regular file, expected an image file")
    with open(path, "rb") as file, _open(file, name) as image:
        yield image


def _open(file: io.IOBase, name: str) -> Image.Image:
    """Reads the header of an image file; no pixel is decoded.

    On damaged files Pillow raises errors of a dozen unrelated kinds, some of them assertions; here and below all become
    one.
    """
    try:
        with _FILTERS_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(file)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has more than the {MAX_PIXELS} pixels allowed; make it smaller") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that can be read") from error
    except Exception as error:
        raise ValueError(f"{name} is damaged: {_one_line(error)}") from error


def _decode(image: Image.Image, name: str, *, small: bool = False) -> Image.Image:
    """Decodes a Pillow image of any mode into upright RGB; `small` takes the smallest size a JPEG decoder can give."""
    _check_size(*image.size, name)
    try:
        if small:
            image.draft("RGB", (1, 1))
        image.load()
        rgb = _to_rgb(image)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has more than the {MAX_PIXELS} pixels allowed; make it smaller") from error
    except Exception as error:
        raise ValueError(f"{name} is damaged or cut short: {_one_line(error)}") from error
    turn = _UPRIGHT.get(_orientation(image))
    return rgb.transpose(turn) if turn is not None else rgb


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none. Damaged EXIF data is no reason to refuse the picture."""
    try:
        with _FILTERS_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - whatever the reader of the tags stumbles over, they are not needed
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts a decoded image of any mode to RGB, without EXIF data."""
    mode = image.mode
    if mode.startswith("I;16") or mode in ("I", "F"):
        values = np.asarray(image)
        grey = _to_bytes(values, floating=mode == "F", sixteen=mode.startswith("I;16"))
        if "transparency" in image.info:  # one value of a PNG
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        # The table that littlecms would otherwise compute with is off by up to twenty levels.
        exact = ImageCms.Flags.NOOPTIMIZE
        rgb = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB", flags=exact)
    elif image.has_transparency_data:
        # Pillow has no direct way from premultiplied grey to RGBA.
        rgba = (image.convert("LA") if mode == "La" else image).convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(rgba, mask=rgba.getchannel("A"))
    else:
        rgb = image.convert("RGB")
    rgb.info = {}
    return rgb


def _to_bytes(values: np.ndarray, *, floating: bool, sixteen: bool) -> np.ndarray:
    """Scales grey values of a wider type, [H, W], to uint8; see `load_image` for the ranges."""
    if floating:
        values = np.where(np.isfinite(values), values, 0)
    low, high = float(values.min()), float(values.max())
    if sixteen:
        low, high = 0.0, 65535.0
    elif low >= 0:
        ranges = (1.0, 255.0, 65535.0) if floating else (255.0, 65535.0)
        low, high = 0.0, next((limit for limit in ranges if high <= limit), high)
    grey = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), 64):  # float64 copies of a whole large picture would take gigabytes
        strip = values[start : start + 64].astype(np.float64)
        grey[start : start + 64] = np.rint((strip - low) * 255 / max(high - low, 1e-12))
    return grey


def _from_array(array: np.ndarray) -> Image.Image:
    """Checks an array of pixels and wraps it in a Pillow image of mode L, RGB or RGBA."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"an image array is H x W or H x W x 1, 3 or 4 (channels last), got shape {array.shape}")
    _check_size(array.shape[1], array.shape[0], "the image")
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        array = np.rint(array / 257).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # also false for NaN
            raise ValueError(f"a float image array runs from 0 to 1, got {array.min():g} to {array.max():g}; divide it")
        array = np.rint(array * 255.0).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"an image array is uint8, uint16, bool or float from 0 to 1, got {array.dtype}; convert it")
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"{name} has no pixels: {width} x {height}")
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{name} has {width} x {height} pixels, more than the {MAX_PIXELS} pixels allowed; make it smaller"
        )


def _one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
