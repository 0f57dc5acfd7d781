"""Weights as two factors, and embeddings as tensor trains: stored, described, read back, run, or refused.

A product of factors differs from the float64 one by float32 rounding alone: 1e-5 of the largest output. Logits of the
engines are relative to their spread: 1e-4, as for every format; where V is held in bfloat16 or activations are rounded
to 8 bits the bound says so.
"""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from factored import linears, stored, write
from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder, resident_bytes
from gossamer.checkpoint.save import save_folder
from gossamer.errors import CorruptCheckpoint, GossamerError, ShapeMismatch, UnsupportedModel
from gossamer.formats import Codebook, Dense, Format, Integer, KMeans, LowRank, TensorTrain, quantization_config
from gossamer.formats.layout import layout_from_quantization_config
from gossamer.formats.linear import stored_linear
from gossamer.formats.low_rank import worthwhile_rank

INNER: list[Format] = [
    Dense(torch.bfloat16),
    Dense(torch.float32),
    Dense(torch.float16),
    Integer(8, None),
    Integer(4, 32),
    Integer(3, 32, symmetric=False),
    Codebook("nf4", 16),
    Codebook("fp8", None),
    Codebook("mxfp4", 32),
]
FORMS = [LowRank(32, inner) for inner in INNER] + [LowRank(24, Dense()), LowRank(24, Integer(8, 32))]
ids = [form.name for form in FORMS]


@pytest.fixture(params=FORMS, ids=ids)
def form(request) -> LowRank:
    return request.param


def test_bits_are_those_of_what_is_stored(form: LowRank) -> None:
    tensors = stored(form, (64, 96))
    assert form.nbytes((64, 96)) == sum(t.nbytes for t in tensors.values())
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == form.stored((64, 96))
    if form.inner == Dense(torch.bfloat16):
        assert form.bits_per_weight((64, 96)) == 16 * form.rank * (64 + 96) / (64 * 96)


def test_a_layer_multiplies_by_one_factor_then_the_other(form: LowRank) -> None:
    tensors, g = stored(form, (64, 96)), torch.Generator().manual_seed(9)
    u, v = form.factors(tensors)
    x, bias = torch.randn(2, 5, 96, generator=g), torch.randn(64, generator=g)
    expected = (x.double() @ v.double().T) @ u.double().T + bias.double()
    layer = stored_linear(form, tensors, bias)
    assert (layer(x).double() - expected).abs().max() < 1e-5 * expected.abs().max()
    weight = u.double() @ v.double()
    assert (form.unpack(tensors).double() - weight).abs().max() < 1e-5 * weight.abs().max()
    rows = torch.tensor([3, 63, 0, 3])
    assert (layer.rows(rows).double() - weight[rows]).abs().max() < 1e-5 * weight.abs().max()


def test_a_folder_of_factors_is_read_as_it_was_written(tiny_model, tmp_path, form) -> None:
    written = write(tiny_model, tmp_path / "m", dict.fromkeys(linears(tiny_model), form))
    checkpoint = open_checkpoint(tmp_path / "m")
    for module, tensors in written.items():
        name, expected = f"{module}.weight", form.unpack(tensors)
        assert checkpoint.format(name) == form
        assert all(torch.equal(tensors[local], t) for local, t in checkpoint.stored(name).items())
        assert checkpoint.nbytes(name) == sum(t.nbytes for t in tensors.values())
        assert torch.allclose(checkpoint.tensor(name), expected, rtol=1e-5, atol=1e-6)
        for rows in (slice(3, 32), slice(31, 32), slice(0, 0)):
            assert torch.allclose(checkpoint.tensor(name, rows), expected[rows], rtol=1e-5, atol=1e-6)
    on_disk = load_file(tmp_path / "m" / "model.safetensors")
    assert checkpoint.weight_bytes() == sum(t.nbytes for t in on_disk.values())
    copy = open_checkpoint(save_folder(checkpoint, tmp_path / "copy"))
    assert copy.fingerprint() == checkpoint.fingerprint()


def test_a_decoder_keeps_the_factors_and_gives_their_products_logits(tiny_model, tmp_path, form) -> None:
    write(tiny_model, tmp_path / "m", dict.fromkeys([*linears(tiny_model), "model.embed_tokens"], form))
    checkpoint = open_checkpoint(tmp_path / "m")
    oracle, packed = load_decoder(checkpoint), load_decoder(checkpoint, packed=True)
    tokens = torch.arange(2, 42).view(2, 20)
    expected, found = oracle(tokens), packed(tokens)
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    held = sum(t.nbytes for t in {t.data_ptr(): t for t in packed.state_dict().values()}.values())
    assert held < 2 * resident_bytes(checkpoint, torch.float32, packed=True) + 4096


