"""LLaMA, read from top to bottom.

LLaMA 1, 2 and 3 (arXiv 2302.13971, 2307.09288, 2407.21783) and the models built alike. An adapter's
prompts enter in `attend_both`, its tuning where a linear is `tuned` and in `RMSNorm.forward` (and both once more in
`decode_step`, a faster loop over the layers). Without an adapter this is the base model, and nothing here is trained.

Shapes: B batch, T new tokens, S tokens attended to (cached and new), C width, H query heads, G key/value heads,
D head width, N layers, V vocabulary, K prompt length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmadapter.config import LlamaConfig
from mmadapter.normalise import normalise

if TYPE_CHECKING:
    from mmadapter.adapter import PromptKV, Prompts
    from mmadapter.decode_step import DecodeStep, Ready

SHORT = 256  # keys up to which attention holds its scores in memory


def rope_frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """Angle of each pair of a head's numbers from one position to the next (RoFormer, arXiv 2104.09864), [D/2]."""
    exponents = torch.arange(0, config.head_width, 2, device=device, dtype=torch.float32) / config.head_width
    frequencies = config.rope_theta**-exponents
    if config.rope_divisors is not None:
        frequencies = frequencies / torch.tensor(config.rope_divisors, device=device)
    return frequencies


def rope_table(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles.

    Args:
        frequencies: Of `rope_frequencies`.
        positions: Token positions, [T] or [B, T].
        dtype: Of the result; the angles themselves are computed in float32.

    Returns:
        Two tensors [1 or B, 1, T, D], as `rotate` takes them: the sines of the first half are negative.
    """
    angles = torch.atleast_2d(positions).float()[..., None] * frequencies  # [1 or B, T, D/2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype)[:, None], torch.cat((-sin, sin), -1).to(dtype)[:, None]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates each pair (i, i + D/2) of [B, heads, T, D]: the halves convention of Hugging Face checkpoints."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with grouped queries: head h reads key/value head h // (H / G).

    Up to `SHORT` keys it is two matrix products; beyond, torch's blocked kernel, which never holds the T by S scores
    but takes several times longer on short rows. For one query, decoding, that kernel is the faster one.

    Args:
        q: [B, H, T, D].
        k, v: [B, G, S, D].
        mask: True where a query may look, [1 or B, 1, T, S]; None is causal, and then T equals S or 1.

    Returns:
        [B, H, T, D].
    """
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    if T == 1:  # the queries of a group are rows of one head, which saves the repeating of keys
        return F.scaled_dot_product_attention(q.reshape(B, G, H // G, D), k, v, attn_mask=mask).view(B, H, 1, D)
    if S > SHORT:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, enable_gqa=H > G
        )
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    scores = ((q * D**-0.5).reshape(B, G, H // G * T, D) @ k.transpose(2, 3)).view(B, H, T, S)
    weights = F.softmax(scores + bias, dim=-1)  # [B, H, T, S]
    return (weights.view(B, G, H // G * T, S) @ v).view(B, H, T, D)


class KVCache:
    """Keys and values of the tokens seen so far, in room set aside for `capacity` tokens.

    Rows share one length; shorter rows are padded before their last tokens, and the padding is masked (`Llama.hidden`).
    Its number format may be wider than the model's (`Llama.new_cache`): what is stored is converted.
    """

    def __init__(
        self, config: LlamaConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (config.layers, batch, config.kv_heads, capacity, config.head_width)
        self.keys = torch.empty(shape, dtype=dtype, device=device)  # [N, B, G, capacity, D]
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.ready: tuple[Prompts | None, Ready | None] = (None, None)  # prompts as `decode_step` last laid them out

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores [B, G, T, D] behind the tokens seen so far and returns all S of them, [B, G, S, D]."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def one_more(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For each layer where the key of one more token goes, [B, G, D], and all S keys with it, [B, G, S, D], and the
        same of the values: a few views of the whole cache in place of several for each layer."""
        place, S = self.length, self.length + 1
        wholes = (self.keys, self.values)
        parts = (part for whole in wholes for part in (whole.select(3, place), whole.narrow(3, 0, S)))
        return zip(*(part.unbind() for part in parts), strict=True)

    def select(self, rows: Tensor, start: int = 0) -> None:
        """Keeps the rows of index `rows` [B'], in that order; a row may be taken more than once (beam search).

        What stays where it is is not copied, and new memory is taken only where there are more rows than before.

        Args:
            start: Tokens that each row has in common with the one that takes its place, such as beams of one text.
        """
        for name in ("keys", "values"):
            old = getattr(self, name)  # [N, B, G, capacity, D]
            if len(rows) > old.shape[1]:
                new = old.new_empty((len(old), len(rows), *old.shape[2:]))
                new[:, :, :, : self.length] = old[:, rows, :, : self.length]
            else:
                new = old[:, : len(rows)]
                moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().flatten()
                for layer in range(len(old)):
                    kept = old[layer, :, :, start : self.length].index_select(0, rows[moved])
                    new[layer, :, :, start : self.length].index_copy_(0, moved, kept)
            setattr(self, name, new)


def attend_both(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int,
    mask: Tensor | None,
    cache: KVCache | None,
    prompt: PromptKV | None,
) -> Tensor:
    """Attention over the text, cached and new, plus the gated attention over the adaption prompts (Eq. 5 to 9).

    Args:
        q: Rotated queries, [B, H, T, D].
        k, v: Rotated keys, and values, of the new tokens, [B, G, T, D].
        mask, cache, prompt: As of `Attention.forward`.

    Returns:
        [B, T, H * D].
    """
    if cache is not None:
        k, v = (past.to(q.dtype) for past in cache.append(layer, k, v))  # [B, G, S, D]
    out = attend(q, k, v, mask)  # [B, H, T, D]
    if prompt is not None:
        out = prompt.add(out, q)
    return out.transpose(1, 2).flatten(2)


class Affine(NamedTuple):
    """s * (y + b) of a linear's output y (`tuned`). A dimension B may be 1: all rows share it.

    Attributes:
        scale: s, [B, 1, out].
        shift: s * b, [B, 1, out].
    """

    scale: Tensor
    shift: Tensor


class LayerTuning(NamedTuple):
    """How an adapter tunes the frozen linears and norms of one block (`tuning`); None leaves one as it is.

    Linears that read the same input stand side by side: `wqkv` is of wq, wk and wv, `w13` of w1 and w3. A norm's is the
    difference to its frozen weight, [1 or B, 1, C].
    """

    wqkv: Affine | None = None
    wo: Affine | None = None
    w13: Affine | None = None
    w2: Affine | None = None
    attention_norm: Tensor | None = None
    ffn_norm: Tensor | None = None


UNTUNED = LayerTuning()


def tuned(y: Tensor, affine: Affine | None) -> Tensor:
    """s * (y + b) of a linear's output [B, T, out], in one pass over it; y itself where nothing tunes it."""
    return y if affine is None else torch.addcmul(affine.shift, affine.scale, y)


def apart(affine: Affine | None, widths: tuple[int, ...]) -> tuple[Affine | None, ...]:
    """The affine of each of several linears whose outputs stand side by side."""
    if affine is None:
        return (None,) * len(widths)
    return tuple(Affine(*parts) for parts in zip(*(tensor.split(widths, dim=-1) for tensor in affine), strict=True))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square taken in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, difference: Tensor | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C]; `difference` [1 or B, 1, C] is added to the weight."""
        return normalise(x, self.eps) * (self.weight if difference is None else self.weight + difference)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
        self.widths = config.attention_widths
        self.wq, self.wk, self.wv = (nn.Linear(config.width, width, bias=False) for width in self.widths)
        self.wo = nn.Linear(config.heads * config.head_width, config.width, bias=False)

    def forward(
        self,
        x: Tensor,
        layer: int,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None,
        prompt: PromptKV | None,
        tuning: LayerTuning,
    ) -> Tensor:
        """Attention over the text, plus the gated attention over the adaption prompts (Eq. 5 to 9).

        Args:
            x: [B, T, C].
            mask: True where a query may look, [1 or B, 1, T, S]; None is plain causal attention.
            prompt: Keys, values and gates of this layer's adaption prompts, None where the layer is not adapted.
            tuning: Of this layer's linears and norms.
        """
        B, T, _ = x.shape
        of_q, of_k, of_v = apart(tuning.wqkv, self.widths)
        q = tuned(self.wq(x), of_q).view(B, T, self.heads, self.head_width).transpose(1, 2)  # [B, H, T, D]
        k = tuned(self.wk(x), of_k).view(B, T, self.kv_heads, self.head_width).transpose(1, 2)  # [B, G, T, D]
        v = tuned(self.wv(x), of_v).view(B, T, self.kv_heads, self.head_width).transpose(1, 2)  # [B, G, T, D]
        mixed = attend_both(rotate(q, rope), rotate(k, rope), v, layer, mask, cache, prompt)
        return tuned(self.wo(mixed), tuning.wo)  # [B, T, C]

    def key_of(self, x: Tensor) -> Tensor:
        """W_k x, [..., C] -> [..., G * D]."""
        return self.wk(x)

    def value_of(self, x: Tensor) -> Tensor:
        """W_v x, [..., C] -> [..., G * D]."""
        return self.wv(x)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.widths = (config.hidden_width, config.hidden_width)
        self.w1 = nn.Linear(config.width, config.hidden_width, bias=False)
        self.w2 = nn.Linear(config.hidden_width, config.width, bias=False)
        self.w3 = nn.Linear(config.width, config.hidden_width, bias=False)

    def forward(self, x: Tensor, tuning: LayerTuning) -> Tensor:
        of_gate, of_up = apart(tuning.w13, self.widths)
        inner = F.silu(tuned(self.w1(x), of_gate)) * tuned(self.w3(x), of_up)
        return tuned(self.w2(inner), tuning.w2)  # [B, T, C]


class Block(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        layer: int,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None,
        prompt: PromptKV | None,
        tuning: LayerTuning,
    ) -> Tensor:
        """[B, T, C] -> [B, T, C]; the arguments are those of `Attention.forward`."""
        normed = self.attention_norm(x, tuning.attention_norm)
        x = x + self.attention(normed, layer, rope, mask, cache, prompt, tuning)
        return x + self.feed_forward(self.ffn_norm(x, tuning.ffn_norm), tuning)

    def prompt_keys_values(
        self, prompt: Tensor, token: Tensor | None, tuning: LayerTuning
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of adaption prompts: W_k (P + I) but for what no softmax sees, and W_v (P + I).

        W_v is linear, so W_v (P + I) = W_v P + W_v I: K + B rows instead of K * B. W_k I would add q . W_k I to all K
        scores of a query alike, which no softmax sees, so the keys are W_k P whatever the image. Both hold for tuned
        linears, s * (W_v (P + I) + b) = s * (W_v P + b) + s * W_v I.

        Args:
            prompt: P, [K, C].
            token: Image token I, [B, C]; None for text.

        Returns:
            Keys W_k P and values W_v P, both [1, G, K, D], and what an image adds to each of its values, W_v I,
            [B, G, 1, D]; None for text.
        """
        G, D = self.attention.kv_heads, self.attention.head_width
        _, of_k, of_v = apart(tuning.wqkv, self.attention.widths)
        prompt = prompt[None]  # [1, K, C]
        key = tuned(self.attention.key_of(prompt), of_k).view(1, -1, G, D).transpose(1, 2)  # [1, G, K, D]
        value = tuned(self.attention.value_of(prompt), of_v).view(1, -1, G, D).transpose(1, 2)  # [1, G, K, D]
        if token is None:
            return key, value, None
        seen = self.attention.value_of(token)[:, None]  # [B, 1, G * D]
        if of_v is not None:
            seen = of_v.scale * seen
        return key, value, seen.view(-1, G, 1, D)


class Llama(nn.Module):
    """The base model. Its state-dict keys are Meta's and stay the same with and without an adapter."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.output = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        self.decode_step: DecodeStep | None = None  # a faster loop over the layers, on a CPU (`packed`, `quantised`)

    @classmethod
    def from_state_dict(cls, config: LlamaConfig, state: dict[str, Tensor]) -> Llama:
        """A frozen model that holds the tensors of `state` themselves, without a copy.

        Raises:
            RuntimeError: A tensor is missing, extra or of another shape.
        """
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(state, strict=True, assign=True)
        return model.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def output_weight(self) -> Tensor:
        """The output projection, [V, C]: the token embedding itself where the two are tied."""
        return self.tok_embeddings.weight if self.output is None else self.output.weight

    def new_cache(self, batch: int, capacity: int, most: int | None = None) -> KVCache:
        """An empty cache with room for `capacity` tokens a row, in float32 where `DecodeStep.widens` says so.

        Args:
            batch: Rows.
            most: Rows that `KVCache.select` will make of them; None: no more.
        """
        wide = self.decode_step is not None and self.decode_step.widens(most or batch)
        return KVCache(self.config, batch, capacity, torch.float32 if wide else self.dtype, self.device)

    def forward(
        self,
        tokens: Tensor,
        *,
        prompts: Prompts | None = None,
        cache: KVCache | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token at every position, float32 [B, T, V]; the arguments are those of `hidden`."""
        return self.logits(self.hidden(tokens, prompts=prompts, cache=cache, valid=valid))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., C] -> float32 [..., V]."""
        return self.raw_logits(hidden).float()

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """As `logits`, in the model's own number format."""
        return F.linear(hidden, self.output_weight) if self.output is None else self.output(hidden)

    def hidden(
        self,
        tokens: Tensor,
        *,
        prompts: Prompts | None = None,
        cache: KVCache | None = None,
        valid: Tensor | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Final hidden states, [B, T, C].

        Args:
            tokens: Token ids, [B, T].
            prompts: What an adapter adds (`Adapter.prompts`); None is the base model.
            cache: Earlier tokens; the new ones are appended to it.
            valid: False where a token, cached or new, is padding, [B, S]. It takes no position and nothing looks at it;
                the last token of a row is none. None: there is none.
            checkpointing: Where gradients are on, keeps no more than each block's input for the backward pass, which
                then runs every block again: one more forward pass for a fraction of the memory.

        Raises:
            ValueError: The tokens are not [B, T] with T >= 1, the cache has no room for them, or there is one beside
                checkpointing.
        """
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be [B, T] with at least one token a row, got shape {tuple(tokens.shape)}")
        T = tokens.shape[1]
        past = cache.length if cache is not None else 0
        if cache is not None and past + T > cache.capacity:
            raise ValueError(f"the cache has room for {cache.capacity} tokens, {past} are in it and {T} more came")
        if cache is not None and checkpointing:
            raise ValueError("checkpointing runs each block twice, which a cache does not stand; leave one of them out")
        if valid is None:
            positions = torch.arange(past, past + T, device=tokens.device)  # [T]
        else:
            positions = (valid.cumsum(1) - 1).clamp_min(0)[:, past:]  # [B, T]
        mask = _attention_mask(T, past, valid, tokens.device)
        x = self.tok_embeddings(tokens)  # [B, T, C]
        if self.decode_step is not None and self.decode_step.takes(tokens, cache):
            x = self.decode_step(x, positions, mask, cache, prompts)
        else:
            x = self._through_blocks(x, positions, mask, cache, prompts, checkpointing)
        if cache is not None:
            cache.length += T
        return x

    def _through_blocks(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        prompts: Prompts | None,
        checkpointing: bool,
    ) -> Tensor:
        """Embeddings to final hidden states, both [B, T, C]."""
        rope = rope_table(rope_frequencies(self.config, x.device), positions, x.dtype)
        for index, block in enumerate(self.layers):
            prompt, tuning = (None, UNTUNED) if prompts is None else (prompts.layers[index], prompts.tuning[index])
            arguments = (x, index, rope, mask, cache, prompt, tuning)
            if checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*arguments)
        return self.norm(x, None if prompts is None else prompts.norm)


def _attention_mask(new: int, past: int, valid: Tensor | None, device: torch.device) -> Tensor | None:
    """True where query t may look at key s, [1 or B, 1, T, S]; None where plain causal attention says the same."""
    if valid is None and (past == 0 or new == 1):
        return None
    keys = torch.arange(past + new, device=device)  # [S]
    queries = torch.arange(past, past + new, device=device)  # [T]
    mask = (keys <= queries[:, None])[None, None]  # [1, 1, T, S]
    if valid is not None:
        # A padding query sees itself: a softmax over nothing would be NaN, and NaN would spread.
        mask = mask & valid[:, None, None, :] | (keys == queries[:, None])  # [B, 1, T, S]
    return mask
