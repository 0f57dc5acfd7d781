"""GGUF files of other families than LLaMA, written as llama.cpp's converter lays them out, against their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.checkpoint.save import SHARD_BYTES, entries, fused, write_config, write_weights
from gossamer.errors import CorruptCheckpoint, UnsupportedModel
from tiny_families import make_family

FAMILIES = {
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "phi3-partial": "phi3",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "gpt_neox-sequential": "gptneox",
    "bloom": "bloom",
}


def laid_out(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """A tensor of transformers as the converter writes it."""
    family = config.model_type
    if family.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if family == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.T.contiguous()
    if "query_key_value" in name:  # from head by head to q, k, v
        heads = config.num_attention_heads
        split = tensor.reshape(heads, 3, tensor.shape[0] // heads // 3, -1)
        return split.transpose(0, 1).reshape(tensor.shape).contiguous()
    return tensor


def write(path: Path, oracle: Any, arch: str, kind: str = "F32") -> None:
    c, writer = oracle.config, gguf.GGUFWriter(path, arch)
    hidden, heads = c.hidden_size, c.num_attention_heads
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(getattr(c, "intermediate_size", None) or getattr(c, "n_inner", None) or 4 * hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(c, "num_key_value_heads", heads))
    norm = getattr(c, "rms_norm_eps", None)
    if norm is not None:
        writer.add_layer_norm_rms_eps(norm)
    else:
        writer.add_layer_norm_eps(getattr(c, "layer_norm_eps", None) or c.layer_norm_epsilon)
    if getattr(c, "head_dim", None):
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    rope = getattr(c, "rope_parameters", None)
    if rope:
        whole = rope.get("full_attention", rope)
        writer.add_rope_freq_base(whole["rope_theta"])
        if whole["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(whole["factor"])
        if "sliding_attention" in rope:
            writer.add_float32(f"{arch}.rope.freq_base_swa", rope["sliding_attention"]["rope_theta"])
        if "partial_rotary_factor" in whole:
            writer.add_rope_dimension_count(int(hidden // heads * whole["partial_rotary_factor"]))
    if getattr(c, "sliding_window", None):
        writer.add_sliding_window(c.sliding_window)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(c, key, None):
            writer.add_float32(f"{arch}.{key}", getattr(c, key))
    writer.add_pad_token_id(0)
    if arch == "gptneox":
        writer.add_parallel_residual(c.use_parallel_residual)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], c.num_hidden_layers)
    tied = getattr(c, "tie_word_embeddings", False)
    for name, tensor in oracle.state_dict().items():
        if tied and name in ("lm_head.weight", "embed_out.weight"):
            continue
        data = laid_out(name, tensor, c).numpy()
        short = name.removeprefix("transformer.") if arch == "bloom" else name
        found = names.get_name(short, try_suffixes=(".weight", ".bias"))
        assert found, name
        chosen = gguf.GGMLQuantizationType[kind if data.ndim == 2 and "attn_qkv" in found else "F32"]
        writer.add_tensor(found, gguf.quantize(data, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def plain(variant: str) -> dict[str, Any]:
    """What the file cannot say, or llama.cpp takes from the shape."""
    if variant.startswith("gemma"):
        return {"query_pre_attn_scalar": 16, "layer_types": None}
    return {}


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path, monkeypatch) -> tuple[str, Path, Path]:
    import tiny_families

    variant = request.param
    said = tiny_families.VARIANTS[variant] | plain(variant)
    said = {key: value for key, value in said.items() if value is not None}
    monkeypatch.setitem(tiny_families.VARIANTS, variant, said)
    oracle = make_family(tmp_path / "folder", variant)
    write(tmp_path / "m.gguf", oracle, FAMILIES[variant])
    return variant, tmp_path / "folder", tmp_path / "m.gguf"


def test_a_file_has_the_tensors_and_the_logits_of_its_folder(pair) -> None:
    _, folder, path = pair
    ours, theirs = open_checkpoint(path), open_checkpoint(folder)
    assert set(ours.names()) == set(theirs.names())
    for name in ours.names():
        expected = theirs.tensor(name)
        torch.testing.assert_close(ours.tensor(name), expected, rtol=0, atol=1e-6)  # 1 was added and taken away
        torch.testing.assert_close(ours.tensor(name, slice(1, 3)), expected[1:3], rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.stored(name)["weight"], expected, rtol=0, atol=1e-6)
    tokens = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(load_decoder(ours)(tokens), load_decoder(theirs)(tokens), rtol=0, atol=1e-4)


def test_a_file_becomes_a_folder_that_transformers_loads(pair, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    _, folder, path = pair
    checkpoint = open_checkpoint(path)
    (tmp_path / "out").mkdir()
    write_config(tmp_path / "out", checkpoint.hf_config)
    tensors = [entry for name in checkpoint.names() for entry in entries(checkpoint, name)]
    write_weights(tmp_path / "out", fused(checkpoint.config, tensors), SHARD_BYTES)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    tokens = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = model.eval()(tokens).logits
    torch.testing.assert_close(load_decoder(checkpoint)(tokens), expected, rtol=0, atol=1e-4)


def test_quantized_rows_of_a_tensor_of_several_layers_are_split(tmp_path) -> None:
    oracle = make_family(tmp_path / "folder", "gpt2")
    write(tmp_path / "m.gguf", oracle, "gpt2", kind="Q8_0")
    ours, theirs = open_checkpoint(tmp_path / "m.gguf"), open_checkpoint(tmp_path / "folder")
    for role in "qkv":
        name = f"transformer.h.1.attn.{role}_proj.weight"
        assert ours.format(name).name == "q8_0"
        q8 = gguf.GGMLQuantizationType.Q8_0
        expected = gguf.dequantize(gguf.quantize(theirs.tensor(name).numpy(), q8), q8)
        assert np.array_equal(ours.tensor(name).numpy(), expected)


def test_what_does_not_fit_is_refused(tmp_path) -> None:
    oracle = make_family(tmp_path / "folder", "gpt2")
    oracle.transformer.h[0].attn.c_attn.weight = torch.nn.Parameter(torch.zeros(64, 190), requires_grad=False)
    write(tmp_path / "m.gguf", oracle, "gpt2")
    with pytest.raises(CorruptCheckpoint, match="190 rows"):
        open_checkpoint(tmp_path / "m.gguf")
    oracle.config.num_key_value_heads = 2
    write(tmp_path / "g.gguf", oracle, "gpt2")
    with pytest.raises(UnsupportedModel, match=r"g\.gguf: gpt2\.attention\.head_count_kv differs from the number"):
        open_checkpoint(tmp_path / "g.gguf")
    writer = gguf.GGUFWriter(tmp_path / "o.gguf", "opt")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match="opt"):
        open_checkpoint(tmp_path / "o.gguf")
