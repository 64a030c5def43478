"""The adapter against the equations written out slowly, against peft, and against itself in every way it is batched."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from weight_files import huggingface_model, random_state, with_changes

from mmadapter.adapter import Adapter, PromptKV, Prompts, select_prompts, stack_prompts
from mmadapter.checkpoint import Fingerprint, load_adapter
from mmadapter.config import GATES, TUNES, AdapterConfig, LlamaConfig
from mmadapter.llama import Llama
from mmadapter.model import AdaptedLlama
from mmadapter.sampling import Sampler, Sampling

# ---- The equations (DESIGN, section 2), in float64, one head and one query at a time.


def reference_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


def reference_rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """Turns the pair (x[j], x[j + D/2]) of one head by position * theta^(-2j/D)."""
    half = len(x) // 2
    angles = torch.tensor([position * theta ** (-2 * j / len(x)) for j in range(half)], dtype=torch.float64)
    first, second = x[:half], x[half:]
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()))


Linear = Callable[[Tensor], Tensor]  # [in] -> [out]


def reference_attention(
    linears: dict[str, Linear], shape: LlamaConfig, x: list[Tensor], prompt: list[Tensor], gates: list[Tensor]
) -> list[Tensor]:
    """One row of T vectors x [C]. `prompt` is this layer's K vectors P [C], none where it is not adapted; `gates` is
    phi(g) of each head."""
    D, share = shape.head_width, shape.heads // shape.kv_heads

    def read(name: str, x: list[Tensor], head: int) -> list[Tensor]:
        return [linears[name](v)[head * D : (head + 1) * D] for v in x]

    heads = []  # [H][T]
    for h in range(shape.heads):
        queries = [reference_rotate(q, t, shape.rope_theta) for t, q in enumerate(read("wq", x, h))]
        keys = [reference_rotate(k, t, shape.rope_theta) for t, k in enumerate(read("wk", x, h // share))]
        values = read("wv", x, h // share)
        prompt_keys, prompt_values = (read(name, prompt, h // share) for name in ("wk", "wv"))
        out = []
        for t, q in enumerate(queries):
            weights = torch.stack([q @ k / math.sqrt(D) for k in keys[: t + 1]]).softmax(0)
            head = sum(w * v for w, v in zip(weights, values[: t + 1], strict=True))
            if prompt:
                weights = torch.stack([q @ k / math.sqrt(D) for k in prompt_keys]).softmax(0)
                head = head + gates[h] * sum(w * v for w, v in zip(weights, prompt_values, strict=True))
            out.append(head)
        heads.append(out)
    return [linears["wo"](torch.cat([out[t] for out in heads])) for t in range(len(x))]


def reference_image_token(parameters: dict[str, Tensor], features: Tensor) -> Tensor:
    """Eq. 9 for one image [F] -> [C]: standardised, LayerNorm, MLP with GELU, LayerNorm."""

    def layer_norm(x: Tensor, name: str) -> Tensor:
        scaled = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        return scaled * parameters[f"projection.{name}.weight"] + parameters[f"projection.{name}.bias"]

    x = (features - parameters["projection.feature_mean"]) / parameters["projection.feature_std"]
    x = parameters["projection.hidden.weight"] @ layer_norm(x, "feature_norm") + parameters["projection.hidden.bias"]
    x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    x = parameters["projection.output.weight"] @ x + parameters["projection.output.bias"]
    return layer_norm(x, "output_norm")


def reference_logits(
    llama: Llama, config: AdapterConfig, parameters: dict[str, Tensor], tokens: Tensor, features: Tensor | None
) -> Tensor:
    """Logits [B, T, V] of the adapted model, from float64 copies of the adapter's `parameters`."""
    shape, state = llama.config, {name: tensor.double() for name, tensor in llama.state_dict().items()}
    first, logits = shape.layers - config.layers, []
    tuned = config.tune != "prompts"

    def linear(layer: int, part: str, name: str) -> Linear:
        """W x, or s * (W x + b)."""
        weight = state[f"layers.{layer}.{part}.{name}.weight"]
        if not tuned:
            return lambda x: weight @ x
        scale, bias = (parameters[f"tuning.{kind}.{name}"][layer] for kind in ("scale", "bias"))
        return lambda x: scale * (weight @ x + bias)

    def norm(x: Tensor, weight: Tensor, name: str, layer: int | None = None) -> Tensor:
        if tuned:
            difference = parameters[f"tuning.norm.{name}"]
            weight = weight + (difference if layer is None else difference[layer])
        return reference_norm(x, weight, shape.norm_eps)

    for b, row in enumerate(tokens.tolist()):
        x = [state["tok_embeddings.weight"][token] for token in row]
        for layer in range(shape.layers):
            own = {key.split(".", 2)[2]: value for key, value in state.items() if key.startswith(f"layers.{layer}.")}
            prompt, gates = [], []
            if layer >= first:
                prompt = list(parameters["prompt"][layer - first])
                if features is not None:
                    image = reference_image_token(parameters, features[b].double())
                    prompt = [P + image for P in prompt]
                gates = [parameters["gate"][layer - first][0 if config.gate == "scalar" else h] for h in range(4)]
                gates = [g.tanh() for g in gates] if config.gate == "tanh" else gates
            normed = [norm(v, own["attention_norm.weight"], "attention", layer) for v in x]
            linears = {name: linear(layer, "attention", name) for name in ("wq", "wk", "wv", "wo")}
            x = [v + a for v, a in zip(x, reference_attention(linears, shape, normed, prompt, gates), strict=True)]
            w1, w2, w3 = (linear(layer, "feed_forward", name) for name in ("w1", "w2", "w3"))
            for t, v in enumerate(x):
                normed_v = norm(v, own["ffn_norm.weight"], "ffn", layer)
                opened = w1(normed_v)
                x[t] = v + w2(opened / (1 + (-opened).exp()) * w3(normed_v))
        final = [norm(v, state["norm.weight"], "final") for v in x]
        logits.append(torch.stack([state["output.weight"] @ v for v in final]))
    return torch.stack(logits)


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("gate", GATES)
def test_logits_and_gradients_are_those_of_the_equations(gate: str, image: bool, tune: str) -> None:
    llama = tiny.llama()
    adapter = tiny.adapter(llama.config, gate=gate, image=image, tune=tune)
    tokens, features = tiny.tokens(2, 4), tiny.features(2) if image else None
    weights = torch.randn(2, 4, 53, generator=torch.Generator().manual_seed(6))

    logits = llama(tokens, prompts=adapter.prompts(llama, features))
    (logits * weights).sum().backward()

    exact = {name: tensor.double() for name, tensor in adapter.state_dict().items()}
    trained = {name: exact[name].requires_grad_() for name, _ in adapter.named_parameters()}
    expected = reference_logits(llama, adapter.config, exact, tokens, features)
    (expected * weights).sum().backward()

    assert (expected - llama(tokens)).abs().max() > 0.05  # the prompts do something
    torch.testing.assert_close(logits, expected.float(), atol=1e-4, rtol=0)
    for name, parameter in adapter.named_parameters():
        assert parameter.grad.abs().max() > 1e-2, name
        torch.testing.assert_close(parameter.grad, trained[name].grad.float(), atol=1e-4, rtol=1e-4, msg=name)


