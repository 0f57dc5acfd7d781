"""Where the engines are that `make test-engines` has made, or makes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import peers

HOME = Path(os.environ.get("GOSSAMER_ENGINES", "~/.cache/gossamer")).expanduser()
"""Whose `peers` hold the engines: not the cache that tests have for themselves."""


def python(peer: str) -> Path:
    """The Python of an engine's environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_HOME", str(HOME))
        return peers.python_of(peer)


def llama_cpp_programs() -> list[Path]:
    """llama.cpp's server and its quantizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_HOME", str(HOME))
        return [peers.llama_server(), peers.llama_cpp_tool("llama-quantize")]
