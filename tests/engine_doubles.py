"""What tests of the engine share: a backend whose logits depend on the whole context, and what must come out of it.

`ContextBackend` compares every context that it reads through block tables with the sequences that run, token by token.
`answer` generates one completion by the plain definition of every parameter, with no cache, batch or draft.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import numpy as np
import torch

from gossamer.engine.backend import BLOCK_SIZE, Batch, blocks_for
from gossamer.engine.draw import sample_row
from gossamer.engine.engine import Engine, EngineOptions
from gossamer.engine.fake import CHARACTERS, FakeBackend, fake_config, fake_tokenizer
from gossamer.engine.params import SamplingParams
from gossamer.engine.sampler import Sampler
from gossamer.engine.sequence import Output, Sequence, Token
from gossamer.engine.speculative import Speculator

VOCAB = len(CHARACTERS) + 1
EOS = len(CHARACTERS)
LETTERS = 12
"""Tokens below this are likely, and so is the end, somewhat; others hardly ever come."""
TOKENIZER = fake_tokenizer()
PREFIXES = [list(range(LETTERS)) * 5, [3] * 40, [1, 2] * 30]
"""How many prompts begin."""


class CheckedBackend(FakeBackend):
    """Counts, and compares each context with the sequence of its engine whose blocks it lies in."""

    engine: Engine | None = None

    def __init__(self, max_positions: int = 1024) -> None:
        super().__init__(fake_config(max_positions=max_positions))
        self.computed = 0
        """Tokens of all steps so far, drafts too."""
        self.most_tokens = self.most_sequences = 0
        """Of one step."""
        self._contexts: list[list[int]] = []

    def forward(self, batch: Batch) -> torch.Tensor:
        self._contexts = []
        logits = super().forward(batch)
        self.computed += len(batch.tokens)
        self.most_tokens = max(self.most_tokens, len(batch.tokens))
        self.most_sequences = max(self.most_sequences, len(self._contexts))
        if self.engine is not None:
            self._compare(batch, self.engine.scheduler.running)
        return logits

    def _compare(self, batch: Batch, running: list[Sequence]) -> None:
        by_blocks = {tuple(sequence.table.blocks): sequence for sequence in running}
        assert len(by_blocks) == len(running), "two sequences have the same blocks"
        for table, context in zip(batch.block_tables.tolist(), self._contexts, strict=True):
            used = tuple(table[: blocks_for(len(context))])
            known = [[*s.ids, *s.drafts][: len(context)] for b, s in by_blocks.items() if b[: len(used)] == used]
            assert context in known, "a context is not that of the sequence whose blocks it lies in"

    def _check_context(self, sequence: int, tokens: np.ndarray) -> None:
        self._contexts.append(tokens.tolist())

    def after(self, context: Many[int]) -> torch.Tensor:
        """Logits float32 [vocab_size] after a context."""
        logits = torch.zeros(self.config.vocab_size)
        for value, ahead in ((2.0, 3), (4.0, 2), (8.0, 1)):
            logits[(context[-1] + ahead) % self.config.vocab_size] = value
        return logits


class ContextBackend(CheckedBackend):
    """Random logits: the last token decides most of them, the whole context a little, by `spread`."""

    def __init__(self, max_positions: int = 1024, spread: float = 0.2, seed: int = 0) -> None:
        super().__init__(max_positions)
        self.spread = spread
        self.table = np.random.default_rng(seed).normal(0, 2, (VOCAB, VOCAB))
        self.table[:, LETTERS:EOS] -= 12
        self.table[:, EOS] -= 1

    def forward(self, batch: Batch) -> torch.Tensor:
        super().forward(batch)
        rows = []
        for row in batch.logit_rows.tolist():
            sequence = int(np.searchsorted(batch.query_start, row, side="right")) - 1
            left = int(batch.query_start[sequence + 1]) - 1 - row
            context = self._contexts[sequence]
            rows.append(self.after(context[: len(context) - left]))
        return torch.stack(rows) if rows else torch.empty(0, VOCAB)

    def after(self, context: Many[int]) -> torch.Tensor:
        noise = np.random.default_rng(zlib.crc32(np.array(context, np.int32).tobytes())).normal(0, 1, VOCAB)
        return torch.from_numpy(self.table[context[-1]] + self.spread * noise).float()


class TableDrafter:
    """Guesses each token from the one before, as `table` says; some guesses are wrong on purpose."""

    name = "table"
    most = 4

    def __init__(self, table: np.ndarray, seed: int, wrong: float = 0.2) -> None:
        self.likeliest = table.argmax(1)
        self.rng, self.wrong = np.random.default_rng(seed), wrong
        self.known: set[Sequence] = set()

    def propose(self, sequences: Many[Sequence], samplers: Many[Sampler], count: int) -> list[list[int]]:
        self.known.update(sequences)
        found = []
        for sequence in sequences:
            guess, last = [], sequence.ids[-1]
            for _ in range(int(self.rng.integers(0, count + 1))):
                last = int(self.likeliest[last]) if self.rng.random() > self.wrong else int(self.rng.integers(LETTERS))
                guess.append(last)
            found.append(guess)
        return found

    def behind(self, sequences: Many[Sequence]) -> float:
        return 0.0

    def forget(self, sequence: Sequence) -> None:
        self.known.discard(sequence)


class AnswerDrafter:
    """Guesses what it was told that comes after each prompt; some guesses are wrong on purpose."""

    name = "answers"
    most = 6

    def __init__(self, answers: Iterable[tuple[Many[int], Many[int]]], vocab_size: int, wrong: float = 0.2) -> None:
        self.answers = {tuple(prompt): list(answer) for prompt, answer in answers}
        self.vocab_size, self.wrong = vocab_size, wrong
        self.rng = np.random.default_rng(0)

    def propose(self, sequences: Many[Sequence], samplers: Many[Sampler], count: int) -> list[list[int]]:
        found = []
        for sequence in sequences:
            guess = self.answers[tuple(sequence.prompt)][sequence.generated :][:count]
            wrong = self.rng.random(len(guess)) < self.wrong
            found.append([(t + 1) % self.vocab_size if w else t for t, w in zip(guess, wrong, strict=True)])
        return found

    def behind(self, sequences: Many[Sequence]) -> float:
        return 0.0

    def forget(self, sequence: Sequence) -> None:
        """Nothing is remembered of a sequence."""


def make_engine(
    backend: CheckedBackend,
    blocks: int = 200,
    *,
    batch_tokens: int = 64,
    sequences: int = 16,
    reuse: bool = True,
    speculator: Speculator | None = None,
) -> Engine:
    """An engine over a KV cache of so many blocks."""
    memory = int(blocks * BLOCK_SIZE * backend.kv_bytes_per_token)
    options = EngineOptions(memory, batch_tokens, sequences, reuse)
    backend.engine = Engine(backend, TOKENIZER, options, speculator)
    return backend.engine


@dataclass
class Answer:
    """One completion."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass
