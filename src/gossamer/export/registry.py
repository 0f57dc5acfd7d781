"""Targets by name. A row here and a file beside it is all that a new target takes; the file is imported when asked."""

from __future__ import annotations

from importlib import import_module

from ..errors import UnknownName
from .base import Export

TARGETS = {
    "gguf": "gguf.GGUFExport",
    "openvino": "openvino.OpenVINOExport",
    "transformers": "compressed.TransformersExport",
    "vllm": "compressed.VLLMExport",
    "gptq": "gptq.GPTQExport",
    "awq": "awq.AWQExport",
    "mlc": "mlc.MLCExport",
    "tensorrt-llm": "tensorrt_llm.TensorRTExport",
}
"""Name -> module and class."""


def target_class(name: str) -> type[Export]:
    """The Export of a target. Raises UnknownName."""
    if name not in TARGETS:
        raise UnknownName("target", name, TARGETS)
    module, _, cls = TARGETS[name].partition(".")
    found: type[Export] = getattr(import_module(f".{module}", __package__), cls)
    return found
