"""Tiny models in both containers, written by other libraries than ours: what the readers are tried on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from gossamer.formats import Codes, Integer

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = ("he", "ll", "hell", "hello", "\u0120w")
MERGES = (("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u0120", "w"))
RESERVED = tuple(f"<reserved_{i}>" for i in range(24))
VOCAB = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *WORDS, *RESERVED]


class Tiny:
    """One LLaMA of a few thousand weights."""

    template = TEMPLATE
    vocab = VOCAB
    merges = MERGES

    def config(self, **changes: Any) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(VOCAB),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 128,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
            **changes,
        }

    def shapes(self, layers: int = 2, hidden: int = 64, ffn: int = 96) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (len(VOCAB), hidden)}
        for i in range(layers):
            block = f"model.layers.{i}"
            shapes |= {
                f"{block}.self_attn.q_proj.weight": (hidden, hidden),
                f"{block}.self_attn.k_proj.weight": (hidden // 2, hidden),
                f"{block}.self_attn.v_proj.weight": (hidden // 2, hidden),
                f"{block}.self_attn.o_proj.weight": (hidden, hidden),
                f"{block}.mlp.gate_proj.weight": (ffn, hidden),
                f"{block}.mlp.up_proj.weight": (ffn, hidden),
                f"{block}.mlp.down_proj.weight": (hidden, ffn),
                f"{block}.input_layernorm.weight": (hidden,),
                f"{block}.post_attention_layernorm.weight": (hidden,),
            }
        return {**shapes, "model.norm.weight": (hidden,)}

    def tensors(self, **kwargs: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        return {n: torch.randn(s, generator=generator).bfloat16() for n, s in self.shapes(**kwargs).items()}

    def backend(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(VOCAB)}, list(MERGES)))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
        return backend

    def folder(
        self, path: Path, *, tensors: dict[str, torch.Tensor] | None = None, shards: int = 1, **config: Any
    ) -> Path:
        """A Hugging Face folder, as safetensors' own library writes it."""
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(self.config(**config)))
        self.backend().save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE})
        )
        tensors = self.tensors() if tensors is None else tensors
        if shards == 1:
            safetensors.torch.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
            return path
        weight_map = {}
        for shard in range(shards):
            part = dict(list(tensors.items())[shard::shards])
            name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            safetensors.torch.save_file(part, path / name)
            weight_map |= dict.fromkeys(part, name)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return path

    def quantized(self, folder: Path, form: Integer) -> dict[str, torch.Tensor]:
        """A compressed-tensors folder whose linear layers are in this format; returns its float weights."""
        tensors, floats = self.tensors(), {}
        generator = torch.Generator().manual_seed(3)
        for name, tensor in list(tensors.items()):
            floats[name] = tensor.float()
            if "_proj" not in name:
                continue
            groups = form.groups(tensor.shape[1])
            low, high = -(2 ** (form.bits - 1)), 2 ** (form.bits - 1)
            codes = Codes(
                torch.randint(low, high, tensor.shape, generator=generator).to(torch.int8),
                torch.rand(tensor.shape[0], groups, generator=generator).bfloat16(),
                None
                if form.symmetric
                else torch.randint(low, high, (tensor.shape[0], groups), generator=generator).to(torch.int8),
            )
            del tensors[name]
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{local}": stored for local, stored in form.pack(codes).items()}
            floats[name] = codes.dequantize()
        self.folder(folder, tensors=tensors, quantization_config=_compressed_tensors(form))
        return floats

    def gguf(
        self,
        path: Path,
        *,
        kind: str = "Q8_0",
        layers: int = 2,
        untied: bool = False,
        leave_out: tuple[str, ...] = (),
        extra: dict[str, np.ndarray[Any, Any]] | None = None,
        **metadata: Any,
    ) -> dict[str, torch.Tensor]:
        """A GGUF file, as the `gguf` package writes it; returns its float tensors by Hugging Face names and layout."""
        writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
        values = {
            "llama.block_count": layers,
            "llama.context_length": 128,
            "llama.embedding_length": 64,
            "llama.feed_forward_length": 96,
            "llama.attention.head_count": 4,
            "llama.attention.head_count_kv": 2,
            "llama.rope.freq_base": 10000.0,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": VOCAB,
            "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(VOCAB) - len(SPECIAL)),
            "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": TEMPLATE,
            **{key.replace("__", "."): value for key, value in metadata.items()},
        }
        for key, value in values.items():
            if value is not None and key not in leave_out:
                self._add(writer, key, value)
        floats: dict[str, torch.Tensor] = {}
        tensors = self.tensors(layers=layers)
        if untied:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
        for name, tensor in tensors.items():
            wanted = kind if tensor.dim() == 2 else "F32"
            number = gguf.GGMLQuantizationType[wanted]
            stored = gguf.quants.quantize(_permuted(name, tensor.float()).numpy(), number)
            writer.add_tensor(_gguf_name(name), stored, raw_dtype=number)
            floats[name] = _unpermuted(name, torch.from_numpy(gguf.quants.dequantize(stored, number).copy()))
        for name, array in (extra or {}).items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return floats

    def _add(self, writer: gguf.GGUFWriter, key: str, value: Any) -> None:
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _compressed_tensors(form: Integer) -> dict[str, Any]:
    """The quantization_config of a model whose linear layers are all in this format."""
    weights = {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": form.symmetric,
        "strategy": "group" if form.group_size else "channel",
        "group_size": form.group_size,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _gguf_name(name: str) -> str:
    for hf, short in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("_proj", ""),
    ):
        name = name.replace(hf, short)
    return name


def _permuted(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """[heads, 2 halves, width / 2] -> [heads, width / 2, 2], as the converters of GGUF do for rotary pairs."""
    if "q_proj" not in name and "k_proj" not in name:
        return tensor
    return tensor.reshape(-1, 2, 8, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape).contiguous()


def _unpermuted(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if "q_proj" not in name and "k_proj" not in name:
        return tensor
    return tensor.reshape(-1, 8, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape).contiguous()


@pytest.fixture
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path_factory.mktemp("cache")))
