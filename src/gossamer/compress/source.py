"""The float model that a compression starts from, a block or a few rows at a time. Knows no method, no work folder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..model import FAMILIES
from ..model.decoder import Block, Entrance, Rotation, make_norm, rotation_of
from ..model.families import norm_parts

EMBED_AT_ONCE = 4 << 20
"""Weights of the embedding that are looked at in one piece."""


class Source:
    """A checkpoint's blocks and embedding in float32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.family = FAMILIES[self.config.family]

    def weight(self, module: str) -> Tensor:
        """A linear layer's weight [out, in], before it is compressed."""
        return self.checkpoint.tensor(f"{module}.weight")

    def dense(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor that stays in float, as an output would store it, in float32."""
        return self.checkpoint.tensor(name, rows, self.checkpoint.dtype).float()

    def block(
        self, i: int, weight: Callable[[str, str], Tensor] | None = None, dense: Callable[[str], Tensor] | None = None
    ) -> Block:
        """Block i in float32: linear weights from `weight(module, role)`, norms and biases from `dense(name)`."""
        weight = weight or (lambda module, role: self.weight(module))
        dense = dense or self.dense
        with torch.device("meta"):
            block = Block(self.config, i)
        for role in self.config.layers[i].linear_shapes(self.config.hidden_size):
            module, linear = self.family.module(role, i), getattr(block, role)
            linear.weight = nn.Parameter(weight(module, role), requires_grad=False)
            if self.config.layers[i].has_bias(role):
                linear.bias = nn.Parameter(dense(f"{module}.bias"), requires_grad=False)
        for role in self.config.layers[i].norm_sizes(self.config.hidden_size):
            self._fill_norm(getattr(block, role), self.family.module(role, i), dense)
        return block.eval()

    def _fill_norm(self, norm: nn.Module, module: str, dense: Callable[[str], Tensor]) -> None:
        for part in norm_parts(self.config):
            setattr(norm, part, nn.Parameter(dense(f"{module}.{part}"), requires_grad=False))

    def norm(self, role: str, dense: Callable[[str], Tensor] | None = None) -> nn.Module:
        """A norm outside of the blocks."""
        norm = make_norm(self.config, self.config.hidden_size)
        self._fill_norm(norm, self.family.module(role), dense or self.dense)
        return norm

    def entrance(self) -> Entrance:
        """What embedded tokens go through before the first block."""
        entrance = Entrance(self.config)
        if entrance.positions is not None:
            table = self.dense(f"{self.family.module('positions')}.weight")
            entrance.positions.weight = nn.Parameter(table, requires_grad=False)
        if entrance.embed_norm is not None:
            entrance.embed_norm = self.norm("embed_norm")
        return entrance

    def dense_names(self, i: int) -> dict[str, tuple[str, str]]:
        """Tensors of block i that stay in float: name -> (role, `weight` or `bias`)."""
        names = {
            f"{self.family.module(role, i)}.{part}": (role, part)
            for role in self.config.layers[i].norm_sizes(self.config.hidden_size)
            for part in norm_parts(self.config)
        }
        for role in self.config.layers[i].linear_shapes(self.config.hidden_size):
            if self.config.layers[i].has_bias(role):
                names[f"{self.family.module(role, i)}.bias"] = (role, "bias")
        return names

    def changed(self, i: int, block: Block) -> dict[str, Tensor]:
        """Norm weights and biases of a block that are not those of the checkpoint, as an output stores them."""
        found = {}
        dtype = self.checkpoint.dtype
        for name, (role, part) in self.dense_names(i).items():
            value = getattr(getattr(block, role), part).detach().to(dtype)
            if not torch.equal(value, self.checkpoint.tensor(name, dtype=dtype)):
                found[name] = value.contiguous()
        return found

    def embed(self, tokens: Tensor, rows: Callable[[slice], Tensor] | None = None) -> Tensor:
        """What the first block reads for tokens [sequences, time]; `rows` of the embedding are the source's here."""
        name = f"{self.family.embed}.weight"
        rows = rows or (lambda part: self.dense(name, part))
        x = torch.empty(*tokens.shape, self.config.hidden_size)
        step = max(1, EMBED_AT_ONCE // self.config.hidden_size)
        for start in range(0, self.config.vocab_size, step):
            stop = min(start + step, self.config.vocab_size)
            here = (tokens >= start) & (tokens < stop)
            if here.any():
                x[here] = rows(slice(start, stop))[tokens[here] - start]
        entrance, positions = self.entrance(), torch.arange(tokens.shape[1])
        for sequence in x:
            sequence.copy_(entrance(sequence, positions))
        return x

    def head(self) -> Tensor:
        """Weight of the head [vocabulary, hidden]: the embedding, if it is tied."""
        module = self.family.embed if self.config.tie_embeddings else self.family.head
        return self.dense(f"{module}.weight")

    def rotation(self, time: int) -> Rotation:
        """The first `time` positions, for any batch."""
        return rotation_of(self.config, torch.arange(time).unsqueeze(0))
