"""What the tests of engines share."""

from __future__ import annotations

from pathlib import Path

import pytest
from peer_engines import llama_cpp_programs


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with llama.cpp's two programs."""
    folder = tmp_path_factory.mktemp("llama.cpp")
    for tool in llama_cpp_programs():
        (folder / tool.name).symlink_to(tool)
    return folder
