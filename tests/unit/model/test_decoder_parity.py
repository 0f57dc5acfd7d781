"""The Decoder computes what transformers computes, within 1e-4 in float32: whole texts, and token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.model import config_from_hf, tensor_names
from gossamer.model.decoder import Decoder

LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 10000.0,
}  # fmt: skip
VARIANTS = {
    "grouped": {},
    "one key-value head": {"num_key_value_heads": 1},
    "one head each": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "ffn bias": {"mlp_bias": True},
    "wide heads": {"head_dim": 24},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama3 scaling": {"rope_parameters": LLAMA3},
}


def oracle(changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128,
            "tie_word_embeddings": False, "initializer_range": 0.2,
        }
        | changes
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    for name, tensor in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # transformers begins with 0 and 1, which hide mistakes
            tensor.data.normal_(1.0 if "norm" in name else 0.0, 0.5)
    return model


class InMemory:
    """As much of a checkpoint as loading takes, over a transformers model."""

    name = path = "memory"
    dtype = torch.float32

    def __init__(self, model):
        self.hf_config = model.config.to_dict()
        self.config = config_from_hf(self.hf_config)
        state = model.state_dict()
        self.tensors = {name: state[name] for name in tensor_names(self.config)}

    def names(self):
        return tuple(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def tensor(self, name, rows=None, dtype=torch.float32):
        return self.tensors[name].to(dtype)


class DenseCache:
    """Keys and values of a batch at their positions: per layer [batch, num_kv_heads, max_length, head_dim]."""

    def __init__(self, config, batch, max_length):
        self.keys = [torch.zeros(batch, c.num_kv_heads, max_length, c.head_dim) for c in config.layers]
        self.values = [torch.zeros_like(k) for k in self.keys]

    def store(self, layer, positions, k, v):
        rows = torch.arange(len(positions)).unsqueeze(1)
        self.keys[layer][rows, :, positions] = k
        self.values[layer][rows, :, positions] = v
        end = int(positions.max()) + 1
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


def pair(changes) -> tuple[torch.nn.Module, Decoder]:
    model = oracle(changes)
    return model, load_decoder(InMemory(model))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_agree_over_a_whole_text(changes):
    model, decoder = pair(changes)
    tokens = torch.randint(131, (2, 100))
    with torch.no_grad():
        expected = model(tokens).logits
    assert expected.std() > 0.3
    assert difference(decoder(tokens), expected) < 1e-4
    assert difference(decoder(tokens, last_only=True), expected[:, -1:]) < 1e-4


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_agree_token_by_token_with_a_cache(changes):
    model, decoder = pair(changes)
    tokens = torch.randint(131, (2, 60))
    with torch.no_grad():
        expected = model(tokens).logits
    cache = DenseCache(decoder.config, 2, 60)
    pieces = [decoder(tokens[:, :17], cache)]
    for at in range(17, 40):
        pieces.append(decoder(tokens[:, at : at + 1], cache, torch.full((2, 1), at)))
    pieces.append(decoder(tokens[:, 40:], cache, torch.arange(40, 60).expand(2, -1)))
    assert difference(torch.cat(pieces, 1), expected) < 1e-4


def test_padding_on_the_right_of_a_prompt_changes_nothing():
    _, decoder = pair({})
    short, long = torch.randint(131, (1, 7)), torch.randint(131, (1, 20))
    alone = DenseCache(decoder.config, 1, 32)
    first = decoder(short, alone)[:, -1]
    then = decoder(torch.tensor([[5]]), alone, torch.tensor([[7]]))[:, 0]
    both = DenseCache(decoder.config, 2, 32)
    padded = torch.cat([torch.nn.functional.pad(short, (0, 13), value=99), long])
    assert difference(decoder(padded, both)[:1, 6], first) < 1e-5
    stepped = decoder(torch.tensor([[5], [6]]), both, torch.tensor([[7], [20]]))
    assert difference(stepped[:1, 0], then) < 1e-5


def test_ragged_layers_run_as_their_shapes_say():
    """A pruned model: every layer narrower in its own way, against layers cut from the oracle by hand."""
    model = oracle({})
    state = dict(model.state_dict())
    state["model.layers.1.mlp.gate_proj.weight"][40:] = 0  # gate 0 makes silu 0: the same as not being there
    hf = model.config.to_dict() | {"gossamer_layers": [{}, {"ffn_width": 40}, {}]}
    config = config_from_hf(hf)
    narrow = InMemory(model)
    narrow.config = config
    for name, shape in tensor_names(config).items():
        narrow.tensors[name] = state[name][tuple(slice(n) for n in shape)]
    tokens = torch.randint(131, (1, 50))
    with torch.no_grad():
        expected = model(tokens).logits
    assert difference(load_decoder(narrow)(tokens), expected) < 1e-4


@pytest.mark.slow
def test_smollm2_agrees_over_512_tokens():
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = open_checkpoint("smollm2")
    tokens = torch.tensor([checkpoint.tokenizer().encode(Path(__file__).read_text())[:512]])
    assert tokens.shape == (1, 512)
    decoder = load_decoder(checkpoint)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**checkpoint.hf_config))
    state = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    with torch.no_grad():
        expected = model.float().eval()(tokens).logits
    assert difference(decoder(tokens), expected) < 1e-4
