"""What block-wise learners share: straight-through rounding against its formula, starts, the training loop."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from gossamer.checkpoint import open_checkpoint
from gossamer.compress.blockview import BlockView
from gossamer.compress.blockwise import (
    LearnOptions,
    RoundedOptions,
    SignDescent,
    block_error,
    cosine,
    learn,
    linear,
    start_from,
    starts_of,
)
from gossamer.compress.calibration import Calibration, token_hash
from gossamer.compress.fakequant import codes_of, codes_of_steps, fake_quantize, round_steps
from gossamer.compress.pipeline import compress
from gossamer.compress.quantize.efficientqat import EfficientQAT
from gossamer.compress.quantize.grid import grid_of, quantize
from gossamer.compress.recipe import parse_recipe
from gossamer.compress.walk import ENOUGH_SEQUENCES, TOKENS_PER_COLUMN
from gossamer.errors import CompressionError, NumericalError
from gossamer.formats import Dense, Format, Integer
from random_blocks import make_block, make_view
from tiny_llama import make_folder

WHOLE = Integer(3, 32)
FORMS = [Integer(bits, group, symmetric) for bits in (2, 3, 4) for group in (16, None) for symmetric in (True, False)]


def view_of(form: Format, seed: int = 0) -> BlockView:
    view = make_view(make_block(), form)
    view.generator.manual_seed(seed)
    return view


def random_grid(form: Integer, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 32, generator=generator)
    scale, zero = grid_of(weight, form)
    scale = scale * (0.6 + 0.3 * torch.rand(scale.shape, generator=generator))  # some weights are clipped
    return weight, scale, zero


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_fake_quantize_gives_exactly_what_its_codes_stand_for(form: Integer) -> None:
    weight, scale, zero = random_grid(form)
    point = None if form.symmetric else zero + 0.3
    codes = codes_of(weight, scale, point, form)
    assert torch.equal(fake_quantize(weight, scale, point, form), codes.dequantize())
    assert torch.equal(codes.scale, scale.to(form.scale_dtype).float())
    packed = form.pack(codes)
    assert torch.equal(form.unpack(packed), codes.dequantize())


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_steps_are_rounded_to_what_their_codes_stand_for_with_gradients_by_the_formula(form: Integer) -> None:
    """du = s inside and 0 where clamped; ds = sum of q - z; dz = -s outside, 0 inside."""
    weight, scale, zero = random_grid(form)
    point = None if form.symmetric else (zero + 0.3).requires_grad_()
    group = 32 if form.group_size is None else form.group_size
    steps = (weight.view(*scale.shape, -1) / scale.unsqueeze(-1)).view_as(weight).requires_grad_()
    scale = scale.requires_grad_()
    rounded = round_steps(steps, scale, point, form)
    codes = codes_of_steps(steps, scale, point, form)
    assert torch.equal(rounded, codes.dequantize())
    coefficients = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    (rounded * coefficients).sum().backward()

    low, high = -(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1
    stored = scale.detach().to(form.scale_dtype).double()
    du, ds, dz = torch.zeros(6, 32).double(), torch.zeros_like(stored), torch.zeros_like(stored)
    for i, j in itertools.product(range(6), range(32)):
        g, c, s = j // group, float(coefficients[i, j]), float(stored[i, j // group])
        z = 0.0 if point is None else float(torch.round(point[i, g]).clamp(low, high))
        free = round(float(steps[i, j]) + z)
        q = min(max(free, low), high)
        du[i, j] = c * s * (q == free)
        ds[i, g] += c * (q - z)
        dz[i, g] += 0.0 if q == free else -s * c
    assert 0 < int((du == 0).sum()) < du.numel()
    assert torch.allclose(steps.grad.double(), du, atol=1e-5)
    assert torch.allclose(scale.grad.double(), ds, rtol=1e-4, atol=1e-4)
    if point is not None:
        assert torch.allclose(point.grad.double(), dz, atol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_straight_through_gradients_are_those_of_the_formula(form: Integer) -> None:
    """dw = 1 inside and 0 where clamped; ds = sum of q - z - w/s inside, q - z outside; dz = -s outside, 0 inside."""
    weight, scale, zero = random_grid(form)
    point = None if form.symmetric else (zero + 0.3).requires_grad_()
    weight, scale = weight.requires_grad_(), scale.requires_grad_()
    coefficients = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    (fake_quantize(weight, scale, point, form) * coefficients).sum().backward()

    low, high = -(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1
    group = 32 if form.group_size is None else form.group_size
    w_, z_ = weight.detach(), None if point is None else point.detach()
    stored = scale.detach().to(form.scale_dtype).double()
    dw, ds, dz = torch.zeros(6, 32).double(), torch.zeros_like(stored), torch.zeros_like(stored)
    for i, j in itertools.product(range(6), range(32)):
        g, c = j // group, float(coefficients[i, j])
        s, w = float(stored[i, g]), float(w_[i, j])
        z = 0.0 if z_ is None else float(torch.round(z_[i, g]).clamp(low, high))
        free = round(w / s + z)
        q = min(max(free, low), high)
        dw[i, j] = c * (q == free)
        ds[i, g] += c * ((q - z) - (w / s if q == free else 0.0))
        dz[i, g] += 0.0 if q == free else -s * c
    assert weight.grad is not None
    assert scale.grad is not None
    torch.testing.assert_close(weight.grad.double(), dw, rtol=0, atol=0)
    torch.testing.assert_close(scale.grad.double(), ds, rtol=1e-4, atol=1e-4)
    assert 0 < int((dw == 0).sum()) < dw.numel()  # both cases are there
    if point is not None:
        assert point.grad is not None
        torch.testing.assert_close(point.grad.double(), dz, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_a_start_rounds_to_the_codes_that_it_was_made_of(form: Integer) -> None:
    weight, scale, zero = random_grid(form)
    other = weight + 0.4 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    codes = quantize(other, scale.to(form.scale_dtype).float(), zero, form)  # not the nearest codes of `weight`
    start = start_from(weight, codes, form)
    assert torch.equal(codes_of(start.weight, start.scale, start.zero, form).codes, codes.codes)
    value = codes.dequantize()
    group = 32 if form.group_size is None else form.group_size
    inside = (weight - value).abs() <= 0.49 * start.scale.repeat_interleave(group, 1)
    torch.testing.assert_close(start.weight[inside], weight[inside], rtol=0, atol=1e-6)  # it moves no more than it must


def test_weights_that_are_not_finite_are_a_typed_error() -> None:
    weight, scale, zero = random_grid(Integer(4, 16))
    weight[2, 3] = float("nan")
    with pytest.raises(NumericalError, match="diverged"):
        codes_of(weight, scale, zero, Integer(4, 16))


def test_a_format_without_even_steps_is_refused_with_the_layer_and_a_way_out() -> None:
    with pytest.raises(CompressionError, match=r"layers\.0\.q_proj.*bf16") as caught:
        starts_of(view_of(Dense(torch.bfloat16)), RoundedOptions())
    assert caught.value.hint


def learn_scale(view: BlockView, rate: float, **options: object) -> tuple[float, float, torch.Tensor]:
    """Train one factor of the weights of `down`, which are halved first: the right answer is 2."""
    factor = torch.nn.Parameter(torch.ones(()))
    down = view.block.down.weight.detach() / 2
    optimizer = torch.optim.Adam([{"params": [factor], "rate": rate}], lr=0.0)
    done = learn(view, lambda: {"down.weight": down * factor}, optimizer, LearnOptions(**{"steps": 60, **options}))
    return done.before, done.after, factor.detach()


def test_learning_finds_what_makes_the_outputs_right_and_repeats_it() -> None:
    before, after, factor = learn_scale(view_of(WHOLE), 0.1)
    assert after < 0.02 * before
    assert abs(float(factor) - 2) < 0.1
    assert torch.equal(learn_scale(view_of(WHOLE), 0.1)[2], factor)
    assert not torch.equal(learn_scale(view_of(WHOLE, seed=1), 0.1)[2], factor)


@pytest.mark.parametrize("rate", [1e9, float("nan")])
def test_training_that_diverges_leaves_its_start(rate: float) -> None:
    before, after, factor = learn_scale(view_of(WHOLE), rate)
    assert after == before
    assert float(factor) == 1.0


def test_a_budget_of_time_ends_the_training() -> None:
    before, after, factor = learn_scale(view_of(WHOLE), 0.1, steps=100_000, seconds=0.05)
    assert after <= before
    assert torch.isfinite(factor)


def test_block_error_is_the_mean_relative_error_of_tokens() -> None:
    view = view_of(WHOLE)
    view.block.o.weight.mul_(1.3)
    with torch.no_grad():
        y = view.block(view.x, view.rotation).double()
    error = (y - view.target).square().sum(-1) / view.target.double().square().sum(-1)
    assert block_error(view, dict) == pytest.approx(float(error.mean()), rel=1e-5)


def test_sign_descent_moves_by_the_rate_whatever_the_gradient() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    optimizer = SignDescent([{"params": [p], "rate": 1.0}])
    optimizer.param_groups[0]["lr"] = 0.25
    p.grad = torch.tensor([1e-9, -3.0, 0.0])
    optimizer.step()
    assert p.tolist() == [0.75, 1.25, 1.0]


def test_schedules_fall_from_one() -> None:
    assert cosine(0) == linear(0) == 1
    assert linear(1) == 0
    assert cosine(1) == pytest.approx(0.05)
    steps = [cosine(i / 10) for i in range(11)]
    assert steps == sorted(steps, reverse=True)


def test_a_hessian_is_of_as_many_sequences_as_it_takes() -> None:
    x = torch.randn(2 * ENOUGH_SEQUENCES, 40, 64, generator=torch.Generator().manual_seed(2))
    view = make_view(make_block(), WHOLE, x)
    for role, columns in (("q", 64), ("down", view.block.down.weight.shape[1])):
        enough = max(ENOUGH_SEQUENCES, -(-TOKENS_PER_COLUMN * columns // 40))
        assert enough < len(x)
        read = view.input_of(role, x[:enough]).flatten(0, 1).double()
        torch.testing.assert_close(view.hessian(role).double(), read.T @ read, rtol=1e-4, atol=1e-2)


def test_streams_in_bfloat16_are_those_of_float32_but_for_its_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative error of both streams behind the first block below 2%, and not none."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    source = open_checkpoint(make_folder(tmp_path / "model", num_hidden_layers=2, **shape))
    tokens = torch.randint(0, 300, (8, 40), generator=torch.Generator().manual_seed(0))
    record = {"kind": "self", "sha256": token_hash(tokens), "sequences": 8, "length": 40, "seed": 0}
    calibration = Calibration(tokens, {**record, "line_hashes": [], "details": {"source": "self"}})
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    decide = EfficientQAT.compress

    def look(method: EfficientQAT, view: BlockView) -> None:
        seen.append((view.x.clone(), view.target.clone()))
        decide(method, view)

    monkeypatch.setattr(EfficientQAT, "compress", look)
    for precision in ("float32", "bfloat16"):
        stage = {"method": "efficientqat", "bits": 4, "group_size": 32, "steps": 0, "precision": precision}
        recipe = parse_recipe({"version": 1, "name": precision, "stages": [stage]}, "test")
        compress(source, recipe, tmp_path / precision, calibration)
    (_, _), exact, (_, _), rough = seen
    for a, b in zip(exact, rough, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert 1e-5 < float((b - a).norm() / a.norm()) < 0.02
