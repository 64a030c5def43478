"""Base weights from a folder in the Hugging Face layout (`config.json`, `*.safetensors`), and from the hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmadapter.config import LlamaConfig, llama3_rope_divisors
from mmadapter.weights.base import (
    BaseWeights,
    check_shapes,
    folder_tokenizer,
    head_width_of,
    make_config,
    read_json,
    required,
    without_rotary_buffers,
)

if TYPE_CHECKING:
    from mmadapter.tokenizer import Tokenizer

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
FLOATS = ("F64", "F32", "F16", "BF16")
INDEX = "model.safetensors.index.json"
HUB_FILES = ("*.json", "*.safetensors", "tokenizer*", "*.jinja")
# Other copies of the same weights, in other layouts.
HUB_IGNORED = ("original/*", "consolidated*", "onnx/*")
NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_PREFIX = "model.layers."
LAYER_NAMES = {
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}


def open_huggingface(spec: str, folder: Path) -> BaseWeights:
    """Describes the base weights in a folder of the Hugging Face layout.

    Raises:
        FileNotFoundError: The index names a file that is not there.
        ValueError: The model is of another kind, a file is truncated, or the tensors are not those of the model that
            `config.json` describes.
    """
    config = read_config(folder / "config.json")
    stored: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _files(folder):
        for name, shape in _read_shapes(path).items():
            stored[name] = path
            shapes[name] = shape
    canonical = {name: _canonical(name) for name in without_rotary_buffers(stored)}
    if config.tied:
        # A tied model may store its embedding a second time; the configuration decides.
        canonical.pop("lm_head.weight", None)
    shapes = {canonical[name]: shapes[name] for name in canonical}
    check_shapes(folder, config, shapes, {new: old for old, new in canonical.items()})

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        from safetensors import safe_open

        for path in sorted(set(stored.values())):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - the reader is no mapping
                    if name in canonical:
                        yield canonical[name], file.get_tensor(name)

    def tokenizer() -> Tokenizer | None:
        return folder_tokenizer(folder)

    return BaseWeights(spec=spec, path=folder, config=config, shapes=shapes, tensors=tensors, tokenizer=tokenizer)


def download(name: str, *, progress: bool = True) -> Path:
    """Fetches the repository "ORG/NAME" or "ORG/NAME@REVISION" of the Hugging Face hub and returns its folder.

    What the hub's own cache holds whole is used as it is, without a network; a revision asks for another state of the
    repository. Otherwise the configuration comes first: a model that cannot be used is turned away before its weights
    are fetched.

    Raises:
        ConnectionError: The hub cannot be reached.
        FileNotFoundError: There is no such repository or revision, or it has no safetensors.
        PermissionError: The repository is gated.
        ValueError: `name` is no repository name, or its model is of another kind.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    repository, _, revision = name.partition("@")
    at = {"repo_id": repository, "revision": revision or None}
    chosen = {"allow_patterns": list(HUB_FILES), "ignore_patterns": list(HUB_IGNORED), **at}
    silence = not progress and not are_progress_bars_disabled()
    if silence:
        disable_progress_bars()
    try:
        with _plain_errors(name):
            with contextlib.suppress(LocalEntryNotFoundError):
                present = Path(snapshot_download(local_files_only=True, **chosen))
                if _is_whole(present):
                    return present
            read_config(Path(hf_hub_download(filename="config.json", **at)))
            folder = Path(snapshot_download(**chosen))
    finally:
        if silence:
            enable_progress_bars()
    if not _is_whole(folder):
        raise FileNotFoundError(
            f"hf:{name} has no whole set of *.safetensors, or the hub could not be reached for it; "
            "try again, or use a repository that has its weights in this format"
        )
    return folder


def hub_config(name: str) -> LlamaConfig:
    """The shape of the model in a repository of the hub; only its `config.json` is fetched.

    Raises:
        ConnectionError, FileNotFoundError, PermissionError, ValueError: As `download`.
    """
    from huggingface_hub import hf_hub_download

    repository, _, revision = name.partition("@")
    with _plain_errors(name):
        return read_config(Path(hf_hub_download(repository, "config.json", revision=revision or None)))


