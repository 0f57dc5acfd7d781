"""Codes for factors: V as a layer of the same inputs, then U as a layer whose inputs are the outputs of V as stored."""

from __future__ import annotations

from torch import Tensor

from ...formats import LowRank
from ..method import Quantizer


def quantize_factors(
    method: Quantizer, form: LowRank, u: Tensor, v: Tensor, hessian: Tensor | None
) -> dict[str, Tensor]:
    """Stored tensors of U [out, rank] and V [rank, in] by any quantizer of layers; U sees V H V^T [rank, rank]."""
    codes = method.quantize(v, form.side("v"), hessian)
    value = codes.dequantize()
    inner = None if hessian is None else value @ hessian @ value.T
    return form.join(form.side("u").pack(method.quantize(u, form.side("u"), inner)), form.side("v").pack(codes))
