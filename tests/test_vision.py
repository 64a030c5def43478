"""Features of frozen towers equal their own forward and forward hooks on their blocks; the projection is Eq. 9."""

from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_towers import encoder_of, pixels_for, tiny_clips  # noqa: F401 - a fixture
from torch import nn

from mmadapter.image import to_square
from mmadapter.tower import IMAGENET_MEAN, IMAGENET_STD
from mmadapter.vision import ImageEncoder, ImageProjection

PHOTOS = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)) for i in range(5)]


def modules_of(encoder: ImageEncoder) -> list[nn.Module]:
    """The modules whose outputs the scales 1, 2, ... are."""
    trunk = encoder.tower.trunk
    if encoder.config.encoder.startswith("efficientnet") or "efficientnet" in encoder.config.encoder:
        return [trunk.blocks[i] for i in (0, 1, 2, 4, 6)]
    if isinstance(trunk, open_clip.transformer.VisionTransformer):
        return list(trunk.transformer.resblocks)
    if isinstance(trunk, open_clip.modified_resnet.ModifiedResNet):
        return [trunk.avgpool, trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
    if hasattr(trunk, "layer4"):
        return [trunk.act1, trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
    return list(trunk.blocks)


def hooked(encoder: ImageEncoder, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The slow reference: the tower's own forward, with a hook on every block that clones what it gives."""
    outputs: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.detach().clone()))
        for module in modules_of(encoder)
    ]
    with torch.no_grad():
        final = encoder.tower.trunk(pixels)
        final = encoder.tower.head(final) if encoder.tower.head is not None else final
    for handle in handles:
        handle.remove()
    return final, outputs


# Spec, image size, number of blocks, whether there is a class token, default scales.
TOWERS = {
    "efficientnet-lite0": (64, 5, False, ("1", "2", "3", "4", "5", "final")),
    "timm:tf_efficientnet_lite0": (64, 5, False, ("1", "2", "3", "4", "5", "final")),
    "timm:resnet10t": (64, 5, False, ("1", "2", "3", "4", "5", "final")),
    "timm:vit_tiny_patch16_224": (48, 12, True, ("4", "8", "12")),
    "timm:deit_tiny_distilled_patch16_224": (48, 12, True, ("4", "8", "12")),
    "open_clip:tiny-vit": (0, 6, True, ("4", "6")),
    "open_clip:tiny-resnet": (0, 5, False, ("1", "2", "3", "4", "5", "final")),
    "open_clip:tiny-timm": (0, 5, False, ("1", "2", "3", "4", "5", "final")),
    "open_clip:tiny-timm-vit": (48, 12, True, ("4", "8", "12")),
}


@pytest.mark.parametrize("spec", TOWERS)
def test_every_scale_equals_a_forward_hook(spec: str) -> None:
    """Guards against wrong blocks, patches taken for class tokens, and finals that are not the tower's own."""
    size, blocks, class_token, defaults = TOWERS[spec]
    scales = ("final", *(str(block) for block in range(blocks, 0, -1)))  # an order other than the tower's
    encoder = encoder_of(spec, size, scales)
    pixels = pixels_for(encoder)
    final, outputs = hooked(encoder, pixels)
    assert len(outputs) == blocks
    expected = [final]
    for output in reversed(outputs):
        expected.append(output[:, 0] if class_token else output.mean((2, 3)))
    features = encoder(pixels)
    assert features.dtype == torch.float32
    assert encoder.widths == tuple(feature.shape[1] for feature in expected)
    assert (features.std(dim=0) > 0).float().mean() > 0.5  # two images that differ
    torch.testing.assert_close(features, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-5)
    assert encoder_of(spec, size).config.scales == defaults


