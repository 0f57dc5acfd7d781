"""Every family as llama.cpp computes it: logits of a tiny model after each of 40 tokens, and what it makes of texts.

Bounds, in standard deviations of the logits: 1e-4 with silu. ggml looks up GELU in a table of float16, which has 11
bits, and takes its tanh form also for GPT-NeoX: 1e-2 there. What is written wrongly by one key must be far outside.
Activations that meet integers it rounds to 8 bits, which random layers amplify: 0.25 in the root mean square, where
other logits would have 1.4.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peer_engines import python

from exports import run_export
from gguf_families import FAMILIES, make_model, make_rounded
from gguf_tokenizers import TOKENIZERS, gemma_tokenizer
from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.export.gguf import GGUFExport
from gossamer.export.run import Proving

pytestmark = pytest.mark.slow
TOKENS = torch.randint(1, 300, (40,), generator=torch.Generator().manual_seed(3)).tolist()
SILU, GELU, EIGHT_BITS = 1e-4, 1e-2, 0.25
TEXTS = ("It's 12345, and two  spaces.", "(a|b)\n\n\u3002 x\u00e9\U0001f642", "hello <|end|> 'S 1 22 333 4444")
BASES = ("qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "bloom")
MISTAKES = [
    ("llama-scaled", "llama.rope.scaling.factor", 1.0),
    ("qwen2", "qwen2.rope.freq_base", 1e6),
    ("qwen3", "qwen3.attention.layer_norm_rms_epsilon", 0.1),
    ("gemma2", "gemma2.attn_logit_softcapping", 50.0),
    ("gemma2", "gemma2.final_logit_softcapping", 30.0),
    ("gemma2", "gemma2.attention.sliding_window", 8),
    ("gemma2-scaled", "gemma2.attention.sliding_window_pattern", 2),
    ("gemma3_text", "gemma3.rope.freq_base_swa", 1e6),
    ("gemma3_text", "gemma3.rope.scaling.factor", 1.0),
    ("phi3-half", "phi3.rope.dimension_count", 16),
    ("gpt2", "gpt2.attention.layer_norm_epsilon", 0.1),
    ("gpt_neox", "gptneox.rope.dimension_count", 16),
    ("gpt_neox-scaled", "gptneox.rope.scaling.factor", 1.0),
    ("gpt_neox-sequential", "gptneox.use_parallel_residual", True),
    ("bloom", "bloom.attention.layer_norm_epsilon", 0.1),
]
"""Model, key, a wrong value."""


def ask(path: Path, texts: tuple[str, ...] = ()) -> tuple[torch.Tensor, list[list[int]]]:
    """llama.cpp's logits [tokens, vocab_size], and its token ids of the texts."""
    script, out = Path(__file__).with_name("llama_cpp_logits.py"), path.with_suffix(".npy")
    job = {"path": str(path), "tokens": TOKENS, "texts": texts, "out": str(out)}
    command = [python("llama-cpp-python"), "-P", script]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.from_numpy(np.load(out)), json.loads(done.stdout.splitlines()[-1])


def difference(model: Path, file: Path) -> torch.Tensor:
    """llama.cpp's logits less ours, in standard deviations of ours."""
    ours = load_decoder(open_checkpoint(model))(torch.tensor([TOKENS]))[0]
    found = (ask(file)[0] - ours) / ours.std()
    print(f"at most {float(found.abs().max()):.1e}, root mean square {float(found.square().mean().sqrt()):.1e}")
    return found


def largest(model: Path, file: Path) -> float:
    return float(difference(model, file).abs().max())


def root_mean_square(model: Path, file: Path) -> float:
    return float(difference(model, file).square().mean().sqrt())


def bound(name: str) -> float:
    return SILU if name.startswith(("llama", "mistral", "qwen", "phi3")) else GELU


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_our_logits(tmp_path, name) -> None:
    make_model(tmp_path / "m", name)
    run_export(tmp_path / "m", "gguf", tmp_path / "m.gguf")
    assert largest(tmp_path / "m", tmp_path / "m.gguf") < bound(name)


@pytest.mark.parametrize(("name", "key", "wrong"), MISTAKES, ids=lambda value: str(value))
def test_a_wrong_key_shows(tmp_path, monkeypatch, name, key, wrong) -> None:
    make_model(tmp_path / "m", name)
    right = GGUFExport._metadata

    def metadata(export: GGUFExport) -> dict[str, Any]:
        said = right(export)
        assert said[key] != wrong
        return {**said, key: wrong}

    monkeypatch.setattr(GGUFExport, "_metadata", metadata)
    run_export(tmp_path / "m", "gguf", tmp_path / "m.gguf", proving=Proving(verify=False))
    assert largest(tmp_path / "m", tmp_path / "m.gguf") > 10 * bound(name)


@pytest.mark.parametrize("name", BASES)
def test_llama_cpp_computes_with_integers(tmp_path, name) -> None:
    model = make_rounded(tmp_path / "m", name, bits=8, group_size=32)
    assert run_export(model, "gguf", tmp_path / "m.gguf")["weights"]["max_abs_error"] == 0.0
    assert root_mean_square(model, tmp_path / "m.gguf") < EIGHT_BITS


@pytest.mark.parametrize("name", BASES)
def test_k_quants_are_what_we_read(tmp_path, llama_cpp, name) -> None:
    wide = {"n_embd": 256} if name == "gpt2" else {"hidden_size": 256}
    wide |= {} if name in ("gpt2", "bloom") else {"intermediate_size": 256}
    make_model(tmp_path / "m", name, **wide)
    options = {"layout": "q4_k_m", "llama_cpp": llama_cpp, "rounding": True}
    run_export(tmp_path / "m", "gguf", tmp_path / "m.gguf", **options)
    assert "q4_k" in {
        open_checkpoint(tmp_path / "m.gguf").format(n).name for n in open_checkpoint(tmp_path / "m").names()
    }
    assert root_mean_square(tmp_path / "m.gguf", tmp_path / "m.gguf") < EIGHT_BITS


def test_the_server_answers_for_another_family(tmp_path, llama_cpp) -> None:
    make_model(tmp_path / "m", "qwen3")
    engine = run_export(tmp_path / "m", "gguf", tmp_path / "m.gguf", llama_cpp=llama_cpp, proving=Proving())["engine"]
    assert engine["agree"] == engine["tokens"] == 48


@pytest.mark.parametrize("pre", [*TOKENIZERS, "gemma"])
def test_llama_cpp_splits_text_as_we_do(tmp_path, pre) -> None:
    make_model(tmp_path / "m", "gpt2")
    made = gemma_tokenizer() if pre == "gemma" else TOKENIZERS[pre]()
    made.save(str(tmp_path / "m" / "tokenizer.json"))
    run_export(tmp_path / "m", "gguf", tmp_path / "m.gguf")
    ours = open_checkpoint(tmp_path / "m").tokenizer()
    assert ask(tmp_path / "m.gguf", TEXTS)[1] == [ours.encode(text) for text in TEXTS]
