"""Features of frozen towers equal their own forward and forward hooks on their blocks; the projection is Eq. 9."""

import json
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from mmadapter.config import VisionConfig
from mmadapter.image import to_square
from mmadapter.tower import IMAGENET_MEAN, IMAGENET_STD
from mmadapter.vision import ImageEncoder, ImageProjection, load_encoder
from mmadapter.weights import store

TEXT = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
TINY_CLIPS = {
    "tiny-vit": {"image_size": 32, "layers": 6, "width": 32, "head_width": 16, "patch_size": 8},
    "tiny-resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None},
    "tiny-timm": {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64},
    "tiny-timm-vit": {
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "token",
        "timm_proj": "",
        "image_size": 224,
    },
}


@pytest.fixture(scope="module", autouse=True)
def tiny_clips(tmp_path_factory):
    """Makes open_clip know small models, for these tests only."""
    folder = tmp_path_factory.mktemp("configs")
    for name, vision in TINY_CLIPS.items():
        width = 192 if name == "tiny-timm-vit" else 24
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": width, "vision_cfg": vision, "text_cfg": TEXT}))
    open_clip.add_model_config(folder)
    yield
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    for name in TINY_CLIPS:
        open_clip.factory._MODEL_CONFIGS.pop(name)


def randomise(module: nn.Module) -> None:
    """Draws every weight and statistic: fresh towers have zeros and ones in places where a mistake would hide."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in module.state_dict().items():
        if tensor.dtype.is_floating_point:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(0.5 + noise.abs() if name.endswith(("var", "norm.weight")) else tensor + 0.1 * noise)


def encoder_of(spec: str, image_size: int = 0, scales: tuple[str, ...] = (), **options: object) -> ImageEncoder:
    torch.manual_seed(0)
    encoder = load_encoder(VisionConfig(spec, scales, image_size), random_weights=True, **options)
    randomise(encoder.tower)
    return encoder


def pixels_for(encoder: ImageEncoder, batch: int = 2) -> torch.Tensor:
    size = encoder.image_size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


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


PHOTOS = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)) for i in range(5)]


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
    encoder = encoder_of("efficientnet-lite0", 32)
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
    projection(encoder.features_of(PHOTOS[:2])).square().sum().backward()
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


def test_efficientnet_weights_are_mapped_by_order(tmp_path, monkeypatch) -> None:
    torch.manual_seed(3)
    reference = timm.create_model("tf_efficientnet_lite0")
    randomise(reference)
    state = {f"_other.{i}": tensor for i, tensor in enumerate(reference.state_dict().values())}
    monkeypatch.setattr(store, "fetch", lambda spec: tmp_path / f"{spec}.pth")
    torch.save(state, tmp_path / "efficientnet-lite0.pth")
    encoder = load_encoder(VisionConfig("efficientnet-lite0", ("final",), 64))
    pixels = pixels_for(encoder)
    reference.reset_classifier(0)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), reference.eval()(pixels), rtol=1e-4, atol=1e-4)
    for damaged in (dict(list(state.items())[1:]), {**state, "_other.0": torch.zeros(1)}):
        torch.save(damaged, tmp_path / "efficientnet-lite0.pth")
        with pytest.raises(ValueError, match="does not hold the weights of efficientnet-lite0"):
            load_encoder("efficientnet-lite0")


@pytest.fixture
def clip_file(tmp_path) -> Path:
    torch.manual_seed(4)
    model = open_clip.create_model("tiny-vit", pretrained_image=False, pretrained_text=False)
    randomise(model)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    return tmp_path / "clip.pt"


def test_open_clip_weights_from_a_file(clip_file) -> None:
    encoder = load_encoder(VisionConfig(f"open_clip:tiny-vit@{clip_file}", ("final",)))
    model = open_clip.create_model("tiny-vit", pretrained=str(clip_file)).eval()
    pixels = pixels_for(encoder)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), model.encode_image(pixels))
    own = sum(parameter.numel() for parameter in model.visual.parameters())
    assert sum(parameter.numel() for parameter in encoder.parameters()) == own  # the text side is gone


def test_torchscript_archives_of_openai_use_quick_gelu(clip_file, tmp_path) -> None:
    """OpenAI's own files are TorchScript archives; under plain GELU their features are silently wrong."""
    model = open_clip.create_model("tiny-vit", pretrained=str(clip_file), force_quick_gelu=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is on its way out of PyTorch; OpenAI's files stay as they are
        archive = torch.jit.trace_module(model, {"encode_image": torch.randn(1, 3, 32, 32)}, check_trace=False)
    archive.save(str(tmp_path / "openai.pt"))
    encoder = load_encoder(VisionConfig(f"open_clip:tiny-vit@{tmp_path / 'openai.pt'}", ("final",)))
    pixels = pixels_for(encoder)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), model.encode_image(pixels), rtol=1e-4, atol=1e-5)
        plain = load_encoder(VisionConfig(f"open_clip:tiny-vit@{clip_file}", ("final",)))
        assert (encoder(pixels) - plain(pixels)).abs().max() > 1e-3


