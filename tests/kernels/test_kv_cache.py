"""The 4-bit KV cache against its formula (kv_codes.py), on every instruction set.

No number of a transformed head is further than half a step from what is stored, but for the rounding of float32
arithmetic. Attention is that of the stored keys and values, transformed back.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gossamer.kernels import cpu
from kv_codes import hadamard, stored

WIDTHS = [2, 8, 16, 24, 64, 80, 128]
"""Heads narrower than a vector, that are no power of two, and with more than one group."""


def heads(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Random keys or values with columns far larger than the others, as keys have."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    x[:, :: max(1, width // 2)] *= 12
    return x


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kind: str, threads: int = 1) -> torch.Tensor:
    """Attention of q [tokens, group, width], the last of the context, over k and v [context, width] through a cache."""
    out = np.full(tuple(q.shape), np.nan, np.float32)
    cpu.extension().attention(kind, q.contiguous().numpy(), k.numpy(), v.numpy(), out)
    return torch.from_numpy(out)


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The formula, in float64."""
    scores = torch.einsum("tgd,cd->tgc", q.double(), k.double()) / math.sqrt(q.shape[-1])
    tokens, context = len(q), len(k)
    hidden = torch.arange(context) > torch.arange(context - tokens, context).unsqueeze(1)
    return scores.masked_fill(hidden.unsqueeze(1), -torch.inf).softmax(-1) @ v.double()


@pytest.mark.parametrize("width", WIDTHS)
def test_attention_is_that_of_the_stored_codes(isa: str, width: int) -> None:
    """Within 2e-4 of the largest value: float32 sums, and codes that the order of the transform's sums may move."""
    for context, tokens, group in [(1, 1, 1), (17, 1, 3), (300, 1, 3), (40, 40, 2), (150, 7, 5)]:
        q = torch.randn(tokens, group, width, generator=torch.Generator().manual_seed(width + context)) / 4
        k, v = heads(context, width, 1), heads(context, width, 2)
        found = attention(q, k, v, "int4").double()
        held_k, half_k = stored(k)
        held_v, half_v = stored(v)
        wanted = expected(q, held_k, held_v)
        # A number within an ulp of the middle between two codes may get either: one such moves a result by a step of
        # one token, weighted. All others must agree to rounding.
        error = (found - wanted).abs() / v.abs().max()
        assert float(error.quantile(0.99)) < 2e-4, f"context {context}: {float(error.quantile(0.99)):.2g}"
        ambiguous = float(half_v.max() / v.abs().max() + (q.abs().max() * half_k.max() * math.sqrt(width)))
        assert float(error.max()) < max(2e-4, ambiguous / 8)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_value_is_further_than_half_a_step_from_what_is_stored(isa: str, width: int) -> None:
    """One token in the cache has all the weight: its value comes back, to half a step of each transformed column."""
    v = heads(1, width, 5) * torch.tensor(2.0) ** -3
    back = attention(torch.zeros(1, 1, width), torch.zeros(1, width), v, "int4")[0, 0]
    turn = hadamard(width)
    error = ((back.double() - v[0].double()) @ turn).abs()
    half = stored(v)[1][0]
    assert bool((error <= half * (1 + 1e-5) + 1e-6 * v.abs().max()).all())
    assert float(error.max()) > 0.05 * float(half.max()) or width == 2, "nothing was rounded: the test sees no codes"


@pytest.mark.parametrize("kind", ["f32", "bf16", "int8", "int4"])
def test_every_kind_of_cache_is_as_near_as_its_numbers(isa: str, kind: str) -> None:
    q, k, v = torch.randn(1, 3, 64) / 4, heads(200, 64, 3), heads(200, 64, 4)
    error = (attention(q, k, v, kind).double() - expected(q, k, v)).abs().max() / v.abs().max()
    assert float(error) < {"f32": 1e-5, "bf16": 0.02, "int8": 0.03, "int4": 0.3}[kind]


def test_equal_and_zero_columns_are_stored_as_they_are(isa: str) -> None:
    """A transform of equal numbers has one that is not zero; zeros have none, and a step of zero."""
    v = torch.zeros(3, 64)
    v[1] = 0.75
    out = attention(torch.zeros(3, 1, 64), torch.zeros(3, 64), v, "int4")
    assert float(out[0].abs().max()) < 1e-30, "a token that is not seen yet has next to no weight"
    torch.testing.assert_close(out[1, 0], v[1] / 2, rtol=1e-2, atol=0)


def test_what_is_no_number_stays_none(isa: str) -> None:
    v = torch.ones(1, 64)
    for bad in (torch.nan, torch.inf, -torch.inf):
        v[0, 7] = bad
        out = attention(torch.zeros(1, 1, 64), torch.zeros(1, 64), v, "int4")
        assert not bool(out.isfinite().any())


def test_refusals() -> None:
    q, k, out = np.zeros((2, 1, 64), np.float32), np.zeros((5, 64), np.float32), np.zeros((2, 1, 64), np.float32)
    attend = cpu.extension().attention
    for kind, bad_q, bad_k, bad_v, bad_out in [
        ("int3", q, k, k, out), ("int4", q[:, :, :63].copy(), k, k, out), ("int4", q, k[:, :62].copy(), k, out),
        ("int4", q, k[:1].copy(), k[:1].copy(), out), ("int4", q, k, k[:4].copy(), out),
        ("int4", q, k, k, out[:1].copy()), ("int4", np.zeros((2, 49, 64), np.float32), k, k, out),
    ]:  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            attend(kind, bad_q, bad_k, bad_v, bad_out)
