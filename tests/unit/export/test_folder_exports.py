"""Folders for other engines: exact where the layout can say it, refused by name where it cannot, read by other code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exports import make_artifact, run_export
from gguf_families import make_model, make_rounded
from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.errors import ExportError, ProofFailed, UnknownName
from gossamer.export import awq, gptq, mlc, proof, tensorrt_llm
from gossamer.export.engines import Answers, find
from gossamer.export.registry import TARGETS, target_class
from gossamer.export.run import Proving
from gossamer.formats import Codebook, Dense, Format, Integer, KMeans, LowRank, Sparse
from tiny_llama import make_folder

FOLDERS = ("transformers", "vllm", "gptq", "awq", "mlc", "tensorrt-llm")
EXACT: dict[str, list[Format | None]] = {
    "transformers": [
        None,
        Integer(4, 32),
        Integer(3, 64, symmetric=False),
        Integer(8, None),
        Codebook("fp8", None),
        Codebook("nvfp4", 16),
        Codebook("mxfp4", 32),
    ],
    "vllm": [None, Integer(4, 64), Integer(4, 64, symmetric=False), Codebook("fp8", None), Codebook("nvfp4", 16)],
    "gptq": [Integer(4, 32), Integer(8, None), Integer(3, 32), Integer(2, 64), Integer(4, None)],
    "awq": [Integer(4, 32), Integer(4, 64, symmetric=False), Integer(4, None)],
    "mlc": [None, Integer(4, 32), Integer(4, 64), Integer(4, None), Integer(3, 32)],
    "tensorrt-llm": [None, Integer(4, 64), Codebook("fp8", None)],
}
REFUSED: dict[str, list[tuple[Format | None, str]]] = {
    "transformers": [(Codebook("nf4", 64), "not exact in bfloat16"), (KMeans(3), "not exact in bfloat16")],
    "vllm": [(Integer(8, None, outliers=True, outlier_share=0.02), "not exact in bfloat16")],
    "gptq": [
        (None, "bf16"),
        (Integer(5, 32), "5 bits"),
        (Integer(4, 32, symmetric=False), "zero point of 0"),
        (Codebook("fp8", None), "fp8"),
    ],
    "awq": [(Integer(8, None), "8 bits"), (Codebook("mxfp4", 32), "mxfp4"), (None, "bf16")],
    "mlc": [
        (Integer(8, None), "not exact in q4f16_2"),
        (Integer(4, 32, symmetric=False), "not exact"),
        (Codebook("nf4", 64), "no layout is like nf4"),
    ],
    "tensorrt-llm": [
        (Integer(8, None), "int8 for FP8"),
        (Integer(4, 32), "int4-g32"),
        (Codebook("nvfp4", 16), "nvfp4"),
    ],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    rows = [(target, *(row if isinstance(row, tuple) else (row,))) for target, each in table.items() for row in each]
    return [pytest.param(*row, id=f"{row[0]}-{row[1].name if row[1] else 'dense'}") for row in rows]


@pytest.mark.parametrize(("target", "form"), cases(EXACT))
def test_what_a_target_can_say_is_read_back_exactly(tmp_path, target, form) -> None:
    record = run_export(make_artifact(tmp_path / "m", form), target, tmp_path / "out")
    assert record["weights"]["max_abs_error"] == 0.0
    assert record["rounded"] == []
    manifest = json.loads((tmp_path / "out" / "gossamer.json").read_text())
    assert manifest["results"]["export"]["target"] == target
    assert manifest["results"]["export"]["weights"] == record["weights"]
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(("target", "form", "words"), cases(REFUSED))
def test_what_a_target_would_read_wrongly_is_refused_with_a_way_out(tmp_path, target, form, words) -> None:
    with pytest.raises(ExportError) as caught:
        run_export(make_artifact(tmp_path / "m", form), target, tmp_path / "out")
    assert words in caught.value.message
    assert caught.value.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize(
    ("target", "form", "words"),
    [
        ("awq", Integer(4, None, symmetric=False), "has 100 rows, and 8 go into a word"),
        ("gptq", Integer(4, None), "has 100 (rows|columns), and codes are packed 32 at a time"),
        ("gguf", Integer(4, None), "has 100 columns, and Q8_0 comes in blocks of 32"),
    ],
)
def test_widths_that_do_not_fill_a_word_or_a_block_are_refused_by_name(tmp_path, target, form, words) -> None:
    model = make_artifact(tmp_path / "m", form, intermediate_size=100)
    with pytest.raises(ExportError, match=f"_proj.* {words}"):
        run_export(model, target, tmp_path / "out", rounding=target == "gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize("target", ["gguf", *FOLDERS])
def test_zeros_of_a_sparse_model_are_filled_in(tmp_path, target) -> None:
    for form in (Sparse(Integer(4, 64), 0.5), Sparse(Dense(torch.bfloat16), 0.5)):
        model = make_artifact(tmp_path / form.name, form)
        if isinstance(form.inner, Integer) or target not in ("gptq", "awq"):
            record = run_export(model, target, tmp_path / f"out-{form.name}")
            assert record["weights"]["max_abs_error"] == 0.0
            assert record["rounded"] == []


@pytest.mark.parametrize(("target", "layout"), [("gguf", "f32"), ("transformers", "f32"), ("mlc", "q0f32")])
def test_factors_are_multiplied_out_in_float32_or_refused(tmp_path, target, layout) -> None:
    model = make_artifact(tmp_path / "m", LowRank(8))
    with pytest.raises(ExportError, match="rank8-bf16"):
        run_export(model, target, tmp_path / "out")
    record = run_export(model, target, tmp_path / "out", layout=layout)
    assert (record["weights"]["max_abs_error"], record["rounded"]) == (0.0, [])


@pytest.mark.parametrize("target", FOLDERS)
def test_layers_of_different_shapes_are_refused(tmp_path, target) -> None:
    form = Integer(4, 64)
    model = make_artifact(tmp_path / "m", form, gossamer_layers=[{"ffn_width": 64}, {}])
    with pytest.raises(ExportError, match="differ") as caught:
        run_export(model, target, tmp_path / "out")
    assert "deci" in str(caught.value)


@pytest.mark.parametrize("target", [t for t in FOLDERS if t not in ("gptq", "awq", "mlc")])
def test_a_packed_embedding_becomes_floats_only_if_rounding_is_allowed(tmp_path, target) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 64), ends=Integer(8, None))
    with pytest.raises(ExportError, match=r"embed_tokens|lm_head"):
        run_export(model, target, tmp_path / "out")
    record = run_export(model, target, tmp_path / "out", rounding=True)
    assert record["rounded"] == ["model.embed_tokens.weight"]
    assert 0 < record["weights"]["max_abs_error"] < 0.5


@pytest.mark.parametrize("target", ["gptq", "awq"])
def test_grids_that_differ_between_layers_are_refused(tmp_path, target) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 32), forms={"down": Integer(4, 64)})
    with pytest.raises(ExportError, match="down_proj"):
        run_export(model, target, tmp_path / "out")


def test_vllm_refuses_two_formats_in_what_it_multiplies_at_once(tmp_path) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 32), forms={"v": Integer(8, None)})
    with pytest.raises(ExportError, match="v_proj"):
        run_export(model, "vllm", tmp_path / "out")
    assert run_export(model, "transformers", tmp_path / "out")["weights"]["max_abs_error"] == 0.0


def test_gptq_says_its_version_and_both_read_alike(tmp_path) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 32))
    for layout in ("gptq", "gptq_v2"):
        run_export(model, "gptq", tmp_path / layout, layout=layout)
        said = json.loads((tmp_path / layout / "quantize_config.json").read_text())
        assert (said["checkpoint_format"], said["group_size"], said["sym"]) == (layout, 32, True)
    name = "model.layers.0.mlp.up_proj.qzeros"
    first, second = (load_file(tmp_path / v / "model.safetensors")[name] for v in ("gptq", "gptq_v2"))
    assert set((first & 15).flatten().tolist()) == {7}
    assert set((second & 15).flatten().tolist()) == {8}


def test_a_zero_point_of_zero_is_said_in_version_2(tmp_path) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 32, symmetric=False))
    record = run_export(model, "gptq", tmp_path / "out", layout="gptq_v2")
    assert record["weights"]["max_abs_error"] == 0.0


@pytest.mark.parametrize("target", ["gptq", "awq", "tensorrt-llm"])
def test_scales_beyond_float16_are_refused(tmp_path, target) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 64))
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    tensors[name][0, 0] = 1e6
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"layers\.1\.mlp\.up_proj.*float16"):
        run_export(model, target, tmp_path / "out")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_packed_down_are_what_a_sum_of_powers_says(bits) -> None:
    codes = torch.randint(0, 1 << bits, (64, 5), generator=torch.Generator().manual_seed(bits))
    words = gptq.pack_down(codes, bits)
    for column in range(5):
        stream = sum(int(code) << (bits * i) for i, code in enumerate(codes[:, column]))
        found = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words[:, column]))
        assert found == stream


def test_nibbles_of_awq_lie_in_its_order() -> None:
    assert awq.pack_along(torch.arange(8).unsqueeze(0)).item() & 0xFFFFFFFF == 0x75316420


def test_rows_of_tensorrt_share_bytes() -> None:
    codes = torch.tensor([[-8, 7], [3, -1]], dtype=torch.int8)
    assert tensorrt_llm.pack_rows(codes).tolist() == [[0x38, 0xF7]]


def test_mlc_turns_the_sign_of_groups_that_hold_the_lowest_code(tmp_path) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 32), ends=Integer(4, 32))
    record = run_export(model, "mlc", tmp_path / "out")
    assert record["layout"] == "q4f16_1"
    assert record["weights"]["max_abs_error"] == 0.0
    index = json.loads((tmp_path / "out" / "tensor-cache.json").read_text())
    assert index == json.loads((tmp_path / "out" / "ndarray-cache.json").read_text())
    shapes = {r["name"]: (r["shape"], r["dtype"]) for shard in index["records"] for r in shard["records"]}
    assert shapes["model.layers.0.self_attn.qkv_proj.q_weight"] == ([128, 8], "uint32")
    assert shapes["model.layers.0.mlp.gate_up_proj.q_scale"] == ([256, 2], "float16")
    assert shapes["model.embed_tokens.q_weight"] == ([320, 8], "uint32")
    config = json.loads((tmp_path / "out" / "mlc-chat-config.json").read_text())
    assert (config["quantization"], config["model_type"], config["conv_template"]) == ("q4f16_1", "llama", "LM")


def test_mlc_packs_ten_codes_of_three_bits_in_a_word(tmp_path) -> None:
    form = Integer(3, 40)
    sizes = {"hidden_size": 80, "intermediate_size": 120, "head_dim": 20}
    model = make_artifact(tmp_path / "m", form, ends=form, **sizes)
    record = run_export(model, "mlc", tmp_path / "out")
    assert (record["layout"], record["weights"]["max_abs_error"]) == ("q3f16_1", 0.0)


def test_mlc_rounds_floats_by_its_own_rule(tmp_path) -> None:
    model = make_artifact(tmp_path / "m")
    record = run_export(model, "mlc", tmp_path / "out", layout="q4f32_1")
    largest = max(float(open_checkpoint(model).tensor(n).abs().max()) for n in record["rounded"])
    assert 0 < record["weights"]["max_abs_error"] <= largest / mlc._middle(4) / 2 * 1.001


def test_tensorrt_says_which_layout_it_is(tmp_path) -> None:
    for form, algorithm in ((Integer(4, 64), "W4A16_AWQ"), (Codebook("fp8", None), "FP8_PER_CHANNEL_PER_TOKEN")):
        model = make_artifact(tmp_path / f"m-{algorithm}", form)
        run_export(model, "tensorrt-llm", tmp_path / algorithm)
        said = json.loads((tmp_path / algorithm / "hf_quant_config.json").read_text())["quantization"]
        assert (said["quant_algo"], said["kv_cache_quant_algo"]) == (algorithm, None)
        assert said["exclude_modules"] == ["lm_head"]
        assert "quantization_config" not in json.loads((tmp_path / algorithm / "config.json").read_text())


@pytest.mark.parametrize(
    "stage", [{"bits": 4, "group_size": 64}, {"format": "fp8"}, None], ids=["int4", "fp8", "dense"]
)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma3_text"])
def test_tensorrt_takes_other_families(tmp_path, name, stage) -> None:
    wide, model = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}, tmp_path / "m"
    if stage is None:
        make_model(model, name, **wide)
    else:
        make_rounded(model, name, wide, **stage)
    record = run_export(model, "tensorrt-llm", tmp_path / "out")
    assert record["weights"]["max_abs_error"] == 0.0
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    architecture = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}.get(name, "Gemma3ForCausalLM")
    assert (said["model_type"], said["architectures"]) == (name, [architecture])
    assert (tmp_path / "out" / "hf_quant_config.json").exists() == (stage is not None)


@pytest.mark.parametrize(
    ("name", "config", "why"),
    [
        ("qwen2-window", {}, "qwen2 has no sliding window"),
        ("qwen2-scaled", {}, "qwen2 knows no rotary scaling linear"),
        ("gemma3_text-untied", {}, "gemma3_text has no soft cap"),
        ("gemma3_text", {"attention_bias": True}, "gemma3_text has no biases"),
        ("phi3", {}, "phi3 .* floats only"),
        ("gpt2", {}, "gpt2 .* not written"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensorrt_refuses_what_its_models_pass_over(tmp_path, name, config, why) -> None:
    make_model(tmp_path / "m", name, **config)
    with pytest.raises(ExportError, match=why):
        run_export(tmp_path / "m", "tensorrt-llm", tmp_path / "out")


def test_openvino_takes_no_bfloat16_and_no_other_heads(tmp_path) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 32))
    assert run_export(model, "openvino", tmp_path / "m.gguf")["weights"]["max_abs_error"] == 0.0
    for name, changes, words in (
        ("ragged", {"gossamer_layers": [{"num_heads": 2, "num_kv_heads": 1}, {}]}, "heads"),
        ("wide", {"head_dim": 32}, "width of heads"),
        ("scaled", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rotary"),
    ):
        with pytest.raises(ExportError, match=words):
            run_export(make_artifact(tmp_path / name, Integer(4, 32), **changes), "openvino", tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("target", "module", "function"),
    [
        ("gptq", gptq, "pack_down"),
        ("awq", awq, "pack_along"),
        ("tensorrt-llm", tensorrt_llm, "pack_rows"),
    ],
)
def test_a_packer_that_makes_a_mistake_is_caught_and_leaves_nothing(
    tmp_path, monkeypatch, target, module, function
) -> None:
    packed = getattr(module, function)
    monkeypatch.setattr(module, function, lambda codes, *more: packed(codes.flip(0), *more))
    with pytest.raises(ProofFailed):
        run_export(make_artifact(tmp_path / "m", Integer(4, 64)), target, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_windows_of_some_layers_go_where_they_are_read(tmp_path) -> None:
    make_model(tmp_path / "m", "qwen2-window")
    record = run_export(tmp_path / "m", "transformers", tmp_path / "out", proving=Proving())
    assert (record["engine"]["tokens"], record["engine"]["agree"]) == (48, 48)
    with pytest.raises(ExportError, match=r"only some layers .* sliding window"):
        run_export(tmp_path / "m", "vllm", tmp_path / "v")


def test_transformers_itself_runs_the_folder(tmp_path) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 32))
    record = run_export(model, "transformers", tmp_path / "out", proving=Proving())
    assert record["engine"]["engine"].startswith("transformers 5")
    assert (record["engine"]["tokens"], record["engine"]["agree"]) == (48, 48)


@pytest.mark.parametrize("target", ["gguf", *FOLDERS])
def test_families_that_are_not_written_are_named(tmp_path, target) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 64), model_type="gemma2")
    with pytest.raises(ExportError, match="gemma2"):
        run_export(model, target, tmp_path / "out")


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("target", ["transformers", "gptq", "awq"])
def test_other_families_with_llamas_names_are_written(tmp_path, family, target) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 32), model_type=family)
    assert run_export(model, target, tmp_path / "out")["weights"]["max_abs_error"] == 0.0
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (said["model_type"], said["architectures"]) == (family, [f"{family.capitalize()}ForCausalLM"])
    if target == "transformers":
        from transformers import AutoModelForCausalLM

        tokens = torch.arange(2, 22).view(1, 20)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        expected = load_decoder(open_checkpoint(model))(tokens)
        with torch.inference_mode():
            assert (theirs(tokens).logits - expected).abs().max() < 1e-3 * expected.std()


def test_an_engine_that_says_something_else_is_caught(tmp_path) -> None:
    checkpoint = open_checkpoint(make_artifact(tmp_path / "m"))
    prompts = [[1, 2, 3]]
    for tokens, words in (([[7, 7, 7, 7]], "deviations"), ([[320]], "no tokens"), ([[]], "no tokens")):
        with pytest.raises(ProofFailed, match=words):
            proof.judge(checkpoint, prompts, Answers("other 1.0", tokens))


def test_logits_that_are_no_numbers_prove_nothing(tmp_path) -> None:
    checkpoint = open_checkpoint(make_folder(tmp_path / "m", poison=float("nan")))
    with pytest.raises(ProofFailed, match="a token nan standard deviations"):
        proof.judge(checkpoint, [[1, 2, 3]], Answers("other 1.0", [[7, 7, 7, 7]]))


def test_an_engine_that_was_named_and_is_not_there_is_an_error(tmp_path) -> None:
    with pytest.raises(ExportError, match="no Python that has vllm"):
        find("vllm", tmp_path / "python")
    assert find("llama.cpp", llama_cpp_folder=tmp_path) is None


def test_targets_and_layouts_that_do_not_exist_are_named(tmp_path) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 32))
    with pytest.raises(UnknownName, match="target 'ggup'"):
        run_export(model, "ggup", tmp_path / "out")
    with pytest.raises(UnknownName, match="layout of gptq 'gptq_v3'"):
        run_export(model, "gptq", tmp_path / "out", layout="gptq_v3")
    assert {target_class(name).target for name in TARGETS} == set(TARGETS)


def test_the_same_model_gives_the_same_bytes(tmp_path) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 64))
    for target in TARGETS:
        out = [tmp_path / f"{target}-{i}" for i in (0, 1)]
        for path in out:
            run_export(model, target, path)
        assert _bytes(out[0]) == _bytes(out[1]), target


def _bytes(path: Path) -> list[bytes]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [file.read_bytes() for file in files]