def test_open_clip_weights_by_tag(clip_file, monkeypatch) -> None:
    """A tag brings its own normalisation and activation; open_clip only warns when the activation is another."""
    about = {"hf_hub": "org/name/", "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    asked = []

    def cached(repository: str, file: str) -> str | None:
        asked.append((repository, file))
        return str(clip_file) if file.endswith(".bin") else None

    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["openai"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: about)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    encoder = load_encoder(VisionConfig("open_clip:tiny-vit/openai", ("final",)))
    assert asked == [("org/name", "open_clip_model.safetensors"), ("org/name", "open_clip_pytorch_model.bin")]
    assert (encoder.mean, encoder.std) == (about["mean"], about["std"])
    model = open_clip.create_model("tiny-vit", pretrained=str(clip_file), force_quick_gelu=True).eval()
    pixels = pixels_for(encoder)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), model.encode_image(pixels))
    with pytest.raises(ValueError, match=r"no weights 'laion' for tiny-vit; it has openai"):
        load_encoder("open_clip:tiny-vit/laion")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_weights_from_a_file(suffix: str, tmp_path) -> None:
    """A classifier of any size in the file is left out; everything else must be there."""
    torch.manual_seed(5)
    reference = timm.create_model("resnet10t", num_classes=7)
    randomise(reference)
    state, path = reference.state_dict(), tmp_path / f"resnet{suffix}"

    def save(tensors: dict) -> None:
        save_file(tensors, path) if suffix == ".safetensors" else torch.save({"state_dict": tensors, "epoch": 3}, path)

    save(state)
    encoder = load_encoder(VisionConfig(f"timm:resnet10t@{path}", ("final",), 64))
    pixels = pixels_for(encoder)
    reference.reset_classifier(0)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), reference.eval()(pixels), rtol=1e-4, atol=1e-5)
    state.pop("layer1.0.conv1.weight")
    save(state)
    with pytest.raises(ValueError, match=r"does not hold the weights of resnet10t: Missing.*layer1\.0\.conv1") as error:
        load_encoder(f"timm:resnet10t@{path}")
    assert "\n" not in str(error.value)


def test_timm_weights_from_the_cache_of_the_hub(tmp_path, monkeypatch) -> None:
    """Weights that were fetched once must load without a network, and at once."""
    torch.manual_seed(6)
    reference = timm.create_model("resnet10t")
    randomise(reference)
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: str(tmp_path / file))
    encoder = load_encoder(VisionConfig("timm:resnet10t", ("final",), 64))
    pixels = pixels_for(encoder)
    reference.reset_classifier(0)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), reference.eval()(pixels), rtol=1e-4, atol=1e-5)