@contextlib.contextmanager
def _plain_errors(name: str) -> Iterator[None]:
    """Turns what the hub's client raises into one line that says what to do."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        HTTPError,  # of whichever HTTP library this version of the hub's client is built on
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = name.partition("@")
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"hf:{name} is no repository; expected hf:ORG/NAME or hf:ORG/NAME@REVISION") from error
    except GatedRepoError as error:
        raise PermissionError(
            f"hf:{name} is gated: accept its licence on its page, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"the hub has no {repository}, or it is private: check the name, or log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repository} has no revision {revision!r} on the hub") from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"cannot fetch hf:{name}: the hub cannot be reached and it was not fetched before. "
            "Check the network, or give a folder"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"hf:{name} has no config.json: it holds no model in the Hugging Face layout"
        ) from error
    except HTTPError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConnectionError(f"cannot fetch hf:{name}: {reason}. Check the network and try again") from error


def read_config(path: Path) -> LlamaConfig:
    """Reads `config.json` of a `LlamaForCausalLM`, or of a `MistralForCausalLM` without a sliding window.

    Raises:
        ValueError: It describes a model of another kind.
    """
    values = read_json(path)
    architecture = (values.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path} describes a {architecture or 'model'}; supported are {' and '.join(ARCHITECTURES)}")
    for option in ("attention_bias", "mlp_bias"):
        if values.get(option):
            raise ValueError(f"{path} has {option}; supported are models whose linear layers have no bias")
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path} has the activation {values['hidden_act']!r}; supported is 'silu'")
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method", "unknown")
        raise ValueError(f"{path} is quantised ({method}); use the unquantised weights, or a GGUF file")
    context = values.get("max_position_embeddings") or 2048
    window = values.get("sliding_window")
    if window is not None and window < context:
        raise ValueError(f"{path} has a sliding window of {window} tokens, less than its context of {context}")
    width, heads = required(values, "hidden_size", path), required(values, "num_attention_heads", path)
    head_width = values.get("head_dim") or head_width_of(path, width, heads)
    theta, divisors = _rope(path, values, head_width)
    return make_config(
        path,
        vocab_size=required(values, "vocab_size", path),
        width=width,
        layers=required(values, "num_hidden_layers", path),
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_width=head_width,
        hidden_width=required(values, "intermediate_size", path),
        norm_eps=float(values.get("rms_norm_eps") or 1e-6),
        rope_theta=theta,
        rope_divisors=divisors,
        tied=bool(values.get("tie_word_embeddings", False)),
        context=context,
    )


def _rope(path: Path, values: dict, head_width: int) -> tuple[float, tuple[float, ...] | None]:
    """Base of the rotary frequencies and their divisors.

    transformers 5 writes all of it into `rope_parameters`, earlier ones `rope_theta` and, where the frequencies are
    scaled, `rope_scaling`, whose `rope_type` was `type` at first.
    """
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or values.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if (scaling.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(f"{path} rotates a part of each head only; supported is the whole head")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, (float(required(scaling, "factor", path)),) * (head_width // 2)
    if kind == "llama3":
        return theta, llama3_rope_divisors(
            head_width,
            theta,
            factor=required(scaling, "factor", path),
            low_freq_factor=required(scaling, "low_freq_factor", path),
            high_freq_factor=required(scaling, "high_freq_factor", path),
            original_context=required(scaling, "original_max_position_embeddings", path),
        )
    raise ValueError(f"{path} has rotary embeddings of type {kind!r}; supported are default, linear and llama3")


def _files(folder: Path) -> list[Path]:
    """The files that hold the weights: those of the index, else the one file of the usual name, else all."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        files = [folder / name for name in sorted(set(required(index, "weight_map", folder / INDEX).values()))]
        if missing := [path.name for path in files if not path.is_file()]:
            raise FileNotFoundError(f"{folder} is incomplete: {', '.join(missing)} named by {INDEX} is not there")
        return files
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _is_whole(folder: Path) -> bool:
    try:
        return (folder / "config.json").is_file() and bool(_files(folder))
    except FileNotFoundError:
        return False


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    shapes = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the reader is no mapping
                entry = file.get_slice(name)
                if entry.get_dtype() not in FLOATS:
                    raise ValueError(f"{path}: {name} is stored as {entry.get_dtype()}; supported are {list(FLOATS)}")
                shapes[name] = tuple(entry.get_shape())
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, or no safetensors file ({error}); fetch it again") from error
    return shapes


def stored_name(canonical: str) -> str:
    """Hugging Face's name of one of our tensors."""
    if canonical.startswith("layers."):
        _, layer, rest = canonical.split(".", 2)
        return f"{LAYER_PREFIX}{layer}.{next(theirs for theirs, ours in LAYER_NAMES.items() if ours == rest)}"
    return next(theirs for theirs, ours in NAMES.items() if ours == canonical)


def _canonical(stored: str) -> str:
    """Our name of a tensor; a name that is not known stays, and the check of names will name it."""
    if stored in NAMES:
        return NAMES[stored]
    layer, _, rest = stored.removeprefix(LAYER_PREFIX).partition(".")
    if stored.startswith(LAYER_PREFIX) and rest in LAYER_NAMES:
        return f"layers.{layer}.{LAYER_NAMES[rest]}"
    return stored
