"""From logits to tokens by noise that only the request knows: the same seed and position always draw the same.

The token is the largest of logit / temperature + noise over the tokens that are kept, the noise being Gumbel's: that
draws from the softmax (Maddison et al., arXiv 1411.0030). It is a hash of seed, position and token, so a draw does not
depend on what else is in the batch, and a draft model that is given the same noise often proposes the very token that
the target will draw. Knows no request; written twice, in numpy as the reference and in csrc/engine/sample.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .. import settings
from ..errors import KernelError
from ..kernels import cpu, dispatch

Doubles: TypeAlias = NDArray[np.float64]
Ids: TypeAlias = NDArray[np.int64]

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def noise(seed: int, position: int, ids: Ids) -> Doubles:
    """Standard Gumbel noise float64 [n] of tokens int64 [n]: what is added to their logits / temperature.

    SplitMix64 (Steele et al., 2014) is a counter and a hash of it. Here the counter starts at a hash of seed and
    position and goes up by a step for each token id; 52 of its 64 bits make a uniform number inside (0, 1).
    """
    start = _mixed(_mixed(seed + _STEP) ^ position & _MASK)
    bits = np.uint64(start) + (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_STEP)
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(_MIX_1)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(_MIX_2)
    bits ^= bits >> np.uint64(31)
    uniform = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    waiting: Doubles = -np.log1p(-uniform)  # exponential; the smallest decide, and they have all digits
    return -np.log(waiting)


def sample_row(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> int:
    """The token drawn from logits float32 [vocab_size]; temperature 0: the likeliest. Raises EngineError: not finite.

    The reference: everything in float64, and a full sort.
    """
    exact = logits.double().numpy()
    best = exact.max(initial=-math.inf)  # NaN wins, too
    if not math.isfinite(best):
        _raise_not_finite()
    if temperature == 0:
        return int(exact.argmax())
    tokens = _kept(exact, temperature, top_k, top_p, min_p)
    with np.errstate(over="ignore"):  # at a low temperature everything but the likeliest becomes impossible
        scores = (exact[tokens] - best) / temperature + noise(seed, position, tokens)
    return int(tokens[scores.argmax()])


def sample_rows(
    logits: Tensor,
    temperatures: Sequence[float],
    top_ks: Sequence[int],
    top_ps: Sequence[float],
    min_ps: Sequence[float],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> Ids:
    """Tokens int64 [rows] drawn from logits float32 [rows, vocab_size], as `sample_row` does. Raises EngineError.

    In C++ where there are kernels. That looks for likely winners in float32 and gives them their scores in float64, so
    it draws what the reference does; but whether the last token fits into top_p is decided to a millionth of the sum.
    """
    extension = _extension()
    columns = (temperatures, top_ks, top_ps, min_ps, seeds, positions)
    if extension is None:
        rows = zip(logits, *columns, strict=True)
        return np.array([sample_row(row, *fields) for row, *fields in rows], np.int64)
    types = (np.float64, np.int64, np.float64, np.float64, np.uint64, np.int64)
    arrays = (np.asarray(column, dtype) for column, dtype in zip(columns, types, strict=True))
    tokens = np.empty(len(logits), np.int64)
    extension.sample_rows(logits.contiguous().numpy(), *arrays, settings.threads(), tokens)
    if (tokens < 0).any():
        _raise_not_finite()
    return tokens


def _kept(logits: Doubles, temperature: float, top_k: int, top_p: float, min_p: float) -> Ids:
    """Tokens that top_k, then top_p, then min_p keep of logits float64 [vocab_size]; of equal ones, the lower id."""
    if top_k == 0 and top_p == 1 and min_p == 0:
        return np.flatnonzero(logits > -math.inf)
    tokens = np.argsort(-logits, kind="stable")[: top_k or None]
    tokens = tokens[logits[tokens] > -math.inf]
    kept, best = logits[tokens], logits[tokens[0]]
    with np.errstate(over="ignore"):
        weights = np.exp((kept - best) / temperature)
    before = np.cumsum(weights) - weights  # total of all likelier tokens
    keep = before < top_p * weights.sum() if top_p < 1 else np.ones(len(kept), np.bool_)
    if min_p > 0:
        keep &= kept >= best + temperature * math.log(min_p)
    found: Ids = tokens[keep]
    return found


def _mixed(number: int) -> int:
    """SplitMix64's hash of a number, taken modulo 2^64."""
    number &= _MASK
    number = (number ^ number >> 30) * _MIX_1 & _MASK
    number = (number ^ number >> 27) * _MIX_2 & _MASK
    return number ^ number >> 31


def _extension() -> ModuleType | None:
    """The C++ kernels; None where there are none, or the reference is asked for."""
    try:
        return None if dispatch.isa() == "reference" else cpu.extension()
    except KernelError:
        return None


def _raise_not_finite() -> NoReturn:
    from .sampling import raise_not_finite  # which stands above this

    raise_not_finite()
