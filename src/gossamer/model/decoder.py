"""One decoder-only transformer for every family, in plain torch: the oracle that other backends are compared with.

Knows shapes and arithmetic; knows nothing of files, requests or schedules. Linear layers are modules that map
[..., in_features] to [..., out_features]; whoever loads a model may put a packed one in place of a dense one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LayerConfig, ModelConfig, Rope


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight) over the last axis, in float32 (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.offset + self.weight if self.offset else self.weight) * wide.to(x.dtype)


def make_norm(config: ModelConfig, size: int) -> nn.Module:
    """A norm of this model over `size` columns."""
    if config.norm == "layer":
        return nn.LayerNorm(size, eps=config.norm_eps).requires_grad_(False)
    return RMSNorm(size, config.norm_eps, config.norm_offset)


class Cache(Protocol):
    """Where a Decoder keeps keys and values."""

    def store(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [batch, time, num_kv_heads, head_dim] of tokens at `positions` [batch, time].

        Returns all keys and values [batch, num_kv_heads, past, head_dim], each at its position.
        """
        ...


class Block(nn.Module):
    """Attention and feed-forward network, each behind a norm. Its four inputs to linear layers are methods."""

    attn_norm: nn.Module
    ffn_norm: nn.Module

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.layer: LayerConfig = config.layers[index]
        for role, (rows, columns) in self.layer.linear_shapes(config.hidden_size).items():
            self.add_module(role, nn.Linear(columns, rows, bias=self.layer.has_bias(role)).requires_grad_(False))
        for role, size in self.layer.norm_sizes(config.hidden_size).items():
            self.add_module(role, make_norm(config, size))
        self.activation, self.parallel = config.activation, config.parallel
        self.rope = config.rope_of(self.layer)
        self.scale = config.query_scale
        self.softcap = config.attention_softcap
        self.slopes = alibi_slopes(self.layer.num_heads) if config.positions == "alibi" else None

    def linear(self, role: str, x: Tensor) -> Tensor:
        return cast(Tensor, getattr(self, role)(x))

    def normed(self, role: str, x: Tensor) -> Tensor:
        """x behind a norm that only some families have."""
        return cast(Tensor, getattr(self, role)(x)) if hasattr(self, role) else x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, cache: Cache | None) -> Tensor:
        """Causal grouped-query attention: q [batch, time, q_size], k and v [batch, time, kv_size] -> [.., q_size]."""
        batch, time, _ = q.shape
        c = self.layer
        q = rotation.apply(self.normed("q_norm", q.view(batch, time, c.num_heads, c.head_dim)), self.rope)
        k = rotation.apply(self.normed("k_norm", k.view(batch, time, c.num_kv_heads, c.head_dim)), self.rope)
        v = v.view(batch, time, c.num_kv_heads, c.head_dim)
        if cache is not None:
            mixed = self._attend_past(q, *cache.store(self.index, rotation.positions, k, v), rotation.positions)
        elif c.window is None and self.slopes is None and self.softcap is None:
            keys, values = (t.repeat_interleave(c.group, dim=2).transpose(1, 2) for t in (k, v))
            mixed = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, is_causal=True, scale=self.scale)
        else:
            positions = torch.arange(time).unsqueeze(0)
            mixed = self._attend_past(q, k.transpose(1, 2), v.transpose(1, 2), positions)
        return mixed.transpose(1, 2).reshape(batch, time, c.q_size)

    def _attend_past(self, q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """q [batch, time, heads, head_dim], keys and values [batch, kv_heads, past, head_dim] -> [batch, heads, ...].

        The query heads that share a key-value head are laid along the time axis, so that the cache is never copied.
        """
        batch, time, _, head_dim = q.shape
        c = self.layer
        q = q.view(batch, time, c.num_kv_heads, c.group, head_dim).permute(0, 2, 3, 1, 4)
        q, keys, values = (
            q.reshape(batch, c.num_kv_heads, c.group * time, head_dim),
            keys.to(q.dtype),
            values.to(q.dtype),
        )
        mask = self._mask(positions, keys.shape[2])
        if self.softcap is None:
            mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=self.scale)
        else:
            scale = head_dim**-0.5 if self.scale is None else self.scale
            scores = softcap(q @ keys.transpose(2, 3) * scale, self.softcap)
            mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values
        return mixed.view(batch, c.num_heads, time, head_dim)

    def _mask(self, positions: Tensor, past: int) -> Tensor:
        """What tokens at positions [batch, time] see of `past` others: [batch, 1 or kv_heads, group * time, past].

        True where they see it; with ALiBi (arXiv 2108.12409) what is added to a score, -inf where they do not.
        """
        distance = positions[:, None, :, None] - torch.arange(past)  # [batch, 1, time, past]
        mask = distance >= 0
        if self.layer.window is not None:
            mask &= distance < self.layer.window
        mask = mask.repeat(1, 1, self.layer.group, 1)
        if self.slopes is None:
            return mask
        slopes = self.slopes.view(1, self.layer.num_kv_heads, self.layer.group, 1, 1)
        bias = (-slopes * distance.unsqueeze(1)).flatten(2, 3)
        return bias.masked_fill(~mask, -torch.inf)

    def mix(self, a: Tensor, rotation: Rotation, cache: Cache | None = None) -> Tensor:
        """Input of `o` [batch, time, q_size] from the normed input a [batch, time, hidden]."""
        return self.attend(self.linear("q", a), self.linear("k", a), self.linear("v", a), rotation, cache)

    def gated(self, f: Tensor) -> Tensor:
        """Input of `down` [batch, time, ffn_width] from the normed input f [batch, time, hidden]."""
        if not self.layer.gated:
            return activate(self.activation, self.linear("up", f))
        return activate(self.activation, self.linear("gate", f)) * self.linear("up", f)

    def attended(self, mixed: Tensor) -> Tensor:
        """What attention adds to the residual stream [batch, time, hidden], from the input of `o`."""
        return self.normed("attn_post_norm", self.linear("o", mixed))

    def fed(self, gated: Tensor) -> Tensor:
        """What the feed-forward network adds to it, from the input of `down`."""
        return self.normed("ffn_post_norm", self.linear("down", gated))

    def ffn_input(self, x: Tensor, attended: Tensor) -> Tensor:
        """Input of `gate` and `up` [batch, time, hidden], from the block's input and what attention adds to it."""
        return cast(Tensor, self.ffn_norm(x if self.parallel else x + attended))

    def forward(self, x: Tensor, rotation: Rotation, cache: Cache | None = None) -> Tensor:
        attended = self.attended(self.mix(self.attn_norm(x), rotation, cache))
        if self.parallel:
            return x + attended + self.fed(self.gated(self.ffn_norm(x)))
        h = x + attended
        return h + self.fed(self.gated(self.ffn_norm(h)))


