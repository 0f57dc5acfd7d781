"""One decoder-only transformer, and model families as data."""

from .config import LayerConfig, ModelConfig, Rope
from .families import FAMILIES, LINEARS, OWN_PREFIX, Family, config_from_hf, tensor_names

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