@pytest.mark.parametrize(("shape", "rank"), [((64, 96), 39), ((1, 1), 1), ((5, 5), 3), ((576, 192), 144)])
def test_the_first_rank_that_does_not_pay(shape: tuple[int, int], rank: int) -> None:
    assert worthwhile_rank(shape) == rank
    assert LowRank(rank).nbytes(shape) >= Dense().nbytes(shape)
    assert rank == 1 or LowRank(rank - 1).nbytes(shape) < Dense().nbytes(shape)


def test_groups_that_do_not_divide_a_rank_are_as_long_as_they_can_be() -> None:
    assert LowRank(96, Integer(4, 64)).side("u") == Integer(4, 32)
    assert LowRank(96, Integer(4, 64)).side("v") == Integer(4, 64)
    with pytest.raises(ShapeMismatch, match="does not divide factors of rank 36"):
        LowRank(36, Integer(4, 64)).stored((64, 64))


@pytest.mark.parametrize(
    "make",
    [
        lambda: LowRank(0),
        lambda: LowRank(-3),
        lambda: LowRank(8, LowRank(8)),
        lambda: LowRank(8, TensorTrain((2, 2), (1,))),
        lambda: LowRank(8, Integer(8, None, outliers=True, outlier_share=0.1)),
        lambda: LowRank(8, KMeans(3, 0.1)),
        lambda: TensorTrain((8,), ()),
        lambda: TensorTrain((8, 8), (2, 2)),
        lambda: TensorTrain((8, 0), (2,)),
        lambda: TensorTrain((8, 8), (9,)),
        lambda: TensorTrain((4, 4, 4), (4, 5)),
        lambda: TensorTrain((4, 16), (2,)).stored((10, 63)),
        lambda: TensorTrain((4, 16), (2,)).holding(Integer(8, None)),
    ],
)
def test_forms_that_do_not_exist_are_refused(make) -> None:
    with pytest.raises(ShapeMismatch):
        make()


# Tensor trains.


@pytest.mark.parametrize("modes", [(8, 8), (4, 4, 4), (2, 8, 4), (2, 2, 4, 4)])
def test_a_train_of_whole_ranks_is_exact(modes: tuple[int, ...]) -> None:
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    most = [
        min(torch.Size(modes[:k]).numel(), torch.Size(modes[k:]).numel()) for k in range(1, len(modes))
    ]  # fmt: skip
    form = TensorTrain(modes, tuple(most), torch.float32)
    assert (form.unpack(form.decompose(weight)) - weight).abs().max() < 1e-5


@pytest.mark.parametrize(("modes", "ranks"), [((8, 8), (3,)), ((4, 4, 4), (2, 3)), ((2, 8, 4), (2, 2))])
def test_the_error_of_a_row_is_within_what_its_unfoldings_drop(modes: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(2)).double()
    form = TensorTrain(modes, ranks, torch.float32)
    error = (form.unpack(form.decompose(weight.float())).double() - weight).square().sum(1)
    dropped = torch.zeros(40).double()
    for k, rank in enumerate(ranks, start=1):
        unfolded = weight.view(40, torch.Size(modes[:k]).numel(), -1)
        tail = torch.linalg.svdvals(unfolded)[:, rank:].square().sum(1)
        assert (error > tail * (1 - 1e-5)).all()  # no train of these ranks is nearer than the best unfolding
        dropped += tail
    assert (error < dropped * (1 + 1e-5)).all()
    if len(modes) == 2:
        assert torch.allclose(error, dropped, rtol=1e-5)


def test_a_folder_with_a_train_embeds_and_ends_by_its_rows(tiny_model, tmp_path) -> None:
    form = TensorTrain((8, 8), (4,), torch.bfloat16)
    written = write(tiny_model, tmp_path / "m", {"model.embed_tokens": form})["model.embed_tokens"]
    checkpoint = open_checkpoint(tmp_path / "m")
    name, expected = "model.embed_tokens.weight", form.unpack(written)
    assert checkpoint.format(name) == form
    assert checkpoint.nbytes(name) == sum(t.nbytes for t in written.values())
    assert torch.equal(checkpoint.tensor(name, slice(37, 90)), expected[37:90])
    tokens = torch.arange(2, 42).view(2, 20)
    oracle, packed = load_decoder(checkpoint), load_decoder(checkpoint, packed=True)
    assert torch.equal(packed.embed(tokens), oracle.embed(tokens))
    assert (packed(tokens) - oracle(tokens)).abs().max() < 1e-4 * oracle(tokens).std()


# Descriptions.


