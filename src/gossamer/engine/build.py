"""From the name of a model to an engine that serves it, with a drafter if one is asked for. Knows no HTTP."""

from __future__ import annotations

import logging

import torch

from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import EngineError
from ..settings import threads
from .backend import Activations, Backend, BackendName, Progress, Weights, choose
from .engine import Engine, EngineOptions
from .sharded.nodes import Nodes
from .speculative import Drafter, Speculator

DRAFTERS = {
    "ngram": "what followed the last time that the same tokens stood there",
    "self": "the model itself, rounded to 4 bits as it is loaded",
}
"""Names of drafters that are no model; any other name is one."""

logger = logging.getLogger("gossamer.engine")


def build_engine(
    model: str | Checkpoint,
    options: EngineOptions | None = None,
    *,
    backend: BackendName = "auto",
    weights: Weights = "stored",
    activations: Activations = "auto",
    kv_cache: str = "auto",
    draft: str | None = None,
    max_drafts: int | None = None,
    adaptive: bool = True,
    progress: Progress | None = None,
    tp: int = 1,
    pp: int = 1,
    nodes: Nodes | None = None,
) -> Engine:
    """Load a model, and what guesses for it: `draft` is `ngram`, `self`, or another model's name.

    `tp`, `pp`, `nodes`: as `choose` takes them; `max_drafts`: most tokens to guess at once; `adaptive`: no guesses
    while they would be slower. Raises CheckpointError, DoesNotFit, EngineError.
    """
    torch.set_num_threads(threads())
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    target = choose(checkpoint, backend, weights, activations, kv_cache, progress, tp, pp, nodes)
    engine = Engine(target, checkpoint.tokenizer(), options or EngineOptions())
    if draft is not None:
        drafter = _drafter(draft, checkpoint, engine, activations, kv_cache, progress)
        engine.speculator = Speculator(drafter, max_drafts, adaptive)
    return engine


def _drafter(
    name: str,
    checkpoint: Checkpoint,
    engine: Engine,
    activations: Activations,
    kv_cache: str,
    progress: Progress | None,
) -> Drafter:
    """What guesses. Raises EngineError for a model with another vocabulary."""
    if name == "ngram":
        from .speculative.ngram import NgramDrafter

        return NgramDrafter()
    from .speculative.draft_model import DraftModel

    draft: Checkpoint
    if name == "self":
        from .speculative.rounded import RoundedCheckpoint

        draft = RoundedCheckpoint(checkpoint)
    else:
        draft = open_checkpoint(name)
        _require_same_vocabulary(checkpoint, draft)
    loaded: Backend = choose(
        draft, "auto", "stored", "auto" if activations == "int8" else activations, kv_cache, progress
    )
    return DraftModel(loaded, engine.blocks.num_blocks)


def _require_same_vocabulary(target: Checkpoint, draft: Checkpoint) -> None:
    """Raise EngineError unless every token means the same to both."""
    first, second = target.tokenizer(), draft.tokenizer()
    sizes = target.config.vocab_size, draft.config.vocab_size
    different = next((i for i in range(min(sizes)) if first.token(i) != second.token(i)), None)
    if sizes[0] != sizes[1] or different is not None:
        what = f"{sizes[0]:,} and {sizes[1]:,} tokens" if different is None else f"token {different} differs"
        raise EngineError(
            f"{draft.name} cannot draft for {target.name}: their vocabularies are not the same ({what})",
            hint="a compressed form of the same model can; so can ngram and self",
        )
