"""Does a model stay what it is over hours: `gossamer soak`.

Before and after, every position of the context is judged on a text: perplexity, and divergence from a reference, by
how far into the context they are. Between the two, rounds go by for as long as asked. A round is a conversation: pieces
of the text and answers that the model draws take turns, each with all that was said before, which is in the cache,
until the context is full. After each round the very same probe is answered again. Numbers that a healthy engine repeats
are compared with those of the beginning:

    probe       its tokens, and their log-probabilities
    positions   the negative log-likelihood of each token of the text

NaN, infinity, an engine that stops, and a difference above the bound are findings. Knows no process and no record.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import open_checkpoint
from ..engine.backend import Activations, Backend, BackendName, Batch, Weights, blocks_for
from ..engine.llm import LLM
from ..engine.params import SamplingParams
from ..engine.runner import KVPool
from ..errors import EngineError, MeasureError
from .corpus import check_contamination, load_corpus
from .jobs import engine_facts, loading
from .plans import LARGEST_NLL, SoakPlan
from .quality import divergence
from .records import model_block
from .worker import Channel, Progress

CHUNK = 64
"""Positions whose logits [CHUNK, vocab_size] are held at once."""
PARTS = 16
"""Into which the context is cut, for figures by position."""
PROBE_TOKENS, PROBE_ANSWER, PROBE_LIKELIEST = 128, 16, 5
BOUNDS = {"cpu": 0.0, "reference": 1e-3}
"""Nats by which a repeated number may differ: the cpu backend adds in one order whatever is cached, torch does not."""
MOST_FINDINGS = 20
FAR = 1e9
"""How far a number has moved that is none any more."""


@dataclass
class _Positions:
    """One pass over the text: [windows, context - 1]; NaN where the logits were not finite."""

    nll: Tensor
    kld: Tensor | None


@dataclass
class _Sums:
    """What was generated, by part of the context."""

    nll: list[float] = field(default_factory=lambda: [0.0] * PARTS)
    tokens: list[int] = field(default_factory=lambda: [0] * PARTS)


class Soak:
    """One session of a model. `ids`: tokens of the text. Raises MeasureError where they do not fill the windows."""

    def __init__(
        self,
        llm: LLM,
        reference: Backend | None,
        ids: list[int],
        plan: SoakPlan,
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.llm, self.reference, self.ids, self.plan = llm, reference, ids, plan
        self.context = plan.check(llm.config.max_positions, len(ids))
        self.bound = BOUNDS[llm.backend.name] if plan.bound is None else plan.bound
        self.findings: list[dict[str, Any]] = []
        self.rounds = self.probes = 0
        self.probe_drift = self.position_drift = 0.0
        self.complete = self.broken = False
        self._sums = _Sums()
        self._before: _Positions | None = None
        self._progress, self._clock, self._began = progress, clock, clock()
        self._talking_since = self._began

    def run(self) -> Iterator[dict[str, Any]]:
        """The results so far: once before the first round, after each, and at the end."""
        self._before = self._judge("judging before")
        first = self._probe()
        yield self.results()
        self._talking_since = self._clock()
        while not self._over():
            self._converse()
            self._compare(first, self._probe())
            self.rounds += 1
            yield self.results()
        self._compare_positions(self._judge("judging after"))
        self.complete = True
        yield self.results()

    def results(self) -> dict[str, Any]:
        """All that is known by now, as JSON has it."""
        stats = self.llm.engine.stats()
        return {
            "sound": not self.findings,
            "complete": self.complete,
            "findings": self.findings[:MOST_FINDINGS],
            "findings_count": len(self.findings),
            "context": self.context,
            "rounds": self.rounds,
            "seconds": self._clock() - self._began,
            "generated_tokens": sum(self._sums.tokens),
            "cached_prompt_tokens": stats.prefix_hits,
            "probes": self.probes,
            "bound": self.bound,
            "probe_drift": self.probe_drift,
            "position_drift": self.position_drift if self.complete else None,
            "positions": self._by_position(),
        }

    # --- what is done ------------------------------------------------------------------------------------------------

    def _converse(self) -> None:
        """One conversation up to the end of the context, or of the time."""
        dice = random.Random(f"{self.plan.seed} {self.rounds}")
        said: list[int] = []
        while len(said) + 2 * self.plan.turn <= self.context and not self._over():
            start = dice.randrange(len(self.ids) - self.plan.turn)
            said += self.ids[start : start + self.plan.turn]
            said += self._answer(said, dice.randrange(1 << 31))
            self._tell("soaking")

    def _answer(self, said: list[int], seed: int) -> list[int]:
        params = SamplingParams(
            max_tokens=self.plan.turn, temperature=1.0, seed=seed, ignore_eos=True, logprobs=0, skip_special=False
        )
        tokens, chances = self._generate(said, params)
        for position, chance in enumerate(chances, len(said)):
            part = position * PARTS // self.context
            self._sums.nll[part] -= chance[0]
            self._sums.tokens[part] += 1
        return tokens

    def _probe(self) -> tuple[list[int], list[list[float]]]:
        """The answer to the probe, greedily: tokens, and for each its log-probability and those of the likeliest."""
        length = min(PROBE_TOKENS, self.context - PROBE_ANSWER)
        params = SamplingParams(max_tokens=PROBE_ANSWER, ignore_eos=True, logprobs=PROBE_LIKELIEST)
        self.probes += 1
        return self._generate(self.ids[:length], params)

    def _generate(self, tokens: list[int], params: SamplingParams) -> tuple[list[int], list[list[float]]]:
        """Nothing, and a finding, where the engine gives up: the session ends then."""
        if self.broken:
            return [], []
        try:
            (found,) = self.llm.generate([tokens], params)
        except EngineError as error:
            self.broken = True
            self._find("stopped", f"the engine gave up after {len(tokens)} tokens: {error.message}")
            return [], []
        told = [chance for chance in found.logprobs or () if chance is not None]
        return list(found.tokens), [[chance.logprob, *(p for _, p in chance.top)] for chance in told]

    @torch.inference_mode()
    def _judge(self, label: str) -> _Positions:
        """One pass over all windows, both models side by side."""
        shape = (self.plan.windows, self.context - 1)
        nll = torch.full(shape, math.nan, dtype=torch.float64)
        kld = None if self.reference is None else torch.full(shape, math.nan, dtype=torch.float64)
        truth = None if self.reference is None else KVPool(self.reference)
        for window in range(self.plan.windows):
            ids = self.ids[window * self.context :][: self.context]
            models = [_logits(self.llm.backend, self.llm.pool, ids)]
            models += [] if truth is None else [_logits(truth.backend, truth, ids)]
            done = 0
            for logits, *others in zip(*models, strict=True):
                part = slice(done, done + len(logits))
                self._check_finite(logits, label, done)
                logp = logits.log_softmax(-1)
                targets = torch.tensor(ids[1:][part])[:, None]
                nll[window, part] = -logp.gather(1, targets)[:, 0].double()
                if kld is not None:
                    kld[window, part] = divergence(others[0].log_softmax(-1), logp)
                done += len(logits)
                self._progress(label, window * self.context + done, self.plan.windows * self.context)
        return _Positions(nll, kld)

    # --- what is looked for ------------------------------------------------------------------------------------------

    def _check_finite(self, logits: Tensor, label: str, start: int) -> None:
        """A finding for NaN and one for infinity, with the first position of this chunk that has it."""
        for kind, bad in (("nan", logits.isnan()), ("inf", logits.isinf())):
            rows = bad.any(-1).nonzero()[:, 0].tolist()
            if rows:
                self._find(kind, f"{label}: logits of {len(rows)} of {len(logits)} tokens", start + rows[0])

    def _compare(self, first: tuple[list[int], list[list[float]]], now: tuple[list[int], list[list[float]]]) -> None:
        """The probe's answer with that of the beginning, up to the first other token: what follows has another context.

        Within a bound a near tie may be decided otherwise; without one nothing may.
        """
        if self.broken:
            return
        other = next((i for i, (a, b) in enumerate(zip(first[0], now[0], strict=True)) if a != b), None)
        read = slice(None if other is None else other + 1)
        moved = _moved(torch.tensor(first[1][read]), torch.tensor(now[1][read]))
        self.probe_drift = max(self.probe_drift, moved)
        if moved > self.bound or (other is not None and self.bound == 0):
            token = "" if other is None else f", and token {other} of its answer is another"
            said = f"moved by {moved:.3g}, the bound is {self.bound:g}{token}"
            self._find("drift", f"the probe's log-probabilities {said}")

    def _compare_positions(self, after: _Positions) -> None:
        """Each token of the text with what it was before."""
        assert self._before is not None
        by_position = zip(self._before.nll.unbind(1), after.nll.unbind(1), strict=True)
        moved = [_moved(before, now) for before, now in by_position]
        self.position_drift = max(moved)
        if self.position_drift > self.bound:
            where = next(i for i, drift in enumerate(moved) if drift > self.bound)
            said = f"moved by {self.position_drift:.3g}, the bound is {self.bound:g}"
            self._find("drift", f"the text's log-likelihoods {said}", where)

    def _find(self, kind: str, detail: str, position: int | None = None) -> None:
        where = {"round": self.rounds, "seconds": round(self._clock() - self._began, 3), "position": position}
        self.findings.append({"kind": kind, "detail": detail, **where})

    # --- what is told ------------------------------------------------------------------------------------------------

    def _by_position(self) -> list[dict[str, Any]]:
        """A row for each part of the context: of the text before the first round, and of what was generated since."""
        assert self._before is not None
        rows = []
        for part in range(PARTS):
            start, stop = (self.context * edge // PARTS for edge in (part, part + 1))
            text = _mean(self._before.nll[:, start:stop])
            tokens = self._sums.tokens[part]
            rows.append(
                {
                    "from": start,
                    "to": stop,
                    "nll": text,
                    "perplexity": None if text is None or text > LARGEST_NLL else math.exp(text),
                    "kld": None if self._before.kld is None else _mean(self._before.kld[:, start:stop]),
                    "generated_tokens": tokens,
                    "generated_nll": self._sums.nll[part] / tokens if tokens else None,
                }
            )
        return rows

    def _over(self) -> bool:
        late = self._clock() - self._talking_since >= self.plan.minutes * 60
        return self.broken or late or (self.plan.rounds is not None and self.rounds >= self.plan.rounds)

    def _tell(self, label: str) -> None:
        seconds = math.ceil(self.plan.minutes * 60)
        self._progress(label, min(int(self._clock() - self._talking_since), seconds), seconds)


def _logits(backend: Backend, pool: KVPool, ids: list[int]) -> Iterator[Tensor]:
    """Logits [up to CHUNK, vocab_size] after every token but the last, in order."""
    blocks = pool.take(blocks_for(len(ids)))
    table = np.array([blocks], np.int32)
    try:
        for start in range(0, len(ids) - 1, CHUNK):
            tokens = np.array(ids[start : min(start + CHUNK, len(ids) - 1)], np.int32)
            ends = np.array([0, len(tokens)], np.int32), np.array([start + len(tokens)], np.int32)
            yield backend.forward(Batch(tokens, *ends, table, np.arange(len(tokens), dtype=np.int32)))
    finally:
        pool.give(blocks)


def _moved(before: Tensor, now: Tensor) -> float:
    """The largest difference of two tensors; what is not a number in both has not moved, in one it has gone far."""
    same = (before == now) | (before.isnan() & now.isnan())
    moved = (before - now).abs().masked_fill(same, 0.0).nan_to_num(FAR, FAR)
    return float(moved.max()) if len(moved) else 0.0


def _mean(values: Tensor) -> float | None:
    """Of those that are finite; None where none is."""
    known = values[values.isfinite()]
    return float(known.mean()) if len(known) else None


def soak_model(
    channel: Channel,
    model: str,
    reference: str | None,
    corpus: str,
    plan: dict[str, Any],
    weights: Weights,
    backend: BackendName = "auto",
    activations: Activations = "auto",
    kv_cache: str = "auto",
) -> Iterator[dict[str, Any]]:
    """A session as a worker's job: the results so far, for each value asked for."""
    checkpoint = open_checkpoint(model)
    channel.fact("model", model_block(checkpoint))
    text = load_corpus(corpus)
    llm = LLM(
        checkpoint,
        weights,
        backend=backend,
        activations=activations,
        kv_cache=kv_cache,
        max_batch=1,
        progress=loading(channel, checkpoint),
    )
    channel.fact("engine", engine_facts(llm.backend))
    ids = llm.tokenizer.encode(text.text)
    check_contamination(text, checkpoint.manifest, model)
    load = partial(LLM, weights=weights, backend=backend, max_batch=1)
    truth = None if reference is None else _reference(channel, reference, llm, ids, text.text, load)
    yield from Soak(llm, truth, ids, SoakPlan(**plan), channel.progress).run()


def _reference(channel: Channel, name: str, llm: LLM, ids: list[int], text: str, load: Callable[..., LLM]) -> Backend:
    """What a session is compared with. Raises MeasureError unless it has the model's tokens."""
    checkpoint = open_checkpoint(name)
    channel.fact("reference_fingerprint", checkpoint.fingerprint())
    if checkpoint.config.vocab_size != llm.config.vocab_size or checkpoint.tokenizer().encode(text) != ids:
        raise MeasureError(f"{name} has other tokens than {llm.checkpoint.name}", hint="leave --reference away")
    return load(checkpoint, progress=loading(channel, checkpoint)).backend