class Received(Answer):
    """One completion as an engine told it."""

    told: list[Token] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)

    def take(self, output: Output) -> None:
        assert self.finish_reason is None, "something came after the end"
        assert output.tokens or output.error, "an output of nothing"
        self.outputs.append(output)
        self.told += output.tokens
        self.tokens += [token.id for token in output.tokens]
        self.text += "".join(token.text for token in output.tokens)
        assert all(token.finish_reason is None for token in output.tokens[:-1])
        if output.error is None:
            assert output.tokens[-1].finish_reason == output.finish_reason
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason

    @property
    def answer(self) -> Answer:
        return Answer(self.tokens, self.text, self.finish_reason, self.stop_reason)


def collect(engine: Engine, received: dict[tuple[str, int], Received] | None = None) -> dict[tuple[str, int], Received]:
    """Step until nothing is left to do; what each choice of each request was told."""
    received = {} if received is None else received
    while engine.has_work:
        for output in engine.step():
            received.setdefault((output.request_id, output.choice), Received()).take(output)
    engine.check_idle()
    return received


def generate(
    engine: Engine, requests: Mapping[str, tuple[Many[int], SamplingParams]]
) -> dict[tuple[str, int], Received]:
    """Add requests together, and step until all have ended."""
    for name, (prompt, params) in requests.items():
        engine.add(name, prompt, params)
    return collect(engine)


