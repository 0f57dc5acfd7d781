"""A linear layer computed from codes: the stored weight exactly, and the gradients that the formulas say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gossamer.compress.quantize.grid import grid_of, quantize
from gossamer.compress.tunedlinear import TunedLinear
from gossamer.errors import CompressionError, NumericalError
from gossamer.formats import Codebook, Codes, Format, Integer, KMeans, Outliers

FORMS = [
    Integer(4, 16, True),
    Integer(3, 16, False),
    Integer(8, None, True),
    Codebook("nf4", 16),
    Codebook("nf4", 16, double_quant=True),
    Codebook("mxfp4", 32),
    Codebook("nvfp4", 16),
    Codebook("fp8", None),
]


def random_weight(rows: int = 12, columns: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def layer_of(form: Format, weight: torch.Tensor) -> tuple[TunedLinear, torch.Tensor]:
    """A layer as it is read from what is stored, and the weight that is stored."""
    stored = form.pack(quantize(weight, *grid_of(weight, form), form))
    return TunedLinear("layer", form, form.codes(stored), None), form.unpack(stored)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_an_untouched_layer_is_the_stored_weight_and_is_stored_as_it_was(form: Format) -> None:
    layer, value = layer_of(form, random_weight())
    assert torch.equal(layer.weight(), value)
    assert torch.equal(form.unpack(form.pack(layer.codes())), value)
    tokens = torch.tensor([[3, 0], [11, 3]])
    assert torch.equal(layer.look_up(tokens), value[tokens])


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_the_forward_weight_is_what_is_stored_after_the_scales_have_moved(form: Format) -> None:
    layer, _ = layer_of(form, random_weight())
    assert layer.scale is not None
    layer.scale.mul_(1 + 0.2 * torch.rand(layer.scale.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(form.unpack(form.pack(layer.codes())), layer.weight())


def test_the_gradient_of_scales_and_zero_points_is_that_of_the_formula() -> None:
    form = Integer(3, 16, False)
    layer, _ = layer_of(form, random_weight())
    for parameter in layer.trainable(scales=True, zeros=True):
        parameter.requires_grad_()
    slope = random_weight(seed=1)
    (layer.weight() * slope).sum().backward()
    codes = layer.codes()
    grouped, zero = codes.codes.view(12, 4, 16).double(), codes.zero.double().unsqueeze(-1)
    wanted = ((grouped - zero) * slope.view(12, 4, 16).double()).sum(-1)
    assert torch.allclose(layer.scale.grad.double(), wanted, atol=1e-4)
    wanted = -(codes.scale.double() * slope.view(12, 4, 16).double().sum(-1))
    assert torch.allclose(layer.zero.grad.double(), wanted, atol=1e-4)


def test_latent_weights_get_a_straight_gradient_within_the_grid_and_none_beyond() -> None:
    form = Integer(2, 16, True)
    layer, _ = layer_of(form, random_weight())
    share = random_weight(seed=2) * 2
    layer.begin_latent(None)
    layer.latent.copy_(share)
    for parameter in layer.trainable(scales=True, zeros=False):
        parameter.requires_grad_()
    slope = random_weight(seed=3)
    (layer.weight() * slope).sum().backward()
    inside = (share.round() >= -2) & (share.round() <= 1)  # what no code is clamped for
    assert 0.1 < inside.float().mean() < 0.9
    step = layer.scale.detach().repeat_interleave(16, 1)
    assert torch.allclose(layer.latent.grad, torch.where(inside, slope * step, 0.0), atol=1e-5)
    part = (share.round().clamp(-2, 1) * slope).view(12, 4, 16)  # the weights move with their grid
    assert torch.allclose(layer.scale.grad, part.sum(-1), atol=1e-4)


@pytest.mark.parametrize("form", [Integer(3, 16), Integer(3, 16, False), FORMS[-1]], ids=lambda f: f.name)
def test_rows_that_are_looked_up_get_the_gradient_that_they_get_in_the_whole_weight(form: Format) -> None:
    tokens, slope = torch.tensor([[3, 0], [11, 3]]), random_weight(seed=5)[:4].view(2, 2, -1)
    gradients = []
    for look_up in (lambda layer: layer.look_up(tokens), lambda layer: layer.weight()[tokens]):
        layer, _ = layer_of(form, random_weight())
        layer.begin_latent(random_weight())
        for parameter in layer.trainable(scales=True, zeros=True):
            parameter.requires_grad_()
        (look_up(layer) * slope).sum().backward()
        gradients.append({name: p.grad for name, p in layer.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() >= {"latent", "scale"}
    assert all(torch.allclose(gradients[0][name], g, atol=1e-5) for name, g in gradients[1].items())


@pytest.mark.parametrize("symmetric", [True, False])
def test_latent_weights_begin_near_where_they_were_in_the_cells_of_their_codes(symmetric: bool) -> None:
    form = Integer(3, 16, symmetric)
    layer, value = layer_of(form, random_weight())
    wanted = value + 0.1 * random_weight(seed=4)
    layer.begin_latent(wanted)
    assert torch.equal(layer.weight(), value)
    step = layer.scale.detach().repeat_interleave(16, 1)
    moved, wished = layer.latent - value / step, (wanted - value) / step
    assert (moved.abs() <= 0.4901).all()
    near = wished.abs() < 0.49
    assert 0.1 < near.float().mean() < 0.999
    assert torch.allclose(moved[near], wished[near], atol=1e-4)
    assert (moved.sign() == wished.sign())[~near].all()


@pytest.mark.parametrize("form", [f for f in FORMS if f.name != "fp8-channel"], ids=lambda f: f.name)
def test_latent_weights_that_have_not_moved_round_to_the_codes_that_they_came_from(form: Format) -> None:
    layer, value = layer_of(form, random_weight())
    layer.begin_latent(None)
    assert torch.equal(layer.weight(), value)
    tokens = torch.tensor([[3, 0], [11, 3]])
    assert torch.equal(layer.look_up(tokens), value[tokens])
    assert torch.equal(form.unpack(form.pack(layer.codes())), value)


def test_levels_of_a_row_are_what_is_trained_where_they_are_what_is_stored() -> None:
    form = KMeans(2)
    levels = random_weight(12, 4).half().float()
    index = torch.randint(0, 4, (12, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    layer = TunedLinear("layer", form, Codes(index, torch.ones(12, 1), None, levels), None)
    (parameter,) = layer.trainable(scales=True, zeros=True)
    parameter.requires_grad_()
    slope = random_weight(seed=1)
    (layer.weight() * slope).sum().backward()
    wanted = torch.zeros(12, 4).scatter_add_(1, index.long(), slope)
    assert torch.allclose(parameter.grad, wanted, atol=1e-5)
    with torch.no_grad():
        parameter.add_(0.1)
    assert torch.equal(form.unpack(form.pack(layer.codes())), layer.weight())
    with pytest.raises(CompressionError, match="scaled grid"):
        layer.begin_latent(None)


@pytest.mark.parametrize("latent", [False, True])
def test_outliers_stay_beside_the_grid(latent: bool) -> None:
    form = Integer(4, 16, True, outliers=True)
    weight = random_weight()
    kept = Outliers(*(torch.tensor(t, dtype=torch.int32) for t in ([0, 5], [7, 63])), torch.tensor([8.0, -16.0]))
    rest = quantize(weight, *grid_of(weight, form), form)
    codes = Codes(rest.codes, rest.scale, None, None, kept)
    layer = TunedLinear("layer", form, codes, None)
    value = codes.dequantize()
    if latent:
        layer.begin_latent(value)
    assert torch.allclose(layer.weight(), value, atol=1e-6)
    assert torch.equal(form.unpack(form.pack(layer.codes())), value)
    assert torch.equal(layer.codes().codes, codes.codes)


@pytest.mark.parametrize("form", FORMS[:4], ids=lambda f: f.name)
def test_scales_that_were_trained_below_zero_are_still_a_grid(form: Format) -> None:
    layer, _ = layer_of(form, random_weight())
    layer.scale[0, 0] = -0.5
    weight: Any = layer.weight()
    assert torch.isfinite(weight).all()
    assert weight[0, :16].abs().max() < 1e-30
    layer.scale[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="layer: the weight is not finite"):
        layer.codes()
