"""Base weights by name: one spec for the store, the Hugging Face hub, Meta's folders, Hugging Face folders and GGUF."""

from __future__ import annotations

from pathlib import Path

import torch

from mmadapter.config import LlamaConfig
from mmadapter.weights import store
from mmadapter.weights.base import NAMES_IN_A_MESSAGE, BaseWeights, expected_shapes

__all__ = ["BaseWeights", "expected_shapes", "load_state_dict", "open_weights", "read_config", "store"]

HUB_PREFIX = "hf:"
GGUF_MAGIC = b"GGUF"
SUPPORTED = "Meta (params.json, consolidated.*.pth), Hugging Face (config.json, *.safetensors) or one .gguf file"
# Any of these stands for the folder that it lies in.
FOLDER_FILES = ("params.json", "consolidated.*.pth", "config.json", "*.safetensors", "*.safetensors.index.json")


def open_weights(spec: str, *, progress: bool = True) -> BaseWeights:
    """Finds the base weights that `spec` names, fetching them if need be, and reads what they are.

    No tensor is loaded. The names and shapes of the tensors are exactly those of `expected_shapes(config)`.

    Args:
        spec: A name of the store ("smollm2-135m"), "hf:ORG/NAME[@REVISION]", or a folder or file, recognised by what
            is in it.
        progress: Whether to show a progress bar while something is fetched.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: The spec is not understood, or what it names is not a whole LLaMA of a supported kind.
        ConnectionError: It has to be fetched and cannot be.
        OSError: It cannot be read, or the cache folder cannot be written.
    """
    item = store.items().get(spec)
    if item is not None:
        if item.kind != "llama":
            names = ", ".join(name for name, other in store.items().items() if other.kind == "llama")
            raise ValueError(f"{spec} is an image encoder, not a LLaMA; the LLaMAs of the store are {names}")
        return _open_path(spec, store.fetch(spec, progress=progress))
    if spec.startswith(HUB_PREFIX):
        from mmadapter.weights.huggingface import download

        return _open_path(spec, download(spec.removeprefix(HUB_PREFIX), progress=progress))
    path = Path(spec).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"no LLaMA named {spec!r}: it is no file or folder, and the store has "
            f"{', '.join(name for name, other in store.items().items() if other.kind == 'llama')}. "
            f"Give one of these, a path, or hf:ORG/NAME"
        )
    return _open_path(spec, path)


def read_config(spec: str) -> LlamaConfig:
    """The shape of the LLaMA that `spec` names; of a repository of the hub only the configuration is fetched.

    Raises:
        As `open_weights`.
    """
    if spec.startswith(HUB_PREFIX):
        from mmadapter.weights.huggingface import hub_config

        return hub_config(spec.removeprefix(HUB_PREFIX))
    return open_weights(spec).config


def load_state_dict(weights: BaseWeights, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Loads all tensors, cast to `dtype`, ready for `Llama.load_state_dict(strict=True, assign=True)`.

    Raises:
        ValueError: `dtype` is not a floating-point type.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"weights are loaded in a floating-point type, got {dtype}")
    return {name: tensor.to(dtype).contiguous() for name, tensor in weights.tensors()}


def _open_path(spec: str, path: Path) -> BaseWeights:
    """Recognises a file or folder by what is in it."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(GGUF_MAGIC)) == GGUF_MAGIC:
                from mmadapter.weights.gguf import open_gguf

                return open_gguf(spec, path)
        if not any(path.match(pattern) for pattern in FOLDER_FILES):
            raise ValueError(f"{path} is no LLaMA: it is not a GGUF file, nor a file of {SUPPORTED}")
        path = path.parent
    if (path / "params.json").is_file() and any(path.glob("consolidated.*.pth")):
        from mmadapter.weights.meta import open_meta

        return open_meta(spec, path)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        from mmadapter.weights.huggingface import open_huggingface

        return open_huggingface(spec, path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _open_path(spec, files[0])
    if files:
        raise ValueError(f"{path} holds {len(files)} GGUF files; name one of them, such as {files[0].name}")
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:NAMES_IN_A_MESSAGE]) or "nothing"
    raise ValueError(f"{path} holds no LLaMA weights: expected {SUPPORTED}; it holds {found}")
