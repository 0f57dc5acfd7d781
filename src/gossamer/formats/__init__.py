"""How a weight is stored: one file per format, and the layout of a whole model folder."""

from .base import Format, Tensors
from .dense import Dense
from .integer import Codes, Integer, nearest_group_size
from .layout import Kind, Layout, layout_from_quantization_config, quantization_config

__all__ = [
    "Codes",
    "Dense",
    "Format",
    "Integer",
    "Kind",
    "Layout",
    "Tensors",
    "layout_from_quantization_config",
    "nearest_group_size",
    "quantization_config",
]
