"""Image features that are kept, so that many questions about one image encode it once.

Shapes: B images, F width of the image features.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from mmadapter.config import VisionConfig
from mmadapter.image import ImageSource, load_image, to_square
from mmadapter.vision import ImageEncoder


class KeptFeatures:
    """Features of the images seen lately, of any encoder; several threads may use it."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[VisionConfig, bytes], Tensor] = OrderedDict()  # the latest last

    def of(self, encoder: ImageEncoder, images: Sequence[ImageSource], limit: int) -> Tensor:
        """Features of images, float32 [B, F]; those that are kept are not computed again.

        Args:
            limit: Images that are kept from now on.

        Raises:
            FileNotFoundError, ValueError: An image cannot be read.
        """
        # Made small one by one: a batch of photos as they come from a camera would fill a gigabyte.
        squares = [to_square(load_image(image), encoder.image_size, encoder.config.resize) for image in images]
        keys = [(encoder.config, hashlib.sha256(square.tobytes()).digest()) for square in squares]
        # Looked up once: another thread's images may push these out at any moment.
        found = {key: self._kept.get(key) for key in keys}
        missing = {key: square for key, square in zip(keys, squares, strict=True) if found[key] is None}
        if missing:
            found |= dict(zip(missing, encoder.features_of(list(missing.values())), strict=True))
        for key in keys:
            self._kept.pop(key, None)
            self._kept[key] = found[key]
        while len(self._kept) > limit:
            self._kept.popitem(last=False)
        return torch.stack([found[key] for key in keys])
