"""The look inside an answer, against the equations in float64."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import tiny_session
import torch
from tiny_session import Tiny
from torch import Tensor

from mmadapter.adapter import Adapter
from mmadapter.config import LlamaConfig
from mmadapter.inspection import look_inside
from mmadapter.llama import Llama
from mmadapter.session import Session
from mmadapter.vision import ImageProjection

SCALES = {"2": 3, "4/2x1": 2, "final": 2}  # scale -> its features, FEATURES in all


def session_of(llama: Llama, adapter: Adapter | None) -> Session:
    session = Session(llama)
    session.adapter_module = adapter
    if adapter is not None and adapter.projection is not None:
        config = SimpleNamespace(scales=tuple(SCALES))
        session._encoder = SimpleNamespace(config=config, widths=tuple(SCALES.values()))
    return session


def whitened(base: LlamaConfig) -> Adapter:
    """An adapter whose projection keeps 4 of the features' principal components."""
    adapter = tiny.adapter(base, image=True)
    torch.manual_seed(5)
    adapter.projection = ImageProjection(tiny.FEATURES, base.width, 11, components=4)
    mixed = torch.randn(30, tiny.FEATURES) @ torch.randn(tiny.FEATURES, tiny.FEATURES)
    adapter.projection.set_statistics(mixed + 1)
    return adapter.eval()


def reference_token(projection: ImageProjection, features: Tensor, left_out: range = range(0)) -> Tensor:
    """The image token of features [F] without some of them (Eq. 9), [C]."""
    state = {name: tensor.double() for name, tensor in projection.state_dict().items()}
    x = (features.double() - state["feature_mean"]) / state["feature_std"]
    for index in left_out:
        x[index] = 0.0
    if "feature_whitening" in state:
        x = x @ state["feature_whitening"]

    def normed(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = normed(x, "feature_norm")
    x = state["hidden.weight"] @ x + state["hidden.bias"]
    x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return normed(state["output.weight"] @ x + state["output.bias"], "output_norm")


def reference_shares(
    llama: Llama, adapter: Adapter, tokens: list[int], first: int, image: Tensor | None, strength: float
) -> list[float]:
    """The prompts' share in each layer, from the steps `first` on: the equations, one head after the other."""
    config, T = llama.config, len(tokens)
    H, D = config.heads, config.head_width
    state = {name: tensor.double() for name, tensor in llama.state_dict().items()}
    own = {name: tensor.double() for name, tensor in adapter.state_dict().items()}

    def linear(x: Tensor, layer: int, part: str, name: str) -> Tensor:
        y = x @ state[f"layers.{layer}.{part}.{name}.weight"].T
        if f"tuning.scale.{name}" not in own:
            return y
        scale = 1 + strength * (own[f"tuning.scale.{name}"][layer] - 1)
        return scale * (y + strength * own[f"tuning.bias.{name}"][layer])

    def norm(x: Tensor, layer: int, name: str) -> Tensor:
        weight = state[f"layers.{layer}.{name}_norm.weight"]
        if f"tuning.norm.{name}" in own:
            weight = weight + strength * own[f"tuning.norm.{name}"][layer]
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    frequencies = config.rope_theta ** -(torch.arange(0, D, 2).double() / D)
    angles = torch.arange(T).double()[:, None] * frequencies  # [T, D/2]

    def rotated(x: Tensor) -> Tensor:
        a, b = x[:, : D // 2], x[:, D // 2 :]
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), 1)

    causal = torch.ones(T, T, dtype=torch.bool).tril()
    x = state["tok_embeddings.weight"][tokens]
    shares = []
    for layer in range(config.layers):
        y = norm(x, layer, "attention")
        q, k, v = (linear(y, layer, "attention", name) for name in ("wq", "wk", "wv"))
        adapted = layer - (config.layers - adapter.config.layers)
        if adapted >= 0:
            P = own["prompt"][adapted]
            if image is not None:
                P = P + reference_token(adapter.projection, image)  # Eq. 10
            k_p, v_p = linear(P, layer, "attention", "wk"), linear(P, layer, "attention", "wv")
        of_text, of_prompts = [], []
        for head in range(H):
            mine = slice(head * D, head * D + D)
            group = head // (H // config.kv_heads)
            theirs = slice(group * D, group * D + D)
            query = rotated(q[:, mine])
            scores = (query @ rotated(k[:, theirs]).T / math.sqrt(D)).masked_fill(~causal, -math.inf)
            of_text.append(scores.softmax(1) @ v[:, theirs])
            if adapted >= 0:
                g = own["gate"][adapted][head if own["gate"].shape[1] > 1 else 0]
                g = g.tanh() if adapter.config.gate == "tanh" else g
                weights = (query @ k_p[:, theirs].T / math.sqrt(D)).softmax(1)
                of_prompts.append(strength * g * weights @ v_p[:, theirs])
        out = torch.cat(of_text, 1)
        share = 0.0
        if adapted >= 0:
            added = torch.cat(of_prompts, 1)
            by_step = [float(added[t].norm() / (out[t].norm() + added[t].norm())) for t in range(first, T)]
            share = sum(by_step) / len(by_step)
            out = out + added
        shares.append(share)
        x = x + linear(out, layer, "attention", "wo")
        y = norm(x, layer, "ffn")
        gated = linear(y, layer, "feed_forward", "w1")
        gated = gated * gated.sigmoid() * linear(y, layer, "feed_forward", "w3")
        x = x + linear(gated, layer, "feed_forward", "w2")
    return shares


