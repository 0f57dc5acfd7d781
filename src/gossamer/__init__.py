"""Gossamer: make a language model faster and lighter, show what that cost, and run it.

    model = gossamer.from_pretrained("smollm2")
    llm = gossamer.LLM(model)

Names are imported when they are first asked for: `import gossamer` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.pretrained import from_pretrained, push_to_hub, save_pretrained
    from .engine.llm import LLM

__version__ = "0.1.0"

_HOMES = {
    "LLM": "engine.llm",
    "from_pretrained": "checkpoint.pretrained",
    "push_to_hub": "checkpoint.pretrained",
    "save_pretrained": "checkpoint.pretrained",
}

__all__ = ["LLM", "__version__", "from_pretrained", "push_to_hub", "save_pretrained"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
