"""What every format stores: all of it, exactly, in the bytes that it says, and readable by rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from format_codes import FORMATS, random_codes, random_outliers
from gossamer.errors import GossamerError, KernelError, ShapeMismatch
from gossamer.formats import Codebook, Codes, Dense, Format, Integer, KMeans, Sparse

ids = [form.name for form in FORMATS]


def columns_for(form: Format, least: int) -> int:
    size = form.group_size or (32 if isinstance(form, Codebook) else 1)
    return -(-least // size) * size


def same(a: Codes, b: Codes) -> bool:
    pairs = [(a.codes, b.codes), (a.scale, b.scale), (a.zero, b.zero), (a.levels, b.levels)]
    if a.outliers is not None and b.outliers is not None:
        pairs += [(getattr(a.outliers, f), getattr(b.outliers, f)) for f in ("rows", "columns", "values")]
    alike = all((x is None) == (y is None) for x, y in pairs) and (a.outliers is None) == (b.outliers is None)
    return alike and all(torch.equal(x.float().nan_to_num(), y.float().nan_to_num()) for x, y in pairs if x is not None)


@pytest.mark.parametrize("form", FORMATS, ids=ids)
@given(out=st.integers(1, 70), least=st.integers(1, 130), seed=st.integers(0, 10_000))
def test_what_is_packed_comes_back_exactly(form: Format, out: int, least: int, seed: int) -> None:
    shape = (out, columns_for(form, least))
    q = random_codes(form, *shape, seed)
    tensors = form.pack(q)
    said = form.stored(shape)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == said
    assert all(t.is_contiguous() for t in tensors.values())
    assert form.nbytes(shape) == sum(t.nbytes for t in tensors.values())
    assert form.bits_per_weight(shape) == 8 * form.nbytes(shape) / math.prod(shape)
    assert same(form.codes(tensors), q)
    assert torch.equal(form.unpack(tensors), q.dequantize())


@pytest.mark.parametrize("form", FORMATS, ids=ids)
@given(rows=st.tuples(st.integers(0, 75), st.integers(0, 75)).map(sorted), seed=st.integers(0, 100))
def test_rows_are_read_alone(form: Format, rows: list[int], seed: int) -> None:
    start, stop = rows
    shape = (75, columns_for(form, 96))
    tensors = form.pack(random_codes(form, *shape, seed))
    whole = form.unpack(tensors)
    assert torch.equal(form.unpack(tensors, slice(start, stop)), whole[start:stop])
    asked = 0

    def read(local: str, part: slice) -> torch.Tensor:
        nonlocal asked
        assert 0 <= part.start <= part.stop <= len(tensors[local])
        asked += tensors[local][part].nbytes
        return tensors[local][part].clone()

    assert torch.equal(form.read(shape, start, stop, read), whole[start:stop])
    bits_before = tensors["weight_mask"].nbytes if isinstance(form, Sparse) else 0
    # No more than whole words of zero points need; sparse rows begin where the bits before them say.
    assert asked <= form.nbytes((stop - start + 32, shape[1])) + bits_before + 200


@pytest.mark.parametrize("form", FORMATS, ids=ids)
def test_parts_of_a_matrix_are_stored_as_they_would_be_alone(form: Format) -> None:
    q = random_codes(form, 48, columns_for(form, 64), 5)
    parts = q.split([16, 30, 2])
    stored = [form.codes(form.pack(p)).dequantize() for p in parts]
    assert torch.equal(torch.cat(stored), q.dequantize())


@pytest.mark.parametrize("form", FORMATS, ids=ids)
def test_tensors_that_do_not_fit_each_other_are_refused(form: Format) -> None:
    shape = (40, columns_for(form, 224))
    tensors = form.pack(random_codes(form, *shape, 5))
    for local, tensor in tensors.items():
        for bad in (tensor[:-1], tensor.flatten()[:0], None):
            changed = {k: v for k, v in tensors.items() if k != local}
            if bad is not None:
                changed[local] = bad
            with pytest.raises((GossamerError, KeyError, IndexError)) as caught:
                form.unpack(changed)
            if bad is not None or isinstance(form, Codebook | KMeans):
                assert isinstance(caught.value, KernelError), (local, bad)


def test_outliers_that_point_nowhere_are_refused() -> None:
    form = KMeans(2, 0.02)
    tensors = form.pack(random_codes(form, 6, 50, 1))
    for local, bad in (
        ("outlier_columns", torch.full_like(tensors["outlier_columns"], 50)),
        ("outlier_columns", torch.full_like(tensors["outlier_columns"], -1)),
        ("outlier_pointers", tensors["outlier_pointers"].flip(0)),
        ("outlier_pointers", tensors["outlier_pointers"] + 1),
        ("outlier_pointers", tensors["outlier_pointers"] * 100),
    ):
        with pytest.raises(KernelError, match="outlier"):
            form.unpack({**tensors, local: bad})
        with pytest.raises(KernelError, match="outlier"):
            form.read((6, 50), 0, 6, lambda name, rows, bad=bad, local=local: {**tensors, local: bad}[name][rows])


@given(out=st.integers(1, 40), columns=st.integers(1, 60), share=st.floats(0, 0.3), seed=st.integers(0, 1000))
def test_any_number_of_outliers_in_any_rows_is_stored(out: int, columns: int, share: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    count = int(share * out * columns)
    q = random_codes(KMeans(3), out, columns, seed)
    q = Codes(q.codes, q.scale, None, q.levels, random_outliers(out, columns, count, g))
    form = KMeans(3, 0.1, kept=count)
    tensors = form.pack(q)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == form.stored((out, columns))
    assert torch.equal(form.unpack(tensors), q.dequantize())
    start, stop = out // 3, out - out // 4
    assert torch.equal(form.unpack(tensors, slice(start, stop)), q.dequantize()[start:stop])


def test_outliers_that_have_no_place_are_not_lost_in_silence() -> None:
    q = random_codes(Integer(4, 16, outliers=True, outlier_share=0.1), 4, 32)
    for form in (Integer(4, 16), Codebook("nf4", 16)):
        with pytest.raises(KernelError, match="outliers"):
            form.pack(q)


def test_columns_past_the_range_of_int16_are_stored_wider() -> None:
    assert KMeans(2, 0.1).stored((2, 1 << 15))["outlier_columns"][0] == torch.int16
    assert KMeans(2, 0.1).stored((2, (1 << 15) + 1))["outlier_columns"][0] == torch.int32


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Codebook("nf5", 64), "nf4"),
        (lambda: Codebook("mxfp4", 64), "32"),
        (lambda: Codebook("nvfp4", 32), "16"),
        (lambda: Codebook("fp8", 64), "each row"),
        (lambda: Codebook("mxfp4", 32, double_quant=True), "double"),
        (lambda: KMeans(0), "bits"),
        (lambda: KMeans(8), "bits"),
        (lambda: KMeans(4, 1.5), "share"),
        (lambda: Integer(9, None), "2 to 8"),
        (lambda: Integer(4, None, outlier_share=0.1), "outlier_share"),
        (lambda: Sparse(Dense(), 1.0), "share"),
        (lambda: Sparse(Integer(8, None, outliers=True), 0.5), "no outliers"),
        (lambda: Sparse(Dense(), 0.5).holding(Codebook("nf4", 64)), "not nf4"),
    ],
)
def test_formats_that_do_not_exist_say_what_does(make, words: str) -> None:
    with pytest.raises(GossamerError) as caught:
        make()
    assert words in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("form", [Codebook("nf4", 64), Codebook("mxfp4", 32), Codebook("nvfp4", 16)])
def test_groups_that_do_not_divide_a_row_name_the_nearest_that_do(form: Codebook) -> None:
    with pytest.raises(ShapeMismatch, match="does not divide 72"):
        form.stored((4, 72))


def test_a_format_without_a_scale_for_groups_says_so() -> None:
    one = torch.ones(1)
    for form in (KMeans(3), Dense()):
        with pytest.raises(KernelError, match="no scales for groups"):
            form.fit(one, one)
        with pytest.raises(KernelError, match="no scales for groups"):
            form.round(one, one, None)
    with pytest.raises(KernelError, match="no codes"):
        Dense().pack(random_codes(Integer(4, None), 2, 4))


def random_sparse(out: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    weight = torch.rand(out, columns, generator=g) + 0.5
    gone = torch.randperm(out * columns, generator=g)[: round(sparsity * out * columns)]
    return weight.flatten().index_fill(0, gone, 0.0).view(out, columns).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@given(
    out=st.integers(1, 70),
    columns=st.integers(1, 70),
    sparsity=st.sampled_from([0, 0.25, 0.5, 0.97]),
    seed=st.integers(0, 99),
)
def test_floats_without_their_zeros_come_back_exactly(
    dtype, out: int, columns: int, sparsity: float, seed: int
) -> None:
    weight, form = random_sparse(out, columns, sparsity, dtype, seed), Sparse(Dense(dtype), sparsity)
    tensors = form.compress(weight.float())
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == form.stored((out, columns))
    nonzeros = out * columns - round(sparsity * out * columns)
    assert form.nbytes((out, columns)) == out * -(-columns // 8) + nonzeros * dtype.itemsize + 16
    assert torch.equal(form.unpack(tensors), weight.float())
    start, stop = out // 3, out - out // 4
    read = form.read((out, columns), start, stop, lambda local, part: tensors[local][part])
    assert torch.equal(read, weight[start:stop].float())
    assert torch.equal(form.unpack(tensors, slice(start, stop)), weight[start:stop].float())


@pytest.mark.parametrize("form", [Sparse(Dense(), 0.5), Sparse(Integer(4, 16), 0.5)], ids=lambda f: f.name)
def test_bits_and_nonzeros_that_do_not_fit_each_other_are_refused(form: Sparse) -> None:
    shape = (33, 48)
    if isinstance(form.inner, Integer):
        tensors = form.pack(random_codes(form, *shape, 1))
    else:
        tensors = form.compress(random_sparse(*shape, 0.5, torch.bfloat16, 1).float())
    mask, numbers = tensors["weight_mask"], tensors[form.numbers]
    changes = [
        {"weight_mask": mask.clone().fill_(255)},
        {"weight_mask": mask.clone().fill_(0)},
        {"weight_mask": mask.to(torch.int8)},
        {"weight_mask": mask[:, :-1]},
        {"weight_shape": torch.tensor([33, 47])},
        {"weight_shape": torch.tensor([33, 49])},
        {"weight_shape": torch.tensor([-33, 48])},
        {form.numbers: numbers[:-2]},
        {form.numbers: torch.cat([numbers, numbers])},
        {form.numbers: numbers.to(torch.int64)},
    ]
    for change in changes:
        with pytest.raises(KernelError, match=form.name):
            form.unpack({**tensors, **change})
    narrow = {**tensors, "weight_shape": torch.tensor([33, 45])}
    with pytest.raises(KernelError, match="behind column 45"):
        form.unpack(narrow)
