"""Every compression method by name."""

from __future__ import annotations

from ..errors import UnknownName
from .method import Quantizer
from .quantize.gptq import GPTQ
from .quantize.rtn import RTN

METHODS: dict[str, type[Quantizer]] = {m.name: m for m in (RTN, GPTQ)}


def method_class(name: str) -> type[Quantizer]:
    """The method of this name. Raises UnknownName with the nearest ones."""
    if name not in METHODS:
        raise UnknownName("method", name, METHODS)
    return METHODS[name]
