"""Rotation: the residual stream and the values of attention in another orthonormal basis, in which nothing stands out.

QuaRot (arXiv 2404.00456). An RMS norm without weights commutes with a rotation, so the model computes the same with
its norm weights multiplied into the layers behind them and a randomized Hadamard matrix into every layer that reads or
writes the residual stream. The values of each head are turned likewise, between the rows of v and the columns of o.
Weights and activations lose their outliers, and rounding loses less.

All of it is folded into the weights: a rotated model is an ordinary one. What would have to be turned while the model
runs is left out: the input of `down`, and queries and keys behind their positions. A head that is tied to the
embedding stays so only if the final norm multiplies all channels by one number; otherwise the rotated model has a head
of its own, of as many weights as the embedding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ...checkpoint import Checkpoint
from ...errors import CompressionError
from ...model import FAMILIES, LINEARS, ModelConfig, tensor_names
from ...model.families import NORMS, Family
from ..method import Options, Transform
from ..view import View

LARGEST_FACTOR = 64
"""A power of two is split into Hadamard matrices of at most this size: fewer operations than one large matrix."""
LARGEST_CORE = 512
"""No matrix of Paley's is taken beyond this size: a random one for the odd part alone mixes nearly as well."""


class Rotation:
    """An orthogonal matrix Q [size, size]: random signs times a Kronecker product of small orthogonal matrices.

    With kind `hadamard`, all its entries are 1 / sqrt(size) in magnitude wherever a Hadamard matrix of that size is
    known (Sylvester's and Paley's constructions over primes: 576 = 16 * 36, 1536 = 128 * 12); a random orthogonal
    matrix takes the place of the factor that has none. With `orthogonal`, Q is one random matrix.
    """

    def __init__(self, size: int, seed: int, kind: Literal["hadamard", "orthogonal"] = "hadamard") -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size = size
        self.signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        self.factors = [_random(size, generator)] if kind == "orthogonal" else _factors(size, generator)

    def turn(self, x: Tensor) -> Tensor:
        """x Q for float64 x [.., size]."""
        y: Tensor = (x * self.signs).reshape(-1, self.size)
        for factor in self.factors:
            # The factor's axis is turned and goes to the end: after the last factor all are in their order again.
            y = y.view(len(y), len(factor), -1).transpose(1, 2) @ factor
            y = y.reshape(len(y), self.size)
        return y.view(x.shape)

    def turn_rows(self, x: Tensor) -> Tensor:
        """Q^T x for float64 x [size, ..]."""
        return self.turn(x.T).T if x.dim() > 1 else self.turn(x)

    def matrix(self) -> Tensor:
        """Q itself, float64 [size, size]."""
        return self.turn(torch.eye(self.size, dtype=torch.float64))


def paley(order: int) -> Tensor | None:
    """Paley's Hadamard matrix [order, order] (1933), its entries 1 and -1, its rows orthogonal; None if there is none.

    Made from the squares modulo a prime q: the order is q + 1 if q = 3 mod 4, and 2 (q + 1) if q = 1 mod 4.
    """
    if order % 4:
        return None
    if _is_prime(order - 1):
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _residues(order - 1)
        return skew + torch.eye(order, dtype=torch.float64)
    q = order // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, _residues(q)
        outer, inner = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]], dtype=torch.float64)
        return torch.kron(conference, outer) + torch.kron(torch.eye(q + 1, dtype=torch.float64), inner)
    return None


