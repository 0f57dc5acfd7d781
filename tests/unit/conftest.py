"""A tiny model folder that several parts are tried on: random weights, a byte-level tokenizer, a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_tokenizer(folder: Path, template: str | None) -> int:
    """tokenizer.json and its config; returns the size of the vocabulary."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    vocab = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(vocab)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"} | (
        {"chat_template": template} if template else {}
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocab)


def write_model(folder: Path, *, template: str | None = TEMPLATE, packed: bool = False, **changes: object) -> Path:
    """A two-layer LLaMA; `packed` stores its linear layers and its embedding as integers of several kinds."""
    import safetensors.torch
    import torch

    from gossamer.formats import quantization_config
    from gossamer.model import config_from_hf, tensor_names

    folder.mkdir(parents=True)
    hf = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": write_tokenizer(folder, template),
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 96,
        "rope_theta": 10000.0, "tie_word_embeddings": True, "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    } | changes  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    tensors, formats = {}, {}
    for name, shape in tensor_names(config_from_hf(hf)).items():
        weight = torch.randn(shape, generator=generator) * (0.2 if len(shape) == 2 else 1.0)
        module = name.removesuffix(".weight")
        if packed and len(shape) == 2:
            formats[module] = _kind_of_integers(module)
            tensors |= {f"{module}.{local}": t for local, t in _quantized(weight, formats[module]).items()}
        else:
            tensors[name] = weight.bfloat16()
    if packed:
        kinds = {m: "embedding" if m.endswith("embed_tokens") else "linear" for m in formats}
        hf["quantization_config"] = quantization_config(formats, kinds, "lm_head")
    (folder / "config.json").write_text(json.dumps(hf))
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _kind_of_integers(module: str):
    from gossamer.formats import Integer

    if module.endswith(("embed_tokens", "lm_head")):
        return Integer(8, None, symmetric=True)
    if module.endswith("v_proj"):
        return Integer(4, 32, symmetric=False)
    if module.endswith("down_proj"):
        return Integer(3, 32, symmetric=True)
    return Integer(4, None if module.endswith("o_proj") else 32, symmetric=True)


def _quantized(weight, form):
    """Rounded to the nearest code, by group: what a weight becomes does not matter here, only how it is stored."""
    import torch

    from gossamer.formats import Codes

    out, columns = weight.shape
    grouped = weight.view(out, form.groups(columns), -1)
    scale = (grouped.abs().amax(-1) / 2 ** (form.bits - 1)).bfloat16()
    zero = None if form.symmetric else torch.randint(-2, 3, scale.shape).to(torch.int8)
    shift = 0 if zero is None else zero.unsqueeze(-1)
    top = 2 ** (form.bits - 1)
    codes = (grouped / scale.unsqueeze(-1).float()).round().add(shift).clamp(-top, top - 1).to(torch.int8)
    return form.pack(Codes(codes.view(out, columns), scale, zero))


@pytest.fixture(scope="session")
def write_tiny_model():
    """write_model, for tests that want another one."""
    return write_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny bfloat16 model with a context of 96 tokens."""
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, its linear layers and its tied embedding packed as integers."""
    return write_model(tmp_path_factory.mktemp("tiny") / "packed", packed=True)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements run in this process, which spares a start of Python for each."""
    from inline_worker import InlineWorker

    monkeypatch.setattr("gossamer.measure.run.Worker", InlineWorker)
