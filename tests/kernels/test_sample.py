"""Drawing tokens: by the right distribution, the same in C++ as in the reference, and alike from two distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.engine import draw
from gossamer.engine.draw import noise, sample_row, sample_rows
from gossamer.errors import EngineError
from gossamer.kernels import cpu

SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 1000, 5000]
PLAIN = (1.0, 0, 1.0, 0.0)
TRUNCATED = [
    PLAIN,
    (0.7, 0, 1.0, 0.0),
    (3.0, 5, 1.0, 0.0),
    (1.0, 0, 0.8, 0.0),
    (1.0, 0, 1.0, 0.1),
    (0.8, 20, 0.9, 0.05),
    (1.5, 900, 0.99, 0.0),
    (1.0, 100_000, 1.0, 1e-4),
    (100.0, 0, 0.5, 0.0),
    (0.05, 0, 0.99, 0.0),
    (1e-30, 3, 0.9, 0.1),
    (1.0, 0, 1e-9, 0.0),
    (1.0, 0, math.nextafter(1.0, 0.0), 0.0),
]


def drawn(logits: torch.Tensor, params: tuple[float, int, float, float], seeds, positions) -> np.ndarray:
    """Tokens of the C++ code for each row, all with the same params."""
    n = len(logits)
    return sample_rows(logits, *([value] * n for value in params), seeds, positions)


def random_logits(rows: int, size: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * spread


def scores(logits: torch.Tensor, params, seed: int, position: int) -> np.ndarray:
    """float64 [vocab_size], -inf where a token is not kept; written apart from the code under test."""
    temperature, top_k, top_p, min_p = params
    exact = logits.double().numpy()
    order = sorted(range(len(exact)), key=lambda t: (-exact[t], t))[: top_k or None]
    weights = np.exp((exact[order] - exact.max()) / temperature)
    shares, total, found = weights / weights.sum(), 0.0, np.full(len(exact), -math.inf)
    for token, share in zip(order, shares, strict=True):
        if total < top_p and share >= min_p * shares[0] and exact[token] > -math.inf:
            found[token] = exact[token] / temperature + noise(seed, position, np.array([token]))[0]
        total += share
    return found


@pytest.mark.parametrize("params", TRUNCATED)
@pytest.mark.parametrize("size", SIZES)
def test_cpp_draws_what_the_reference_draws(size, params):
    logits = random_logits(12, size, size)
    logits[1] = 0.0  # all alike
    logits[2] = logits[2].round()  # many alike
    logits[3, size // 2 :] = -torch.inf
    logits[3, 0] = 0.0
    logits[4] *= 1e30
    seeds, positions = [7 + 1000 * i for i in range(12)], [3 * i for i in range(12)]
    expected = [sample_row(row, *params, *at) for row, *at in zip(logits, seeds, positions, strict=True)]
    assert drawn(logits, params, seeds, positions).tolist() == expected


@pytest.mark.parametrize("params", TRUNCATED)
def test_the_chosen_token_has_the_best_score_of_those_kept(params):
    logits = random_logits(20, 700, 5)
    for seed, (row, token) in enumerate(zip(logits, drawn(logits, params, range(20), [9] * 20).tolist(), strict=True)):
        all_scores = scores(row, params, seed, 9)
        assert all_scores[token] >= all_scores.max() - 1e-4 * max(1.0, abs(all_scores.max()))


@given(st.data())
def test_any_logits_and_params_give_what_the_reference_gives(data):
    numbers = st.floats(-50, 50, width=32) | st.sampled_from([0.0, 1.0, -math.inf, 3e38, -3e38])
    values = data.draw(st.lists(numbers, min_size=1, max_size=200))
    logits = torch.tensor([*values, 0.0], dtype=torch.float32)
    params = (
        data.draw(st.floats(0, 100)),
        data.draw(st.integers(0, 250)),
        data.draw(st.floats(0, 1, exclude_min=True)),
        data.draw(st.floats(0, 1)),
    )
    seed, position = data.draw(st.integers(0, (1 << 63) - 1)), data.draw(st.integers(0, 1 << 40))
    token = int(drawn(logits[None], params, [seed], [position])[0])
    if token != sample_row(logits, *params, seed, position):
        # Only whether the last token fits into top_p may be decided otherwise, where that is a matter of rounding.
        near = [(*params[:2], params[2] * (1 + change), params[3]) for change in (-1e-5, 1e-5)]
        assert token in [sample_row(logits, *other, seed, position) for other in near]


def chi_square(counts: np.ndarray, shares: np.ndarray) -> float:
    """Standard deviations by which the statistic is above its mean."""
    expected = shares * counts.sum()
    assert counts[expected == 0].sum() == 0
    used = expected > 0
    freedom = used.sum() - 1
    statistic = ((counts[used] - expected[used]) ** 2 / expected[used]).sum()
    return float((statistic - freedom) / math.sqrt(2 * freedom))


def shares_of(logits: torch.Tensor, params) -> np.ndarray:
    kept = np.isfinite(scores(logits, params, 0, 0))
    weights = np.where(kept, np.exp((logits.double().numpy() - float(logits.max())) / params[0]), 0.0)
    return weights / weights.sum()


@pytest.mark.parametrize(
    "params", [PLAIN, (0.6, 0, 1.0, 0.0), (1.0, 6, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (1.3, 9, 0.9, 0.05)]
)
@pytest.mark.parametrize("over", ["positions", "seeds"])
def test_draws_follow_the_distribution(params, over):
    n, logits = 40_000, random_logits(1, 24, 3, 1.0)[0]
    counters = (range(n), [5] * n) if over == "seeds" else ([11] * n, range(n))
    tokens = drawn(logits.expand(n, -1), params, *counters)
    assert chi_square(np.bincount(tokens, minlength=24), shares_of(logits, params)) < 4


def test_the_reference_follows_the_distribution_too():
    n, logits, params = 4000, random_logits(1, 12, 3, 1.0)[0], (1.1, 8, 0.9, 0.01)
    tokens = [sample_row(logits, *params, 1, position) for position in range(n)]
    assert chi_square(np.bincount(tokens, minlength=12), shares_of(logits, params)) < 4


def test_draws_of_neighbouring_positions_and_seeds_are_independent():
    """Pairs of tokens are as frequent as the product of their shares."""
    side, size = 200, 6
    logits = random_logits(1, size, 8, 1.0)[0]
    seeds, positions = np.divmod(np.arange(side * side), side)
    tokens = drawn(logits.expand(side * side, -1), PLAIN, seeds, positions).reshape(side, side)
    shares = shares_of(logits, PLAIN)
    for first, second in [(tokens[:, :-1:2], tokens[:, 1::2]), (tokens[:-1:2], tokens[1::2])]:
        pairs = np.bincount((first * size + second).ravel(), minlength=size * size)
        assert chi_square(pairs, np.outer(shares, shares).ravel()) < 4


def test_noise_is_gumbels_and_uncorrelated():
    counters = [(seed, position) for seed in (0, 1, 1 << 62) for position in (0, 1, 2, 1 << 33)]
    rows = np.stack([noise(*counter, np.arange(20_000)) for counter in counters])
    uniform = np.exp(-np.exp(-rows))
    assert ((uniform > 0) & (uniform < 1)).all()
    for row in uniform:
        assert chi_square(np.histogram(row, 50, (0, 1))[0], np.full(50, 0.02)) < 4
        assert abs(np.corrcoef(row[:-1], row[1:])[0, 1]) < 5 / math.sqrt(len(row))
    apart = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(apart).max() < 5 / math.sqrt(rows.shape[1])


@pytest.mark.parametrize("seed", range(6))
def test_two_distributions_that_share_the_noise_mostly_draw_the_same(seed):
    """At least (1 - d) / (1 + d) of the draws agree, d being their distance in total variation."""
    n, target = 20_000, random_logits(1, 50, seed, 2.0)[0]
    draft = target + random_logits(1, 50, 100 + seed, 0.3)[0]
    distance = float((target.softmax(-1) - draft.softmax(-1)).abs().sum()) / 2
    assert 0.01 < distance < 0.5
    agree = drawn(target.expand(n, -1), PLAIN, [seed] * n, range(n)) == drawn(
        draft.expand(n, -1), PLAIN, [seed] * n, range(n)
    )
    assert agree.mean() > (1 - distance) / (1 + distance) - 4 * 0.5 / math.sqrt(n)


def test_a_row_does_not_feel_its_neighbours():
    logits = random_logits(9, 3000, 1)
    columns = [
        [0.0, 1.0, 0.5, 2.0, 1.0, 1.0, 1.0, 0.9, 0.1],
        [0, 0, 5, 0, 1, 0, 2000, 40, 0],
        [1.0, 0.9, 1.0, 0.5, 1.0, 1.0, 0.7, 0.95, 1.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.01, 0.0],
        list(range(9)),
        [4] * 9,
    ]
    together = sample_rows(logits, *columns).tolist()
    alone = [sample_rows(logits[i : i + 1], *([column[i]] for column in columns)).item() for i in range(9)]
    assert together == alone
    assert len(set(together)) > 5
    assert (together[0], together[4]) == (int(logits[0].argmax()), int(logits[4].argmax()))


def test_without_the_extension_the_reference_draws(monkeypatch):
    logits, params = random_logits(5, 400, 2), (0.9, 30, 0.9, 0.02)
    expected = drawn(logits, params, range(5), range(5)).tolist()
    monkeypatch.setenv("GOSSAMER_KERNELS", "reference")
    monkeypatch.setattr(cpu, "extension", lambda: pytest.fail("C++ was called"))
    found = drawn(logits, params, range(5), range(5))
    assert found.tolist() == expected
    assert found.dtype == np.int64


@pytest.mark.parametrize("params", TRUNCATED)
def test_a_masked_token_is_never_drawn(params):
    logits = random_logits(1, 500, 4)[0]
    allowed = [3, 64, 65, 311, 499]
    logits[[t for t in range(500) if t not in allowed]] = -torch.inf
    tokens = drawn(logits.expand(300, -1), params, [1] * 300, range(300)).tolist()
    assert set(tokens) <= set(allowed)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 63, 64, 99])
def test_logits_that_are_not_finite_are_an_error(bad, at):
    logits = random_logits(3, 100, 4)
    logits[1, at] = bad
    with pytest.raises(EngineError, match="not finite"):
        drawn(logits, PLAIN, [1] * 3, [1] * 3)
    with pytest.raises(EngineError, match="not finite"):
        sample_row(logits[1], *PLAIN, 1, 1)


def test_a_row_without_any_token_is_an_error():
    for logits in (torch.full((1, 70), -torch.inf), torch.full((1, 3), torch.nan)):
        with pytest.raises(EngineError, match="not finite"):
            drawn(logits, PLAIN, [1], [1])
        with pytest.raises(EngineError, match="not finite"):
            sample_row(logits[0], *PLAIN, 1, 1)


def test_params_that_make_no_sense_do_not_reach_the_kernel():
    logits = np.zeros((2, 8), np.float32)
    good = [np.ones(2), np.zeros(2, np.int64), np.ones(2), np.zeros(2), np.zeros(2, np.uint64), np.zeros(2, np.int64)]
    out = np.empty(2, np.int64)
    module = cpu.extension()
    module.sample_rows(logits, *good, 1, out)
    for at, wrong in [
        (0, np.ones(3)),
        (0, -np.ones(2)),
        (0, np.full(2, np.nan)),
        (1, -np.ones(2, np.int64)),
        (2, np.zeros(2)),
        (3, -np.ones(2)),
    ]:
        with pytest.raises(ValueError, match=r"must|needs"):
            module.sample_rows(logits, *good[:at], wrong, *good[at + 1 :], 1, out)
    with pytest.raises(ValueError, match="no tokens"):
        module.sample_rows(np.zeros((2, 0), np.float32), *good, 1, out)
    with pytest.raises(TypeError):
        module.sample_rows(logits.astype(np.float64), *good, 1, out)


def test_an_empty_batch_draws_nothing():
    assert drawn(torch.zeros(0, 10), PLAIN, [], []).shape == (0,)
    assert draw.sample_rows(torch.zeros(0, 10), [], [], [], [], [], []).dtype == np.int64
