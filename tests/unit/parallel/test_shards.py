"""Ranks together compute what one process does: every format, unequal shares, replicated heads, biases, stages."""

from __future__ import annotations

import pytest
import torch

from engine_batches import NUM_BLOCKS, RAGGED, random_steps
from format_codes import FORMATS
from gossamer.checkpoint import open_checkpoint
from gossamer.engine.backend import choose
from gossamer.engine.sharded.part import Part
from gossamer.engine.sharded.view import ShardedCheckpoint, plan_checkpoint
from gossamer.formats import Dense, Integer, Sparse
from parallel_models import Meeting, together, write_model

BACKENDS = ["reference", "cpu"]
KV_CACHE = {"reference": "auto", "cpu": "fp32"}
CUT = [f for f in FORMATS if f.group_size in (None, 16, 32, 64) and not isinstance(f, Sparse)]
"""Those whose groups go into half a row of every matrix; zeros that are left away cannot be cut."""
TWICE = [{"num_heads": 2 * r["num_heads"], "num_kv_heads": 2 * r["num_kv_heads"], "ffn_width": 192} for r in RAGGED]
BOUND = 2e-4
"""Largest error of a logit over the spread of logits: float32 sums in another order, over three layers."""


def logits_of(checkpoint, plan, steps, backend, meeting=None):
    """Logits of each step by all ranks of a plan, and the likeliest tokens."""

    def work(share, peers):
        part = Part.load(checkpoint, share, peers, backend, activations="exact", kv_cache=KV_CACHE[backend])
        part.backend.reserve(NUM_BLOCKS)
        return [(part.run("forward", step.batch), part.run("argmax", step.batch)) for step in steps]

    last = together(plan, work, meeting)[-plan.tp :]
    found = []
    for ranks in zip(*last, strict=True):
        logits = torch.cat([forward[0] for forward, _ in ranks], -1)
        values, tokens = (torch.stack([best[i] for _, best in ranks]) for i in range(2))
        found.append((logits, tokens.gather(0, values.argmax(0, keepdim=True))[0]))
    return found


def check(folder, tp, pp, backend, seed=0):
    checkpoint = open_checkpoint(folder)
    whole = choose(checkpoint, backend, activations="exact", kv_cache=KV_CACHE[backend])
    whole.reserve(NUM_BLOCKS)
    steps = random_steps(checkpoint.config, seed, sequences=3, steps=5)
    plan = plan_checkpoint(checkpoint, tp, pp)
    for step, (logits, tokens) in zip(steps, logits_of(checkpoint, plan, steps, backend), strict=True):
        expected = whole.forward(step.batch)
        assert logits.shape == expected.shape
        if len(expected):
            assert float((logits - expected).abs().max()) <= BOUND * float(expected.std())
            assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", [*CUT, Dense(), Dense(torch.float32)], ids=lambda f: f.name)
def test_two_ranks_give_what_one_process_does_in_every_format(form, backend, tmp_path):
    check(write_model(tmp_path / "model", form), 2, 1, backend)