@pytest.mark.parametrize(
    ("options", "strength"),
    [
        ({"gate": "tanh"}, 1.0),
        ({"gate": "identity", "layers": 3}, 1.7),
        ({"gate": "scalar", "image": True}, 1.0),
        ({"gate": "tanh", "image": True, "tune": "prompts+bias+scale+norm"}, 0.6),
    ],
)
def test_the_share_of_the_prompts_is_that_of_the_equations(options: dict, strength: float) -> None:
    llama = tiny.llama()
    adapter = tiny.adapter(llama.config, **options)
    tokens = tiny.tokens(1, 12)[0].tolist()
    image = tiny.features(1) if options.get("image") else None
    inside = look_inside(session_of(llama, adapter), tokens[:8], tokens[8:], image, strength)
    expected = reference_shares(llama, adapter, tokens, 7, None if image is None else image[0], strength)
    L, N = adapter.config.layers, llama.config.layers
    assert inside.prompt_share == pytest.approx(expected, abs=1e-5)
    assert inside.prompt_share[: N - L] == [0.0] * (N - L)
    assert all(0.05 < share < 0.95 for share in inside.prompt_share[N - L :])
    gates = adapter.gate.tanh() if options["gate"] == "tanh" else adapter.gate
    torch.testing.assert_close(torch.tensor(inside.gates), strength * gates.detach().expand(L, llama.config.heads))
    assert (inside.first_layer, inside.strength) == (N - L, strength)


def test_long_answers_go_through_the_blocked_kernel_and_mean_the_same() -> None:
    llama = tiny.llama(tiny.config(context=320))
    adapter = tiny.adapter(llama.config)
    tokens = tiny.tokens(1, 300)[0].tolist()
    inside = look_inside(session_of(llama, adapter), tokens[:290], tokens[290:])
    assert inside.prompt_share == pytest.approx(reference_shares(llama, adapter, tokens, 289, None, 1.0), abs=1e-5)


def test_an_answer_that_stopped_at_once_still_had_one_step() -> None:
    llama = tiny.llama()
    adapter = tiny.adapter(llama.config)
    tokens = tiny.tokens(1, 6)[0].tolist()
    inside = look_inside(session_of(llama, adapter), tokens, [])
    assert inside.prompt_share == pytest.approx(reference_shares(llama, adapter, tokens, 5, None, 1.0), abs=1e-5)
    assert inside.scale_share == {}


@pytest.mark.parametrize("whitens", [False, True])
def test_the_shares_of_the_scales_are_those_of_leaving_one_out(whitens: bool) -> None:
    llama = tiny.llama()
    adapter = whitened(llama.config) if whitens else tiny.adapter(llama.config, image=True)
    image = tiny.features(1)
    inside = look_inside(session_of(llama, adapter), [1, 2], [3], image)
    changes, start = [], 0
    for width in SCALES.values():
        without = reference_token(adapter.projection, image[0], range(start, start + width))
        changes.append(float((without - reference_token(adapter.projection, image[0])).norm()))
        start += width
    expected = {name: change / sum(changes) for name, change in zip(SCALES, changes, strict=True)}
    assert list(inside.scale_share) == list(SCALES)
    assert inside.scale_share == pytest.approx(expected, abs=1e-5)
    assert sum(inside.scale_share.values()) == pytest.approx(1)
    assert len({round(share, 3) for share in expected.values()}) == 3  # else a mix-up would not show


