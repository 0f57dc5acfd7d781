"""From logits to tokens. Every request draws from its own generator, so its tokens do not depend on its neighbours."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..errors import EngineError
from .params import SamplingParams

COLDEST = 1e-30
"""A temperature below this is taken as this: float32 cannot hold it, and even far above only the likeliest is drawn."""


class Sampler:
    """The sampling state of one request: its params, and a generator if it draws."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.generator: torch.Generator | None = None
        if not params.greedy:
            seed = secrets.randbits(63) if params.seed is None else params.seed
            self.generator = torch.Generator().manual_seed(seed)

    def sample(self, logits: Tensor) -> int:
        """The next token from logits float32 [vocab_size]."""
        if self.generator is None:
            return int(logits.argmax())
        logits, tokens = truncate(scaled(logits, self.params.temperature), self.params)
        at = int(draw(logits.unsqueeze(0), torch.rand(1, generator=self.generator)))
        return at if tokens is None else int(tokens[at])


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token for each row of logits [rows, vocab_size]. Raises EngineError if a row is not finite."""
    require_finite(logits)
    return [sampler.sample(row) for sampler, row in zip(samplers, logits, strict=True)]


def require_finite(logits: Tensor) -> None:
    """Raise EngineError unless every row of logits [rows, vocab_size] has a likeliest token; some may be impossible."""
    if not bool(logits.amax(-1).isfinite().all()):  # NaN and +inf both reach the maximum
        raise_not_finite()


def raise_not_finite() -> NoReturn:
    """Raise the EngineError of logits from which no token can be taken."""
    raise EngineError("the model's logits are not finite", hint="gossamer eval shows what its weights are worth")


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits [..., vocab_size] over a temperature above 0, less their maximum: the likeliest token is at 0.

    Divided first, they would overflow to infinity at a low temperature, and infinity less infinity is no number.
    """
    return (logits - logits.amax(-1, keepdim=True)) / max(temperature, COLDEST)


def truncate(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Logits of the tokens that top_k, top_p and min_p keep, likeliest first, and their ids (None: all, in order)."""
    if params.top_k == 0 and params.top_p == 1.0 and params.min_p == 0.0:
        return logits, None
    count = min(params.top_k or len(logits), len(logits))
    kept, tokens = logits.topk(count) if count < len(logits) else logits.sort(descending=True, stable=True)
    probabilities = kept.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # total of all likelier tokens: the first is always kept
    keep = (before < params.top_p) & (probabilities >= params.min_p * probabilities[0])
    keep[0] = True
    return kept[keep], tokens[keep]


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Tokens int64 [rows] of logits [rows, vocab_size] at the quantiles `uniform` [rows] of their distributions."""
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    target = uniform.double().unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
