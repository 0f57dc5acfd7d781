"""What judging a model yields token by token, and the numbers that follow from it. Knows no tensor.

Scores of parts of a text, put together in its order, give the very numbers of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from ..errors import MeasureError
from .plans import LARGEST_NLL


@dataclass(frozen=True)
class Quality:
    """The outcome for one model; divergence is None where there was no reference."""

    nll: float
    tokens_scored: int
    tokens_read: int
    """Tokens of all windows, those before the scored ones included: what `seconds` was spent on."""
    seconds: float
    kld_mean: float | None = None
    kld_p99: float | None = None
    top1_agreement: float | None = None
    activation_kld: float | None = None
    """None where activations are exact."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)

    def results(self) -> dict[str, Any]:
        """What a record says of it."""
        return {
            "perplexity": self.perplexity,
            "nll": self.nll,
            "kld_mean": self.kld_mean,
            "kld_p99": self.kld_p99,
            "top1_agreement": self.top1_agreement,
            "activation_kld": self.activation_kld,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_read / self.seconds,
        }


@dataclass
class Scores:
    """What one model scored over some windows; all lists in the text's order, empty where nothing was compared."""

    # Numbers, not tensors: small tensors that stay, between large ones that go, tear holes into the heap.
    nll: list[float] = field(default_factory=list)
    kld: list[float] = field(default_factory=list)
    agreed: list[bool] = field(default_factory=list)
    activation_kld: list[float] = field(default_factory=list)
    tokens_read: int = 0
    seconds: float = 0.0

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """Those of a text, of its parts in order."""
        whole = cls()
        for part in parts:
            whole.nll += part.nll
            whole.kld += part.kld
            whole.agreed += part.agreed
            whole.activation_kld += part.activation_kld
            whole.tokens_read += part.tokens_read
            whole.seconds += part.seconds
        return whole

    def quality(self) -> Quality | MeasureError:
        """The numbers; a MeasureError if the perplexity is too large for one."""
        mean = float(np.mean(self.nll))
        if mean > LARGEST_NLL:
            return MeasureError(f"mean negative log-likelihood {mean:.4g}: the perplexity is past every float")
        return Quality(
            nll=mean,
            tokens_scored=len(self.nll),
            tokens_read=self.tokens_read,
            seconds=self.seconds,
            kld_mean=_mean(self.kld),
            kld_p99=float(np.quantile(self.kld, 0.99)) if self.kld else None,
            top1_agreement=_mean(self.agreed),
            activation_kld=_mean(self.activation_kld),
        )


def _mean(values: Sequence[float]) -> float | None:
    """None where there is nothing to average."""
    return float(np.mean(values)) if values else None
