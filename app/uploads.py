"""Pictures that come from outside: limited in kind, bytes and pixels before a pixel is decoded."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from mmadapter.image import load_image

# What browsers, cameras and scanners make. Pillow would read dozens more, and of those PostScript runs a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
READABLE = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000 or PPM"

_DATA_URI = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?P<parameters>(;[^;,]*)*),", re.ASCII)


@dataclass(frozen=True)
class Limits:
    """What one picture may have.

    Attributes:
        max_bytes: Of the file.
        max_pixels: Width times height.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 40_000_000

    def __post_init__(self) -> None:
        if self.max_bytes < 1 or self.max_pixels < 1:
            raise ValueError(f"limits must be at least 1, got {self.max_bytes} bytes and {self.max_pixels} pixels")


DEFAULT_LIMITS = Limits()


class TooLarge(ValueError):  # noqa: N818 - what is too large stands in the message
    """The picture has more bytes or pixels than the limits allow (HTTP status 413)."""


def read_upload(source: str | os.PathLike | bytes, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """Reads a picture that someone sent.

    Args:
        source: Bytes of a file, or the path of one that the server itself has put there: a path that came from outside
            must not arrive here.
        limits: Checked on the bytes before they are read, and on the pixels by the file's header.

    Returns:
        An upright RGB image (`image.load_image`).

    Raises:
        FileNotFoundError: There is no such file.
        TooLarge: It is beyond the limits.
        ValueError: It is empty, no file, no picture of a known kind, or damaged. No message tells a folder's name.
    """
    data, name = _read(source, limits)
    if not data:
        raise ValueError(f"{name} is empty; send a picture")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no picture that can be read; send {READABLE}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(
            f"{name} has too many pixels, at most {limits.max_pixels:,} are taken; make it smaller"
        ) from error
    except Exception as error:  # of damaged files Pillow raises a dozen unrelated kinds, some of them assertions
        raise ValueError(f"{name} is damaged; save it again and send that") from error
    with image:
        width, height = image.size
        if width * height > limits.max_pixels:
            raise TooLarge(
                f"{name} has {width} x {height} pixels, at most {limits.max_pixels:,} are taken; make it smaller"
            )
        return load_image(image)


def read_data_uri(text: str, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """Reads a picture out of a data URI in base64 (RFC 2397), as the API takes it.

    Returns:
        An upright RGB image.

    Raises:
        TooLarge: It is beyond the limits; base64 is decoded only after that.
        ValueError: It is no data URI, of another type than a picture, not base64, or no picture.
    """
    text = text.strip()
    head = _DATA_URI.match(text)
    if head is None:
        raise ValueError(f'expected a data URI, "data:image/jpeg;base64,...", got {text[:30]!r}')
    kind = (head["type"] or "text/plain").lower()
    if not kind.startswith("image/"):
        raise ValueError(f'a data URI of a picture begins with "data:image/", this one is of type {kind[:60]}')
    if ";base64" not in head["parameters"].lower():
        raise ValueError('a data URI must be in base64, "data:image/jpeg;base64,...", this one is not')
    # Three bytes are four characters; a little more is let through, for line breaks, and counted exactly below.
    if (len(text) - head.end()) * 3 // 4 > limits.max_bytes * 1.1 + 4:
        raise _too_many_bytes("the picture", limits)
    try:
        data = base64.b64decode("".join(text[head.end() :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("the data URI is not valid base64; is it cut short?") from error
    return read_upload(data, limits)


def _read(source: str | os.PathLike | bytes, limits: Limits) -> tuple[bytes, str]:
    """The bytes, and what messages call them: a file's own name, for its folder is nobody's business."""
    if isinstance(source, bytes):
        data, name = source, "the picture"
    else:
        path = Path(source)
        name = path.name
        if not path.exists():
            raise FileNotFoundError(f"{name} is not there any more; send it again")
        if not path.is_file():  # a pipe would be waited on for ever
            raise ValueError(f"{name} is not a file; send a picture")
        with open(path, "rb") as file:
            data = file.read(limits.max_bytes + 1)
    if len(data) > limits.max_bytes:
        raise _too_many_bytes(name, limits)
    return data, name


def _too_many_bytes(name: str, limits: Limits) -> TooLarge:
    return TooLarge(f"{name} has more than the {limits.max_bytes / 1e6:g} MB that are taken; make it smaller")