class Entrance(nn.Module):
    """Embedded tokens [batch, time, hidden] as the first block reads them: scaled, with learned positions, normed."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale, self.offset = config.embed_scale, config.position_offset
        self.positions: nn.Embedding | None = None
        self.embed_norm: nn.Module | None = None
        if config.positions == "learned":
            rows = config.max_positions + config.position_offset
            self.positions = nn.Embedding(rows, config.hidden_size).requires_grad_(False)
        if config.embed_norm:
            self.embed_norm = make_norm(config, config.hidden_size)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x of tokens at positions [batch, time]."""
        if self.scale != 1.0:
            x = x * self.scale
        if self.positions is not None:
            x = x + self.positions(positions + self.offset)
        return x if self.embed_norm is None else cast(Tensor, self.embed_norm(x))


class Decoder(nn.Module):
    """Tokens [batch, time] to float32 logits [batch, time, vocab_size]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size).requires_grad_(False)
        self.entrance = Entrance(config)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.final_norm = make_norm(config, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False).requires_grad_(False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def rotation(self, positions: Tensor) -> Rotation:
        """Positions [batch, time] with their rotary factors; all layers of a model share them."""
        return rotation_of(self.config, positions)

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits [batch, time (1 if last_only), vocab_size]; see `hidden` for cache and positions."""
        x = self.hidden(tokens, cache, positions)
        return self.logits(x[:, -1:] if last_only else x)

    @torch.inference_mode()
    def hidden(self, tokens: Tensor, cache: Cache | None = None, positions: Tensor | None = None) -> Tensor:
        """Hidden states [batch, time, hidden_size] before the final norm.

        With a cache, keys and values are stored at `positions`, and a token sees every position up to its own; what the
        cache holds past it may be anything finite.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        return self.through(self.entrance(self.embed(tokens), positions), cache, positions)

    @torch.inference_mode()
    def through(self, x: Tensor, cache: Cache | None, positions: Tensor) -> Tensor:
        """Hidden states [batch, time, hidden_size] after all blocks, from those before the first."""
        rotation = self.rotation(positions)
        for block in self.blocks:
            x = block(x, rotation, cache)
        return x

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Final norm and head: hidden states [batch, time, hidden_size] to float32 logits."""
        return softcap(cast(Tensor, self.head(self.final_norm(x))).float(), self.config.final_softcap)


