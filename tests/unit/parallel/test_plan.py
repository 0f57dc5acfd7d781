"""Plans: every weight is held by as many ranks as it should be, shares are balanced, what cannot be cut is named."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import EngineError
from gossamer.formats import Codebook, Dense, Format, Integer
from gossamer.model.config import LayerConfig, ModelConfig, Rope
from gossamer.model.families import tensor_names
from gossamer.parallel import make_plan
from gossamer.parallel.plan import Plan, _stages

BF16 = Dense()
SMOLLM2 = LayerConfig(num_heads=9, num_kv_heads=3, head_dim=64, ffn_width=1536)


def config(*layers: LayerConfig, vocab: int = 512, hidden: int = 64) -> ModelConfig:
    return ModelConfig("llama", vocab, hidden, layers, 1e-5, Rope(), "silu", True, 128)


def plan(model: ModelConfig, tp: int, pp: int = 1, form: Format = BF16) -> Plan:
    return make_plan(model, dict.fromkeys(tensor_names(model), form), tp, pp)


def counts(found: Plan) -> list[tuple[int, int]]:
    """Query and key-value heads of each rank in the first layer."""
    return [(c.num_heads, c.num_kv_heads) for c in (s.rank_config.layers[0] for s in found.shares)]


@pytest.mark.parametrize(
    ("heads", "kv", "tp", "expected"),
    [
        pytest.param(8, 4, 2, [(4, 2), (4, 2)], id="even"),
        pytest.param(9, 3, 2, [(6, 2), (3, 1)], id="smollm2: whole groups cost less than a group cut in two"),
        pytest.param(9, 3, 3, [(3, 1)] * 3, id="a group each"),
        pytest.param(8, 2, 4, [(2, 1)] * 4, id="fewer groups than ranks: each is held twice"),
        pytest.param(4, 1, 2, [(2, 1), (2, 1)], id="one key-value head for all"),
        pytest.param(12, 3, 2, [(6, 3), (6, 3)], id="a group cut in two balances"),
    ],
)
def test_heads_are_shared_out_so_that_the_largest_share_is_smallest(heads, kv, tp, expected):
    layer = LayerConfig(heads, kv, 64, 256)
    assert counts(plan(config(layer), tp)) == expected


@given(
    st.integers(1, 6), st.integers(1, 5), st.sampled_from([8, 16, 64]), st.integers(2, 400),
    st.integers(1, 4), st.integers(1, 3), st.integers(4, 600),
)  # fmt: skip
def test_every_head_column_and_token_has_its_rank(kv, group, head_dim, width, tp, pp, vocab):
    layers = [LayerConfig(kv * group, kv, head_dim, width + i) for i in range(4)]
    model = config(*layers, vocab=vocab)
    try:
        found = plan(model, tp, pp)
    except EngineError:
        assert kv * group < tp or width < tp
        return
    for stage in range(pp):
        shares = [s for s in found.shares if s.stage == stage]
        assert [s.tp_rank for s in shares] == list(range(tp))
        assert len({(s.first_layer, len(s.layers)) for s in shares}) == 1
        assert shares[0].vocab[0] == 0
        assert shares[-1].vocab[1] == vocab
        for i in range(len(shares[0].layers)):
            layer = model.layers[shares[0].first_layer + i]
            held = [s.layers[i] for s in shares]
            assert [h for x in held for h in range(*x.heads)] == list(range(layer.num_heads))
            assert [c for x in held for c in range(*x.ffn)] == list(range(layer.ffn_width))
            for x in held:  # each query head meets its own key-value head
                own = (x.heads[1] - x.heads[0]) // len(x.kv_heads)
                assert [x.kv_heads[h // own] for h in range(x.heads[1] - x.heads[0])] == [
                    h // layer.group for h in range(*x.heads)
                ]
    starts = [s.first_layer for s in found.shares if s.tp_rank == 0]
    lengths = [len(s.layers) for s in found.shares if s.tp_rank == 0]
    assert starts == [sum(lengths[:i]) for i in range(pp)]
    assert sum(lengths) == model.num_layers


def test_a_feed_forward_network_is_cut_at_whole_groups():
    layer = dataclasses.replace(SMOLLM2, ffn_width=192)
    widths = [s.rank_config.layers[0].ffn_width for s in plan(config(layer), 2, form=Integer(4, 64)).shares]
    assert widths == [128, 64]


@pytest.mark.parametrize(
    ("layer", "form", "tp", "named"),
    [
        (LayerConfig(8, 8, 16, 256), Integer(4, 128), 2, "layers.0.self_attn.o_proj"),
        (LayerConfig(8, 8, 16, 96), Codebook("nf4", 96), 2, "layers.0."),
        (LayerConfig(8, 8, 16, 256), Integer(4, 256), 2, "layers.0."),
        (LayerConfig(2, 2, 16, 256), Dense(), 4, "2 heads"),
    ],
)
def test_what_cannot_be_cut_is_named_with_the_way_out(layer, form, tp, named):
    with pytest.raises(EngineError) as caught:
        plan(config(layer), tp, form=form)
    assert named in caught.value.message
    assert caught.value.hint is not None
    assert "--tp" in caught.value.hint


def test_a_format_that_nobody_can_cut_is_refused():
    class Odd(Format):
        name = "odd"
        group_size = None

        def stored(self, shape):
            raise NotImplementedError

        def unpack(self, tensors, rows=None):
            raise NotImplementedError

    with pytest.raises(EngineError, match=r"is stored as odd, which cannot be cut"):
        plan(config(SMOLLM2), 2, form=Odd())
    assert plan(config(SMOLLM2), 1, form=Odd()).tp == 1


@pytest.mark.parametrize("changes", [{"positions": "alibi"}, {"positions": "learned"}, {"embed_norm": True}])
def test_models_whose_positions_or_embedding_cannot_be_cut_are_refused(changes):
    model = config(SMOLLM2)
    with pytest.raises(EngineError, match="cannot be cut"):
        make_plan(dataclasses.replace(model, **changes), dict.fromkeys(tensor_names(model), BF16), 2, 1)


def test_stages_are_as_even_as_layers_and_the_head_allow():
    assert _stages([1.0] * 6, 0.0, 3) == [(0, 2), (2, 4), (4, 6)]
    assert _stages([1.0] * 6, 2.0, 2) == [(0, 4), (4, 6)]
    assert _stages([5.0, 1.0, 1.0, 1.0], 0.0, 2) == [(0, 1), (1, 4)]
    with pytest.raises(EngineError, match="3 layers cannot be 4 stages"):
        plan(config(*[SMOLLM2] * 3), 1, 4)


def test_bytes_on_the_wire_are_two_sums_a_layer():
    found = plan(config(*[SMOLLM2] * 30, vocab=49152, hidden=576), 2)
    assert found.wire_bytes_per_token() == 61 * 576 * 4
    assert plan(config(SMOLLM2), 1).wire_bytes_per_token() == 0
