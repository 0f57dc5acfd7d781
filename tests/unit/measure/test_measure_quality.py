"""Perplexity, divergence and agreement are what their formulas say, over the windows that the plan says."""

from __future__ import annotations

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.engine import runner
from gossamer.engine.backend import Batch
from gossamer.engine.reference import ReferenceBackend
from gossamer.errors import MeasureError, UsageError
from gossamer.measure.plans import WindowPlan
from gossamer.measure.quality import Quality, evaluate, hidden_states
from gossamer.model import ModelConfig
from gossamer.model.decoder import Decoder

PLAN = WindowPlan(context=24, stride=20, scored=11)


def random_model(config: ModelConfig, seed: int, noise: float = 0.3) -> ReferenceBackend:
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(config)
    for parameter in decoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * noise + (parameter.dim() == 1))
    return ReferenceBackend(decoder.eval())


def perturbed(model: ReferenceBackend, seed: int, noise: float) -> ReferenceBackend:
    copy = Decoder(model.config)
    copy.load_state_dict(model.decoder.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for parameter in copy.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return ReferenceBackend(copy.eval())


class Rounding(ReferenceBackend):
    """A backend whose weights are others while its activations are rounded."""

    def __init__(self, model: ReferenceBackend, rounded: ReferenceBackend) -> None:
        super().__init__(model.decoder)
        self.activations = "int8"
        self.pair = {"exact": model.decoder, "int8": rounded.decoder}

    def hidden(self, batch: Batch) -> torch.Tensor:
        self.decoder = self.pair[self.activations]
        return super().hidden(batch)

    def head(self, states: torch.Tensor) -> torch.Tensor:
        self.decoder = self.pair[self.activations]
        return super().head(states)


def log_softmax(model: ReferenceBackend, window: torch.Tensor) -> np.ndarray:
    """float64 [context, vocab_size] by the whole model at once, and numpy's own formula."""
    logits = model.decoder(window.unsqueeze(0))[0].numpy().astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_hand(
    model: ReferenceBackend, reference: ReferenceBackend, tokens: torch.Tensor, plan: WindowPlan
) -> dict[str, float]:
    nll, kld, agreed = [], [], []
    start = 0
    while start + plan.context <= len(tokens):
        window = tokens[start : start + plan.context]
        ours, theirs = log_softmax(model, window), log_softmax(reference, window)
        for position in range(plan.context - plan.scored, plan.context):
            p, q = theirs[position - 1], ours[position - 1]
            nll.append(-q[int(window[position])])
            kld.append(float(np.sum(np.exp(p) * (p - q))))
            agreed.append(p.argmax() == q.argmax())
        start += plan.stride
    ordered = sorted(kld)
    rank = 0.99 * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return {
        "nll": float(np.mean(nll)),
        "count": len(nll),
        "mean": float(np.mean(kld)),
        "p99": ordered[low] + (rank - low) * (ordered[high] - ordered[low]),
        "agreed": float(np.mean(agreed)),
    }


@pytest.fixture
def tokens(tiny_config: ModelConfig) -> torch.Tensor:
    return torch.randint(0, tiny_config.vocab_size, (131,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("plan", [PLAN, WindowPlan(100, 100, 99), WindowPlan(2, 1, 1), WindowPlan(131, 131, 70)])
def test_every_number_matches_its_formula_in_float64(
    tiny_config: ModelConfig, tokens: torch.Tensor, plan: WindowPlan
) -> None:
    reference = random_model(tiny_config, 1)
    models = [perturbed(reference, 2, 0.05), random_model(tiny_config, 3)]
    for model, found in zip(models, evaluate(models, reference, tokens, plan), strict=True):
        expected = by_hand(model, reference, tokens, plan)
        assert isinstance(found, Quality)
        assert found.tokens_scored == expected["count"] == len(plan.starts(131)) * plan.scored
        assert found.nll == pytest.approx(expected["nll"], rel=1e-6)
        assert found.perplexity == pytest.approx(math.exp(expected["nll"]), rel=1e-5)
        assert found.kld_mean == pytest.approx(expected["mean"], rel=1e-5)
        assert found.kld_p99 == pytest.approx(expected["p99"], rel=1e-5)
        assert found.top1_agreement == pytest.approx(expected["agreed"])


def test_a_model_of_equal_weights_has_no_divergence(tiny_config: ModelConfig, tokens: torch.Tensor) -> None:
    reference = random_model(tiny_config, 1)
    twin = perturbed(reference, 2, 0.0)
    for found in evaluate([reference, twin, reference], reference, tokens, PLAN):
        assert isinstance(found, Quality)
        assert found.tokens_scored == len(PLAN.starts(131)) * PLAN.scored
        assert (found.kld_mean, found.kld_p99, found.top1_agreement) == (0.0, 0.0, 1.0)


def test_a_reference_judged_beside_others_scores_as_it_does_alone(
    tiny_config: ModelConfig, tokens: torch.Tensor
) -> None:
    reference, other = random_model(tiny_config, 1), random_model(tiny_config, 2)
    together = evaluate([reference, other], reference, tokens, PLAN)
    alone = evaluate([reference], None, tokens, PLAN)[0]
    assert isinstance(together[0], Quality)
    assert isinstance(alone, Quality)
    assert together[0].nll == alone.nll
    assert together[0].tokens_read == alone.tokens_read == len(PLAN.starts(131)) * PLAN.context
    assert together[0].seconds > 0


def test_without_a_reference_there_is_no_divergence(tiny_config: ModelConfig, tokens: torch.Tensor) -> None:
    (found,) = evaluate([random_model(tiny_config, 1)], None, tokens, PLAN)
    assert isinstance(found, Quality)
    assert found.kld_mean is found.kld_p99 is found.top1_agreement is None


def test_a_model_that_yields_nan_is_an_error_and_the_others_go_on(
    tiny_config: ModelConfig, tokens: torch.Tensor
) -> None:
    reference, broken = random_model(tiny_config, 1), random_model(tiny_config, 2)
    broken.decoder.final_norm.weight.fill_(math.nan)
    outcomes = evaluate([broken, reference], reference, tokens, PLAN)
    assert isinstance(outcomes[0], MeasureError)
    assert isinstance(outcomes[1], Quality)
    with pytest.raises(MeasureError, match="not finite"):
        evaluate([reference], broken, tokens, PLAN)


def test_a_perplexity_past_every_float_is_an_error(tiny_config: ModelConfig, tokens: torch.Tensor) -> None:
    loud = random_model(tiny_config, 1)
    loud.decoder.final_norm.weight.fill_(1e6)
    (outcome,) = evaluate([loud], None, tokens, PLAN)
    assert isinstance(outcome, MeasureError)


def test_a_text_shorter_than_a_window_is_refused(tiny_config: ModelConfig, tokens: torch.Tensor) -> None:
    with pytest.raises(MeasureError, match="23 tokens"):
        evaluate([random_model(tiny_config, 1)], None, tokens[:23], PLAN)


@pytest.mark.parametrize("chunk", [512, 40, 24, 7, 1])
def test_hidden_states_are_those_of_the_whole_forward_pass(
    tiny_config: ModelConfig, tokens: torch.Tensor, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "CHUNK", chunk)
    model = random_model(tiny_config, 1)
    model.reserve(3)
    window = tokens[:40]
    logits = model.head(hidden_states(model, window, 15))
    exact = deepcopy(model.decoder).double()(window.unsqueeze(0))[0, 24:39]
    # Logits of up to 7; float32 itself, whole or in chunks, is up to 1.3e-5 away from float64: sums of 16 to 40 terms
    # through two layers. A hundred roundings of the largest logit are 4e-5; a row that is misplaced is off by 0.1.
    assert (logits - exact).abs().max() <= 100 * 2**-24 * exact.abs().max()


def test_what_rounding_activations_adds_is_judged_against_the_same_weights(
    tiny_config: ModelConfig, tokens: torch.Tensor
) -> None:
    reference, exact, rounded = (random_model(tiny_config, seed) for seed in (1, 2, 3))
    model = Rounding(exact, rounded)
    (found,) = evaluate([model], reference, tokens, PLAN)
    (plain,) = evaluate([rounded], reference, tokens, PLAN)
    assert isinstance(found, Quality)
    assert isinstance(plain, Quality)
    assert found.activation_kld == pytest.approx(by_hand(rounded, exact, tokens, PLAN)["mean"], rel=1e-5)
    assert plain.activation_kld is None
    assert (found.nll, found.kld_mean) == (plain.nll, plain.kld_mean)  # what runs is what is judged
    assert model.activations == "int8"
    assert found.tokens_read == plain.tokens_read


def test_a_rounding_reference_tells_what_that_adds_too(tiny_config: ModelConfig, tokens: torch.Tensor) -> None:
    exact, rounded = (random_model(tiny_config, seed) for seed in (2, 3))
    model = Rounding(exact, rounded)
    (found,) = evaluate([model], model, tokens, PLAN)
    assert isinstance(found, Quality)
    assert found.kld_mean == 0
    assert found.activation_kld == pytest.approx(by_hand(rounded, exact, tokens, PLAN)["mean"], rel=1e-5)


@given(st.integers(2, 60), st.integers(0, 60), st.data())
def test_windows_are_whole_in_order_and_score_no_token_twice(context: int, slack: int, data: st.DataObject) -> None:
    scored = data.draw(st.integers(1, context - 1))
    plan = WindowPlan(context, scored + slack, scored)
    length = data.draw(st.integers(0, 400))
    starts = list(plan.starts(length))
    positions = [i for s in starts for i in range(s + context - scored, s + context)]
    assert len(set(positions)) == len(positions) == len(starts) * scored
    assert all(0 < i < length for i in positions)
    assert starts == sorted(starts)
    following = starts[-1] + plan.stride if starts else 0
    assert following + context > length  # no whole window is left out at the end


@pytest.mark.parametrize(("context", "stride", "scored"), [(1, 1, 1), (10, 10, 10), (10, 10, 0), (10, 4, 5), (0, 0, 0)])
def test_a_plan_that_cannot_mean_anything_is_refused(context: int, stride: int, scored: int) -> None:
    with pytest.raises(UsageError):
        WindowPlan(context, stride, scored)
