"""How well a model predicts a text, and how far it has moved from the model it was made from.

Windows of `context` tokens start every `stride` tokens; the last `scored` tokens of each are predicted from all that
stand before them in the window; an incomplete last window is dropped. The text is tokenized once, as a whole, with what
special tokens the tokenizer adds by itself. Per scored token, over the whole vocabulary,
in float32 with sums in float64 (`scores.py`):

    perplexity        exp of the mean negative log-likelihood of the token that is there
    KL divergence     sum p_reference * (log p_reference - log p_model), mean and 99th percentile
    top-1 agreement   share of tokens where both models think the same token likeliest
    activation KLD    mean KL divergence from the same weights with exact activations, where the backend rounds them

Knows backends and token ids; knows no files, tokenizers or processes. At most CHUNK rows of logits exist at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..engine import runner
from ..engine.backend import Backend, Batch, blocks_for
from ..errors import MeasureError
from .plans import WindowPlan
from .scores import Quality, Scores

CHUNK = 64
"""Positions whose logits [CHUNK, vocab_size] are held at once."""


def evaluate(
    models: Sequence[Backend],
    reference: Backend | None,
    tokens: Tensor,
    plan: WindowPlan,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Quality | MeasureError]:
    """Judge models on tokens [n] beside one reference, whose forward pass is computed once for all of them.

    A model that yields NaN or infinity gives a MeasureError in its place and the others go on; a reference that does,
    or a text shorter than one window, raises it. A model that *is* the reference is computed once. What the backends
    have cached is lost. Raises DoesNotFit if a window does not fit their caches.
    """
    scored = score(models, reference, tokens, plan, slice(None), progress)
    return [scores.quality() if isinstance(scores, Scores) else scores for scores in scored]


def score(
    models: Sequence[Backend],
    reference: Backend | None,
    tokens: Tensor,
    plan: WindowPlan,
    windows: slice,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Scores | MeasureError]:
    """What `evaluate` judges by, of some of the windows: those of one do not depend on any other."""
    plan.check(len(tokens))
    starts = plan.starts(len(tokens))[windows]
    for backend in dict.fromkeys([*models, *([] if reference is None else [reference])]):
        backend.reserve(blocks_for(plan.context))
    anchor = None if reference is None else _Scorer(reference)
    scorers = [anchor if anchor is not None and model is reference else _Scorer(model) for model in models]
    for done, start in enumerate(starts):
        _score_window(scorers, anchor, tokens[start : start + plan.context], plan.scored)
        progress(done + 1, len(starts))
    return [scorer.scores if scorer.error is None else scorer.error for scorer in scorers]


class _Scorer:
    """One model, and what it scored so far."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.scores = Scores()
        self.error: MeasureError | None = None
        self.states = torch.empty(0)
        self.exact_states: Tensor | None = None
        """The same with exact activations, where the backend rounds them."""

    def read(self, window: Tensor, scored: int) -> None:
        """Run the blocks over a window [context]; keep the states [scored, hidden_size] of the positions to score."""
        began = time.perf_counter()
        self.states = hidden_states(self.backend, window, scored)
        self.scores.seconds += time.perf_counter() - began
        self.scores.tokens_read += len(window)
        if self.backend.activations == "int8":
            with _exact_activations(self.backend):
                self.exact_states = hidden_states(self.backend, window, scored)

    def predict(self, rows: slice) -> Tensor:
        """Log-probabilities [rows, vocab_size] of the window that was read."""
        began = time.perf_counter()
        logp = log_probabilities(self.backend, self.states[rows])
        self.scores.seconds += time.perf_counter() - began
        return logp

    def add(self, logp: Tensor, truth: Tensor | None, targets: Tensor) -> None:
        """Score log-probabilities [rows, vocab_size] against targets [rows] and against the reference's, if any."""
        self.scores.nll += (-logp.gather(1, targets.unsqueeze(1)).squeeze(1)).tolist()
        if truth is not None:
            self.scores.kld += divergence(truth, logp).tolist()
            self.scores.agreed += (logp.argmax(-1) == truth.argmax(-1)).tolist()

    def add_exact(self, logp: Tensor, rows: slice) -> None:
        """Score the same rows against those of exact activations, if there are such."""
        if self.exact_states is not None:
            with _exact_activations(self.backend):
                exact = log_probabilities(self.backend, self.exact_states[rows])
            self.scores.activation_kld += divergence(exact, logp).tolist()


@torch.inference_mode()
def _score_window(scorers: Sequence[_Scorer], anchor: _Scorer | None, window: Tensor, scored: int) -> None:
    """Add one window [context] to all scorers, side by side, CHUNK scored positions at a time."""
    targets = window[-scored:]
    going = list(dict.fromkeys(scorer for scorer in scorers if scorer.error is None))
    for scorer in going if anchor is None or anchor in going else [anchor, *going]:
        scorer.read(window, scored)
    for rows in (slice(i, i + CHUNK) for i in range(0, scored, CHUNK)):
        truth = None if anchor is None else anchor.predict(rows)
        for scorer in going:
            if scorer.error is not None:
                continue
            try:
                logp = truth if scorer is anchor and truth is not None else scorer.predict(rows)
                scorer.add(logp, truth, targets[rows])
                scorer.add_exact(logp, rows)
            except MeasureError as error:
                scorer.error = error


def hidden_states(backend: Backend, window: Tensor, scored: int) -> Tensor:
    """Hidden states [scored, hidden_size] from which the last `scored` tokens of window [context] are predicted.

    The window is read into the backend's first blocks, in the chunks in which the engine reads prompts.
    """
    tokens = window.numpy().astype(np.int32)
    table = np.arange(blocks_for(len(tokens)), dtype=np.int32)[None]
    first = len(tokens) - scored - 1  # the position from which the first scored token is predicted
    parts = []
    for start in range(0, len(tokens), runner.CHUNK):
        stop = min(start + runner.CHUNK, len(tokens))
        rows = np.arange(max(first, start), min(stop, len(tokens) - 1), dtype=np.int32) - start
        ends = np.array([0, stop - start], np.int32), np.array([stop], np.int32)
        parts.append(backend.hidden(Batch(tokens[start:stop], *ends, table, rows)))
    return torch.cat(parts)


def log_probabilities(backend: Backend, states: Tensor) -> Tensor:
    """Log-probabilities float32 [rows, vocab_size] from states [rows, hidden_size]. Raises MeasureError on NaN."""
    logits = backend.head(states)
    if not torch.isfinite(logits).all():
        raise MeasureError("the model's logits are not finite: NaN or infinity")
    return logits.log_softmax(-1)


def divergence(truth: Tensor, logp: Tensor) -> Tensor:
    """KL divergence float64 [rows] of log-probabilities [rows, vocab_size] from the true ones."""
    return (truth.exp() * (truth - logp)).sum(-1, dtype=torch.float64)


@contextmanager
def _exact_activations(backend: Backend) -> Iterator[None]:
    """The backend with exact activations, for as long as this lasts."""
    before = backend.activations
    backend.activations = "exact"
    try:
        yield
    finally:
        backend.activations = before