def test_no_network_says_what_to_do(monkeypatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise RuntimeError("Name or service not known\nand a page of advice")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, file: None)
    monkeypatch.setattr(timm, "create_model", unreachable)
    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    for spec, name in (("timm:resnet10t", "timm:resnet10t"), ("open_clip:ViT-L-14/openai", "open_clip:ViT-L-14")):
        with pytest.raises(ConnectionError, match="Name or service not known") as error:
            load_encoder(spec)
        assert f'"{name}@FILE"' in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("efficientnet-lite9", "unknown image encoder 'efficientnet-lite9', did you mean efficientnet-lite"),
        ("clip", "expected one of efficientnet-lite0"),
        ("timm:", "unknown image encoder"),
        ("timm:resnet5", "timm has no model 'resnet5', did you mean resnet"),
        ("timm:resnet18.a9_in1k", r"timm has no weights 'resnet18\.a9_in1k', did you mean resnet18\.a"),
        ("timm:resnet9999x@{file}", "timm has no model"),
        ("timm:test_vit", "timm has no weights for test_vit"),
        ("open_clip:ViT-L-41/openai", "open_clip has no model 'ViT-L-41', did you mean .*ViT-L-14"),
        ("open_clip:ViT-L-14/openia", "open_clip has no weights 'openia' for ViT-L-14; it has openai, "),
        ("open_clip:ViT-L-14", 'needs a tag, as in "open_clip:ViT-L-14/openai", or a file'),
        ("open_clip:tiny-vit", 'open_clip:tiny-vit needs a file: "open_clip:tiny-vit@FILE"'),
        ("open_clip:tiny-vit@{file}", "notes.pth does not hold the weights of tiny-vit"),
        ("timm:resnet10t@{file}", "notes.pth is not a file of PyTorch weights"),
    ],
)
def test_bad_specs(spec: str, message: str, tmp_path, monkeypatch) -> None:
    if "test_vit" in spec:
        monkeypatch.setattr(timm, "list_pretrained", lambda pattern: [])
    (tmp_path / "notes.pth").write_text("not weights")
    with pytest.raises(ValueError, match=message) as error:
        load_encoder(spec.format(file=tmp_path / "notes.pth"))
    assert "\n" not in str(error.value)


def test_files_that_are_not_there_or_hold_something_else(tmp_path, clip_file) -> None:
    for spec in ("timm:resnet10t", "open_clip:tiny-vit"):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.pth not found"):
            load_encoder(f"{spec}@{tmp_path / 'nowhere.pth'}")
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"path": Path("x")}, tmp_path / "pickle.pth")
    for file, message in (
        ("cut.safetensors", "not a whole safetensors file"),
        ("list.pth", "holds no state dict"),
        ("pickle.pth", "not a file of PyTorch weights"),
        ("clip.pt", "does not hold the weights of resnet10t"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_encoder(f"timm:resnet10t@{tmp_path / file}")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="does not hold the weights of tiny-resnet") as error:
        load_encoder(f"open_clip:tiny-resnet@{clip_file}")
    assert "\n" not in str(error.value)


def projection_of(**options: float) -> ImageProjection:
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 2])
def test_real_efficientnets_know_a_cat(number: int) -> None:
    """Weights, their order, normalisation, size and channel order are right together or the cat is something else."""
    spec = f"efficientnet-lite{number}"
    file = store.cached_path(spec)
    if file is None:
        pytest.skip(f"{spec} is not in the cache; fetch it with: python -m mmadapter weights fetch {spec}")
    encoder = load_encoder(spec)
    assert sum(encoder.widths) == (1752, 1752, 1840)[number]
    weight, bias = list(torch.load(file, weights_only=True, map_location="cpu").values())[-2:]
    skimage = pytest.importorskip("skimage.data")
    scores = encoder.features_of([skimage.chelsea(), skimage.coffee()])[:, -1280:] @ weight.T + bias
    cat, cup = scores.argmax(dim=1).tolist()
    assert cat in range(281, 286)  # ImageNet's domestic cats
    assert cup in (504, 967, 968)  # coffee mug, espresso, cup


@pytest.mark.slow
def test_the_paper_encoder_has_six_scales() -> None:
    """ViT-L/14: the class token after every fourth of 24 blocks, 1024 wide each (PAPER: multi-scale CLIP features)."""
    torch.manual_seed(0)
    encoder = load_encoder("open_clip:ViT-L-14", random_weights=True)
    assert encoder.config.scales == ("4", "8", "12", "16", "20", "24")
    assert encoder.widths == (1024,) * 6
    assert (encoder.image_size, encoder.mean) == (224, open_clip.OPENAI_DATASET_MEAN)
    assert encoder(encoder.preprocess(PHOTOS[:1])).isfinite().all()