# ---- At a gate of zero.


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("gate", GATES)
def test_a_new_adapter_changes_no_bit_and_only_its_gates_have_a_gradient(gate: str, image: bool) -> None:
    llama, tokens = tiny.llama(), tiny.tokens(2, 6)
    projection = tiny.adapter(llama.config, image=True).projection if image else None
    adapter = Adapter(AdapterConfig(2, 3, gate), llama.config, projection=projection)
    features = tiny.features(2) if image else None
    base = llama(tokens)
    logits = llama(tokens, prompts=adapter.prompts(llama, features))
    assert torch.equal(logits, base)
    logits.square().sum().backward()
    for name, parameter in adapter.named_parameters():
        if name == "gate":
            assert (parameter.grad != 0).all()
        else:
            assert (parameter.grad == 0).all(), name
    with torch.no_grad():
        adapter.gate -= 0.1 * adapter.gate.grad
    assert not torch.equal(llama(tokens, prompts=adapter.prompts(llama, features)), base)
    assert torch.equal(llama(tokens), base)


def test_prompts_start_at_the_scale_of_the_config() -> None:
    torch.manual_seed(0)
    for std in (1.0, 0.1):
        prompt = Adapter(AdapterConfig(4, 10, prompt_std=std), tiny.config(width=64, layers=4)).prompt
        assert prompt.std().item() == pytest.approx(std, rel=0.1)
        assert abs(prompt.mean().item()) < 0.1 * std


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_strength_scales_phi(gate: str) -> None:
    """0 is the base bit for bit; half of tanh(g) is not tanh(g / 2)."""
    llama, tokens = tiny.llama(), tiny.tokens(2, 6)
    adapter = tiny.adapter(llama.config, gate=gate)
    whole, half, none = (adapter.prompts(llama, strength=strength) for strength in (1.0, 0.5, 0.0))
    phi = adapter.gate.tanh() if gate == "tanh" else adapter.gate
    assert whole.layers[0] is None
    for layer in (1, 2):
        assert torch.equal(whole.layers[layer].gate, phi[layer - 1].expand(4)[None])
        assert torch.equal(half.layers[layer].gate, 0.5 * whole.layers[layer].gate)
    assert torch.equal(llama(tokens, prompts=none), llama(tokens))
    by_hand = tiny.adapter(llama.config, gate="identity")
    by_hand.gate.copy_((0.5 * phi).expand(2, 4))
    by_hand.prompt.copy_(adapter.prompt)
    assert torch.equal(llama(tokens, prompts=half), llama(tokens, prompts=by_hand.prompts(llama)))


