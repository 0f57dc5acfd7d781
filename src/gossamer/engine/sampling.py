"""Draws at given quantiles: how a model's own text is sampled, many rows alike. Requests draw by `sampler.py`."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ..errors import EngineError

COLDEST = 1e-30
"""A temperature below this is taken as this: float32 cannot hold it, and even far above only the likeliest is drawn."""


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


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Tokens int64 [rows] of logits [rows, vocab_size] at the quantiles `uniform` [rows] of their distributions."""
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    target = uniform.double().unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
