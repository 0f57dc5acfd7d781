"""Every compression method by name: one row each."""

from __future__ import annotations

from ..errors import UnknownName
from .distill.local import RecoverLocal
from .distill.whole import Distill
from .factorize.asvd import ASVD
from .factorize.svd import SVD
from .factorize.svd_llm import SVDLLM
from .factorize.tensor_train import TensorTrainEmbedding
from .method import Method
from .prune.depth import Depth
from .prune.flap import FLAP
from .prune.llm_pruner import LLMPruner
from .prune.magnitude import Magnitude
from .prune.slicegpt import SliceGPT
from .prune.sparsegpt import SparseGPT
from .prune.wanda import Wanda
from .prune.wanda_sp import WandaSP
from .quantize.awq import AWQ
from .quantize.efficientqat import EfficientQAT
from .quantize.gptq import GPTQ
from .quantize.hqq import HQQ
from .quantize.llm_int8 import LLMInt8
from .quantize.omniquant import OmniQuant
from .quantize.rotate import Rotate
from .quantize.rtn import RTN
from .quantize.signround import SignRound
from .quantize.smoothquant import SmoothQuant
from .quantize.squeezellm import SqueezeLLM
from .tune.lora import LoRA
from .tune.qat import QAT
from .tune.qlora import QLoRA
from .tune.scales import Scales

_ROWS: tuple[type[Method], ...] = (
    Rotate,
    Magnitude,
    Wanda,
    SparseGPT,
    WandaSP,
    FLAP,
    LLMPruner,
    SliceGPT,
    Depth,
    SVD,
    ASVD,
    SVDLLM,
    TensorTrainEmbedding,
    RTN,
    HQQ,
    GPTQ,
    AWQ,
    SmoothQuant,
    LLMInt8,
    SqueezeLLM,
    OmniQuant,
    SignRound,
    EfficientQAT,
    RecoverLocal,
    Scales,
    QAT,
    QLoRA,
    LoRA,
    Distill,
)
METHODS: dict[str, type[Method]] = {m.name: m for m in _ROWS}


def method_class(name: str) -> type[Method]:
    """The method of this name. Raises UnknownName with the nearest ones."""
    if name not in METHODS:
        raise UnknownName("method", name, METHODS)
    return METHODS[name]
