"""Fixed codebooks: their levels, the way to the nearest one, their scales, and compressed-tensors' own reading of them.

Independent of what is tested: published levels, normal quantiles from the standard library, nearest levels by trying
all in float64, and the package compressed-tensors.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st

from gossamer.compress.method import QuantizeOptions
from gossamer.compress.quantize.gptq import GPTQ, GPTQOptions
from gossamer.compress.quantize.rtn import RTN
from gossamer.formats import Codebook, Codes

BNB_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
BNB_FP4 = [
    0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25,
    -0.0, -0.005208333333, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25,
]  # fmt: skip
FORMS = [
    Codebook("nf4", 64),
    Codebook("nf4", 32, double_quant=True),
    Codebook("fp4", 64),
    Codebook("mxfp4", 32),
    Codebook("nvfp4", 16),
    Codebook("fp8", None),
]
ids = [form.name for form in FORMS]


def e2m1(code: int) -> float:
    """One bit of sign, two of exponent (bias 1), one of mantissa (OCP Microscaling Formats v1.0, 5.3.3)."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


def e4m3(code: int) -> float:
    """One bit of sign, four of exponent (bias 7), three of mantissa; all ones is no number (OFP8, arXiv 2209.05433)."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def test_nf4_levels_are_those_of_bitsandbytes_and_quantiles_of_the_normal_distribution() -> None:
    levels = Codebook("nf4", 64).levels
    assert torch.equal(levels, torch.tensor(BNB_NF4))
    # QLoRA, appendix E: eight quantiles above zero, seven below, zero itself; the outermost between 1/32 and 1/30.
    edge = 1 - (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(edge, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(edge, 0.5, 8)[:-1]]
    expected = np.sort([*above, 0.0, *below]) / max(above)
    assert np.abs(levels.double().numpy() - expected).max() < 1e-6


def test_fp4_levels_are_those_of_bitsandbytes() -> None:
    assert torch.allclose(Codebook("fp4", 64).levels, torch.tensor(BNB_FP4), rtol=0, atol=1e-8)


def test_e2m1_and_e4m3_levels_are_those_of_their_bits() -> None:
    for kind, group in (("mxfp4", 32), ("nvfp4", 16)):
        assert Codebook(kind, group).levels.tolist() == [e2m1(code) for code in range(16)]
    expected = np.array([e4m3(code) for code in range(256)])
    assert np.array_equal(Codebook("fp8", None).levels.double().numpy(), expected, equal_nan=True)


@pytest.mark.parametrize("form", FORMS, ids=ids)
@given(scale=st.floats(1e-4, 1e3), seed=st.integers(0, 10_000))
def test_rounding_takes_the_nearest_level(form: Codebook, scale: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    scale32 = torch.tensor([scale])
    values = torch.randn(200, generator=g) * scale32 * form.reach
    codes = form.round(values, scale32, None)
    levels = form.levels.double().numpy() * float(scale32)
    best = np.nanmin(np.abs(values.double().numpy()[:, None] - levels), axis=1)
    found = np.abs(levels[codes.int().numpy()] - values.double().numpy())
    assert (found <= best * (1 + 1e-5) + 1e-6 * float(scale32) * form.reach).all()
    assert torch.equal(form.value(codes, scale32, None), form.levels[codes.int()] * scale32)


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_every_level_is_its_own_nearest_and_ties_of_e2m1_and_e4m3_go_to_the_even_code(form: Codebook) -> None:
    levels = form.levels[torch.isfinite(form.levels)]
    one = torch.ones(1)
    assert torch.equal(form.levels[form.round(levels, one, None).int()], levels)
    if form.kind in ("mxfp4", "nvfp4", "fp8"):
        rising = levels.unique()
        middles = (rising[1:] + rising[:-1]) / 2
        codes = form.round(middles, one, None).int()
        assert (codes % 2 == 0).all()


def relative_error(form: Codebook, clip: str, weight: torch.Tensor) -> float:
    q = RTN(QuantizeOptions(clip=clip)).quantize(weight, form, None)
    return float((q.dequantize() - weight).square().sum() / weight.square().sum())


@pytest.mark.parametrize(
    ("form", "bound"),
    [
        # Relative squared errors of normal weights. For comparison: int4 in groups of 64 with clipping loses 0.0095.
        (Codebook("nf4", 64), 0.0095),
        (Codebook("nf4", 64, double_quant=True), 0.0098),
        (Codebook("fp4", 64), 0.018),
        (Codebook("mxfp4", 32), 0.0140),
        (Codebook("nvfp4", 16), 0.0090),
        (Codebook("fp8", None), 0.00075),
    ],
    ids=lambda value: value.name if isinstance(value, Codebook) else str(value),
)
def test_rounding_to_nearest_loses_no_more_than_this(form: Codebook, bound: float) -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    plain, clipped = relative_error(form, "none", weight), relative_error(form, "mse", weight)
    assert clipped <= plain * (1 + 1e-6)
    assert clipped < bound < 2 * clipped  # a bound that says something


@pytest.mark.parametrize("form", FORMS, ids=ids)
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_what_rounding_chose_is_stored_as_it_is(form: Codebook, clip: str) -> None:
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(48, 128, generator=g) * torch.rand(48, 1, generator=g)
    q = RTN(QuantizeOptions(clip=clip)).quantize(weight, form, None)
    for part in (q, *q.split([16, 7, 25])):
        back = form.codes(form.pack(part))
        assert torch.equal(back.codes, part.codes)
        assert torch.equal(back.scale, part.scale)


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_groups_of_zeros_stay_zero_and_take_nothing_from_others(form: Codebook) -> None:
    weight = torch.zeros(4, 128)
    weight[1] = torch.randn(128, generator=torch.Generator().manual_seed(2)) * 1e-3
    for clip in ("none", "mse"):
        q = RTN(QuantizeOptions(clip=clip)).quantize(weight, form, None)
        assert (q.scale > 0).all()  # a reader may divide by it
        stored = form.unpack(form.pack(q))
        assert torch.equal(stored, q.dequantize())
        assert not stored[[0, 2, 3]].any()
        alone = RTN(QuantizeOptions(clip=clip)).quantize(weight[1:2], form, None)
        assert torch.equal(stored[1:2], form.unpack(form.pack(alone)))


@pytest.mark.parametrize("form", [Codebook("nf4", 64, double_quant=True), Codebook("nvfp4", 16)], ids=lambda f: f.name)
def test_groups_far_below_the_largest_of_their_weight_are_rounded_anew_to_the_smallest_scale(form: Codebook) -> None:
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(2, 128, generator=g)
    weight[1] *= 1e-7
    q = RTN(QuantizeOptions()).quantize(weight, form, None)
    stored = form.unpack(form.pack(q))
    assert torch.equal(stored[0], q.dequantize()[0])
    smallest = form.codes(form.pack(q)).scale.min()
    assert (stored[1] - weight[1]).abs().max() <= smallest * form.reach / 2
    assert smallest * form.reach < 1e-4 * weight[0].abs().max()


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_gptq_loses_less_output_than_rtn(form: Codebook) -> None:
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(32, 128, generator=g)
    mix = torch.randn(128, 128, generator=g) / 128**0.5
    x = torch.randn(1000, 128, generator=g) @ mix + 0.1 * torch.randn(1000, 128, generator=g)
    rtn = RTN(QuantizeOptions(clip="mse")).quantize(weight, form, None)
    for act_order in (True, False):
        gptq = GPTQ(GPTQOptions(act_order=act_order)).quantize(weight, form, x.T @ x)
        lost = [float(((x @ (c.dequantize() - weight).T) ** 2).sum()) for c in (gptq, rtn)]
        assert lost[0] < 0.7 * lost[1], act_order
        assert torch.equal(form.unpack(form.pack(gptq)), gptq.dequantize())


# compressed-tensors: the same bytes read by the package that defined them.

SCHEMES = {
    "mxfp4": QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8, zp_dtype=torch.uint8
    ),
    "nvfp4": QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    ),
    "fp8": QuantizationArgs(num_bits=8, type="float", strategy="channel"),
}
STORED = {"mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized", "fp8": "float-quantized"}
SHARED = [Codebook("mxfp4", 32), Codebook("nvfp4", 16), Codebook("fp8", None)]


def theirs(form: Codebook) -> tuple[type, QuantizationScheme]:
    scheme = QuantizationScheme(targets=["Linear"], weights=SCHEMES[form.kind])
    return BaseCompressor.get_value_from_registry(STORED[form.kind]), scheme


@pytest.mark.parametrize("form", SHARED, ids=lambda f: f.name)
@given(out=st.integers(1, 20), groups=st.integers(1, 6), seed=st.integers(0, 1000))
def test_compressed_tensors_reads_what_is_packed_here(form: Codebook, out: int, groups: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, 32 * groups, generator=g) * torch.rand(out, 1, generator=g)
    q = RTN(QuantizeOptions(clip="mse")).quantize(weight, form, None)
    compressor, scheme = theirs(form)
    found = compressor.decompress(form.pack(q), scheme)["weight"]  # in bfloat16
    assert torch.equal(found.bfloat16(), q.dequantize().bfloat16())


@pytest.mark.parametrize("form", SHARED, ids=lambda f: f.name)
@given(out=st.integers(1, 20), groups=st.integers(1, 6), seed=st.integers(0, 1000))
def test_what_compressed_tensors_packs_is_read_here(form: Codebook, out: int, groups: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, 32 * groups, generator=g)
    size = form.group_size or weight.shape[1]
    largest = weight.view(out, -1, size).abs().amax(-1)
    compressor, scheme = theirs(form)
    state = {"weight": weight}
    if form.kind == "mxfp4":
        state["weight_scale"] = 2.0 ** (largest.log2().floor() - 2)
    elif form.kind == "fp8":
        state["weight_scale"] = (largest / 448).bfloat16().float()
    else:
        state["weight_global_scale"] = 448 * 6 / weight.abs().max().view(1)
        state["weight_scale"] = (largest / 6 * state["weight_global_scale"]).to(torch.float8_e4m3fn).float()
    packed = compressor.compress(state, scheme)
    if form.kind == "fp8":
        packed["weight_scale"] = packed["weight_scale"].bfloat16()
    shape = (out, 32 * groups)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in packed.items()} == form.stored(shape)
    q = form.codes(packed)
    expected = compressor.decompress(packed, scheme)["weight"]
    assert torch.equal(q.dequantize().bfloat16(), expected.bfloat16())
    # Its codes are ours: the nearest of the same grid, ties the same way.
    scale = state["weight_scale"].float() / state.get("weight_global_scale", 1.0)
    ours = form.round(weight.view(out, -1, size), scale.unsqueeze(-1), None).view(shape)
    assert torch.equal(form.levels[ours.int()], form.levels[q.codes.int()])


def test_scales_of_a_group_follow_compressed_tensors_for_mxfp4() -> None:
    from compressed_tensors.quantization.utils import calculate_qparams

    largest = torch.tensor([1e-3, 0.5, 0.99, 1.0, 1.7, 1.75, 1.76, 6.0, 7.0, 100.0, 3e-30])
    expected, _ = calculate_qparams(-largest, largest, SCHEMES["mxfp4"])
    found, _ = Codebook("mxfp4", 32).fit(-largest, largest)
    assert torch.equal(found, expected)


def test_codes_given_with_other_scales_than_are_stored_still_store_the_nearest_weights() -> None:
    form = Codebook("nvfp4", 16)
    q = Codes(torch.full((2, 16), 7, dtype=torch.int8), torch.tensor([[1.0], [1e-9]]), None, form.levels)
    stored = form.unpack(form.pack(q))
    assert torch.equal(stored[0], torch.full((16,), 6.0))
    assert not stored[1].any()
