"""The measurements as a worker process runs them: open, load, measure, answer in plain JSON values.

Each job takes a Channel and JSON-able arguments. What must outlive a crash (which model it was, how it was measured) is
reported as facts before the work that may fail. Knows nothing of the parent, of records' envelopes or of other engines.
"""

from __future__ import annotations

import hashlib
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from .. import settings
from ..checkpoint import Checkpoint, Tokenizer, open_checkpoint
from ..engine import isa_in_use
from ..engine.backend import Activations, Backend, BackendName, Weights, choose, resolve
from ..engine.llm import LLM
from ..engine.sharded.nodes import Nodes
from ..errors import GossamerError, MeasureError
from . import speed
from .corpus import Corpus, check_contamination, load_corpus
from .memory import peak_rss, read_usage
from .plans import SpeedPlan, WindowPlan
from .quality import evaluate, score
from .records import model_block
from .samples import sample_prompts, sample_texts
from .scores import Quality
from .timing import Timing, rates
from .worker import Channel, Progress, describe


def evaluate_models(
    channel: Channel, models: Sequence[str], reference: str | None, samples: int, **asked: Any
) -> list[dict[str, Any]]:
    """Judge models that share one tokenization (all of them the reference's, or a single model's own), side by side.

    `asked`: the arguments of `_judge`. For each model, in order: {"results": {...}} or {"error": {"kind", "message",
    "hint"}}.
    """
    judge = _judge(channel, **asked)
    try:
        anchor = None if reference is None else judge.load_reference(reference)
    except GossamerError as error:
        return [_failure(error)] * len(models)
    answers: list[dict[str, Any]] = [{} for _ in models]
    backends: dict[int, Backend] = {}
    for index, name in enumerate(models):
        try:
            backends[index] = judge.load(index, name)
            judge.check_samples(index, samples)
        except GossamerError as error:
            backends.pop(index, None)
            answers[index] = _failure(error)
    if not backends:
        return answers
    outcomes = evaluate(list(backends.values()), anchor, judge.ids, judge.plan, partial(channel.progress, "judging"))
    for done, (index, outcome) in enumerate(zip(backends, outcomes, strict=True)):
        channel.progress("answering", done, len(backends))
        try:
            answers[index] = _answer(outcome, backends[index], judge.checkpoints[index].tokenizer(), samples)
        except GossamerError as error:
            answers[index] = _failure(error)
    channel.progress("answering", len(backends), len(backends))
    return answers


def examine_model(channel: Channel, model: str, reference: str | None, samples: int, **asked: Any) -> int:
    """How many windows the text has for one model, after every check of `evaluate_models` that needs no weights."""
    judge = _judge(channel, **asked)
    if reference is not None:
        judge.examine_reference(reference)
    judge.examine(0, model)
    judge.check_samples(0, samples)
    return len(judge.plan.starts(len(judge.ids)))


def score_windows(
    channel: Channel, model: str, reference: str | None, samples: int, windows: Sequence[int], **asked: Any
) -> dict[str, Any]:
    """{"scores": the fields of Scores, "samples": answers} of one model, of the windows from the first to the last."""
    judge = _judge(channel, **asked)
    anchor = None if reference is None else judge.load_reference(reference)
    backend = judge.load(0, model)
    (found,) = score([backend], anchor, judge.ids, judge.plan, slice(*windows))
    if isinstance(found, MeasureError):
        raise found
    return {"scores": asdict(found), "samples": sample_texts(backend, judge.checkpoints[0].tokenizer(), samples)}


def _judge(
    channel: Channel,
    corpus: str,
    corpus_sha256: str,
    plan: dict[str, int],
    tokens: int | None,
    weights: Weights,
    backend: BackendName = "auto",
    activations: Activations = "auto",
    kv_cache: str = "auto",
    tp: int = 1,
    pp: int = 1,
    nodes: Sequence[Any] | None = None,
) -> _Judge:
    """Whoever opens and loads models for the text; `nodes`: the fields of Nodes."""
    torch.set_num_threads(settings.threads())
    channel.fact("engine", _expected_engine(backend, weights))
    load = partial(_load, channel, backend, weights, tp, pp, _nodes(nodes))
    text = _unchanged(corpus, corpus_sha256)
    return _Judge(channel, text, WindowPlan(**plan), tokens, load, activations, kv_cache)


