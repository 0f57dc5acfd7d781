"""Text generation: requests, sampling, and the loop that turns logits into text. `LLM` is the public surface.

Names are imported when they are first asked for, so that `SamplingParams` can be checked before torch is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .llm import LLM, isa_in_use, sampling_bytes
    from .params import SamplingParams
    from .sequence import Completion, Token

_HOMES = {
    "LLM": "llm",
    "isa_in_use": "llm",
    "sampling_bytes": "llm",
    "SamplingParams": "params",
    "Completion": "sequence",
    "Token": "sequence",
}

__all__ = ["LLM", "Completion", "SamplingParams", "Token", "isa_in_use", "sampling_bytes"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
