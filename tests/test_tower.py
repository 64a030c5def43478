"""A tower holds the weights that its spec names, or says in one line why not."""

import warnings
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from small_towers import pixels_for, randomise, tiny_clips  # noqa: F401 - a fixture

from mmadapter.config import VisionConfig
from mmadapter.vision import load_encoder
from mmadapter.weights import store


def test_efficientnet_weights_are_mapped_by_order(tmp_path, monkeypatch) -> None:
    torch.manual_seed(3)
    reference = timm.create_model("tf_efficientnet_lite0")
    randomise(reference)
    state = {f"_other.{i}": tensor for i, tensor in enumerate(reference.state_dict().values())}
    monkeypatch.setattr(store, "fetch", lambda spec: tmp_path / f"{spec}.pth")
    torch.save(state, tmp_path / "efficientnet-lite0.pth")
    # In float64: random weights blow up what rounding, and the number of threads, make of float32.
    encoder = load_encoder(VisionConfig("efficientnet-lite0", ("final",), 64), dtype=torch.float64)
    pixels = pixels_for(encoder)
    reference.reset_classifier(0)
    with torch.no_grad():
        expected = reference.eval().double()(pixels.double()).float()
        torch.testing.assert_close(encoder(pixels), expected, rtol=1e-5, atol=1e-5)
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


def test_random_weights_need_no_file() -> None:
    encoder = load_encoder(VisionConfig("timm:resnet10t@nowhere.pth", image_size=32), random_weights=True)
    assert encoder.config.encoder == "timm:resnet10t@nowhere.pth"


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


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 2])
def test_real_efficientnets_know_a_cat(number: int) -> None:
    """Weights, their order, normalisation, size and channel order are right together or the cat is something else."""
    spec = f"efficientnet-lite{number}"
    file = store.cached_path(spec)
    if file is None:
        pytest.skip(f"{spec} is not in the cache; fetch it with: python -m mmadapter weights fetch {spec}")
    encoder = load_encoder(spec)
    assert sum(encoder.widths) == (1792, 1792, 1840)[number]
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
    assert encoder(encoder.preprocess([Image.new("RGB", (40, 30), "red")])).isfinite().all()
