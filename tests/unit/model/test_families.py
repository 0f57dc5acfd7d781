"""What a config.json leaves out means what it means to transformers."""

from __future__ import annotations

import pytest

from gossamer.errors import CorruptCheckpoint
from gossamer.model import config_from_hf, tensor_names

SAID = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 16,
}  # fmt: skip


def test_keys_that_a_mistral_leaves_out():
    from transformers import MistralConfig

    theirs = MistralConfig(**SAID, sliding_window=None)
    ours = config_from_hf({**SAID, "model_type": "mistral", "sliding_window": None})
    layer = ours.layers[0]
    assert (layer.num_kv_heads, layer.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert (ours.max_positions, ours.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert (ours.rope.theta, ours.tie_embeddings) == (theirs.rope_parameters["rope_theta"], theirs.tie_word_embeddings)


def test_a_mistral_that_says_nothing_of_its_window_has_one():
    from transformers import MistralConfig

    assert MistralConfig(**SAID).sliding_window == 4096
    assert {layer.window for layer in config_from_hf({**SAID, "model_type": "mistral"}).layers} == {4096}


def test_keys_that_a_llama_leaves_out():
    from transformers import LlamaConfig

    theirs, ours = LlamaConfig(**SAID), config_from_hf({**SAID, "model_type": "llama"})
    layer = ours.layers[0]
    assert (layer.num_kv_heads, layer.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert (ours.max_positions, ours.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)


def test_biases_of_a_layer_are_said_by_role():
    llama = {**SAID, "model_type": "llama", "attention_bias": True}
    ours = config_from_hf({**llama, "gossamer_layers": [{}, {"biases": ["o", "down"]}]})
    assert ours.layers[0].biases == {"q", "k", "v", "o"}
    assert ours.layers[1].biases == {"o", "down"}
    shapes = tensor_names(ours)
    assert shapes["model.layers.1.mlp.down_proj.bias"] == (64,)
    assert "model.layers.1.self_attn.q_proj.bias" not in shapes


@pytest.mark.parametrize("biases", ["o", {"o": 1}, ["o", "norm"], [["o"]], [None]])
def test_biases_of_no_role_are_refused(biases):
    with pytest.raises(CorruptCheckpoint, match="biases"):
        config_from_hf({**SAID, "model_type": "llama", "gossamer_layers": [{}, {"biases": biases}]})
