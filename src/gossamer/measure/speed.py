"""How fast a model reads and writes, and what memory that takes, in this process.

One run: `batch` prompts of `prompt_tokens` ordinary tokens are read together (its end is the time to first token),
then each is continued greedily, end tokens ignored, to `output_tokens`. Every run has prompts of its own, from a seed,
so that nothing remembered of an earlier run helps a later one. Prompts are read in the chunks that the engine makes of
them. The KV cache is reserved inside the timed part; like the engine's, it stays for the next run.

    prefill tokens/s = batch * prompt_tokens / time to first token
    decode tokens/s  = batch * (output_tokens - 1) / time from the first token to the last

Knows the engine; knows no rounds, no other models and no records.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import torch

from .. import settings
from ..checkpoint import Tokenizer
from ..engine import LLM
from ..engine.reference import ReferenceBackend
from ..engine.runner import KVPool, Rows
from ..model.config import LayerConfig, ModelConfig, Rope
from ..model.decoder import Decoder
from .memory import read_usage
from .plans import SpeedPlan
from .timing import Timing

ORDINARY_TEXT = 100_000
"""Characters of text whose tokens prompts are made of."""
PAGE_NOISE = 4 << 20
"""Bytes of growth that RSS may show for reasons of its own: thread buffers, heap pages, scratch space."""


def warm_libraries() -> None:
    """Load and run a model of no size, so that what libraries import and allocate at first use is not the model's."""
    torch.set_num_threads(settings.threads())
    config = ModelConfig("llama", 8, 8, (LayerConfig(1, 1, 8, 8),), 1e-5, Rope(), "silu", True, 8)
    with torch.device("meta"):
        Decoder(config)
    with Rows(KVPool(ReferenceBackend(Decoder(config))), [[0, 1]], [3]) as rows:
        _continue(rows, 2)


def ordinary_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Sorted distinct token ids that occur in a text: no special token, and none that was never trained."""
    return sorted(set(tokenizer.encode(text[:ORDINARY_TEXT], special=False)))


def make_prompts(ordinary: Sequence[int], plan: SpeedPlan, seed: int) -> list[list[int]]:
    """Token ids [batch][prompt_tokens], the same for the same seed."""
    draw = random.Random(seed)
    return [draw.choices(ordinary, k=plan.prompt_tokens) for _ in range(plan.batch)]


def time_run(llm: LLM, prompts: Sequence[Sequence[int]], plan: SpeedPlan) -> Timing:
    """One run on the clock."""
    began = time.perf_counter()
    with _rows(llm, prompts, plan) as rows:
        first = _continue(rows, plan.output_tokens)
        return Timing(first - began, time.perf_counter() - first)


def kv_bytes_per_token(llm: LLM, prompts: Sequence[Sequence[int]], plan: SpeedPlan) -> tuple[int, str]:
    """Bytes of KV cache for each token of context, and where the number is from: "measured" or "computed".

    Measured: growth of RSS from before a run to its end, its cache still alive, over the tokens in it. Where that
    drowns in the noise of the process, or the backend keeps its memory, the size is the one that the backend states.
    """
    llm.pool.release()
    before = read_usage(settle=True).rss
    with _rows(llm, prompts, plan) as rows:
        _continue(rows, plan.output_tokens)
        growth = read_usage(settle=True).rss - before
        held = sum(rows.lengths)
    if growth < PAGE_NOISE:
        return round(llm.backend.kv_bytes_per_token), "computed"
    return round(growth / held), "measured"


def _rows(llm: LLM, prompts: Sequence[Sequence[int]], plan: SpeedPlan) -> Rows:
    """Rows for one run, nothing of them read yet."""
    return Rows(llm.pool, prompts, [plan.prompt_tokens + plan.output_tokens] * len(prompts))


def _continue(rows: Rows, count: int) -> float:
    """Read the rows and continue each greedily by `count` tokens; the moment at which the first ones were there."""
    tokens = rows.argmax().tolist()
    first = time.perf_counter()
    for _ in range(count - 1):
        rows.append(tokens)
        tokens = rows.argmax().tolist()
    return first
