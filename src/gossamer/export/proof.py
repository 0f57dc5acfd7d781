"""Is what was written what was meant? Every weight read back by other code, and greedy tokens of the engine itself.

An engine computes in its own dtype, so its tokens may differ from ours where two logits lie near each other. They are
therefore judged one by one: our model, in float32, sees the engine's own answer, and each token must be one that our
model finds as likely as its favourite, within GAP.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint, Tokenizer
from ..checkpoint.load import load_decoder
from ..errors import ProofFailed
from ..formats import Dense, Format
from .base import MISTAKE, Export, Progress, Reader
from .engines import Answers

MISPLACED = 0.5
"""Root mean square error over root mean square of a rounded tensor: rounding to two bits stays below, noise is at 1."""
GAP = 0.25
"""Standard deviations of the logits that an engine's token may lie below our favourite."""
PROMPTS = (
    "The capital of France is",
    "Water boils at a lower temperature in the mountains because",
    "def fibonacci(n):\n    if n < 2:\n        return",
)
ANSWER = 16
"""Tokens that an engine answers to each prompt."""
MISREAD = "it reads the model wrongly, or computes too roughly to tell: try another version of it"


def read_back(export: Export, reader: Reader, progress: Progress) -> dict[str, Any]:
    """Compare every tensor with ours. Raises ProofFailed naming the first that is not what it must be."""
    checkpoint = export.checkpoint
    worst, where, names = 0.0, None, checkpoint.names()
    for done, name in enumerate(names):
        progress("verifying", done, len(names))
        error = _error(export, name, checkpoint.tensor(name), reader.weight(name))
        if error > worst:
            worst, where = error, name
    progress("verifying", len(names), len(names))
    return {
        "reader": reader.name,
        "tensors": len(names),
        "exact": len(names) - len(export.rounded),
        "max_abs_error": worst,
        "max_abs_error_at": where,
        "bits_per_weight": reader.nbytes * 8 / checkpoint.parameters(),
    }


def _error(export: Export, name: str, ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest error of a tensor. Raises ProofFailed if it is not exact and was not meant to be rounded."""
    if ours.shape != theirs.shape:
        raise ProofFailed(
            f"{export.target}: {name} {list(ours.shape)} was read back as {list(theirs.shape)}", hint=MISTAKE
        )
    if export.same(name, ours, theirs):
        return 0.0
    off = ours - theirs
    share = float(off.norm() / ours.norm())
    if name not in export.rounded or not share < MISPLACED:
        raise ProofFailed(
            f"{export.target}: {name} was read back with errors up to {float(off.abs().max()):.3g} "
            f"({share:.2%} of its size), and must be {'near' if name in export.rounded else 'the same'}",
            hint=MISTAKE,
        )
    return float(off.abs().max())


class ReadBack(Checkpoint):
    """What was written as a checkpoint, so that it can be run here."""

    def __init__(self, checkpoint: Checkpoint, reader: Reader) -> None:
        self.name, self.path, self.dtype = checkpoint.name, checkpoint.path, torch.float32
        self.config, self.hf_config = checkpoint.config, checkpoint.hf_config
        self._shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
        self._original, self._reader = checkpoint, reader

    def format(self, name: str) -> Format:
        return Dense(torch.float32)

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        return {"weight": self._reader.weight(name)}

    def _make_tokenizer(self) -> Tokenizer:
        return self._original.tokenizer()

    def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._reader.weight(name)[start:stop]

    def _files(self) -> list[Path]:
        return []

    def _contents(self) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
        return iter(())


def prompts_of(checkpoint: Checkpoint) -> list[list[int]]:
    """Token ids of PROMPTS."""
    tokenizer = checkpoint.tokenizer()
    return [tokenizer.encode(text) for text in PROMPTS]


def judge(written: Checkpoint, prompts: Sequence[Sequence[int]], answers: Answers) -> dict[str, Any]:
    """Compare an engine's greedy answers with our logits. Raises ProofFailed if a token is none of ours."""
    if len(answers.tokens) != len(prompts):
        raise ProofFailed(f"{answers.engine} answered {len(answers.tokens)} of {len(prompts)} prompts", hint=MISREAD)
    decoder, ends = load_decoder(written), torch.tensor(sorted(written.tokenizer().eos_ids))
    agreed, gaps = 0, []
    for prompt, answer in zip(prompts, answers.tokens, strict=True):
        if not answer or not all(0 <= token < written.config.vocab_size for token in answer):
            raise ProofFailed(
                f"{answers.engine} answered {str(answer)[:80]}, which are no tokens of the model", hint=MISREAD
            )
        logits = decoder(torch.tensor([[*prompt, *answer[:-1]]]))[0, len(prompt) - 1 :]
        best = _favourites(logits, answer, ends)
        chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        agreed += int((best == chosen).sum())
        gaps += ((best - chosen) / logits.std(-1)).tolist()
    worst = float(torch.tensor(gaps).max())  # not a number if one is not
    if not worst <= GAP:
        raise ProofFailed(
            f"{answers.engine} gave a token {worst:.2f} standard deviations of the logits below ours, over {GAP}",
            hint=MISREAD,
        )
    total = len(list(itertools.chain(*answers.tokens)))
    return {"engine": answers.engine, "tokens": total, "agree": agreed, "max_gap": worst}


def _favourites(logits: torch.Tensor, answer: Sequence[int], ends: torch.Tensor) -> torch.Tensor:
    """Our largest logits [tokens]: engines are told not to end, which some obey by never giving a token that would."""
    without_ends = logits.index_fill(1, ends, -torch.inf).max(-1).values
    return torch.where(torch.isin(torch.tensor(answer), ends), logits.max(-1).values, without_ends)
