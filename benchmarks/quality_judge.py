"""One judge for every model of the quality benchmark: weights as floats, exact activations, the torch decoder.

So only the weights differ: what an engine rounds while it runs is in no figure. A judgement of the same weights on the
same text by the same code is remembered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gossamer.checkpoint import open_checkpoint
from gossamer.errors import GossamerError
from gossamer.measure.corpus import Corpus, load_corpus
from gossamer.measure.plans import WindowPlan
from gossamer.measure.run import EvalRequest, evaluate_models
from quality_make import code_hash

TOGETHER = 6
"""Models that share one pass of the float model; each takes its weights in float32."""
KEPT = ("perplexity", "kld_mean", "kld_p99", "top1_agreement")

Say = Callable[[str], None]
Judgement = dict[str, Any]
"""What KEPT names, or {"reason"}."""


@dataclass(frozen=True)
class Text:
    """A text to judge on: as it was named, and what it is."""

    source: str
    corpus: Corpus

    @staticmethod
    def load(source: str) -> Text:
        return Text(source, load_corpus(source))


@dataclass(frozen=True)
class Judge:
    """How models are judged: against which float model, on how many tokens."""

    reference: Path
    tokens: int
    threads: int
    memory: Path
    """A file of judgements."""
    plan: WindowPlan = field(default_factory=WindowPlan)

    def judge(self, paths: Mapping[str, Path], text: Text, again: bool, say: Say) -> dict[str, Judgement]:
        """A judgement for each model; one that cannot be read has a reason instead of figures."""
        known: dict[str, Judgement] = json.loads(self.memory.read_text()) if self.memory.exists() else {}
        found: dict[str, Judgement] = {}
        keys: dict[str, str] = {}
        for name, path in paths.items():
            try:
                keys[name] = self._key(path, text)
            except GossamerError as error:
                found[name] = {"reason": f"{type(error).__name__}: {error.message}"}
        missing = [name for name, key in keys.items() if again or key not in known]
        for group in (missing[i : i + TOGETHER] for i in range(0, len(missing), TOGETHER)):
            say(f"judging on {text.corpus.name}: {', '.join(group)}")
            for name, judgement in zip(group, self._evaluate([paths[name] for name in group], text), strict=True):
                found[name] = judgement
                if "reason" not in judgement:
                    known[keys[name]] = judgement
            self.memory.write_text(json.dumps(known, indent=1))
        return {name: found.get(name) or known[keys[name]] for name in paths}

    def _evaluate(self, paths: Sequence[Path], text: Text) -> Iterator[Judgement]:
        request = EvalRequest(
            corpus_source=text.source,
            corpus=text.corpus,
            plan=self.plan,
            reference=str(self.reference),
            tokens=self.tokens,
            samples=0,
            weights="float",
            backend="reference",
            activations="exact",
            threads=self.threads,
        )
        for record in evaluate_models([str(path) for path in paths], request, lambda *_: None):
            results = record["results"]
            yield {key: results[key] for key in KEPT} if results else {"reason": str(record["error"])}

    def protocol(self, text: Text) -> dict[str, Any]:
        """What decides a judgement beside the model."""
        return {
            "reference": open_checkpoint(self.reference).fingerprint(),
            "text": text.corpus.sha256,
            "tokens": self.tokens,
            "plan": asdict(self.plan),
            "code": code_hash("measure", "model", "checkpoint", "formats", "engine"),
        }

    def _key(self, path: Path, text: Text) -> str:
        """What decides a judgement. Raises GossamerError if the model cannot be opened."""
        return json.dumps({"model": open_checkpoint(path).fingerprint(), **self.protocol(text)}, sort_keys=True)
