"""How the C++ executor holds each stored weight, and the packing of it when a model is loaded.

    integers of 2 to 8 bits        as they are (7 bits as 8), groups of 32 columns and their multiples, or whole rows
    nf4, fp4, mxfp4, nvfp4         4-bit codes, looked up in registers; groups of 16 columns as well
    fp8                            bytes, made floats in registers
    outliers of integers           beside the packed weight, in float32
    sparse weights                 with their zeros; int8 and bfloat16 without, where AVX-512 fills them up
    two factors                    each as its own format says; where rows are looked up, as what fits none
    k-means, and what fits none    bfloat16 (integers in other groups: float32); `Packer.expanded` names those
Knows checkpoints and the extension; knows no layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoint import Checkpoint
from ..formats import Codebook, Dense, Format, Integer, KMeans, LowRank, Sparse
from ..formats.codebook import GLOBAL_SCALE
from ..formats.low_rank import SIDES, Side
from ..kernels import cpu as kernels
from ..kernels import dispatch

BLOCK_COLUMNS = 32
"""Columns of a weight that a kernel multiplies at once: groups of a scale are multiples of it, or whole rows."""
MAX_SPARSE_COLUMNS = 65536
"""Widest weight beside which others can be kept."""

Held: TypeAlias = "Integer | Codebook | LowRank | Literal['bf16', 'float']"


def held_as(form: Format, columns: int, dense: torch.dtype) -> Held:
    """How a weight of this format and width is held; `dense`: the dtype that a quantized one was made from."""
    if isinstance(form, Sparse):
        return held_as(form.inner, columns, dense)
    if isinstance(form, Codebook):
        groups = form.group_size in (None, columns) or form.group_size == BLOCK_COLUMNS // 2
        return form if groups or _whole_blocks(form.group_size) else "bf16"
    if isinstance(form, LowRank):
        return form
    if isinstance(form, KMeans):
        return "bf16"
    if isinstance(form, Integer):
        fits = form.group_size in (None, columns) or _whole_blocks(form.group_size)
        if fits and not (form.outliers and columns > MAX_SPARSE_COLUMNS):
            return form
        return "bf16" if form.outliers else "float"
    held = form.dtype if isinstance(form, Dense) else dense
    return "bf16" if held is torch.bfloat16 else "float"


def squeezable(held: Held) -> bool:
    """True if a weight that is held so can be held without its zeros."""
    return held == "bf16" or (isinstance(held, Integer) and held.bits >= 7 and held.symmetric and not held.outliers)


def squeezes(held: Held) -> bool:
    """True if a sparse weight that is held so is held without its zeros: where that makes it faster."""
    return squeezable(held) and bool(kernels.extension().squeezing_pays())


def expansion(checkpoint: Checkpoint) -> int:
    """Bytes by which weights grow that are not held as they are stored."""
    total = 0
    for name in checkpoint.names():
        form, shape = checkpoint.format(name), checkpoint.shape(name)
        parts = [(form.side(s), form.shape(s, shape)) for s in SIDES] if isinstance(form, LowRank) else [(form, shape)]
        total += sum(_growth(part, size, checkpoint.dtype) for part, size in parts)
    return total


def _growth(form: Format, shape: tuple[int, ...], dense: torch.dtype) -> int:
    """Bytes by which a matrix grows that is not held as it is stored."""
    if len(shape) != 2 or isinstance(form, Dense):
        return 0
    held = held_as(form, shape[1], dense)
    if isinstance(form, Sparse) and squeezes(held):
        return 0
    if held == "bf16":
        return Dense(torch.bfloat16).nbytes(shape) - form.nbytes(shape)
    if isinstance(form, Sparse):
        return (Dense(torch.float32) if held == "float" else form.inner).nbytes(shape) - form.nbytes(shape)
    return 0


class _Factor:
    """A checkpoint whose weights are one of their two factors, as far as packing reads it."""

    def __init__(self, checkpoint: Checkpoint, side: Side) -> None:
        self.checkpoint, self.side, self.dtype = checkpoint, side, checkpoint.dtype

    def format(self, name: str) -> Format:
        return self._pair(name).side(self.side)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._pair(name).shape(self.side, self.checkpoint.shape(name))

    def stored(self, name: str) -> dict[str, Tensor]:
        return self._pair(name).tensors(self.side, self.checkpoint.stored(name))

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.format(name).unpack(self.stored(name)).to(dtype)

    def _pair(self, name: str) -> LowRank:
        form = self.checkpoint.format(name)
        assert isinstance(form, LowRank)
        return form


class Packer:
    """Packs weights of a checkpoint into one arena."""

    def __init__(self, checkpoint: Checkpoint, threads: int) -> None:
        self.checkpoint: Checkpoint | _Factor = checkpoint
        self.threads = threads
        self.extension: Any = kernels.extension()
        self.arena = self.extension.Arena()
        self.coded = False
        """True if some weight meets activations that may be rounded to 8 bits."""
        self.expanded: dict[str, bool] = {}
        """Names of formats that are held in bfloat16 -> whether all their weights are exact there."""
        self.filled: set[str] = set()
        """Names of sparse formats that are held with their zeros."""

    def alike(self, modules: Sequence[str]) -> bool:
        """True if these modules' weights can be rows of one packed weight."""
        held = {(self._held(m), self._is_sparse(m)) for m in modules}
        return len(held) == 1 and not isinstance(held.pop()[0], LowRank)

    def pack_rows(self, module: str) -> Any:
        """A weight whose rows are looked up: factors are multiplied out."""
        held = self._held(module)
        if not isinstance(held, LowRank):
            return self._whole([module], held, False)
        return self._dense([f"{module}.weight"], held_as(Dense(self.checkpoint.dtype), 1, self.checkpoint.dtype), False)

    def pack(self, modules: Sequence[str], interleave: bool = False) -> Any:
        """Rows of these modules, which are alike, as one packed weight; `interleave`: two, tile by tile in turns."""
        held = self._held(modules[0])
        if isinstance(held, LowRank):
            return self._pair(modules[0])
        if not (self._is_sparse(modules[0]) and squeezes(held)):
            return self._whole(modules, held, interleave)
        apart = copy(self)
        apart.arena, apart.filled = self.extension.Arena(), set()
        whole = apart._whole(modules, held, interleave)
        self.coded = self.coded or apart.coded
        return self.extension.squeeze(self.arena, whole, self.threads)

    def _whole(self, modules: Sequence[str], held: Held, interleave: bool) -> Any:
        """Weights that are no factors, with all of their zeros."""
        names = [f"{m}.weight" for m in modules]
        self.filled |= {form.name for form in map(self.checkpoint.format, names) if isinstance(form, Sparse)}
        if isinstance(held, Integer):
            self.coded = True
            parts = [self._integer_part(held, name) for name in names]
            columns = self.checkpoint.shape(names[0])[1]
            weight = self.extension.pack_integer(self.arena, parts, columns, interleave, self.threads)
            return self._with_outliers(weight, held, names) if held.outliers else weight
        if isinstance(held, Codebook):
            if held.kind != "fp8":
                self.coded = True
                return self._codebook(held, names, interleave)
            stored = [self.checkpoint.stored(name) for name in names]
            codes = [tensors["weight"].view(torch.uint8) for tensors in stored]
            if all(bool(((c & 127) != 127).all()) for c in codes):  # else: what is no number shines through bfloat16
                factors = [tensors["weight_scale"].float().flatten().numpy() for tensors in stored]
                arrays = [c.contiguous().numpy() for c in codes]
                return self.extension.pack_e4m3(self.arena, arrays, factors, interleave, self.threads)
        return self._dense(names, held, interleave)

    def _pair(self, module: str) -> Any:
        """Two factors, of which the second follows the first."""
        packed = {}
        for side in SIDES:
            part = copy(self)
            assert isinstance(self.checkpoint, Checkpoint)
            part.checkpoint = _Factor(self.checkpoint, side)
            packed[side] = part.pack([module])
            self.coded = self.coded or part.coded
        packed["u"].after(packed["v"])
        return packed["u"]

    def _dense(self, names: Sequence[str], held: Held, interleave: bool) -> Any:
        if held == "float":
            floats = [self.checkpoint.tensor(name).contiguous().numpy() for name in names]
            return self.extension.pack_f32(self.arena, floats, interleave, self.threads)
        dense = [self._bfloat16(name) for name in names]
        bits = [t.view(torch.int16).numpy().view(np.uint16) for t in dense]
        return self.extension.pack_bf16(self.arena, bits, interleave, self.threads)

    def _held(self, module: str) -> Held:
        name = f"{module}.weight"
        return held_as(self.checkpoint.format(name), self.checkpoint.shape(name)[1], self.checkpoint.dtype)

    def _is_sparse(self, module: str) -> bool:
        return isinstance(self.checkpoint.format(f"{module}.weight"), Sparse)

    def _integer_part(self, form: Integer, name: str) -> Any:
        stored, tensors = self.checkpoint.format(name), self.checkpoint.stored(name)
        if isinstance(stored, Sparse):
            tensors = stored.filled(tensors)
        zero = None
        if not form.symmetric:
            words = tensors["weight_zero_point"].T.contiguous()
            zero = dispatch.unpack_codes(words, form.bits, self.checkpoint.shape(name)[0]).T.contiguous().numpy()
        packed = tensors["weight_packed"].contiguous().numpy()
        return self.extension.IntegerPart(packed, _floats(tensors["weight_scale"]), zero, form.bits)

    def _with_outliers(self, weight: Any, form: Integer, names: Sequence[str]) -> Any:
        """The weight, with the outliers of its parts beside it; their rows count over all parts."""
        start, found = 0, []
        for name in names:
            outliers = form.codes(self.checkpoint.stored(name)).outliers
            assert outliers is not None
            found.append((outliers.rows + start, outliers.columns, outliers.values))
            start += self.checkpoint.shape(name)[0]
        rows, columns, values = (torch.cat(each).contiguous().numpy() for each in zip(*found, strict=True))
        weight.keep(rows, columns, values)
        return weight

    def _codebook(self, form: Codebook, names: Sequence[str], interleave: bool) -> Any:
        parts, factors = [], []
        for name in names:
            tensors = self.checkpoint.stored(name)
            codes = form.codes(tensors)
            scale, factor = codes.scale, None
            if form.kind == "nvfp4":  # its scales are bytes, the float that all of them share is a factor of the rows
                scale = tensors["weight_scale"]
                factor = (1 / tensors[GLOBAL_SCALE].float()).repeat(len(codes.codes)).numpy()
            packed = dispatch.pack_codes(codes.codes - 8, 4).numpy()
            parts.append(self.extension.IntegerPart(packed, _floats(scale), None, 4))
            factors.append(factor)
        columns = self.checkpoint.shape(names[0])[1]
        levels = form.levels.numpy()
        return self.extension.pack_codebook(self.arena, parts, factors, levels, columns, interleave, self.threads)

    def _bfloat16(self, name: str) -> Tensor:
        """A weight in bfloat16; of a quantized one it is noted whether that changes it."""
        form = self.checkpoint.format(name)
        if isinstance(form.grid, Dense):
            return self.checkpoint.tensor(name, dtype=torch.bfloat16).contiguous()
        weight = self.checkpoint.tensor(name)
        held = weight.bfloat16()
        exact = torch.equal(held.float(), weight)
        self.expanded[form.name] = exact and self.expanded.get(form.name, True)
        return held.contiguous()


def _whole_blocks(group_size: int | None) -> bool:
    return group_size is not None and group_size % BLOCK_COLUMNS == 0


def _floats(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.float().contiguous().numpy()
    return array