GEMMA2 = {
    "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 16, "sliding_window": 48, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
"""Norms behind both halves of a layer, a scale of the embedding, windows, bounds of scores and logits."""
SHAPES = {
    "untied": ({"tie_word_embeddings": False}, 2, 1),
    "biases": ({"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}, 2, 1),
    "ragged": ({"gossamer_layers": TWICE}, 2, 1),
    "unequal": ({"num_attention_heads": 9, "num_key_value_heads": 3}, 2, 1),
    "one kv head": ({"num_attention_heads": 4, "num_key_value_heads": 1}, 2, 1),
    "kv twice": ({"num_attention_heads": 12, "num_key_value_heads": 3}, 2, 1),
    "three ranks": ({"num_attention_heads": 6, "num_key_value_heads": 2}, 3, 1),
    "stages": ({}, 1, 2),
    "stages untied": ({"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}, 1, 3),
    "both": ({}, 2, 2),
    "gemma2": (GEMMA2, 2, 2),
    "qwen3": ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, 2, 2),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_ranks_and_stages_give_what_one_process_does_in_every_shape(name, backend, tmp_path):
    changes, tp, pp = SHAPES[name]
    check(write_model(tmp_path / "model", Integer(4, 16), **changes), tp, pp, backend, seed=1)


def test_there_are_two_sums_a_layer_and_one_for_the_embedding(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path / "model"))
    plan = plan_checkpoint(checkpoint, 2, 1)
    meeting = Meeting(plan)
    step = random_steps(checkpoint.config, 0)[0]

    def work(share, peers):
        part = Part.load(checkpoint, share, peers, "cpu")
        part.backend.reserve(NUM_BLOCKS)
        part.run("forward", step.batch)

    together(plan, work, meeting)
    assert meeting.sums == 2 * checkpoint.config.num_layers + 1


@pytest.mark.parametrize("form", CUT, ids=lambda f: f.name)
def test_a_cut_holds_the_very_numbers_of_the_whole(form, tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path / "model", form))
    plan = plan_checkpoint(checkpoint, 2, 1)
    for share in plan.shares:
        view = ShardedCheckpoint(checkpoint, share)
        for name in view.names():
            own = share.cuts()[name]
            whole = checkpoint.tensor(own.source)
            rows = torch.cat([torch.arange(a, b) for a, b in own.rows or ((0, len(whole)),)])
            expected = whole[rows]
            if own.columns is not None:
                expected = torch.cat([expected[:, a:b] for a, b in own.columns], 1)
            assert torch.equal(view.tensor(name), expected)
            assert tuple(expected.shape) == view.shape(name)
            if expected.ndim == 2:
                stored, found = view.stored(name), view.format(name)
                assert torch.equal(found.unpack(stored), expected)
                described = {n: (t.dtype, tuple(t.shape)) for n, t in stored.items()}
                assert described == found.stored(view.shape(name))


def test_each_rank_holds_its_share_of_the_bytes(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path / "model", Integer(4, 32)))
    whole = checkpoint.weight_bytes()
    for tp, pp in ((2, 1), (1, 3), (2, 3)):
        plan = plan_checkpoint(checkpoint, tp, pp)
        held = [ShardedCheckpoint(checkpoint, share).weight_bytes() for share in plan.shares]
        assert plan.weight_bytes({name: checkpoint.format(name) for name in checkpoint.names()}) == held
        extra = checkpoint.nbytes("model.embed_tokens.weight") if pp > 1 else 0  # embedding and head in two stages
        norms = sum(checkpoint.nbytes(n) for n in checkpoint.names() if len(checkpoint.shape(n)) == 1)
        shapes = len(checkpoint.names()) * 16 * tp  # weight_shape of every part
        assert whole <= sum(held) + shapes
        assert sum(held) <= whole + extra + norms * tp + shapes
        assert max(held) < 0.6 * whole


def test_rows_of_a_view_are_the_rows_of_its_tensor(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path / "m", num_attention_heads=12, num_key_value_heads=3))
    view = ShardedCheckpoint(checkpoint, plan_checkpoint(checkpoint, 2, 1).shares[0])
    name = "model.layers.1.self_attn.k_proj.weight"
    whole = view.tensor(name)
    assert view.shape(name) == (48, 64)  # a key-value head twice, and another
    assert torch.equal(whole[:16], whole[16:32])
    for start, stop in ((0, 48), (5, 40), (17, 18), (30, 48), (7, 7)):
        assert torch.equal(view.tensor(name, slice(start, stop)), whole[start:stop])


def test_logits_that_are_not_finite_win_no_argmax(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path / "model"))
    plan = plan_checkpoint(checkpoint, 2, 1)

    def work(share, peers):
        return Part.load(checkpoint, share, peers, "reference").head(torch.full((1, 64), torch.nan), "argmax")

    assert all(bool(values.isnan().all()) for values, _ in together(plan, work))
