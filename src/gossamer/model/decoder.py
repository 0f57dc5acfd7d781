"""One decoder-only transformer for every family, in plain torch: the oracle that other backends are compared with.

Knows shapes and arithmetic; knows nothing of files, requests or schedules. Linear layers are modules that map
[..., in_features] to [..., out_features]; whoever loads a model may put a packed one in place of a dense one.
"""

from __future__ import annotations

import math
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LayerConfig, ModelConfig, Rope


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32 (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Cache(Protocol):
    """Where a Decoder keeps keys and values."""

    def store(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [batch, time, num_kv_heads, head_dim] of tokens at `positions` [batch, time].

        Returns all keys and values [batch, num_kv_heads, past, head_dim], each at its position.
        """
        ...


class Block(nn.Module):
    """Norm, attention, residual; norm, gated feed-forward, residual. Its four inputs to linear layers are methods."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.layer: LayerConfig = config.layers[index]
        for role, (rows, columns) in self.layer.linear_shapes(config.hidden_size).items():
            self.add_module(role, nn.Linear(columns, rows, bias=self.layer.has_bias(role)).requires_grad_(False))
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.activation = config.activation

    def linear(self, role: str, x: Tensor) -> Tensor:
        return cast(Tensor, getattr(self, role)(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, cache: Cache | None) -> Tensor:
        """Causal grouped-query attention: q [batch, time, q_size], k and v [batch, time, kv_size] -> [.., q_size]."""
        batch, time, _ = q.shape
        c = self.layer
        q = rotation.apply(q.view(batch, time, c.num_heads, c.head_dim))
        k = rotation.apply(k.view(batch, time, c.num_kv_heads, c.head_dim))
        v = v.view(batch, time, c.num_kv_heads, c.head_dim)
        if cache is None:
            keys, values = (t.repeat_interleave(c.group, dim=2).transpose(1, 2) for t in (k, v))
            mixed = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, is_causal=True)
        else:
            mixed = self._attend_cached(q, *cache.store(self.index, rotation.positions, k, v), rotation.positions)
        return mixed.transpose(1, 2).reshape(batch, time, c.q_size)

    def _attend_cached(self, q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """q [batch, time, heads, head_dim], keys and values [batch, kv_heads, past, head_dim] -> [batch, heads, ...].

        The query heads that share a key-value head are laid along the time axis, so that the cache is never copied.
        """
        batch, time, _, head_dim = q.shape
        c = self.layer
        q = q.view(batch, time, c.num_kv_heads, c.group, head_dim).permute(0, 2, 3, 1, 4)
        mask = torch.arange(keys.shape[2]) <= positions[:, None, :, None]  # [batch, 1, time, past]
        mixed = F.scaled_dot_product_attention(
            q.reshape(batch, c.num_kv_heads, c.group * time, head_dim),
            keys.to(q.dtype),
            values.to(q.dtype),
            attn_mask=mask.repeat(1, 1, c.group, 1),
        )
        return mixed.view(batch, c.num_heads, time, head_dim)

    def mix(self, a: Tensor, rotation: Rotation, cache: Cache | None = None) -> Tensor:
        """Input of `o` [batch, time, q_size] from the normed input a [batch, time, hidden]."""
        return self.attend(self.linear("q", a), self.linear("k", a), self.linear("v", a), rotation, cache)

    def gated(self, f: Tensor) -> Tensor:
        """Input of `down` [batch, time, ffn_width] from the normed input f [batch, time, hidden]."""
        return activate(self.activation, self.linear("gate", f)) * self.linear("up", f)

    def forward(self, x: Tensor, rotation: Rotation, cache: Cache | None = None) -> Tensor:
        h = x + self.linear("o", self.mix(self.attn_norm(x), rotation, cache))
        return h + self.linear("down", self.gated(self.ffn_norm(h)))


class Decoder(nn.Module):
    """Tokens [batch, time] to float32 logits [batch, time, vocab_size]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size).requires_grad_(False)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False).requires_grad_(False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def rotation(self, positions: Tensor) -> Rotation:
        """Rotary factors for positions [batch, time]; every layer of a model shares them."""
        return Rotation(positions, self.config.rope, self.config.layers[0].head_dim)

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
        rotation = self.rotation(positions)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, rotation, cache)
        return cast(Tensor, x)

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Final norm and head: hidden states [batch, time, hidden_size] to float32 logits."""
        return cast(Tensor, self.head(self.final_norm(x))).float()


class Rotation:
    """Rotary factors of one batch of positions [batch, time], applied to [batch, time, heads, head_dim]."""

    def __init__(self, positions: Tensor, rope: Rope, head_dim: int) -> None:
        self.positions = positions
        angles = positions.unsqueeze(-1).float() * inverse_frequencies(rope, head_dim)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
        self.cos, self.sin = angles.cos(), angles.sin()  # [batch, time, 1, head_dim]

    def apply(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * self.cos.to(x.dtype) + turned * self.sin.to(x.dtype)


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Rotary frequencies [head_dim / 2], scaled as the config says (LLaMA 3.1's rule for `llama3`)."""
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_positions * frequencies / (2 * math.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = blend.clamp(0.0, 1.0)
        return (1 - blend) * frequencies / rope.factor + blend * frequencies
    return frequencies


def activate(name: str, x: Tensor) -> Tensor:
    """The feed-forward non-linearity of a family, by its Hugging Face name."""
    if name == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_pytorch_tanh" else "none")
