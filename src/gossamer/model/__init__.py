"""One decoder-only transformer, and model families as data."""

from .config import LayerConfig, ModelConfig, Rope
from .families import FAMILIES, LINEARS, OWN_PREFIX, Family, tensor_names
from .translate import config_from_hf

__all__ = [
    "FAMILIES",
    "LINEARS",
    "OWN_PREFIX",
    "Family",
    "LayerConfig",
    "ModelConfig",
    "Rope",
    "config_from_hf",
    "tensor_names",
]