def sylvester(order: int) -> Tensor:
    """Sylvester's Hadamard matrix [order, order] of a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _residues(q: int) -> Tensor:
    """Jacobsthal's matrix [q, q]: 1 where the difference of row and column is a square modulo the prime q, else -1."""
    symbol = -torch.ones(q, dtype=torch.float64)
    symbol[[i * i % q for i in range(1, q)]] = 1
    symbol[0] = 0
    index = torch.arange(q)
    return symbol[(index.unsqueeze(1) - index) % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _factors(size: int, generator: torch.Generator) -> list[Tensor]:
    """Orthogonal matrices whose Kronecker product has this size: one for what is odd in it, the rest powers of two."""
    odd = size // (size & -size)
    factors = []
    if odd > 1:
        orders = [order for order in _doubled(4 * odd, min(size, LARGEST_CORE)) if paley(order) is not None]
        matrix = paley(orders[0]) if orders else None
        factors.append(_random(odd, generator) if matrix is None else matrix / math.sqrt(len(matrix)))
        size //= len(factors[0])
    while size > 1:
        order = min(size, LARGEST_FACTOR)
        factors.append(sylvester(order) / math.sqrt(order))
        size //= order
    return factors


def _doubled(start: int, limit: int) -> Iterator[int]:
    while start <= limit:
        yield start
        start *= 2


def _random(size: int, generator: torch.Generator) -> Tensor:
    """A uniformly random orthogonal matrix, float64 [size, size]."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    rotation: Tensor = q * r.diagonal().sign()  # without the signs the distribution would be the algorithm's
    return rotation.contiguous()


class RotateOptions(Options):
    """Options of the rotation."""

    kind: Literal["hadamard", "orthogonal"] = Field("hadamard", description="orthogonal: one uniformly random matrix")
    seed: int = Field(0, ge=0, le=2**63 - 1)
    values: bool = Field(True, description="turn the values of attention, too, within each head")


class Rotate(Transform):
    """The same model in another basis: norms without weights, and a head of its own unless that is needless."""

    name = "rotate"
    keeps_stream = False
    Options = RotateOptions
    options: RotateOptions

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        """The rotated model, whose tensors are computed as they are read. Raises CompressionError."""
        require_rotatable(checkpoint.config, self.name)
        return RotatedCheckpoint(checkpoint, self.options)

    def expect(self, config: ModelConfig) -> ModelConfig:
        """With a head of its own, which it gets unless the final norm multiplies all channels alike."""
        require_rotatable(config, self.name)
        return replace(config, tie_embeddings=False)


def require_rotatable(config: ModelConfig, method: str) -> None:
    """Raises CompressionError for a model in which something else than linear layers touches the residual stream."""
    reason = None
    if config.norm != "rms":
        reason = "its norms take the mean away, which is another after a rotation"
    elif any(layer.post_norms for layer in config.layers):
        reason = "norms stand between its linear layers and the residual stream, and multiply each channel by a weight"
    if reason is not None:
        raise CompressionError(
            f"{method}: a model of the family {config.family} cannot be rotated: {reason}",
            hint="leave the stage away",
        )


class RotatedCheckpoint(View):
    """Another checkpoint's tensors, rotated in float64 whenever they are read."""

    def __init__(self, base: Checkpoint, options: RotateOptions) -> None:
        super().__init__(base)
        self.options = options
        family = FAMILIES[base.config.family]
        self._final_norm = base.tensor(f"{family.final_norm}.weight", dtype=torch.float64)
        self._tied = base.config.tie_embeddings and bool((self._final_norm == self._final_norm[0]).all())
        self.config = replace(base.config, tie_embeddings=self._tied)
        self.hf_config = {**base.hf_config, "tie_word_embeddings": self._tied}
        self._shapes = dict(tensor_names(self.config))
        self._stream = Rotation(base.config.hidden_size, options.seed, options.kind)
        # All layers share one rotation of values: heads of one width are all that the model families have.
        self._values = Rotation(base.config.layers[0].head_dim, options.seed + 1, options.kind)
        self._places = dict(places(family, self.config))

    def fingerprint(self) -> str:
        text = f"{self.base.fingerprint()} {Rotate.name} {self.options.model_dump_json()}"
        return hashlib.sha256(text.encode()).hexdigest()

    def tensor(self, name: str, rows: slice | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rotated tensor, or these rows of it. Only rows of embedding, head, q, k, gate and up are read alone."""
        self.shape(name)
        role, block, kind = self._places[name]
        if role in ("v", "o", "down") or kind == "bias":
            whole = self._written(name, role, block, kind)
            return (whole if rows is None else whole[rows]).to(dtype)
        if role in ("q_norm", "k_norm"):
            return self._plain(name)[rows or slice(None)].to(dtype)
        if role in NORMS or role == "final_norm":
            return self._norm(name, role)[rows or slice(None)].to(dtype)
        return self._reader(name, role, block, rows).to(dtype)

    def _norm(self, name: str, role: str) -> Tensor:
        """Norm weights have gone into the layers behind them, but for one number that a tied head needs."""
        return self._final_norm if role == "final_norm" and self._tied else torch.ones(self.shape(name))

    def _reader(self, name: str, role: str, block: int | None, rows: slice | None) -> Tensor:
        """W diag(norm) Q: a layer that reads the residual stream, or the embedding, whose rows are part of it."""
        family = FAMILIES[self.config.family]
        if role == "head" and self.base.config.tie_embeddings:
            name = f"{family.embed}.weight"
        weight = self.base.tensor(name, rows, torch.float64)
        if role == "head":
            weight = weight * self._final_norm
        elif role != "embed":
            norm = "ffn_norm" if role in ("gate", "up") else "attn_norm"
            weight = weight * self.base.tensor(f"{family.module(norm, block)}.weight", dtype=torch.float64)
        return self._stream.turn(weight)

    def _written(self, name: str, role: str, block: int | None, kind: str) -> Tensor:
        """What writes the residual stream (o, down: Q^T W) or values (v: R^T W for each head), and all biases."""
        if role == "v":
            weight = self._reader(name, role, block, None).T if kind == "weight" else self._plain(name)
            weight = self._turn_heads(weight) if self.options.values else weight
            return weight.T if kind == "weight" else weight
        weight = self._plain(name)
        if role in ("o", "down"):
            weight = self._stream.turn_rows(weight)
        if role == "o" and kind == "weight" and self.options.values:
            weight = self._turn_heads(weight)
        return weight

    def _plain(self, name: str) -> Tensor:
        return self.base.tensor(name, dtype=torch.float64)

    def _turn_heads(self, weight: Tensor) -> Tensor:
        """W blockdiag(R) for weight [.., heads * head_dim]."""
        return self._values.turn(weight.reshape(*weight.shape[:-1], -1, self._values.size)).flatten(-2)


def places(family: Family, config: ModelConfig) -> Iterator[tuple[str, tuple[str, int | None, str]]]:
    """Tensor name -> role, block and whether it is a weight or a bias."""
    for role in ("embed", "final_norm", "head"):
        yield f"{family.module(role)}.weight", (role, None, "weight")
    for i in range(config.num_layers):
        for role in (role for role in (*LINEARS, *NORMS) if role in family.modules):
            for kind in ("weight", "bias"):
                yield f"{family.module(role, i)}.{kind}", (role, i, kind)