def bench_model(
    channel: Channel,
    model: str,
    plan: dict[str, int],
    weights: Weights,
    backend: BackendName = "auto",
    activations: Activations = "auto",
    kv_cache: str = "auto",
    tp: int = 1,
    pp: int = 1,
    nodes: Sequence[Any] | None = None,
) -> Iterator[dict[str, Any] | None]:
    """Load a model, then one run for each value asked for (warm-up runs first), then the results as the last value.

    Memory is read in this order: `bare` with libraries and tokenizer but no weights; then after loading; the peak is
    the process's own, import to end. Ranks (`tp`, `pp`) count too: with the weights that they hold, and their peaks.
    """
    shape = SpeedPlan(**plan)
    channel.fact("engine", _expected_engine(backend, weights))
    speed.warm_libraries()
    began = time.perf_counter()
    checkpoint = open_checkpoint(model)
    tokenizer = checkpoint.tokenizer()
    opening = time.perf_counter() - began
    channel.fact("model", model_block(checkpoint))
    shape.check(checkpoint.config.max_positions)
    ordinary = speed.ordinary_tokens(tokenizer, load_corpus("default").text)
    bare = read_usage(settle=True).rss
    del tokenizer  # the engine makes its own, in the place of this one
    began = time.perf_counter()
    progress = loading(channel, checkpoint)
    choice: dict[str, Any] = {"backend": backend, "activations": activations, "kv_cache": kv_cache, "tp": tp, "pp": pp}
    llm = LLM(checkpoint, weights, progress=progress, nodes=_nodes(nodes), **choice)
    channel.fact("engine", engine_facts(llm.backend))
    elsewhere = llm.backend.weight_bytes if llm.backend.pids else 0
    load_s = opening + time.perf_counter() - began
    loaded = read_usage(settle=True).rss
    yield None
    timings: list[Timing] = []
    for run in range(shape.warmup + shape.repetitions):
        timing = speed.time_run(llm, speed.make_prompts(ordinary, shape, seed=run), shape)
        timings += [timing] if run >= shape.warmup else []
        yield None
    prompts = speed.make_prompts(ordinary, shape, seed=shape.warmup + shape.repetitions)
    reserved = llm.pool.nbytes
    kv, source = speed.kv_bytes_per_token(llm, prompts, shape)
    yield {
        "wm_bytes": checkpoint.weight_bytes(),
        "rm_weights_bytes": max(0, loaded - bare) + elsewhere,
        "rm_kv_bytes_per_token": kv,
        "rm_kv_source": source,
        "rm_peak_bytes": peak_rss(llm.backend.pids),
        "rm_reserved_bytes": reserved,
        "bare_bytes": bare,
        **rates(timings, shape),
        "load_s": load_s,
    }