@pytest.mark.parametrize("spec", ["timm:resnet10t", "timm:vit_tiny_patch16_224", "open_clip:tiny-vit"])
@pytest.mark.parametrize("scales", [("2",), ("final",), ("5", "2", "final", "2")])
def test_few_scales_leave_the_final_as_it_is(spec: str, scales: tuple[str, ...]) -> None:
    """open_clip's ResNet pools the last block that was asked for, not its own last."""
    size = TOWERS[spec][0]
    encoder = encoder_of(spec, size, scales)
    pixels = pixels_for(encoder)
    everything = encoder_of(spec, size, ("1", "2", "3", "4", "5", "final"))
    parts = dict(zip(everything.config.scales, everything(pixels).split(everything.widths, dim=1), strict=True))
    torch.testing.assert_close(encoder(pixels), torch.cat([parts[scale] for scale in scales], dim=1))


def test_scales_of_a_clip_resnet_below_the_last() -> None:
    encoder = encoder_of("open_clip:tiny-resnet", scales=("2", "final"))
    pixels = pixels_for(encoder)
    final, outputs = hooked(encoder, pixels)
    expected = torch.cat([outputs[1].mean((2, 3)), final], dim=1)
    torch.testing.assert_close(encoder(pixels), expected, rtol=1e-4, atol=1e-5)


def test_one_pass_over_the_tower() -> None:
    encoder, calls = encoder_of("timm:vit_tiny_patch16_224", 32, ("3", "7/2x2", "final", "final/1x1")), []
    encoder.tower.trunk.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    encoder(pixels_for(encoder))
    assert len(calls) == 1


def test_mean_of_patches_where_there_is_no_class_token() -> None:
    """A register token stands where the class token would, and says nothing about the image."""
    encoder = encoder_of("timm:vit_dwee_patch16_reg1_gap_256", 48, ("3", "final"))
    pixels = pixels_for(encoder)
    final, outputs = hooked(encoder, pixels)
    assert outputs[2].shape[1] == 1 + 3 * 3
    expected = torch.cat([outputs[2][:, 1:].mean(1), final], dim=1)
    torch.testing.assert_close(encoder(pixels), expected, rtol=1e-4, atol=1e-5)


def test_grids_of_a_transformer_average_its_patches() -> None:
    encoder = encoder_of("open_clip:tiny-vit", scales=("3", "3/2x4", "6/1x1"))
    pixels = pixels_for(encoder)
    _, outputs = hooked(encoder, pixels)
    patches = outputs[2][:, 1:].reshape(2, 4, 4, 32)  # without the class token [B, rows, columns, C]
    cells = patches.reshape(2, 2, 2, 4, 32).mean(2)  # two rows of four columns
    expected = [outputs[2][:, 0], cells.permute(0, 3, 1, 2).flatten(1), outputs[5][:, 1:].mean(1)]
    assert encoder.widths == (32, 32 * 8, 32)
    torch.testing.assert_close(encoder(pixels), torch.cat(expected, dim=1), rtol=1e-4, atol=1e-5)


