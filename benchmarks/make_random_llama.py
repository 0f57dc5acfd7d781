"""Makes a LLaMA folder with random weights of any size, one tensor in memory at a time.

    python benchmarks/make_random_llama.py OUT [--hidden 2048] [--layers 16] [--ffn 8192] [--vocab 128256]

The defaults are a 1-billion-parameter shape. The tokenizer is SmolLM2's: its ids are a part of the vocabulary.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.safetensors_io import Entry, write_safetensors
from gossamer.model import config_from_hf, tensor_names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    for name, default in (("hidden", 2048), ("layers", 16), ("heads", 32), ("kv-heads", 8), ("ffn", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, default=128256)
    make(parser.parse_args())


def make(args: argparse.Namespace, **more: Any) -> None:
    """Write config.json (with `more` in it), tokenizer and model.safetensors (bf16)."""
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.hidden // args.heads,
        "intermediate_size": args.ffn,
        "vocab_size": args.vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "dtype": "bfloat16",
        **more,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "config.json").write_text(json.dumps(hf, indent=2))
    open_checkpoint("smollm2").tokenizer().save(args.out)
    names = tensor_names(config_from_hf(hf))
    entries = [Entry(name, torch.bfloat16, shape, random_rows(name, shape)) for name, shape in names.items()]
    write_safetensors(args.out / "model.safetensors", entries)
    print(f"{args.out}: {sum(torch.Size(s).numel() for s in names.values()) / 1e9:.2f} billion parameters")


def random_rows(name: str, shape: tuple[int, ...]) -> Callable[[], Iterator[torch.Tensor]]:
    """Chunks of a tensor: ones for a norm, else normal values of the usual initial size, seeded by the name."""

    def chunks() -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(sum(name.encode()))
        for start in range(0, shape[0], 4096):
            part = (min(4096, shape[0] - start), *shape[1:])
            if len(shape) == 1:
                yield torch.ones(part, dtype=torch.bfloat16)
            else:
                yield (torch.randn(part, generator=generator) * 0.02).bfloat16()

    return chunks


if __name__ == "__main__":
    main()
