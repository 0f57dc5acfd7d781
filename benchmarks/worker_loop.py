"""The loop of a benchmark worker: a model is loaded once, then answers timed requests, one JSON line each.

    {"op": "prefill", "batch": 1, "prompt": 512, "output": 0, "depth": 0}
    {"op": "decode", "batch": 16, "prompt": 32, "output": 64, "depth": 0}

`prefill` times prompts of `prompt` tokens up to the first token after them; `decode` times `output` tokens for each
sequence behind `depth + prompt` tokens. Each warms up before its clock starts. Needs nothing but the standard library:
peers run it in environments of their own.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """One timed piece of work; all counts are tokens, for each sequence of the batch."""

    op: str
    batch: int
    prompt: int
    output: int
    depth: int

    @property
    def context(self) -> int:
        """Tokens of a sequence before the first that is timed in decoding, or all of a prompt."""
        return self.depth + self.prompt

    @property
    def tokens(self) -> int:
        """Tokens that are timed."""
        return self.batch * (self.prompt if self.op == "prefill" else self.output)


_turns = itertools.count()


def prompts(request: Request, vocab: int) -> list[list[int]]:
    """Token ids of every sequence, others at each call: a peer that remembers prefixes must compute them too."""
    draw = random.Random(next(_turns))
    return [[draw.randrange(vocab // 8, vocab) for _ in range(request.context)] for _ in range(request.batch)]


def serve(load: Callable[[], tuple[Callable[[Request], float], dict[str, Any]]]) -> None:
    """`load` gives what answers a request with its seconds, and facts about the model; then requests until the end."""
    _end_with_parent()
    # What a library prints must not stand between the answers: its standard output becomes standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    seconds_of, facts = load()
    print(json.dumps({"ready": True, **facts}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(seconds_of, Request(**json.loads(line)))), file=answers, flush=True)


def _end_with_parent() -> None:
    """A child that is stopped would never see that its parent has been killed: let the system kill it (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _answer(seconds_of: Callable[[Request], float], request: Request) -> dict[str, Any]:
    try:
        seconds = seconds_of(request)
    except Exception as error:  # a request that fails is a row that failed, and the others go on
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return {"seconds": seconds, "tokens_per_second": request.tokens / seconds}