def test_grids_of_a_convolutional_network() -> None:
    encoder = encoder_of("efficientnet-lite0", 64, ("1/2x2", "final/1x1", "final", "final/2x2"))
    pixels = pixels_for(encoder)
    final, outputs = hooked(encoder, pixels)
    stage, one, own, four = encoder(pixels).split(encoder.widths, dim=1)
    quarters = [outputs[0][:, :, r : r + 16, c : c + 16].mean((2, 3)) for r in (0, 16) for c in (0, 16)]
    torch.testing.assert_close(stage, torch.stack(quarters, dim=2).flatten(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one, final)
    torch.testing.assert_close(own, final)
    torch.testing.assert_close(four.unflatten(1, (1280, 4)).mean(2), final, rtol=1e-4, atol=1e-5)


def test_the_layout_of_swin_is_channels_last() -> None:
    """Swin's blocks give [B, rows, columns, C]: read as [B, C, rows, columns] the widths would be rows."""
    encoder = encoder_of("timm:swin_tiny_patch4_window7_224", scales=("1", "4", "final", "final/1x1"))
    assert encoder.widths == (96, 768, 768, 768)
    _, _, final, map_ = encoder(pixels_for(encoder, 1)).split(encoder.widths, dim=1)
    torch.testing.assert_close(final, map_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (("7",), r'has 6 blocks, 1 to 6, and "final"; got scale \'7\''),
        (("0",), "counted from 1"),
        (("last",), 'block counted from 1 or "final"'),
        (("3/2",), "RxC"),
        (("3/5x1",), "has 4 x 4 cells there, too few"),
        (("final/2x2",), 'has no grid; give "6/2x2"'),
    ],
)
def test_scales_that_do_not_exist(scales: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder_of("open_clip:tiny-vit", scales=scales)


def test_the_encoder_is_frozen() -> None:
    """In training mode, batch statistics of a frozen tower would drift with every caption it sees."""
    encoder = encoder_of("efficientnet-lite0", 32)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    nn.Sequential(encoder).train()
    features = encoder(pixels_for(encoder))
    assert not features.requires_grad
    assert not any(module.training for module in encoder.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_preprocessing() -> None:
    encoder = encoder_of("efficientnet-lite0", 32)
    assert (encoder.mean, encoder.std) == (IMAGENET_MEAN, IMAGENET_STD)
    pixels = encoder.preprocess(PHOTOS[:2])
    assert pixels.shape == (2, 3, 32, 32)
    square = np.asarray(to_square(PHOTOS[1], 32, "squash")) / 255
    expected = (square - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(pixels[1].permute(1, 2, 0).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_own_image_sizes() -> None:
    assert encoder_of("efficientnet-lite0").image_size == 224
    assert encoder_of("open_clip:tiny-vit").image_size == 32
    assert encoder_of("open_clip:tiny-vit").mean == open_clip.OPENAI_DATASET_MEAN
    encoder = encoder_of("open_clip:tiny-vit", 64)
    assert (encoder.image_size, encoder.config.image_size) == (64, 64)
    assert encoder.tower.trunk.positional_embedding.shape == (65, 32)
    for spec in ("timm:vit_tiny_patch16_224", "open_clip:tiny-timm-vit", "timm:swin_tiny_patch4_window7_224"):
        with pytest.raises(ValueError, match="cannot take images of 3 x 3") as error:
            encoder_of(spec, 3)
        assert "\n" not in str(error.value)


def test_batches_equal_single_images(tmp_path) -> None:
    encoder = encoder_of("efficientnet-lite0", 32).double()  # rounding differs with the batch and the threads
    path = tmp_path / "photo.png"
    PHOTOS[4].save(path)
    together = encoder.features_of([*PHOTOS[:4], path], batch_size=2)
    alone = torch.cat([encoder(encoder.preprocess([photo])) for photo in PHOTOS])
    assert together.shape == (5, sum(encoder.widths))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert encoder.features_of([]).shape == (0, sum(encoder.widths))


def test_features_can_be_trained_on() -> None:
    """Tensors made in inference mode cannot take part in autograd."""
    encoder = encoder_of("efficientnet-lite0", 32)
    projection = ImageProjection(sum(encoder.widths), 8, 16)
    features = encoder.features_of(PHOTOS[:2])
    assert not features.is_inference()
    projection(features).square().sum().backward()
    assert all(parameter.grad is not None for parameter in projection.parameters())


@pytest.mark.parametrize("spec", ["timm:tf_efficientnet_lite0", "open_clip:tiny-vit", "open_clip:tiny-resnet"])
def test_bfloat16_gives_nearly_the_same_in_float32(spec: str) -> None:
    size = TOWERS[spec][0]
    full, half = encoder_of(spec, size), encoder_of(spec, size, dtype=torch.bfloat16)
    half.tower.load_state_dict(full.tower.state_dict())
    pixels = pixels_for(full)
    features = half(pixels)
    assert features.dtype == torch.float32
    assert next(half.parameters()).dtype == torch.bfloat16
    assert F.cosine_similarity(features, full(pixels)).min() > 0.97


def projection_of(**options: Any) -> ImageProjection:
    torch.manual_seed(7)
    return ImageProjection(6, 4, 5, **options)


def test_projection_is_its_equation() -> None:
    projection = projection_of()
    features = torch.randn(3, 6) * 5 + 2
    hidden = F.gelu(F.layer_norm(features, (6,)) @ projection.hidden.weight.T + projection.hidden.bias)
    expected = F.layer_norm(hidden @ projection.output.weight.T + projection.output.bias, (4,))
    tokens = projection(features)
    assert tokens.shape == (3, 4)
    torch.testing.assert_close(tokens, expected)


def test_projection_standardises() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1e-2, 1.0, 10.0, 3.0, 1.0, 1.0])
    features = torch.randn(500, 6, generator=generator) * scales + 7
    features[:, 5] = 3.0  # never varies: it must not be blown up
    projection = projection_of()
    projection.set_statistics(features)
    standard = (features - projection.feature_mean) / projection.feature_std
    torch.testing.assert_close(standard[:, :5].mean(0), torch.zeros(5), rtol=0, atol=1e-3)
    torch.testing.assert_close(standard[:, :5].std(0), torch.ones(5), rtol=0.01, atol=0)
    assert projection.feature_std[5] == 1
    expected = projection_of()(standard)
    torch.testing.assert_close(projection(features), expected)
    assert set(dict(projection.named_buffers())) == {"feature_mean", "feature_std"}
    assert {"feature_mean", "feature_std"} <= set(projection.state_dict())


def test_projection_whitens() -> None:
    """Small differences between images would take a short training too long to find."""
    generator = torch.Generator().manual_seed(0)
    # Six features of four sources, the last of which is a hundredth of the first.
    sources = torch.randn(400, 4, generator=generator) * torch.tensor([1.0, 0.5, 0.1, 0.01])
    features = sources @ torch.randn(4, 6, generator=generator) + 3
    projection = projection_of(components=3)
    projection.set_statistics(features)
    standard = (features - projection.feature_mean) / projection.feature_std
    white = standard @ projection.feature_whitening
    variances = torch.linalg.eigvalsh((standard.T @ standard / 400).double()).flip(0)[:3].float()
    # Each component has its own variance v divided by v + 1e-3, and they do not go together.
    torch.testing.assert_close(white.T @ white / 400, torch.diag(variances / (variances + 1e-3)), rtol=1e-3, atol=1e-3)
    assert projection.hidden.in_features == 3
    normed = F.layer_norm(white, (3,))
    hidden = F.gelu(normed @ projection.hidden.weight.T + projection.hidden.bias)
    expected = F.layer_norm(hidden @ projection.output.weight.T + projection.output.bias, (4,))
    torch.testing.assert_close(projection(features), expected)


def test_fewer_images_than_components_whiten_what_there_is() -> None:
    projection = projection_of(components=5)
    projection.set_statistics(torch.tensor([[0.0, 1, 2, 3, 4, 5], [1.0, 1, 2, 3, 4, 5]]))
    assert projection.feature_whitening.count_nonzero(dim=0).tolist() == [1, 0, 0, 0, 0]


def test_more_components_than_features_are_an_error() -> None:
    with pytest.raises(ValueError, match="an image has 6 features, so 7 components cannot be whitened"):
        projection_of(components=7)


def test_projection_dropout_acts_in_training_only() -> None:
    features = torch.randn(4, 6)
    for options in ({"dropout": 0.5}, {"feature_dropout": 0.5}):
        projection = projection_of(**options)
        assert not torch.equal(projection(features), projection(features))
        projection.eval()
        assert torch.equal(projection(features), projection(features))
        torch.testing.assert_close(projection(features), projection_of()(features))


def test_projection_in_bfloat16_takes_float32_features() -> None:
    projection = projection_of()
    features = torch.randn(4, 6)
    expected = projection(features)
    tokens = projection.to(torch.bfloat16)(features)
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(5, 7), r"\[n, 6\], got \[5, 7\]"),
        (torch.zeros(1, 6), "two or more images"),
        (torch.full((3, 6), torch.nan), "not finite"),
    ],
)
def test_statistics_of_the_wrong_features(features: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        projection_of().set_statistics(features)