def adjusted(
    logits: torch.Tensor, params: SamplingParams, prompt: Many[int], answer: Many[int], ends: Iterable[int]
) -> torch.Tensor:
    """Logits after penalties, biases and the ban of early ends, token by token as the documentation says."""
    values = logits.tolist()
    counts = Counter(answer)
    for token in range(len(values)):
        if token in counts or token in prompt:
            penalty = params.repetition_penalty
            values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
        values[token] -= params.presence_penalty * (token in counts) + params.frequency_penalty * counts[token]
    for token, bias in params.logit_bias:
        values[token] += bias
    if len(answer) < params.min_tokens:
        for token in ends:
            values[token] = -math.inf
    return torch.tensor(values)


def answer(backend: CheckedBackend, prompt: Many[int], params: SamplingParams, seed: int | None = None) -> Answer:
    """What a request must be answered, from the definition of its parameters; `seed` instead of its own."""
    seed = params.seed if seed is None else seed
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    found = Answer()
    limit = min(params.max_tokens, backend.config.max_positions - len(prompt))
    pieces: list[str] = []
    while True:
        may_stop = len(found.tokens) >= params.min_tokens
        logits = adjusted(backend.after([*prompt, *found.tokens]), params, prompt, found.tokens, ends)
        if params.greedy:
            token = int(logits.argmax())
        else:
            assert seed is not None
            shape = (params.temperature, params.top_k, params.top_p, params.min_p)
            token = sample_row(logits, *shape, seed, len(found.tokens))
        found.tokens.append(token)
        is_end = may_stop and token in ends
        special = token == EOS
        pieces.append("" if is_end or (special and params.skip_special) else "<end>" if special else CHARACTERS[token])
        found.text = "".join(pieces)
        if is_end:
            found.finish_reason = "stop"
            found.stop_reason = token if token in params.stop_token_ids else None
            return found
        late = "".join(pieces[: params.min_tokens])
        stops = [(at, stop) for stop in params.stop if (at := found.text.find(stop, len(late))) >= 0]
        if stops:
            at, found.stop_reason = min(stops)
            found.text, found.finish_reason = found.text[:at], "stop"
            return found
        if len(found.tokens) == limit:
            found.finish_reason = "length"
            return found


def random_params(rng: np.random.Generator) -> SamplingParams:
    """Every field that changes tokens, each now and then."""

    def now_and_then(value: object, otherwise: object) -> object:
        return value if rng.random() < 0.25 else otherwise

    most = int(rng.integers(1, 50))
    return SamplingParams(
        max_tokens=most,
        temperature=float(rng.choice([0.0, 0.0, 0.7, 1.3])),
        top_p=now_and_then(0.9, 1.0),
        top_k=now_and_then(3, 0),
        min_p=now_and_then(0.05, 0.0),
        seed=int(rng.integers(1 << 62)),
        stop=now_and_then(("".join(TOKENIZER.decode([int(t)]) for t in rng.integers(0, 6, 2)),), ()),
        ignore_eos=bool(rng.random() < 0.5),
        min_tokens=now_and_then(int(rng.integers(0, most + 1)), 0),
        n=now_and_then(2, 1),
        presence_penalty=now_and_then(0.5, 0.0),
        frequency_penalty=now_and_then(0.4, 0.0),
        repetition_penalty=now_and_then(1.2, 1.0),
        logit_bias=now_and_then({3: 2.5, 5: -100.0}, {}),
        stop_token_ids=now_and_then((int(rng.integers(LETTERS)),), ()),
        logprobs=now_and_then(2, None),
        prompt_logprobs=now_and_then(1, None),
        skip_special=bool(rng.random() < 0.5),
    )


def random_prompt(rng: np.random.Generator) -> list[int]:
    """Often with a beginning that others have."""
    shared = PREFIXES[rng.integers(len(PREFIXES))][: rng.integers(0, 60)] if rng.random() < 0.7 else []
    return [*shared, *rng.integers(0, LETTERS, rng.integers(1, 30)).tolist()]
