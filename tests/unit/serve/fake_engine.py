"""The engine of `fake_server.py`: it counts, but says what it is told to say. Only its worker loads it, and torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fake_server import make_tokenizer

from gossamer.engine.engine import Engine, EngineOptions
from gossamer.engine.fake import FakeBackend, fake_config

SAYING = re.compile(r"say:(.*)\n> (.*)", re.DOTALL)


class TalkingBackend(FakeBackend):
    """Counts, but says what it is told to say."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._tokenizer = make_tokenizer()
        self._contexts: list[str] = []

    def forward(self, batch: Any) -> torch.Tensor:
        self._contexts = []
        logits = super().forward(batch)
        for row, at in enumerate(batch.logit_rows):
            sequence = int(np.searchsorted(batch.query_start, at, side="right")) - 1
            behind = int(batch.query_start[sequence + 1]) - 1 - int(at)
            context = self._contexts[sequence]
            self._say(logits[row], context[: len(context) - behind])
        return logits

    def _check_context(self, sequence: int, tokens: Any) -> None:
        self._contexts.append("".join(self._tokenizer.decode([int(t)], skip_special=False) for t in tokens))

    def _say(self, logits: torch.Tensor, context: str) -> None:
        if "boom:" in context:
            raise RuntimeError("the fake engine was told to break")
        if "nan:" in context:
            logits[:] = torch.nan
        found = SAYING.search(context)
        if found is None or not found[1].partition("\n")[0].startswith(found[2]):
            return
        line = found[1].partition("\n")[0]
        after = line[len(found[2]) : len(found[2]) + 1]
        token = self._tokenizer.token_id(after) if after else min(self._tokenizer.eos_ids)
        assert token is not None
        logits[token] = 20.0


def make_engine(
    delay: float, token_delay: float, context: int, options: dict[str, Any], fail: str | None = None
) -> Engine:
    """The factory of the worker; `fail`: a file whose presence makes it fail."""
    if fail is not None and Path(fail).exists():
        raise RuntimeError("there is nothing to load")
    backend = TalkingBackend(config=fake_config(max_positions=context), delay=delay, token_delay=token_delay)
    return Engine(backend, make_tokenizer(), EngineOptions(**options))
