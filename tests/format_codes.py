"""Random codes of any format, made without its own rounding."""

from __future__ import annotations

import torch

from gossamer.formats import Codebook, Codes, Integer, KMeans, Outliers, Sparse

FORMATS = [
    *(
        Integer(bits, group, symmetric)
        for bits in (2, 3, 4, 5, 6, 8)
        for group, symmetric in ((16, True), (None, False))
    ),
    Integer(8, None, outliers=True, outlier_share=0.02),
    Integer(3, 32, symmetric=False, outliers=True, outlier_share=0.01),
    Codebook("nf4", 64),
    Codebook("nf4", 16, double_quant=True),
    Codebook("nf4", None),
    Codebook("fp4", 32),
    Codebook("fp4", 64, double_quant=True),
    Codebook("mxfp4", 32),
    Codebook("nvfp4", 16),
    Codebook("fp8", None),
    KMeans(2),
    KMeans(3, 0.01),
    KMeans(4, 0.005),
    Sparse(Integer(8, None), 0.5),
    Sparse(Integer(4, 32), 0.75),
    Sparse(Integer(3, 16, symmetric=False), 0.3),
]


def random_outliers(out: int, columns: int, count: int, generator: torch.Generator) -> Outliers:
    """`count` different places, in order, with values that bfloat16 holds."""
    places = torch.randperm(out * columns, generator=generator)[:count].sort().values
    values = torch.randn(count, generator=generator).bfloat16().float()
    return Outliers((places // columns).int(), (places % columns).int(), values)


def random_codes(form: Integer | Codebook | KMeans | Sparse, out: int, columns: int, seed: int = 0) -> Codes:
    """Codes over the whole range of the format, with scales that it stores as they are."""
    if isinstance(form, Sparse):
        return _pruned(random_codes(form.inner, out, columns, seed), form.sparsity, seed)
    g = torch.Generator().manual_seed(seed)
    shape = (out, form.groups(columns))
    # 6 of the 8 bits of bfloat16's mantissa and the 4 of E4M3 hold these, whatever power of two they are times.
    scale = torch.randint(8, 16, shape, generator=g).float() * 2.0 ** torch.randint(-9, -3, shape, generator=g)
    zero = levels = outliers = None
    low, high = 0, 2**form.bits
    if isinstance(form, Integer):
        low, high = -(2 ** (form.bits - 1)), 2 ** (form.bits - 1)
        if not form.symmetric:
            zero = torch.randint(low, high, shape, generator=g).to(torch.int8)
    elif isinstance(form, Codebook):
        levels = form.levels
        if form.kind == "mxfp4":
            scale = 2.0 ** torch.randint(-20, 20, shape, generator=g)
    else:
        levels, scale = torch.randn(out, high, generator=g).half().float(), torch.ones(shape)
    codes = torch.randint(low, high, (out, columns), generator=g).to(form.code_dtype)
    if isinstance(form, Codebook) and form.kind == "fp8":
        codes[codes & 127 == 127] = 0  # not a number
    if not isinstance(form, Codebook) and form.outliers:
        outliers = random_outliers(out, columns, out * round(form.outlier_share * columns), g)
    return Codes(codes, scale, zero, levels, outliers)


def _pruned(codes: Codes, sparsity: float, seed: int) -> Codes:
    """The same codes of integers with just this share of zeros: all others stand for something else."""
    out, columns = codes.codes.shape
    zero = torch.zeros_like(codes.scale) if codes.zero is None else codes.zero
    zero = zero.repeat_interleave(columns // zero.shape[1], 1).to(torch.int8)
    others = torch.where(codes.codes == zero, torch.where(zero > 0, zero - 1, zero + 1), codes.codes)
    places = torch.randperm(out * columns, generator=torch.Generator().manual_seed(seed))
    where = torch.zeros(out * columns, dtype=torch.bool)
    where[places[: round(sparsity * out * columns)]] = True
    return Codes(torch.where(where.view(out, columns), zero, others), codes.scale, codes.zero)
