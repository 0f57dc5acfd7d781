"""From the logits of a step to its tokens: what each request asks for, row by row, then one draw for all of them.

A row's result depends on its request alone: on its params, its seed, its tokens so far and where in its answer it is.
Neither the batch nor drafts change it, so that what speculation accepts is what would have been drawn anyway. Knows no
schedule and no cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .draw import sample_rows
from .params import SamplingParams
from .sequence import TokenLogprobs


class Sampler:
    """What one completion's params do to its logits; `matcher` is the state of its grammar, if it has one."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], seed: int, matcher: Any = None) -> None:
        self.params, self.seed, self.matcher = params, seed, matcher
        self._prompt = sorted(set(prompt)) if params.repetition_penalty != 1.0 else []

    def adjust(self, logits: Tensor, generated: Sequence[int], drafts: Sequence[int], ends: Iterable[int]) -> None:
        """Change logits float32 [vocab_size] in place, for the token after `generated` and then `drafts`."""
        params, history = self.params, [*generated, *drafts]
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*self._prompt, *history}), dtype=torch.int64)
            values, penalty = logits[seen], params.repetition_penalty
            logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if history and (params.presence_penalty or params.frequency_penalty):
            tokens, counts = torch.unique(torch.tensor(history, dtype=torch.int64), return_counts=True)
            logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts
        if params.logit_bias:
            tokens = torch.tensor([token for token, _ in params.logit_bias], dtype=torch.int64)
            logits[tokens] += torch.tensor([bias for _, bias in params.logit_bias])
        if self.matcher is not None:
            matcher = self.matcher.copy() if drafts else self.matcher
            for token in drafts:
                matcher.accept(token)
            matcher.mask(logits)
        if len(history) < params.min_tokens:
            ids = torch.tensor(list(ends), dtype=torch.int64)
            before = logits[ids]
            logits[ids] = -torch.inf
            if self.matcher is not None and logits.amax() == -torch.inf:
                logits[ids] = before  # its grammar is complete: there is nothing else to say

    @property
    def adjusts(self) -> bool:
        """True if `adjust` may change anything, whatever the history."""
        p = self.params
        return bool(
            p.repetition_penalty != 1.0
            or p.presence_penalty
            or p.frequency_penalty
            or p.logit_bias
            or p.min_tokens
            or self.matcher is not None
        )

    def accept(self, token: int) -> None:
        """A token was drawn."""
        if self.matcher is not None and not self.matcher.finished:
            self.matcher.accept(token)


def draw_rows(logits: Tensor, samplers: Sequence[Sampler], positions: Sequence[int]) -> list[int]:
    """A token for each row of adjusted logits [rows, vocab_size], at these positions of their answers."""
    tokens: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.params.greedy]
    if drawn:
        params = [samplers[row].params for row in drawn]
        found = sample_rows(
            logits if len(drawn) == len(tokens) else logits[drawn],
            [p.temperature for p in params],
            [p.top_k for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            [samplers[row].seed for row in drawn],
            [positions[row] for row in drawn],
        )
        for row, token in zip(drawn, found.tolist(), strict=True):
            tokens[row] = token
    return tokens


def finite_rows(logits: Tensor) -> list[bool]:
    """For each row of logits [rows, vocab_size], whether it has a likeliest token."""
    found: list[bool] = logits.amax(-1).isfinite().tolist()  # NaN and +inf both reach the maximum
    return found


def token_logprobs(logprobs: Tensor, token: int, count: int) -> TokenLogprobs:
    """Of a token, and of the `count` likeliest, in log-probabilities [vocab_size]."""
    top: tuple[tuple[int, float], ...] = ()
    if count:
        values, ids = logprobs.topk(min(count, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(float(logprobs[token]), top)
