"""How a weight is stored: one file per format, and the layout of a whole model folder."""

from .base import Format, Tensors
from .codebook import Codebook
from .codes import Codes, Outliers
from .dense import Dense
from .integer import Integer, nearest_group_size
from .kmeans import KMeans
from .layout import Kind, Layout, layout_from_quantization_config, only_ours, quantization_config
from .low_rank import LowRank
from .own_layout import OWN_METHOD
from .sparse import Sparse
from .tensor_train import TensorTrain

__all__ = [
    "OWN_METHOD",
    "Codebook",
    "Codes",
    "Dense",
    "Format",
    "Integer",
    "KMeans",
    "Kind",
    "Layout",
    "LowRank",
    "Outliers",
    "Sparse",
    "TensorTrain",
    "Tensors",
    "layout_from_quantization_config",
    "nearest_group_size",
    "only_ours",
    "quantization_config",
]