def test_an_image_that_is_the_mean_of_all_leans_on_no_scale() -> None:
    """A division by the sum of the changes would give NaN."""
    llama = tiny.llama()
    adapter = tiny.adapter(llama.config, image=True)
    inside = look_inside(session_of(llama, adapter), [1], [2], adapter.projection.feature_mean[None])
    assert inside.scale_share == dict.fromkeys(SCALES, 0.0)


def test_at_gate_or_strength_zero_the_prompts_have_no_share() -> None:
    llama = tiny.llama()
    adapter = tiny.adapter(llama.config, image=True)
    image = tiny.features(1)
    assert look_inside(session_of(llama, adapter), [1], [2], image, strength=0.0).prompt_share == [0.0] * 3
    with torch.no_grad():
        adapter.gate.zero_()
    inside = look_inside(session_of(llama, adapter), [1], [2], image)
    assert inside.prompt_share == [0.0] * 3
    assert inside.gates == [[0.0] * 4] * 2
    assert sum(inside.scale_share.values()) == pytest.approx(1)  # the token is there; nothing lets it in


def test_values_of_zero_have_no_share() -> None:
    """Where text and prompts both add nothing, 0 / 0 must not spread."""
    llama = tiny.llama()
    for block in llama.layers:
        block.attention.wv.weight.data.zero_()
    assert look_inside(session_of(llama, tiny.adapter(llama.config)), [1], [2]).prompt_share == [0.0] * 3


def test_looking_changes_nothing(tmp_path: Path) -> None:
    llama = tiny.llama()
    session = session_of(llama, tiny.adapter(llama.config))
    row = tiny.tokens(1, 9)
    before = session.logits(row)
    look_inside(session, [1, 2], [3], strength=0.3)
    assert torch.equal(session.logits(row), before)
    assert session.strength == 1.0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


@pytest.mark.parametrize(
    ("adapter", "arguments", "message"),
    [
        (None, ([1], [2]), "base model alone has no gates"),
        ({}, ([], [2]), "expected the tokens of the prompt, got none"),
        ({}, ([1] * 100, [2] * 29), "prompt and answer have 129 tokens, the model's context is 128"),
        ({}, ([1], [2], tiny.features(1)), "trained without images"),
        ({"image": True}, ([1], [2], tiny.features(2)), r"features of one image, \[1, F\], got \[2, 7\]"),
        ({"image": True}, ([1], [2], tiny.features(1)[0]), r"features of one image, \[1, F\], got \[7\]"),
    ],
)
def test_what_cannot_be_looked_at_is_said(adapter: dict | None, arguments: tuple, message: str) -> None:
    llama = tiny.llama()
    made = None if adapter is None else tiny.adapter(llama.config, **adapter)
    with pytest.raises(ValueError, match=message):
        look_inside(session_of(llama, made), *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_session.build(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", ["sees", "tuned"])
def test_a_loaded_session_is_looked_into(folder: Tiny, name: str) -> None:
    session = folder.load(getattr(folder, name))
    prompt = session.tokenizer.encode("Generate caption for this image")
    answer = session.tokenizer.encode(" a red dog", bos=False)
    first, second = (
        look_inside(session, prompt, answer, session.features([folder.picture(number)])) for number in (0, 1)
    )
    assert list(first.scale_share) == ["2", "final"]
    assert sum(first.scale_share.values()) == pytest.approx(1)
    assert first.scale_share != second.scale_share
    assert first.prompt_share != second.prompt_share
    assert first.gates == second.gates
    assert len(first.gates) == 2
    assert first.first_layer == 1
    assert all(isinstance(value, float) for row in first.gates for value in row)


def test_bfloat16_gives_nearly_the_shares_of_float32(folder: Tiny) -> None:
    exact, rough = (
        look_inside(session, [1, 2, 3], [4, 5], session.features([folder.picture(0)]))
        for session in (folder.load(folder.sees), folder.load(folder.sees, dtype="bfloat16"))
    )
    assert rough.prompt_share == pytest.approx(exact.prompt_share, abs=0.03)
    assert rough.gates == exact.gates  # not rounded with the model
    assert rough.prompt_share != exact.prompt_share
