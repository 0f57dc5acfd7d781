"""SqueezeLLM against the exact optimum of one-dimensional k-means, and the promises of its parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gossamer.compress.method import QuantizeOptions
from gossamer.compress.quantize.rtn import RTN
from gossamer.compress.quantize.squeezellm import (
    CUTS,
    SqueezeLLM,
    SqueezeLLMOptions,
    kept_beside,
    kmeans,
    nearest,
    row_levels,
)
from gossamer.compress.recipe import parse_recipe
from gossamer.errors import NumericalError, RecipeError
from gossamer.formats import Codes, Integer, KMeans


def optimum(values: np.ndarray, weights: np.ndarray, count: int) -> float:
    """Least weighted squared error of `count` centres for one row, by dynamic programming over all cuts in float64."""
    order = np.argsort(values)
    v, w = values[order], weights[order]
    n = len(v)
    sums = [np.concatenate([[0.0], np.cumsum(w * v**p)]) for p in (0, 1, 2)]

    def cost(i: int, j: int) -> float:
        s0, s1, s2 = (s[j] - s[i] for s in sums)
        return s2 - s1 * s1 / s0 if s0 > 0 else 0.0

    best = [0.0] + [np.inf] * n
    for _ in range(count):
        best = [min([best[j], *(best[i] + cost(i, j) for i in range(j))]) for j in range(n + 1)]
    return float(best[n])


def error(values: torch.Tensor, weights: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Weighted squared error [rows] of taking the nearest level, by trying all levels."""
    distance = (values.unsqueeze(-1) - levels.unsqueeze(1)).abs().amin(-1)
    return (weights * distance**2).sum(1)


def draws(kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and weights float64 [8, 40]."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(8, 40, generator=g, dtype=torch.float64)
    weights = torch.rand(8, 40, generator=g, dtype=torch.float64)
    if kind == "tails":
        return values**3, weights**4
    if kind == "plain":
        return values, torch.ones_like(weights)
    return torch.where(values > 0, values + 5, values), weights  # two heaps


@pytest.mark.parametrize("kind", ["plain", "tails", "heaps"])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_levels_are_the_exact_optimum_of_short_rows_and_near_it_in_long_ones(kind: str, count: int) -> None:
    ratios = []
    for seed in range(6):
        values, weights = draws(kind, seed)
        found = error(values, weights, kmeans(values, weights, count))
        best = torch.tensor([optimum(v.numpy(), w.numpy(), count) for v, w in zip(values, weights, strict=True)])
        assert (found >= best * (1 - 1e-6) - 1e-9).all()
        ratios.append(found / best.clamp(min=1e-12))
    ratio = torch.cat(ratios)
    if CUTS * count >= 40:
        assert float(ratio.max()) < 1 + 1e-5  # what float32 takes for equal
    else:
        assert float(ratio.mean()) < 1.02
        assert float(ratio.max()) < 1.15


def test_a_row_with_as_many_values_as_levels_is_kept_exactly() -> None:
    g = torch.Generator().manual_seed(0)
    points = torch.randn(6, 8, generator=g).half().float()
    weight = points.gather(1, torch.randint(0, 8, (6, 64), generator=g))
    codes = quantized(weight, bits=3, outlier_share=0.0, sensitive_share=0.0)
    assert torch.equal(codes.dequantize(), weight)


def test_a_weight_that_matters_alone_has_a_level_of_its_own() -> None:
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 64, generator=g).half().float()
    gradient = torch.full((4, 64), 1e-6)
    gradient[:, 17] = 1e6
    codes = quantized(weight, gradient, bits=2, outlier_share=0.0, sensitive_share=0.0)
    assert torch.equal(codes.dequantize()[:, 17], weight[:, 17])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_lose_less_than_the_even_grid_of_a_row(bits: int) -> None:
    g = torch.Generator().manual_seed(bits)
    weight, sensitivity = torch.randn(16, 256, generator=g), torch.rand(16, 256, generator=g) ** 3
    levels = row_levels(weight, sensitivity, 2**bits)
    even = RTN(QuantizeOptions(bits=bits, group_size="channel", clip="mse")).quantize(weight, Integer(bits, None), None)
    lost = (sensitivity * (even.dequantize() - weight) ** 2).sum(1)
    assert (error(weight, sensitivity, levels) < lost).all()


def test_what_is_kept_is_a_fixed_number_of_each_row_the_most_sensitive_and_the_largest() -> None:
    g = torch.Generator().manual_seed(2)
    weight, sensitivity = torch.randn(5, 200, generator=g), torch.rand(5, 200, generator=g)
    kept = kept_beside(weight, sensitivity, share=0.02, sensitive_share=0.005)
    assert kept.sum(1).tolist() == [4] * 5
    for row in range(5):
        first = int(sensitivity[row].argmax())
        rest = weight[row].abs().clone()
        rest[first] = 0
        assert set(kept[row].nonzero().flatten().tolist()) == {first, *rest.topk(3).indices.tolist()}


