"""Codebooks that are fixed: a code is an index into a table of levels, and the weight is level * scale of its group.

    kind   levels                                   scale of a group                     stored as
    nf4    quantiles of a normal distribution       its largest weight, bf16             below
    fp4    bitsandbytes' 4-bit floats               its largest weight, bf16             below
    mxfp4  E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6, signs  power of two (E8M0), groups of 32    mxfp4-pack-quantized
    nvfp4  the same                                 E4M3, groups of 16; times one float  nvfp4-pack-quantized
    fp8    E4M3                                     bf16, one for each row               float-quantized
nf4 and double quantization: QLoRA (arXiv 2305.14314); mxfp4: OCP Microscaling Formats v1.0 (arXiv 2310.10537).

Where compressed-tensors 0.20 has a form, that is what is stored (two codes a byte, the first column's in the low bits):
    mxfp4  weight_packed uint8 [out, in / 2], weight_scale uint8 [out, in / 32]
    nvfp4  weight_packed uint8 [out, in / 2], weight_scale E4M3 [out, in / 16], weight_global_scale float32 [1]
    fp8    weight E4M3 [out, in], weight_scale bf16 [out, 1]
nf4 and fp4 are stored as integers are, codes from 0: weight_packed, weight_shape, weight_scale bf16 [out, in / g]. With
`double_quant` weight_scale is uint8, a float of 4 bits of exponent and 4 of mantissa, and weight_scale_exponent int32
[1] is the exponent that all of them start from. So a scale is a short bf16 number, rounded alike whatever it stands
beside: rows can be quantized and stored in any parts. (QLoRA scales 256 of them at a time by a float32 of their own.)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from ..errors import KernelError, ShapeMismatch, UnknownName
from ..kernels import dispatch
from .base import SHAPE, Format, Stored, Tensors, check_tensors, shares, words
from .codes import Codes, look_up

CodebookKind: TypeAlias = Literal["nf4", "fp4", "mxfp4", "nvfp4", "fp8"]
KINDS: tuple[CodebookKind, ...] = ("nf4", "fp4", "mxfp4", "nvfp4", "fp8")
GROUP_SIZES: dict[CodebookKind, int | None] = {"mxfp4": 32, "nvfp4": 16, "fp8": None}
"""Of the kinds that have no choice."""
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_MAX = 448.0
SMALLEST = 2.0**-126
"""Scale of a group of zeros where scales share a range with others: it takes none of it from them."""
GLOBAL_SCALE, SCALE_EXPONENT = "weight_global_scale", "weight_scale_exponent"


@dataclass(frozen=True)
class Codebook(Format):
    """Levels of this kind with a scale for each `group_size` columns (None: each row)."""

    kind: CodebookKind
    group_size: int | None
    double_quant: bool = False
    scale_dtype: torch.dtype = torch.bfloat16

    uncut: ClassVar[frozenset[str]] = frozenset({GLOBAL_SCALE, SCALE_EXPONENT})

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnknownName("codebook", self.kind, KINDS)
        wanted = GROUP_SIZES.get(self.kind, self.group_size)
        if self.group_size != wanted:
            way = "it has one scale for each row" if wanted is None else f"its groups are of {wanted}"
            raise ShapeMismatch(f"{self.kind} with group_size {self.group_size} is not a format", hint=way)
        if self.double_quant and self.kind not in ("nf4", "fp4"):
            raise ShapeMismatch(f"{self.kind} has no double quantization", hint="nf4 and fp4 have")
        if self.fixed_scales:
            fixed = torch.float8_e4m3fn if self.kind == "nvfp4" else torch.uint8
            object.__setattr__(self, "scale_dtype", fixed)

    @property
    def name(self) -> str:
        if self.kind in ("mxfp4", "nvfp4"):
            return self.kind
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"{self.kind}-{group}" + ("-dq" if self.double_quant else "")

    @property
    def fixed_scales(self) -> bool:  # type: ignore[override]
        return self.double_quant or self.kind in ("mxfp4", "nvfp4")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.kind == "fp8" else 4

    @property
    def code_dtype(self) -> torch.dtype:  # type: ignore[override]
        return torch.uint8 if self.kind == "fp8" else torch.int8

    @property
    def levels(self) -> Tensor:
        """float32 [16] or [256]: what each code stands for, in scales."""
        return _table(self.kind).levels

    def stored(self, shape: tuple[int, ...]) -> Stored:
        out, columns = shape
        scale = (self.scale_dtype, (out, self.groups(columns)))
        if self.kind == "fp8":
            return {"weight": (torch.float8_e4m3fn, (out, columns)), "weight_scale": scale}
        if self.kind in ("mxfp4", "nvfp4"):
            tensors: Stored = {"weight_packed": (torch.uint8, (out, columns // 2)), "weight_scale": scale}
            return tensors | ({GLOBAL_SCALE: (torch.float32, (1,))} if self.kind == "nvfp4" else {})
        tensors = {
            "weight_packed": (torch.int32, (out, words(columns, 4))),
            "weight_scale": scale,
            SHAPE: (torch.int64, (2,)),
        }
        return tensors | ({SCALE_EXPONENT: (torch.int32, (1,))} if self.double_quant else {})

    def pack(self, codes: Codes) -> dict[str, Tensor]:
        if codes.outliers is not None:
            raise KernelError(f"{self.name} keeps no outliers, {len(codes.outliers)} were given")
        stored_scale = self._pack_scale(codes.scale.float())
        scale = self._unpack_scale(stored_scale)
        index = codes.codes
        if not torch.equal(scale, codes.scale.float()):
            # Scales that lie too far below the largest of their weight are raised, and their codes chosen again.
            grouped = look_up(index, self.levels).view(*scale.shape, -1) * codes.scale.float().unsqueeze(-1)
            index = self.round(grouped, scale.unsqueeze(-1), None).view(index.shape)
        index = index.to(self.code_dtype)
        if self.kind == "fp8":
            return {"weight": index.contiguous().view(torch.float8_e4m3fn), **stored_scale}
        if self.kind in ("mxfp4", "nvfp4"):
            packed = (index[:, 0::2] | index[:, 1::2] << 4).view(torch.uint8)
            return {"weight_packed": packed, **stored_scale}
        shape = torch.tensor(index.shape, dtype=torch.int64)
        return {"weight_packed": dispatch.pack_codes(index - 8, 4), **stored_scale, SHAPE: shape}

    def codes(self, tensors: Tensors, rows: slice | None = None) -> Codes:
        rows = slice(None) if rows is None else rows
        shape = self._shape(tensors)
        check_tensors(self, tensors, shape)
        scale = self._unpack_scale(tensors)[rows]
        if self.kind == "fp8":
            index = tensors["weight"][rows].view(torch.uint8)
        elif self.kind in ("mxfp4", "nvfp4"):
            packed = tensors["weight_packed"][rows]
            index = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).to(torch.int8)
        else:
            index = dispatch.unpack_codes(tensors["weight_packed"][rows].contiguous(), 4, shape[1]) + 8
        return Codes(index, scale, None, self.levels)

    def unpack(self, tensors: Tensors, rows: slice | None = None) -> Tensor:
        return self.codes(tensors, rows).dequantize()

    def round(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return _table(self.kind).nearest(values / scale)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return self.levels.index_select(0, codes.int().flatten()).view(codes.shape) * scale

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.maximum(high, -low).clamp(min=0)
        if self.kind == "mxfp4":
            scale = _power_of_two(scale)
        else:
            scale = self._rounded(scale / self.reach)
        return scale, torch.zeros_like(scale)

    def assemble(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Codes:
        return Codes(codes.to(self.code_dtype), scale, None, self.levels)

    @property
    def shares(self) -> Sequence[float]:
        if self.kind == "fp8":
            return ()  # floats of a large range: another scale moves their steps, and makes them no finer
        if self.kind == "mxfp4":
            return (2.0, 0.5)  # the next powers of two
        # E2M1 has nothing between 4 and 6 (2/3 and 1 for fp4): a largest weight that becomes 4 may lose less.
        return shares(1.0 if self.kind == "nf4" else 1.5)

    @property
    def reach(self) -> float:
        return {"nf4": 1.0, "fp4": 1.0, "mxfp4": 6.0, "nvfp4": 6.0, "fp8": E4M3_MAX}[self.kind]

    def _rounded(self, scale: Tensor) -> Tensor:
        """Positive scales as they will be stored, whatever others they stand beside."""
        if self.double_quant or self.kind == "nvfp4":
            mantissa, exponent = torch.frexp(scale)
            steps = 2.0 ** (5 if self.double_quant else 4)
            scale = torch.ldexp((mantissa * steps).round() / steps, exponent)
            return scale.clamp(min=SMALLEST)
        scale = scale.to(self.scale_dtype).float()
        return torch.where(scale == 0, 1.0, scale)  # a group of zeros still needs a scale to divide by

    def _pack_scale(self, scale: Tensor) -> dict[str, Tensor]:
        """Stored tensors of scales [out, groups]; those that lie too far below the largest become the smallest."""
        if self.kind == "mxfp4":
            return {"weight_scale": (torch.frexp(scale).exponent + 126).clamp(0, 254).to(torch.uint8)}
        if self.kind == "nvfp4":
            mantissa, exponent = torch.frexp(scale.max())
            power = int((9 if float(mantissa) <= E4M3_MAX / 512 else 8) - exponent)  # the largest is in (224, 448] then
            factor = 2.0 ** max(-126, min(126, power))
            stored = (scale * factor).clamp(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn)
            return {"weight_scale": stored, GLOBAL_SCALE: torch.tensor([factor])}
        if self.double_quant:
            mantissa, exponent = torch.frexp(scale)
            lowest = exponent.max() - 15
            code = (exponent - lowest) * 16 + (mantissa * 32).round().int() - 16
            return {"weight_scale": code.clamp(min=0).to(torch.uint8), SCALE_EXPONENT: lowest.int().view(1)}
        return {"weight_scale": scale.to(self.scale_dtype).contiguous()}

    def _unpack_scale(self, tensors: Tensors) -> Tensor:
        """float32 scales [out, groups]."""
        stored = tensors["weight_scale"]
        if self.kind == "mxfp4":
            return torch.where(stored == 255, torch.nan, _exp2(stored.int() - 127))
        if self.kind == "nvfp4":
            return stored.float() / tensors[GLOBAL_SCALE]
        if self.double_quant:
            exponent = (stored >> 4).int() + tensors[SCALE_EXPONENT].clamp(-300, 300)
            return torch.ldexp((16 + (stored & 15).float()) / 32, exponent)
        return stored.float()

    def _shape(self, tensors: Tensors) -> tuple[int, int]:
        """Shape of the weight as the stored tensors say it."""
        named = SHAPE if self.kind in ("nf4", "fp4") else "weight" if self.kind == "fp8" else "weight_packed"
        found = tensors.get(named)
        said = [] if found is None else found.tolist() if named == SHAPE else list(found.shape)
        if len(said) != 2:
            raise KernelError(f"{self.name}: {named} {said or 'is missing'}, which is not of a matrix")
        return said[0], said[1] * (2 if named == "weight_packed" else 1)


class _Table:
    """Levels by code, and the way from a value to the nearest of them."""

    def __init__(self, levels: Sequence[float]) -> None:
        self.levels = torch.tensor(levels, dtype=torch.float32)
        # Codes by rising level; of a zero with a sign and one without, the latter.
        rising = sorted({level: code for code, level in reversed(list(enumerate(levels)))}.items())
        bounds = []
        for (a, code_a), (b, code_b) in itertools.pairwise(rising):
            middle = torch.tensor((a + b) / 2, dtype=torch.float32)
            if code_a % 2 and not code_b % 2:  # a tie goes to the even code, and to the lower level of two alike
                middle = torch.nextafter(middle, torch.tensor(-torch.inf))
            bounds.append(middle)
        self.bounds = torch.stack(bounds)
        self.order = torch.tensor([float(code) for _, code in rising])

    def nearest(self, values: Tensor) -> Tensor:
        """Codes, as float32, of values in scales."""
        place = torch.bucketize(values, self.bounds, out_int32=True)
        return self.order.index_select(0, place.flatten()).view(values.shape)


class _Bytes(_Table):
    """E4M3: a code is the byte, rounding is the conversion that torch has."""

    def __init__(self) -> None:
        self.levels = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()

    def nearest(self, values: Tensor) -> Tensor:
        return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8).float()


@functools.cache
def _table(kind: CodebookKind) -> _Table:
    if kind == "fp8":
        return _Bytes()
    if kind == "nf4":
        return _Table(NF4_LEVELS)
    positive = [n / 12 for n in FP4_TWELFTHS] if kind == "fp4" else list(E2M1_LEVELS)
    return _Table(positive + [-level for level in positive])


def _power_of_two(largest: Tensor) -> Tensor:
    """Scales of E2M1 groups by their largest weight: it becomes 3.5 to 7, as compressed-tensors has it."""
    mantissa, exponent = torch.frexp(largest)
    exponent = exponent - 3 + (mantissa >= 0.875).int()
    return torch.where(largest == 0, 1.0, _exp2(exponent.clamp(-126, 127)))


def _exp2(exponent: Tensor) -> Tensor:
    """Two to this power, exactly."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