def describe_model(
    channel: Channel, model: str, plan: dict[str, int], judged: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What other engines need to be measured as ours: the model's files, and the very tokens that ours would read.

    `prompts` [runs][batch][prompt_tokens]; `windows` of a text if `judged` says which: {"corpus", "corpus_sha256",
    "plan", "tokens"}. `kv_elements`: numbers that a KV cache holds for each token.
    """
    shape = SpeedPlan(**plan)
    checkpoint = open_checkpoint(model)
    channel.fact("model", model_block(checkpoint))
    shape.check(checkpoint.config.max_positions)
    ordinary = speed.ordinary_tokens(checkpoint.tokenizer(), load_corpus("default").text)
    runs = range(shape.warmup + shape.repetitions)
    return {
        "path": str(checkpoint.path),
        "form": "folder" if checkpoint.path.is_dir() else "gguf",
        "kv_elements": sum(2 * layer.kv_size for layer in checkpoint.config.layers),
        "prompts": [speed.make_prompts(ordinary, shape, seed) for seed in runs],
        "windows": [] if judged is None else _windows(channel, model, **judged),
    }


def _windows(
    channel: Channel, model: str, corpus: str, corpus_sha256: str, plan: dict[str, int], tokens: int | None
) -> list[list[int]]:
    """The windows of a text that a model is judged on, after every check of `evaluate_models`."""
    text = _Text(channel, _unchanged(corpus, corpus_sha256), WindowPlan(**plan), tokens)
    text.examine(0, model)
    return [text.ids[start : start + text.plan.context].tolist() for start in text.plan.starts(len(text.ids))]


def _unchanged(corpus: str, sha256: str) -> Corpus:
    """The text. Raises MeasureError if it is not the one that the parent read."""
    text = load_corpus(corpus)
    if text.sha256 != sha256:
        raise MeasureError(f"{corpus} changed while it was being measured on")
    return text


def loading(channel: Channel, checkpoint: Checkpoint) -> Progress:
    """Progress of loading, under the model's name."""
    return lambda label, done, total: channel.progress(f"{label} {checkpoint.name}", done, total)


def _load(
    channel: Channel,
    backend: BackendName,
    weights: Weights,
    tp: int,
    pp: int,
    nodes: Nodes | None,
    checkpoint: Checkpoint,
    activations: Activations,
    kv_cache: str,
) -> Backend:
    """A checkpoint in a backend. Raises as choose does."""
    return choose(checkpoint, backend, weights, activations, kv_cache, loading(channel, checkpoint), tp, pp, nodes)


def _nodes(fields: Sequence[Any] | None) -> Nodes | None:
    return None if fields is None else Nodes(*fields)


def engine_facts(backend: Backend) -> dict[str, Any]:
    """What a record says about the engine: the arguments of `records.engine_block`."""
    return {
        "backend": backend.name,
        "kernels": isa_in_use(),
        "activations": backend.activations,
        "kv_cache": backend.kv_dtype,
    }


def _expected_engine(backend: BackendName, weights: Weights) -> dict[str, Any]:
    """The same as far as it is known before a model is opened, for the records of those that cannot be."""
    return {"backend": resolve(None, backend, weights)[0], "kernels": isa_in_use()}


class _Text:
    """Opens the models of one job, and holds the tokens [n] that all of them are judged on."""

    def __init__(self, channel: Channel, corpus: Corpus, plan: WindowPlan, limit: int | None) -> None:
        self.channel, self.corpus, self.plan, self.limit = channel, corpus, plan, limit
        self.ids = torch.empty(0, dtype=torch.int64)
        self.checkpoints: dict[int, Checkpoint] = {}

    def examine(self, index: int, name: str) -> Checkpoint:
        """One model, opened, after every check that needs no weights. Raises GossamerError."""
        checkpoint = self.checkpoints[index] = open_checkpoint(name)
        self.channel.fact(f"model {index}", model_block(checkpoint))
        tokenizer = self._tokenize(checkpoint)
        check_contamination(self.corpus, checkpoint.manifest, name, tokenizer.decode(self._judged().tolist()))
        return checkpoint

    def examine_reference(self, name: str) -> Checkpoint:
        """What the others are compared with, opened. Raises MeasureError."""
        with _of_reference(name):
            checkpoint = open_checkpoint(name)
            self._tokenize(checkpoint)
            self.channel.fact("reference_fingerprint", checkpoint.fingerprint())
        return checkpoint

    def check_samples(self, index: int, samples: int) -> None:
        """Raises TokenizerError for a chat template that is broken: before the work, not after it."""
        if samples:
            sample_prompts(self.checkpoints[index].tokenizer(), 1)

    def _tokenize(self, checkpoint: Checkpoint) -> Tokenizer:
        """Tokens of the corpus by this model: those of the first stand for all. Raises MeasureError if they differ."""
        tokenizer = checkpoint.tokenizer()
        ids = torch.tensor(tokenizer.encode(self.corpus.text)[: self.limit], dtype=torch.int64)
        config = checkpoint.config
        if self.plan.context > config.max_positions:
            raise MeasureError(
                f"{checkpoint.name} sees {config.max_positions} tokens, not {self.plan.context}", hint="lower --context"
            )
        self.plan.check(len(ids))
        if int(ids.max()) >= config.vocab_size:
            raise MeasureError(
                f"{checkpoint.name}: token {int(ids.max())} is past its vocabulary of {config.vocab_size}"
            )
        if not len(self.ids):
            self.ids = ids
            windows = len(self.plan.starts(len(ids)))
            self.channel.fact("windows", windows)
            self.channel.fact("tokens_scored", windows * self.plan.scored)
            self.channel.fact(
                "tokens_sha256", hashlib.sha256(self._judged().numpy().astype("<i8").tobytes()).hexdigest()
            )
        elif not torch.equal(ids, self.ids):
            raise MeasureError(
                f"{checkpoint.name} splits the text into other tokens than the reference",
                hint="divergence needs one tokenizer: leave --reference away",
            )
        return tokenizer

    def _judged(self) -> torch.Tensor:
        """The tokens [n] of all complete windows, from the first to the end of the last."""
        return self.ids[: self.plan.starts(len(self.ids))[-1] + self.plan.context]


class _Judge(_Text):
    """Loads them as well."""

    def __init__(
        self,
        channel: Channel,
        corpus: Corpus,
        plan: WindowPlan,
        limit: int | None,
        load: Callable[[Checkpoint, Activations, str], Backend],
        activations: Activations,
        kv_cache: str,
    ) -> None:
        super().__init__(channel, corpus, plan, limit)
        self._load, self._activations, self._kv_cache = load, activations, kv_cache
        self._reference: tuple[Checkpoint, Backend] | None = None

    def load_reference(self, name: str) -> Backend:
        """Load what the others are compared with. Raises MeasureError, which is every model's."""
        checkpoint = self.examine_reference(name)
        # Most references have no weights that int8 activations could meet.
        activations: Activations = "auto" if self._activations == "int8" else self._activations
        with _of_reference(name):
            backend = self._load(checkpoint, activations, "auto")
        self._reference = checkpoint, backend
        return backend

    def load(self, index: int, name: str) -> Backend:
        """Load one model. Raises GossamerError."""
        backend = self._checked(index, name)
        self.channel.fact(f"engine {index}", engine_facts(backend))
        return backend

    def _checked(self, index: int, name: str) -> Backend:
        """The model's backend, which is the reference's if the model is the reference, keys and values included."""
        checkpoint = self.examine(index, name)
        if self._reference is not None:
            other, backend = self._reference
            if checkpoint.config.vocab_size != other.config.vocab_size:
                raise MeasureError(
                    f"{name} knows {checkpoint.config.vocab_size} tokens, the reference {other.config.vocab_size}",
                    hint="divergence compares distributions over one vocabulary: leave --reference away",
                )
            alike = self._kv_cache in ("auto", backend.kv_dtype)
            if alike and checkpoint.fingerprint() == other.fingerprint():
                return backend
        return self._load(checkpoint, self._activations, self._kv_cache)


@contextmanager
def _of_reference(name: str) -> Iterator[None]:
    """Has an error say that it is the reference's."""
    try:
        yield
    except GossamerError as error:
        raise MeasureError(f"reference {name}: {error.message}", hint=error.hint) from error


def _failure(error: GossamerError) -> dict[str, Any]:
    """The answer for a model that failed; where from goes to stderr, for those who debug."""
    traceback.print_exception(error)
    return {"error": describe(error)}


def _answer(outcome: Quality | MeasureError, backend: Backend, tokenizer: Tokenizer, samples: int) -> dict[str, Any]:
    if isinstance(outcome, MeasureError):
        raise outcome
    return {"results": {**outcome.results(), "samples": sample_texts(backend, tokenizer, samples)}}
