"""What tells two models apart without reading their weights, so that ranks on several machines hold parts of one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ...checkpoint import Checkpoint
from ...errors import EngineError


def identity(checkpoint: Checkpoint) -> dict[str, str]:
    """sha256 of the config, of shapes and formats, of norms and biases, and of what it was made from."""
    names = checkpoint.names()
    vectors = hashlib.sha256()
    for name in names:
        if len(checkpoint.shape(name)) == 1:
            vectors.update(checkpoint.tensor(name).numpy().tobytes())
    return {
        "config": _digest(repr(checkpoint.config)),
        "shapes and formats": _digest([[n, checkpoint.shape(n), repr(checkpoint.format(n))] for n in names]),
        "norms and biases": vectors.hexdigest(),
        "gossamer.json": _digest(checkpoint.manifest),
    }


def require_same(checkpoint: Checkpoint, expected: Mapping[str, Any]) -> None:
    """Raise EngineError, saying what differs, unless this is the model that was asked for."""
    own = identity(checkpoint)
    different = next((what for what in own if own[what] != expected.get(what)), None)
    if different is not None:
        raise EngineError(
            f"{checkpoint.name} is another model here than at the engine: {different} differ",
            hint="copy the same folder to every machine",
        )


def _digest(said: Any) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
