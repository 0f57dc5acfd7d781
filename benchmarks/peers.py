"""Peers, each in a virtual environment of its own, made when first asked for.

    python benchmarks/peers.py llmcompressor

They live below the cache (GOSSAMER_HOME/peers), never in the project, and are never a dependency of it.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from gossamer.settings import cache_dir

PEERS = {"llmcompressor": ["llmcompressor==0.14.0.1"]}
"""Peer -> what pip installs after torch, so that torch stays the build that is measured everywhere."""
TORCH = "torch==2.13.0"


def python_of(peer: str) -> Path:
    """The Python of a peer's environment; the environment is made if it is not there."""
    folder = cache_dir("peers") / peer
    python = folder / "bin" / "python"
    if not (folder / ".complete").exists():
        print(f"making the environment of {peer} in {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, *PEERS[peer], TORCH], check=True)
        (folder / ".complete").touch()
    return python


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(python_of(name))