# ---- peft.


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["multi-head", "grouped"])
@torch.no_grad()
def test_logits_are_those_of_peft(kv_heads: int, tmp_path: Path) -> None:
    """peft trains one gate a layer and takes it as it is; its folder gives the same adapter."""
    from peft import AdaptionPromptConfig, get_peft_model

    shape = with_changes(layers=3, kv_heads=kv_heads, head_width=16)  # peft knows heads of width C / H only
    settings = AdaptionPromptConfig(adapter_len=5, adapter_layers=2, task_type="CAUSAL_LM")
    theirs = get_peft_model(huggingface_model(shape), settings).eval()
    generator = torch.Generator().manual_seed(7)
    names = [name for name, _ in theirs.named_parameters() if "adaption_" in name]
    assert len(names) == 4
    for name in names:
        parameter = theirs.get_parameter(name)
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    llama = Llama.from_state_dict(shape, random_state(shape))
    tokens = tiny.tokens(2, 9, vocab_size=shape.vocab_size)
    expected = theirs(tokens).logits
    assert (expected - llama(tokens)).abs().max() > 0.05

    by_hand = Adapter(AdapterConfig(2, 5, "scalar"), shape)
    for index in range(2):
        attention = theirs.base_model.model.model.layers[1 + index].self_attn
        by_hand.prompt[index], by_hand.gate[index] = attention.adaption_prompt[0], attention.adaption_gate
    theirs.save_pretrained(tmp_path)
    loaded, about = load_adapter(tmp_path, shape, Fingerprint.of(shape, None))
    assert about.adapter == AdapterConfig(2, 5, "scalar")
    for adapter in (by_hand, loaded):
        torch.testing.assert_close(llama(tokens, prompts=adapter.prompts(llama)), expected, atol=1e-4, rtol=0)


