"""Small open_clip models, towers with random weights, and pixels for them."""

import json

import open_clip
import pytest
import torch
from torch import nn

from mmadapter.config import VisionConfig
from mmadapter.vision import ImageEncoder, load_encoder

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
