"""Image towers: the network that an encoder spec names, and one pass over it that keeps what its blocks give.

Shapes: B batch, S side of the image in pixels, C_m channels of block m.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

EFFICIENTNETS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Reading:
    """What one pass over a tower gives.

    Attributes:
        final: The tower's own output [B, C_final].
        final_map: The feature map that is pooled into it [B, C, rows, columns], or None where there is no such map.
        blocks: Of each block kept, in order, the map [B, C_m, rows, columns] and the class token [B, C_m] or None.
    """

    final: torch.Tensor
    final_map: torch.Tensor | None
    blocks: list[tuple[torch.Tensor, torch.Tensor | None]]


class Tower(nn.Module):
    """An image network of timm or open_clip without classifier and text side, and what it was trained to see.

    Attributes:
        mean, std: Normalisation of the input channels.
        image_size: Side of the square the tower takes, S.
    """

    def __init__(
        self,
        trunk: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        head: nn.Module | None = None,
    ) -> None:
        """Takes a timm model or an open_clip tower as `trunk`; `head` follows a timm trunk that open_clip wraps."""
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.mean: tuple[float, float, float] = tuple(mean)
        self.std: tuple[float, float, float] = tuple(std)
        self.image_size = image_size

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Gives the tower's own output [B, C_final] of pixels [B, 3, S, S]."""
        return self.read(pixels, ()).final

    def read(self, pixels: torch.Tensor, kept: Sequence[int] | None) -> Reading:
        """Passes once over the tower and keeps what some of its blocks give.

        Args:
            pixels: Normalised pixels [B, 3, S, S].
            kept: The blocks to keep, counted from 1, ascending; None keeps all.
        """
        indices = None if kept is None else [block - 1 for block in kept]
        of_timm = hasattr(self.trunk, "forward_head")
        return self._read_timm(pixels, indices) if of_timm else self._read_clip(pixels, indices)

    def _read_timm(self, pixels: torch.Tensor, indices: list[int] | None) -> Reading:
        trunk, blocks = self.trunk, []
        if indices == []:  # timm takes no empty list
            features = trunk.forward_features(pixels)
        else:
            takes_prefix = "return_prefix_tokens" in inspect.signature(trunk.forward_intermediates).parameters
            arguments = {"return_prefix_tokens": True} if takes_prefix else {}
            features, maps = trunk.forward_intermediates(pixels, indices=indices, **arguments)
            # The first prefix token may also be a register, which says nothing about the image.
            has_class_token = getattr(trunk, "cls_token", None) is not None
            for kept in maps:
                map_, prefix = kept if isinstance(kept, tuple) else (kept, None)
                blocks.append((map_, prefix[:, 0] if prefix is not None and has_class_token else None))
        pooled = trunk.forward_head(features)
        if self.head is not None:
            return Reading(self.head(pooled), None, blocks)
        return Reading(pooled, self._final_map(features), blocks)

    def _final_map(self, features: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | None:
        """The last features of a timm model, tokens or map, as a map [B, C, rows, columns]; None for other layouts."""
        if isinstance(features, list):  # a tower of several branches
            return None
        if features.ndim == 3:
            patches = features[:, getattr(self.trunk, "num_prefix_tokens", 0) :]  # [B, T, C]
            side = round(patches.shape[1] ** 0.5)
            return patches.transpose(1, 2).unflatten(2, (side, side)) if side * side == patches.shape[1] else None
        if features.ndim != 4:
            return None
        return features.permute(0, 3, 1, 2) if getattr(self.trunk, "output_fmt", "NCHW") == "NHWC" else features

    def _read_clip(self, pixels: torch.Tensor, indices: list[int] | None) -> Reading:
        if indices == []:
            given = self.trunk(pixels)
            return Reading(given[0] if isinstance(given, tuple) else given, None, [])
        # A ResNet of open_clip stops at the last block asked for and pools that: all its blocks are asked for.
        resnet = hasattr(self.trunk, "attnpool")
        given = self.trunk.forward_intermediates(pixels, indices=None if resnet else indices, output_extra_tokens=True)
        maps = given["image_intermediates"]
        if resnet and indices is not None:
            maps = [maps[index] for index in indices]
        tokens = given.get("image_intermediates_prefix", [None] * len(maps))
        blocks = [(map_, None if token is None else token[:, 0]) for map_, token in zip(maps, tokens, strict=True)]
        return Reading(given["image_features"], None, blocks)


def load_tower(spec: str, image_size: int = 0, random_weights: bool = False) -> Tower:
    """Builds the tower that an encoder spec names, in float32 on the CPU, in evaluation mode.

    Args:
        spec: "efficientnet-lite0", -1 or -2, "open_clip:MODEL/TAG", "open_clip:MODEL@FILE", "timm:NAME" or
            "timm:NAME@FILE".
        image_size: Side of the square it shall take; 0 takes its own.
        random_weights: Leaves the weights as they are drawn, fetches and reads none; then "open_clip:MODEL" will do.

    Raises:
        ValueError: An unknown spec, model or tag, a size the tower cannot take, or a file of other weights.
        FileNotFoundError: The weight file is not there.
        ConnectionError: The weights cannot be fetched.
    """
    library, _, rest = spec.partition(":")
    name, _, file = rest.partition("@")
    if random_weights:
        file = ""
    if file and not os.path.isfile(file):
        raise FileNotFoundError(f"{file} not found; {spec} needs its weights there")
    if spec in EFFICIENTNETS:
        tower = _load_efficientnet(spec, image_size, random_weights)
    elif library == "timm" and name:
        tower = _load_timm(name, file, image_size, random_weights)
    elif library == "open_clip" and name:
        tower = _load_open_clip(name, file, image_size, random_weights)
    else:
        known = (*EFFICIENTNETS, "open_clip:MODEL/TAG", "open_clip:MODEL@FILE", "timm:NAME", "timm:NAME@FILE")
        raise ValueError(f"unknown image encoder {spec!r}{_close(spec, known)}; expected one of {', '.join(known)}")
    return tower.eval()


def _load_efficientnet(spec: str, image_size: int, random_weights: bool) -> Tower:
    """An EfficientNet-Lite whose weight file lists the same tensors as timm's model, in order, under other names."""
    import timm

    trunk = timm.create_model(f"tf_{spec.replace('-', '_')}", pretrained=False)
    if not random_weights:
        from mmadapter.weights import store

        file = store.fetch(spec)
        given, expected = _read_file(str(file)), trunk.state_dict()
        if [tensor.shape for tensor in given.values()] != [tensor.shape for tensor in expected.values()]:
            raise ValueError(f"{file} does not hold the weights of {spec}; delete it and fetch it again")
        trunk.load_state_dict(dict(zip(expected, given.values(), strict=True)))
    size = image_size or trunk.default_cfg["input_size"][-1]
    trunk.reset_classifier(0)
    return Tower(trunk, mean=IMAGENET_MEAN, std=IMAGENET_STD, image_size=size)


def _load_timm(name: str, file: str, image_size: int, random_weights: bool) -> Tower:
    """Any backbone of timm, with weights from its hub or from a state dict of the same backbone in a file."""
    import timm

    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise ValueError(f"timm has no model {name!r}{_close(name, known)}")
    tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
    if "." in name and name not in tags:
        raise ValueError(f"timm has no weights {name!r}{_close(name, tags)}")
    if file or random_weights:
        trunk = timm.create_model(name)
    elif not tags:
        raise ValueError(f'timm has no weights for {name}; give a file: "timm:{name}@FILE"')
    else:
        hub = timm.get_pretrained_cfg(name).hf_hub_id or ""
        cached = _cached(hub, ("model.safetensors", "pytorch_model.bin"))
        overlay = {"file": cached} if cached else None
        trunk = _fetch(f"timm:{name}", timm.create_model, name, pretrained=True, pretrained_cfg_overlay=overlay)
    if not hasattr(trunk, "forward_intermediates"):
        raise ValueError(f"timm's {name} does not give its intermediate features; use another model")
    trunk.reset_classifier(0)
    if file:
        classifiers = trunk.default_cfg.get("classifier") or ()
        dropped = tuple(f"{part}." for part in ([classifiers] if isinstance(classifiers, str) else classifiers))
        state = {key: tensor for key, tensor in _read_file(file).items() if not key.startswith(dropped)}
        _load_state(trunk, state, file, name)
    data = timm.data.resolve_model_data_config(trunk)
    size = _resize_timm(trunk, name, data["input_size"][-1], image_size)
    return Tower(trunk, mean=data["mean"], std=data["std"], image_size=size)


def _load_open_clip(name: str, file: str, image_size: int, random_weights: bool) -> Tower:
    """The image side of an open_clip model; the text side is built with it, as the weights hold both, and let go."""
    import open_clip

    name, _, tag = name.partition("/")
    if name not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {name!r}{_close(name, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag and tag not in tags:
        raise ValueError(f"open_clip has no weights {tag!r} for {name}; it has {', '.join(tags) or 'none'}")
    arguments = {"pretrained_image": False, "pretrained_text": False}
    wraps_timm = "timm_model_name" in open_clip.get_model_config(name)["vision_cfg"]
    if image_size and not wraps_timm:
        arguments["force_image_size"] = image_size
    state = None
    if tag and not random_weights:
        about = open_clip.get_pretrained_cfg(name, tag)
        hub, _, hub_file = about.get("hf_hub", "").rpartition("/")
        file = _cached(hub, (hub_file,) if hub_file else ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"))
        file = file or _fetch(f"open_clip:{name}", open_clip.download_pretrained, about)
        # Weights trained with QuickGELU are wrong under GELU; open_clip itself only warns.
        arguments["force_quick_gelu"] = about.get("quick_gelu", False)
        arguments["force_preprocess_cfg"] = {key: about[key] for key in ("mean", "std") if key in about}
    elif file and _is_torchscript(file):
        # OpenAI publishes its models in this form, all of them trained with QuickGELU.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is on its way out of PyTorch; these files stay as they are
            state = torch.jit.load(file, map_location="cpu").state_dict()
        arguments["force_quick_gelu"] = True
    elif not file and not random_weights:
        example = f'a tag, as in "open_clip:{name}/{tags[0]}", or ' if tags else ""
        raise ValueError(f'open_clip:{name} needs {example}a file: "open_clip:{name}@FILE"')
    try:
        model = open_clip.create_model(name, pretrained=file if file and state is None else None, **arguments)
    except OSError as error:
        raise ConnectionError(f"cannot fetch the text side's configuration of {name}: {_reason(error)}") from error
    except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file or name} does not hold the weights of {name}: {_reason(error)}") from error
    if state is not None:
        open_clip.model.resize_pos_embed(state, model)
        visual = {key[len("visual.") :]: tensor for key, tensor in state.items() if key.startswith("visual.")}
        _load_state(model.visual, visual, file, name)
    visual, about = model.visual, open_clip.get_model_preprocess_cfg(model)
    size = about["size"] if isinstance(about["size"], int) else about["size"][-1]
    if not wraps_timm:
        return Tower(visual, mean=about["mean"], std=about["std"], image_size=size)
    size = _resize_timm(visual.trunk, name, size, image_size)
    return Tower(visual.trunk, head=visual.head, mean=about["mean"], std=about["std"], image_size=size)


def _read_file(file: str) -> dict[str, torch.Tensor]:
    """Reads a state dict from a safetensors or PyTorch file, out of a training checkpoint where it is part of one."""
    if file.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file: {_reason(error)}") from error
    try:
        given = torch.load(file, weights_only=True, map_location="cpu")
    except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} is not a file of PyTorch weights: {_reason(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(given, dict) and isinstance(given.get(key), dict):
            given = given[key]
    if not isinstance(given, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in given.values()):
        raise ValueError(f"{file} holds no state dict, expected tensors by name")
    return {key.removeprefix("module."): tensor for key, tensor in given.items()}


def _load_state(module: nn.Module, state: dict[str, torch.Tensor], file: str, name: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{file} does not hold the weights of {name}: {_reason(error)}") from error


def _is_torchscript(file: str) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(member.endswith("/constants.pkl") for member in archive.namelist())


def _resize_timm(trunk: nn.Module, name: str, own_size: int, size: int) -> int:
    """Makes a timm model take images of `size` (0: its own size) and gives the size it takes."""
    if size in (0, own_size):
        return own_size
    if hasattr(trunk, "set_input_size"):  # transformers; a convolutional network takes any size as it is
        try:
            trunk.set_input_size(img_size=(size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(f"{name} cannot take images of {size} x {size} pixels: {_reason(error)}") from error
    return size


def _cached(repository: str, files: Sequence[str]) -> str:
    """The path of a file that the Hugging Face hub's client already keeps, or "".

    Without this, weights that are there load only after the client has tried for half a minute to reach the hub.
    """
    import huggingface_hub

    for file in files if repository else ():
        path = huggingface_hub.try_to_load_from_cache(repository, file)
        if isinstance(path, str):
            return path
    return ""


def _fetch(spec: str, get: Callable, *arguments: object, **options: object) -> object:
    """Calls what downloads weights; `spec` is the encoder's without a tag.

    Raises:
        ConnectionError: It failed, for whatever reason: the clients behind it raise errors of many families.
    """
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)  # it reports every attempt
    try:
        return get(*arguments, **options)
    except Exception as error:
        raise ConnectionError(
            f'cannot fetch the weights of {spec} ({_reason(error)}); give them in a file, as "{spec}@FILE", '
            'or use "efficientnet-lite2"'
        ) from error
    finally:
        client.setLevel(level)


def _close(name: str, known: Iterable[str]) -> str:
    """The names most like it, as the end of a sentence."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f", did you mean {' or '.join(matches)}?" if matches else ""


def _reason(error: BaseException) -> str:
    """The first line of an error that says something; PyTorch's first line is a heading that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]