@pytest.mark.parametrize("form", [*FORMS, TensorTrain((4, 4, 4), (2, 3), torch.float16)], ids=lambda f: f.name)
def test_a_description_says_the_format_again(form: Format) -> None:
    config = json.loads(json.dumps(quantization_config({"a": form}, {"a": "linear"}, "lm_head")))
    layout = layout_from_quantization_config(config, torch.float16)
    assert layout("a", "linear") == form
    assert layout("b", "linear") == Dense(torch.float16)


def described(**said: object) -> dict[str, object]:
    return {
        "quant_method": "gossamer",
        "version": 1,
        "config_groups": {"group_0": {"targets": ["a"], "format": said}},
    }


BF16 = {"type": "float", "dtype": "bf16"}
DEEP: dict[str, object] = {"type": "low-rank", "rank": 8, "inner": BF16}
for _ in range(400):
    DEEP = {"type": "low-rank", "rank": 8, "inner": DEEP}


@pytest.mark.parametrize(
    "said",
    [
        {"type": "low-rank", "rank": 0, "inner": BF16},
        {"type": "low-rank", "rank": True, "inner": BF16},
        {"type": "low-rank", "rank": 8.0, "inner": BF16},
        {"type": "low-rank", "rank": 8},
        {"type": "low-rank", "rank": 8, "inner": "bf16"},
        {"type": "low-rank", "rank": 8, "inner": {}},
        {"type": "low-rank", "rank": 8, "inner": {"type": "float", "dtype": "int8"}},
        {"type": "low-rank", "rank": 8, "inner": {"type": "float", "dtype": ["bf16"]}},
        {"type": "low-rank", "rank": 8, "inner": {"type": "kmeans", "bits": 3, "outlier_share": 0.1}},
        {"type": "low-rank", "rank": 8, "inner": BF16, "more": 1},
        {"type": "low-rank", "rank": 8, "inner": {"type": "low-rank", "rank": 8, "inner": BF16}},
        {"type": "low-rank", "rank": 8, "inner": {"type": "tensor-train", "modes": [2], "ranks": [], "dtype": "bf16"}},
        DEEP,
        {"type": "tensor-train", "modes": [8, 8], "ranks": [9], "dtype": "bf16"},
        {"type": "tensor-train", "modes": [8, 8], "ranks": ["2"], "dtype": "bf16"},
        {"type": "tensor-train", "modes": [8, True], "ranks": [1], "dtype": "bf16"},
        {"type": "tensor-train", "modes": [], "ranks": [], "dtype": "bf16"},
        {"type": "tensor-train", "modes": {"0": 8}, "ranks": [], "dtype": "bf16"},
        {"type": "tensor-train", "modes": [8, 8], "ranks": [2], "dtype": "fp64"},
    ],
)
def test_descriptions_that_make_no_sense_are_typed_errors(said: dict[str, object]) -> None:
    with pytest.raises((CorruptCheckpoint, UnsupportedModel), match=r"config\.json"):
        layout_from_quantization_config(described(**said), torch.bfloat16)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["low-rank", "float", "int", "bf16"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "rank", "inner", "dtype", "modes", "ranks", "bits"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@given(st.sampled_from(["low-rank", "tensor-train", "float"]), st.dictionaries(st.sampled_from(
    ["rank", "inner", "dtype", "modes", "ranks"]), JSON, max_size=4))  # fmt: skip
def test_any_description_is_read_or_refused_with_a_typed_error(kind: str, said: dict[str, object]) -> None:
    with contextlib.suppress(GossamerError):
        layout_from_quantization_config(described(**{**said, "type": kind}), torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("weight_v_packed"), "is missing"),
        (lambda t: t.update(weight_u_packed=t["weight_u_packed"][:-1].contiguous()), "weight_u_packed"),
        (lambda t: t.update(weight_v_shape=torch.tensor([32, 95])), "weight_v_shape"),
        (lambda t: t.update(weight_u_scale=t["weight_u_scale"].int(), weight_v_scale=t["weight_v_scale"].int()), "int"),
        (lambda t: t.update(weight_u_scale=t["weight_u_scale"].half()), "scale"),
        (lambda t: t.update(weight_w=torch.zeros(2, 2)), "weight_w"),
    ],
)
def test_factors_that_do_not_fit_each_other_are_refused_when_opened(tiny_model, tmp_path, change, words) -> None:
    module = "model.layers.1.mlp.down_proj"
    write(tiny_model, tmp_path / "m", {module: LowRank(32, Integer(8, 32))})
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    own = {n.removeprefix(module + "."): tensors.pop(n) for n in list(tensors) if n.startswith(module)}
    change(own)
    save_file(tensors | {f"{module}.{n}": t for n, t in own.items()}, path, {"format": "pt"})
    with pytest.raises(CorruptCheckpoint) as caught:
        open_checkpoint(tmp_path / "m")
    assert words in caught.value.message