def test_kept_weights_come_back_within_bfloat16_and_the_format_stores_all_of_it() -> None:
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(12, 96, generator=g)
    weight[3, 5], weight[7, 90] = 40.0, -25.0
    codes = quantized(weight, bits=3, outlier_share=0.03, sensitive_share=0.01)
    assert codes.outliers is not None
    assert len(codes.outliers) == 12 * 3
    at = codes.outliers.rows.long(), codes.outliers.columns.long()
    assert {(3, 5), (7, 90)} <= set(zip(*(a.tolist() for a in at), strict=True))
    left = codes.outliers.values.abs()
    assert ((codes.dequantize()[at] - weight[at]).abs() <= left * 2**-8 + 1e-6).all()
    form = KMeans(3, 0.03)
    stored = form.pack(codes)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == form.stored((12, 96))
    assert torch.equal(form.unpack(stored), codes.dequantize())


def test_without_gradients_the_inputs_say_what_matters() -> None:
    g = torch.Generator().manual_seed(4)
    weight, x = torch.randn(6, 32, generator=g), torch.randn(100, 32, generator=g) * torch.rand(32, generator=g)
    hessian = x.T @ x
    method = SqueezeLLM(SqueezeLLMOptions(bits=3))
    form = method.options.layer_format(method.options, [32])
    by_inputs = method.quantize(weight, form, hessian)
    same = method.quantize(weight, form, hessian, hessian.diagonal().expand_as(weight).clone())
    assert torch.equal(by_inputs.dequantize(), same.dequantize())
    flat = method.quantize(weight, form, hessian, torch.ones_like(weight))
    assert lost(weight, by_inputs, torch.diag(hessian.diagonal())) < lost(weight, flat, torch.diag(hessian.diagonal()))


def test_rows_are_alike_alone_and_together() -> None:
    g = torch.Generator().manual_seed(5)
    weight, gradient = torch.randn(10, 64, generator=g), torch.rand(10, 64, generator=g)
    whole = quantized(weight, gradient, bits=4, outlier_share=0.05).split([4, 6])
    parts = [
        quantized(weight[:4], gradient[:4], outlier_share=0.05),
        quantized(weight[4:], gradient[4:], outlier_share=0.05),
    ]
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a.dequantize(), b.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_repair_lowers_the_error_of_the_output(bits: int) -> None:
    g = torch.Generator().manual_seed(bits)
    mix = torch.randn(96, 96, generator=g) / 96**0.5
    x = torch.randn(500, 96, generator=g) @ mix
    weight, hessian = torch.randn(32, 96, generator=g), x.T @ x
    plain, repaired = (
        SqueezeLLM(SqueezeLLMOptions(bits=bits, repair=repair)).quantize(weight, KMeans(bits, 0.0045), hessian)
        for repair in (False, True)
    )
    assert lost(weight, repaired, hessian) < 0.85 * lost(weight, plain, hessian)


def test_a_row_of_zeros_and_a_row_that_nothing_rests_on_are_kept() -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(6))
    weight[1] = 0.0
    gradient = torch.ones(3, 64)
    gradient[2] = 0.0
    value = quantized(weight, gradient, bits=4).dequantize()
    assert torch.equal(value[1], weight[1])
    assert float((value[2] - weight[2]).square().mean()) < 0.05 * float(weight[2].square().mean())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(NumericalError, match="not finite"):
        quantized(torch.ones(2, 64), torch.full((2, 64), bad))


def test_weights_beyond_float16_are_refused_with_the_numbers() -> None:
    weight = torch.ones(2, 64)
    weight[0, ::2] = 1e6
    with pytest.raises(NumericalError, match=r"1 to 1e\+06 overflow"):
        quantized(weight, outlier_share=0.0, sensitive_share=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 32}, "group_size does not apply"),
        ({"symmetric": False}, "symmetric does not apply"),
        ({"format": "nf4"}, "format does not apply"),
        ({"clip": "mse"}, "clip does not apply"),
        ({"budget": 4.5}, "budget does not apply"),
        ({"bits": 8}, "bits"),
        ({"layers": {"down": {"bits": 6}}}, "bits is 6"),
        ({"outlier_share": 0.001, "sensitive_share": 0.01}, "sensitive_share 0.01 is over"),
        ({"outlier_shar": 0.001}, "did you mean 'outlier_share'"),
    ],
)
def test_options_that_mean_nothing_here_are_refused(options: dict[str, Any], message: str) -> None:
    stage = {"method": "squeezellm", **options}
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe({"version": 1, "name": "r", "stages": [stage]}, "test")
    assert message in str(caught.value)


def test_nearest_is_nearest() -> None:
    g = torch.Generator().manual_seed(7)
    values, levels = torch.randn(5, 50, generator=g), torch.randn(5, 8, generator=g).sort(1).values
    distance = (values.unsqueeze(-1) - levels.unsqueeze(1)).abs()
    assert torch.allclose(distance.gather(2, nearest(values, levels).unsqueeze(-1))[..., 0], distance.amin(-1))


def quantized(weight: torch.Tensor, gradient: torch.Tensor | None = None, **options: Any) -> Codes:
    method = SqueezeLLM(SqueezeLLMOptions(**options))
    form = method.options.layer_format(method.options, [weight.shape[1]])
    gradient = torch.ones_like(weight) if gradient is None else gradient
    return method.quantize(weight, form, torch.eye(weight.shape[1]), gradient)


def lost(weight: torch.Tensor, codes: Codes, hessian: torch.Tensor) -> float:
    e = (codes.dequantize() - weight).double()
    return float(((e @ hessian.double()) * e).sum())