# ---- Batches whose rows differ.


def mixed_rows(llama: Llama) -> list[Prompts | None]:
    """Two images on one adapter, that adapter without an image, two more of another K, L and gate, and none."""
    shape, images = llama.config, tiny.features(2)
    seeing = tiny.adapter(shape, image=True)
    long = tiny.adapter(shape, layers=3, prompt_length=5, gate="identity", seed=4)
    short = tiny.adapter(shape, layers=1, prompt_length=1, gate="scalar", seed=5)
    return [
        seeing.prompts(llama, images[:1]),
        seeing.prompts(llama, images[1:], strength=0.7),
        None,
        long.prompts(llama),
        seeing.prompts(llama),
        short.prompts(llama),
    ]


@torch.no_grad()
def test_rows_of_one_batch_may_have_any_image_and_adapter() -> None:
    llama, tokens = tiny.llama(), tiny.tokens(6, 7)
    rows = mixed_rows(llama)
    alone = torch.cat([llama(tokens[i : i + 1], prompts=row) for i, row in enumerate(rows)])
    assert all((alone[i] - llama(tokens[i : i + 1])[0]).abs().max() > 0.02 for i in (0, 1, 3, 4, 5))
    stacked = stack_prompts(rows)
    torch.testing.assert_close(llama(tokens, prompts=stacked), alone, atol=1e-5, rtol=0)
    order = torch.tensor([5, 0, 0, 2])
    picked = select_prompts(stacked, order)
    torch.testing.assert_close(llama(tokens[order], prompts=picked), alone[order], atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_taken_out_of_a_batch_can_be_stacked_again() -> None:
    """The padding of short prompts in the first batch must not become visible in the second."""
    llama, tokens = tiny.llama(), tiny.tokens(6, 7)
    stacked = stack_prompts(mixed_rows(llama))
    again = stack_prompts([select_prompts(stacked, torch.tensor([row])) for row in (5, 0, 3)])
    expected = llama(tokens, prompts=stacked)[[5, 0, 3]]
    torch.testing.assert_close(llama(tokens[[5, 0, 3]], prompts=again), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_mixed_left_padded_cached_batch_equals_its_rows_alone() -> None:
    """Prompts take no position, so where a row starts shows in its logits: its padding must not be counted. (The base
    alone would not notice, for there only distances between tokens count.)"""
    llama, rows = tiny.llama(), mixed_rows(tiny.llama())
    texts = [tiny.tokens(1, length, seed=length)[0] for length in (3, 1, 8, 5, 8, 2)]
    ends = tiny.tokens(1, 3, seed=9)[0]
    batch, valid = tiny.left_padded(texts)
    cache, prompts = llama.new_cache(6, 11), stack_prompts(rows)
    steps = [llama(batch, prompts=prompts, cache=cache, valid=valid)]
    assert steps[0].isfinite().all()
    for token in ends:
        valid = torch.cat((valid, torch.ones(6, 1, dtype=torch.bool)), 1)
        steps.append(llama(token.expand(6, 1), prompts=prompts, cache=cache, valid=valid))
    logits = torch.cat(steps, 1)  # [6, 11, V]
    for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
        alone = llama(torch.cat((text, ends))[None], prompts=row)[0]
        torch.testing.assert_close(logits[index, 8 - len(text) :], alone, atol=1e-5, rtol=0)


def test_stacking_shares_what_all_rows_share() -> None:
    llama = tiny.llama()
    prompts = tiny.adapter(llama.config).prompts(llama)
    assert stack_prompts([prompts] * 3) is prompts
    assert stack_prompts([None, None]) is None
    assert select_prompts(None, torch.tensor([0])) is None
    shared = select_prompts(prompts, torch.tensor([0, 0, 0]))
    assert shared.layers[1].key.shape[0] == 1


@torch.no_grad()
def test_a_row_without_an_image_is_a_text_row() -> None:
    llama, tokens = tiny.llama(), tiny.tokens(3, 6)
    adapter = tiny.adapter(llama.config, image=True)
    has_image = torch.tensor([True, False, True])
    logits = llama(tokens, prompts=adapter.prompts(llama, tiny.features(3), has_image=has_image))
    text = llama(tokens, prompts=adapter.prompts(llama))
    seen = llama(tokens, prompts=adapter.prompts(llama, tiny.features(3)))
    torch.testing.assert_close(logits[1], text[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(logits[[0, 2]], seen[[0, 2]], atol=1e-6, rtol=0)
    assert (logits[[0, 2]] - text[[0, 2]]).abs().amax((1, 2)).min() > 0.02


# ---- The second softmax by itself.


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_queries_share_prompt_heads_in_order_and_masked_prompts_count_for_nothing(
    queries: int, masked: bool
) -> None:
    """Head h reads key head h // (H / G), not h % G. What is masked may hold anything, and gets no gradient."""
    B, H, G, T, K, D = 2, 6, 2, queries, 4, 5
    generator = torch.Generator().manual_seed(8)
    q, before = (torch.randn(B, H, T, D, generator=generator) for _ in range(2))
    key, value = (torch.randn(B, G, K, D, generator=generator) for _ in range(2))
    gate = torch.randn(B, H, generator=generator)
    mask = torch.tensor([[True] * K, [True, True, False, False]]) if masked else None
    for tensor in (key, value):
        if masked:
            tensor[~mask[:, None, :].expand(B, G, K)] = 1e4
        tensor.requires_grad_()
    out = PromptKV(key, value, gate, mask).add(before, q)
    for b, visible in enumerate((4, 2 if masked else 4)):
        for h in range(H):
            k, v = key[b, h // 3, :visible], value[b, h // 3, :visible]
            expected = before[b, h] + gate[b, h] * ((q[b, h] @ k.T / math.sqrt(D)).softmax(-1) @ v)
            torch.testing.assert_close(out[b, h], expected, atol=1e-5, rtol=0)
    out.square().sum().backward()
    if masked:
        assert (key.grad[1, :, 2:] == 0).all()
        assert (value.grad[1, :, 2:] == 0).all()
    assert (value.grad[1, :, :2] != 0).all()


@pytest.mark.parametrize("queries", [1, 3])
def test_images_by_themselves_are_images_in_the_values(queries: int) -> None:
    """W_v I beside prompts that all rows share, against the values with it, row by row; gradients, too."""
    B, H, G, T, K, D = 3, 6, 2, queries, 4, 5
    generator = torch.Generator().manual_seed(9)
    q, before = (torch.randn(B, H, T, D, generator=generator) for _ in range(2))
    key, value = (torch.randn(1, G, K, D, generator=generator).requires_grad_() for _ in range(2))
    image = torch.randn(B, G, 1, D, generator=generator).requires_grad_()
    gate = torch.randn(1, H, generator=generator)
    shared = PromptKV(key, value, gate, image=image)
    assert shared.batch == B
    assert PromptKV(key, value, gate).batch == 1
    apart = PromptKV(key.expand(B, -1, -1, -1), value + image, gate)
    found = []
    for prompts in (shared, apart):
        out = prompts.add(before, q)
        found.append((out, *torch.autograd.grad(out.square().sum(), (key, value, image))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    row = shared.select(torch.tensor([2]))
    torch.testing.assert_close(row.add(before[2:], q[2:]), found[0][0][2:], atol=1e-5, rtol=0)


# ---- Once for a generation, anew for each training step.


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_a_generation_computes_prompt_keys_and_values_once(image: bool) -> None:
    """Called anew at every token they would double the cost of these two products."""
    llama = tiny.llama()
    adapter = tiny.adapter(llama.config, image=image)
    calls: Counter[tuple[int, str]] = Counter()
    for layer, block in enumerate(llama.layers):
        for name in ("wk", "wv"):
            getattr(block.attention, name).register_forward_hook(lambda *_, key=(layer, name): calls.update([key]))
    with torch.inference_mode():
        prompts = adapter.prompts(llama, tiny.features(2) if image else None)
        sampler = Sampler(llama, [[1, 2, 3], [4]], Sampling(max_new_tokens=6), prompts)
        for _ in range(6):
            sampler.step()
    text = 6  # the prefill and five tokens
    assert calls[0, "wk"] == calls[0, "wv"] == text  # not adapted
    for layer in (1, 2):
        assert calls[layer, "wk"] == text + 1
        assert calls[layer, "wv"] == text + (2 if image else 1)  # W_v P, and W_v I of all images at once


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_parameter_trains_on_after_an_evaluation(mode, tune: str) -> None:
    """Keys kept on a module from a pass without gradients stop the prompts from training (litgpt's mistake)."""
    llama, tokens, features = tiny.llama(), tiny.tokens(2, 6), tiny.features(2)
    model = AdaptedLlama(llama, tiny.adapter(llama.config, image=True, tune=tune))
    optimizer = torch.optim.SGD(model.adapter.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        with mode():
            model.eval()
            losses.append(model(tokens, tokens, features).item())
        model.train()
        optimizer.zero_grad()
        model(tokens, tokens, features).backward()
        idle = [name for name, p in model.adapter.named_parameters() if p.grad is None or not p.grad.any()]
        assert idle == []
        optimizer.step()
    assert losses[1] < losses[0]  # the evaluation saw the step


@pytest.mark.parametrize("tune", TUNES)
def test_a_bfloat16_base_trains_a_float32_adapter(tune: str) -> None:
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        llama = tiny.llama().to(dtype)
        adapter = tiny.adapter(llama.config, image=True, tune=tune)
        prompts = adapter.prompts(llama, tiny.features(2))
        assert {getattr(prompts.layers[1], name).dtype for name in ("key", "value", "gate")} == {dtype}
        llama(tiny.tokens(2, 6), prompts=prompts).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in adapter.named_parameters()})
    for name, exact in gradients[0].items():
        assert gradients[1][name].dtype == torch.float32
        assert torch.cosine_similarity(exact.flatten(), gradients[1][name].flatten(), dim=0) > 0.98, name


def test_calls_go_through_forward() -> None:
    """What wraps a module, such as DistributedDataParallel, sees no other."""
    model, tokens, seen = AdaptedLlama(tiny.llama(), tiny.adapter(tiny.config())), tiny.tokens(2, 6), []
    model.adapter.register_forward_hook(lambda module, arguments, prompts: seen.append(prompts))
    model(tokens, tokens)
    expected = model.adapter.prompts(model.llama)
    assert torch.equal(seen[0].layers[2].key, expected.layers[2].key)
    assert len(seen) == 1


def test_an_adapter_that_does_not_fit_says_so() -> None:
    llama = tiny.llama()
    with pytest.raises(ValueError, match="adapter of 4 layers does not fit a base of 3"):
        tiny.adapter(llama.config, layers=4)
    with pytest.raises(ValueError, match="trained without images; load one that has an image encoder"):
        tiny.adapter(llama.config).prompts(llama, tiny.features(1))
    for wrong, reason in (
        ({"layers": 0}, "at least one adapted layer, got 0"),
        ({"layers": 1, "prompt_length": 0}, "prompt_length must be at least 1, got 0"),
        ({"layers": 1, "gate": "relu"}, "gate must be one of tanh, identity, scalar, got 'relu'"),
        ({"layers": 1, "prompt_std": -1.0}, "prompt_std must not be negative"),
        ({"layers": 1, "tune": "bias"}, r"tune must be one of prompts, prompts\+bias\+scale\+norm, got 'bias'"),
    ):
        with pytest.raises(ValueError, match=reason):
            AdapterConfig(**wrong)
