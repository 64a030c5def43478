"""The frozen image encoder, read at several scales, and the projection to the image token (arXiv 2303.16199, Eq. 9).

Shapes: B batch, S side of the image in pixels, M scales, C_m channels of scale m, F = sum of the widths of all
scales, R principal components, C width of the LLaMA. A grid is R x C cells.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mmadapter.config import VisionConfig
from mmadapter.image import ImageSource, load_image, to_square, to_tensor
from mmadapter.tower import Reading, Tower, load_tower

WHITENING_FLOOR = 1e-3  # added to the variance of each component, of features whose own is 1
_SCALE = re.compile(r"(?P<place>[1-9]\d*|final)(?:/(?P<rows>[1-9]\d*)x(?P<columns>[1-9]\d*))?")


class ImageEncoder(nn.Module):
    """A frozen tower that gives the concatenated features of several scales in one pass (Eq. 9).

    A scale is a block of a transformer or a stage of a convolutional network, counted from 1, or "final". Its global
    feature is the class token after that block (the mean over the patches where the tower has no class token) or the
    mean over the stage's feature map. With "/RxC" it is the mean over each cell of an R x C grid of the patches or of
    the map, flattened with the cells running fastest.

    The stages of a convolutional network are those that timm and open_clip give (the stem of a ResNet is the first). By
    default a transformer is read after every fourth block and the last, a convolutional network after every stage and
    at the end.

    Attributes:
        config: The encoder's configuration, with its scales and image size filled in.
        widths: Number of features of each scale, C_m; F is their sum.
        mean, std: Normalisation of the input channels.
        image_size: Side of the square the tower takes, S.
    """

    def __init__(self, config: VisionConfig, tower: Tower) -> None:
        """Reads the tower once, on a blank image, to learn its blocks and widths.

        Raises:
            ValueError: A scale is not one of this tower, or its images cannot have this size.
        """
        super().__init__()
        self.tower = tower
        self.mean, self.std, self.image_size = tower.mean, tower.std, tower.image_size
        self.requires_grad_(False).eval()
        size = self.image_size
        try:
            with torch.no_grad():
                blank = self.tower.read(self._first_parameter().new_zeros(1, 3, size, size), None)
        except (AssertionError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{config.encoder} cannot take images of {size} x {size} pixels: {reason}") from error
        shapes = [tuple(features.shape[1:]) for features, _ in blank.blocks]
        transformer = len(set(shapes)) == 1
        scales = config.scales or _default_scales(len(shapes), transformer)
        self.config = dataclasses.replace(config, scales=scales, image_size=self.image_size)
        self._plan = [_parse_scale(scale, shapes, blank, config.encoder) for scale in scales]
        self.widths = tuple(feature.shape[1] for feature in self._features(blank, list(range(1, len(shapes) + 1))))
        if not transformer:
            # Convolutions run faster with channels last (one core, 260 px: 24 images a second instead of 17).
            self.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> ImageEncoder:
        """Stays in evaluation mode: a frozen tower must not update its batch statistics."""
        return super().train(False)

    def fingerprint(self) -> str:
        """A hash of all that its features depend on: weights, number format, scales and preprocessing."""
        digest = hashlib.sha256(repr((self.config, self.mean, self.std)).encode())
        for name, tensor in self.tower.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def preprocess(self, images: Sequence[ImageSource]) -> torch.Tensor:
        """Reads images and makes the pixels the tower takes, float32 [B, 3, S, S], on the CPU."""
        squares = [to_square(load_image(image), self.image_size, self.config.resize) for image in images]
        return to_tensor(squares, self.mean, self.std)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Gives the features of preprocessed images.

        Args:
            pixels: What `preprocess` gives, [B, 3, S, S].

        Returns:
            The features of all scales, in the order of `config.scales`: float32 [B, F].
        """
        parameter = self._first_parameter()
        taken = sorted({place for place, _ in self._plan if place is not None})
        reading = self.tower.read(pixels.to(parameter.device, parameter.dtype), taken)
        return torch.cat(self._features(reading, taken), dim=1)  # [B, F]

    @torch.no_grad()
    def features_of(self, images: Sequence[ImageSource], batch_size: int = 8) -> torch.Tensor:
        """Reads images and gives their features, `batch_size` at a time.

        Returns:
            Float32 [number of images, F], on the encoder's device.
        """
        if not len(images):
            return self._first_parameter().new_zeros(0, sum(self.widths), dtype=torch.float32)
        batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
        return torch.cat([self(self.preprocess(batch)) for batch in batches])

    def _first_parameter(self) -> nn.Parameter:
        return next(self.tower.parameters())

    def _features(self, reading: Reading, taken: list[int]) -> list[torch.Tensor]:
        """The feature of each scale, float32 [B, C_m]."""
        features = []
        for place, grid in self._plan:
            if place is None and grid is None:
                features.append(reading.final.float())
                continue
            map_, token = (reading.final_map, None) if place is None else reading.blocks[taken.index(place)]
            if grid is not None:
                features.append(F.adaptive_avg_pool2d(map_.float(), grid).flatten(1))  # [B, C_m * R * C]
            else:
                features.append(map_.float().mean((2, 3)) if token is None else token.float())
        return features


