"""A LLaMA folder as a BF16 GGUF file without a tokenizer, which is enough to quantize and to time it.

python benchmarks/make_gguf.py FOLDER OUT.gguf
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import torch

from gossamer.checkpoint import Checkpoint, open_checkpoint


def write_gguf(folder: Path, out: Path) -> None:
    """Write the file; tensors are read one at a time, and kept until all are there."""
    checkpoint = open_checkpoint(folder)
    writer = gguf.GGUFWriter(out, "llama", use_temp_file=True)
    _describe(writer, checkpoint)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, checkpoint.hf_config["num_hidden_layers"])
    for name in checkpoint.names():
        key = names.get_name(name, try_suffixes=(".weight",))
        assert key is not None, name
        weight = _permuted(checkpoint, name)
        if weight.dim() == 1:
            writer.add_tensor(key, weight.numpy())
        else:
            raw = weight.bfloat16().view(torch.int16).numpy().view(np.uint8)
            writer.add_tensor(key, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    config = checkpoint.hf_config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(checkpoint.config.layers[0].head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


def _permuted(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A float32 tensor; the rows of query and key projections as GGUF has them, rotary pairs side by side."""
    weight, config = checkpoint.tensor(name), checkpoint.hf_config
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return weight
    rows, columns = weight.shape
    count = config[heads]
    return weight.view(count, 2, rows // count // 2, columns).transpose(1, 2).reshape(rows, columns)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