class Rotation:
    """Positions of a batch [batch, time], and by each of `ropes` rotary factors for [batch, time, heads, head_dim]."""

    def __init__(self, positions: Tensor, ropes: Rope | Iterable[Rope], head_dim: int) -> None:
        self.positions = positions
        ropes = [ropes] if isinstance(ropes, Rope) else ropes
        self._factors = {rope: _factors(positions, rope, head_dim) for rope in ropes}

    def apply(self, x: Tensor, rope: Rope | None) -> Tensor:
        """x turned by one of the ropes; by none it stays as it is."""
        if rope is None:
            return x
        cos, sin = self._factors[rope]
        width = cos.shape[-1]
        head, rest = x[..., :width], x[..., width:]
        turned = torch.cat((-head[..., width // 2 :], head[..., : width // 2]), dim=-1)
        head = head * cos.to(x.dtype) + turned * sin.to(x.dtype)
        return torch.cat((head, rest), dim=-1) if rest.shape[-1] else head


def rotation_of(config: ModelConfig, positions: Tensor) -> Rotation:
    """What the layers of a model need to know of positions [batch, time]."""
    ropes = {rope for layer in config.layers if (rope := config.rope_of(layer)) is not None}
    return Rotation(positions, ropes, config.layers[0].head_dim)


def _factors(positions: Tensor, rope: Rope, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [batch, time, 1, width of the turned columns]."""
    angles = positions.unsqueeze(-1).float() * inverse_frequencies(rope, head_dim)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
    return angles.cos(), angles.sin()


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Rotary frequencies [width / 2] of the turned columns, scaled as the config says (LLaMA 3.1's rule: `llama3`)."""
    width = rope.width(head_dim)
    frequencies = 1.0 / rope.theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_positions * frequencies / (2 * math.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = blend.clamp(0.0, 1.0)
        return (1 - blend) * frequencies / rope.factor + blend * frequencies
    return frequencies


def alibi_slopes(heads: int) -> Tensor:
    """Slope of each head [heads] (arXiv 2108.12409; heads that are no power of two as the authors' code has it)."""
    whole = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / whole) for i in range(whole)]
    more = [2.0 ** (-4.0 * (i + 1) / whole) for i in range(0, 2 * (heads - whole), 2)]
    return torch.tensor(slopes + more, device="cpu")


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap); x itself if there is no cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


def activate(name: str, x: Tensor) -> Tensor:
    """The feed-forward non-linearity of a family, by its Hugging Face name."""
    if name == "silu":
        return F.silu(x)
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_pytorch_tanh" else "none")