class ImageProjection(nn.Module):
    """Projects the concatenated features of all scales to the image token (Eq. 9).

    The features are standardised by their mean and deviation over the training set: those of a frozen network differ
    in scale by orders of magnitude from channel to channel. They may be whitened as well: what tells similar images
    apart, such as two maps with another country coloured, is a small part of the variance, and without its being made
    as large as the rest a short training does not find it. Then LayerNorm, a two-layer MLP and LayerNorm, so that the
    image token starts at the scale of the adaption prompts that it is added to (Eq. 10).
    """

    def __init__(
        self,
        feature_width: int,
        width: int,
        hidden: int,
        dropout: float = 0.0,
        feature_dropout: float = 0.0,
        scale: float = 1.0,
        components: int = 0,
    ) -> None:
        """Makes the projection; the standardisation is the identity until `set_statistics`.

        Args:
            feature_width: Features of one image, F.
            width: Width of the LLaMA, C.
            hidden: Width between the two linear layers.
            dropout: Share of hidden units dropped in training.
            feature_dropout: Share of standardised, or whitened, features dropped in training.
            scale: Standard deviation of the image token's numbers at the start.
            components: Principal components that whitening keeps, R; 0 does not whiten.

        Raises:
            ValueError: There are fewer features than components.
        """
        super().__init__()
        self.register_buffer("feature_mean", torch.zeros(feature_width))
        self.register_buffer("feature_std", torch.ones(feature_width))
        if components > feature_width:
            raise ValueError(f"an image has {feature_width} features, so {components} components cannot be whitened")
        whitening = torch.eye(feature_width, components) if components else None
        self.register_buffer("feature_whitening", whitening)  # [F, R]
        taken = components or feature_width
        self.feature_dropout = nn.Dropout(feature_dropout)
        self.feature_norm = nn.LayerNorm(taken)
        self.hidden = nn.Linear(taken, hidden)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, width)
        self.output_norm = nn.LayerNorm(width)
        nn.init.constant_(self.output_norm.weight, scale)

    @torch.no_grad()
    def set_statistics(self, features: torch.Tensor) -> None:
        """Takes mean and deviation of every feature over a training set, and what whitens them.

        A feature that varies by no more than rounding does (1e-4 of its mean) is only centred, not blown up; a
        component that varies less than a thousandth of what a feature does is raised no further than that.

        Args:
            features: [number of images, F], two images at least.

        Raises:
            ValueError: Another shape, fewer than two images, or values that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != len(self.feature_mean) or len(features) < 2:
            raise ValueError(
                f"expected the features of two or more images, [n, {len(self.feature_mean)}], "
                f"got {list(features.shape)}"
            )
        features = features.double()
        if not features.isfinite().all():
            raise ValueError("the features hold values that are not finite; look for damaged images or weights")
        mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)  # [F], [F]
        deviation[deviation <= 1e-4 * mean.abs()] = 1.0
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(deviation)
        if self.feature_whitening is not None:
            standard = (features - mean) / deviation  # [n, F]
            variances, directions = torch.linalg.eigh(standard.T @ standard / len(standard))  # rising: [F], [F, F]
            components = self.feature_whitening.shape[1]
            largest = torch.arange(len(variances) - 1, len(variances) - 1 - components, -1, device=variances.device)
            whitening = directions[:, largest] / (variances[largest].clamp_min(0) + WHITENING_FLOOR).sqrt()
            whitening[:, variances[largest] < 1e-6] = 0.0  # such directions are rounding's, another at every run
            self.feature_whitening.copy_(whitening)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Projects features [B, F] to image tokens [B, C]."""
        x = (features - self.feature_mean) / self.feature_std  # [B, F]
        if self.feature_whitening is not None:
            x = x @ self.feature_whitening  # [B, R]
        x = x.to(self.hidden.weight.dtype)
        x = self.feature_norm(self.feature_dropout(x))
        x = self.dropout(F.gelu(self.hidden(x)))  # [B, hidden]
        return self.output_norm(self.output(x))  # [B, C]


def load_encoder(
    config: VisionConfig | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    random_weights: bool = False,
) -> ImageEncoder:
    """Builds the encoder a spec names, frozen, with its weights.

    Args:
        config: The encoder, its scales and its image size; a string is the spec alone.
        dtype: Type of the weights; features are float32 whatever it is.
        device: Where the weights go.
        random_weights: Leaves the weights as they are drawn; fetches and reads none.

    Raises:
        ValueError: An unknown spec, model, tag or scale, an image size the tower cannot take, or a file that does not
            hold this tower.
        FileNotFoundError: The weight file is not there.
        ConnectionError: Weights cannot be fetched.
    """
    if isinstance(config, str):
        config = VisionConfig(config)
    return ImageEncoder(config, load_tower(config.encoder, config.image_size, random_weights).to(device, dtype))


def _default_scales(blocks: int, transformer: bool) -> tuple[str, ...]:
    if transformer:
        return tuple(str(block) for block in sorted({*range(4, blocks + 1, 4), blocks}))
    return (*(str(stage) for stage in range(1, blocks + 1)), "final")


def _parse_scale(
    scale: str, shapes: list[tuple[int, ...]], blank: Reading, encoder: str
) -> tuple[int | None, tuple[int, int] | None]:
    """Reads a scale into its block (from 1; None for "final") and its grid (rows, columns) or None.

    Raises:
        ValueError: The scale is malformed, the tower has no such block, or the block has fewer cells than the grid.
    """
    match = _SCALE.fullmatch(scale)
    if match is None:
        raise ValueError(f'a scale is a block counted from 1 or "final", then perhaps "/RxC", got {scale!r}')
    place = None if match["place"] == "final" else int(match["place"])
    if place is not None and place > len(shapes):
        raise ValueError(f'{encoder} has {len(shapes)} blocks, 1 to {len(shapes)}, and "final"; got scale {scale!r}')
    if match["rows"] is None:
        return place, None
    grid = int(match["rows"]), int(match["columns"])
    if place is None and blank.final_map is None:
        raise ValueError(f'the final feature of {encoder} has no grid; give "{len(shapes)}/{grid[0]}x{grid[1]}"')
    rows, columns = blank.final_map.shape[2:] if place is None else shapes[place - 1][1:]
    if grid[0] > rows or grid[1] > columns:
        raise ValueError(f"{encoder} has {rows} x {columns} cells there, too few for scale {scale!r}")
    return place, grid
