"""GGUF files of every family: read back to the same model, and refused where llama.cpp would misread them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exports import run_export
from gguf_families import FAMILIES, make_model, make_rounded
from gguf_tokenizers import BLOOM, TOKENIZERS, gemma_tokenizer, split, split_by
from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.gguf_architectures import ARCHITECTURES, WRITTEN, misread, tensors_of
from gossamer.checkpoint.load import load_decoder
from gossamer.errors import CorruptCheckpoint, ExportError, ProofFailed
from gossamer.export import gguf as writer
from gossamer.model import tensor_names

TOKENS = torch.randint(1, 300, (2, 40), generator=torch.Generator().manual_seed(3))
FUSED = ("phi3", "gpt2", "gpt_neox", "bloom")
INT4 = {"bits": 4, "group_size": 32}


def kinds(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def assert_same(model: Path, file: Path) -> None:
    """The same weights (Gemma's norms as they are used: 1 + weight), the same logits."""
    ours, theirs = open_checkpoint(model), open_checkpoint(file)
    for name in ours.names():
        norm = ours.config.norm_offset if name.endswith("norm.weight") else 0.0
        assert torch.equal(theirs.tensor(name) + norm, ours.tensor(name) + norm), name
    assert torch.equal(load_decoder(theirs)(TOKENS), load_decoder(ours)(TOKENS))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_each_family_is_read_back_as_the_same_model(tmp_path, name) -> None:
    make_model(tmp_path / "m", name)
    assert run_export(tmp_path / "m", "gguf", tmp_path / "m.gguf")["weights"]["max_abs_error"] == 0.0
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["general.architecture"].contents() == FAMILIES[name][0]
    assert_same(tmp_path / "m", tmp_path / "m.gguf")
    ours, theirs = (open_checkpoint(path).config for path in (tmp_path / "m", tmp_path / "m.gguf"))
    alike = {"family": theirs.family, "tie_embeddings": theirs.tie_embeddings}  # mistral is llama, a head may be added
    assert theirs == replace(ours, **alike)


def test_every_tensor_of_every_family_has_a_place(tmp_path) -> None:
    for name, (arch, _) in FAMILIES.items():
        make_model(tmp_path / name, name)
        config = open_checkpoint(tmp_path / name).config
        placed = [name for names in tensors_of(WRITTEN[config.family], config).values() for name in names]
        assert set(placed) == set(tensor_names(config)), arch
    assert {arch for arch, _ in FAMILIES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", FUSED)
def test_layers_in_one_tensor_keep_their_codes(tmp_path, name) -> None:
    model = make_rounded(tmp_path / "m", name, **INT4)
    assert run_export(model, "gguf", tmp_path / "m.gguf")["weights"]["max_abs_error"] == 0.0
    assert {kinds(tmp_path / "m.gguf")[f"blk.{i}.attn_qkv.weight"] for i in range(3)} == {"Q4_0"}
    assert_same(model, tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["qwen3", "gemma2-scaled", "phi3-half", "gpt2-untied", "gpt_neox-sequential", "bloom"])
def test_a_file_that_is_read_and_written_again_is_the_same(tmp_path, name) -> None:
    run_export(make_rounded(tmp_path / "m", name, **INT4), "gguf", tmp_path / "a.gguf")
    run_export(tmp_path / "a.gguf", "gguf", tmp_path / "b.gguf")
    first, second = (gguf.GGUFReader(tmp_path / file) for file in ("a.gguf", "b.gguf"))
    for ours, theirs in zip(first.tensors, second.tensors, strict=True):
        assert (ours.name, ours.tensor_type) == (theirs.name, theirs.tensor_type)
        assert np.array_equal(ours.data, theirs.data)
    told = {key for key in first.fields if first.fields[key].contents() != second.fields[key].contents()}
    assert told == {"general.name", "gossamer.fingerprint"}


def test_layers_of_other_types_get_the_smallest_that_holds_each(tmp_path) -> None:
    layers = {"v": {"bits": 8}, "up": {"symmetric": False}}
    model = make_rounded(tmp_path / "m", "phi3", **INT4, layers=layers)
    assert run_export(model, "gguf", tmp_path / "m.gguf")["weights"]["max_abs_error"] == 0.0
    found = kinds(tmp_path / "m.gguf")
    assert (found["blk.0.attn_qkv.weight"], found["blk.0.ffn_down.weight"]) == ("Q8_0", "Q4_0")
    assert found["blk.0.ffn_up.weight"] in ("Q5_0", "Q8_0")
    assert_same(model, tmp_path / "m.gguf")


def test_a_part_that_no_common_type_holds_is_refused_and_rounded_only_if_asked(tmp_path) -> None:
    model = make_rounded(tmp_path / "m", "gpt2", **INT4, layers={"v": {"group_size": 16}})
    with pytest.raises(ExportError, match="v_proj"):
        run_export(model, "gguf", tmp_path / "m.gguf")
    record = run_export(model, "gguf", tmp_path / "m.gguf", rounding=True)
    assert {name.split(".")[-2] for name in record["rounded"]} == {"v_proj"}
    assert kinds(tmp_path / "m.gguf")["blk.0.attn_qkv.weight"] == "Q8_0"


def test_floats_beside_integers_are_refused_by_name(tmp_path) -> None:
    model, module = make_rounded(tmp_path / "m", "phi3", **INT4), "model.layers.1.self_attn.v_proj"
    tensors = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{module}.")}
    kept[f"{module}.weight"] = open_checkpoint(model).tensor(f"{module}.weight")
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    said = json.loads((model / "config.json").read_text())
    said["quantization_config"]["ignore"].append(module)
    (model / "config.json").write_text(json.dumps(said))
    (model / "gossamer.json").unlink()
    with pytest.raises(ExportError, match=r"layers\.1\.self_attn\.v_proj.*one tensor with others"):
        run_export(model, "gguf", tmp_path / "m.gguf")
    assert run_export(model, "gguf", tmp_path / "m.gguf", rounding=True)["rounded"] == [f"{module}.weight"]
    assert kinds(tmp_path / "m.gguf")["blk.1.attn_qkv.weight"] == "Q8_0"


def test_a_scale_beside_a_matrix_is_refused_where_llama_cpp_would_pass_over_it(tmp_path) -> None:
    model = make_rounded(tmp_path / "m", "qwen2", format="nvfp4")
    with pytest.raises(ExportError, match=r"q_proj.*held exactly by no type"):
        run_export(model, "gguf", tmp_path / "m.gguf")
    run_export(make_rounded(tmp_path / "3", "qwen3", format="nvfp4"), "gguf", tmp_path / "3.gguf", rounding=True)
    assert kinds(tmp_path / "3.gguf")["blk.0.attn_q.weight"] == "NVFP4"


@pytest.mark.parametrize("layout", ["q8_0", "f16"])
def test_layouts_leave_norms_and_take_every_matrix(tmp_path, layout) -> None:
    make_model(tmp_path / "m", "gpt2")
    run_export(tmp_path / "m", "gguf", tmp_path / "m.gguf", layout=layout)
    found = kinds(tmp_path / "m.gguf")
    assert found["blk.0.attn_qkv.weight"] == found["token_embd.weight"] == layout.upper()
    assert found["blk.0.attn_norm.weight"] == found["blk.0.attn_qkv.bias"] == "F32"
    assert found["position_embd.weight"] == ("F32" if layout == "q8_0" else "F16")


def test_a_part_in_a_wrong_place_is_caught(tmp_path, monkeypatch) -> None:
    make_model(tmp_path / "m", "phi3")
    right = writer.GGUFExport._joined
    monkeypatch.setattr(writer.GGUFExport, "_joined", lambda s, names, parts: right(s, names[::-1], parts[::-1]))
    with pytest.raises(ProofFailed, match=r"\.q_proj"):
        run_export(tmp_path / "m", "gguf", tmp_path / "m.gguf")


def test_norms_without_what_the_file_adds_are_caught(tmp_path, monkeypatch) -> None:
    make_model(tmp_path / "m", "gemma2")
    monkeypatch.setattr(writer.GGUFExport, "_norm_offset", lambda *_: 0.0)
    with pytest.raises(ProofFailed, match="norm"):
        run_export(tmp_path / "m", "gguf", tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("name", "config", "why"),
    [
        ("qwen2-window", {}, "qwen2 has no sliding window"),
        ("phi3", {"sliding_window": 16}, "phi3 has no sliding window"),
        ("qwen3-biases", {}, "qwen3 has no bias at o"),
        ("qwen2", {"head_dim": 8}, "heads as wide as the model"),
        ("gemma2-untied", {"attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 16}, "head of architecture"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "root of 16, this model by that of 24"),
        ("gemma2", {"attn_logit_softcapping": None}, "no cap on one of them"),
        ("gemma3_text", {"attn_logit_softcapping": 30.0}, "no soft cap"),
        ("gpt_neox", {"attention_bias": False}, "has a bias at k o q v"),
        ("gpt_neox", {"hidden_act": "relu"}, "the activation relu is not gptneox's, which is gelu"),
        ("gpt2", {"activation_function": "relu"}, "the activation relu is not gpt2's"),
        ("opt", {}, "the family opt .* is no architecture of llama.cpp"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_llama_cpp_would_misread_is_refused(tmp_path, name, config, why) -> None:
    make_model(tmp_path / "m", name, **config)
    with pytest.raises(ExportError, match=why) as caught:
        run_export(tmp_path / "m", "gguf", tmp_path / "m.gguf")
    assert caught.value.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox"])
def test_rotary_positions_that_an_architecture_does_not_know_are_refused(tmp_path, name) -> None:
    make_model(tmp_path / "m", name)
    config = open_checkpoint(tmp_path / "m").config
    row = WRITTEN[config.family]
    partial = replace(config, rope=replace(config.rope, share=0.5))
    assert any("turns all columns" in why for why in misread(row, partial)) != (name in ("phi3", "gpt_neox"))
    known = {"llama": {"linear", "llama3"}, "phi3": set()}.get(name, {"linear"})
    for kind in ("linear", "llama3"):
        scaled = replace(config, rope=replace(config.rope, kind=kind))
        assert any(f"no rotary scaling {kind}" in why for why in misread(row, scaled)) != (kind in known)


def test_the_largest_gemma_divides_scores_otherwise(tmp_path) -> None:
    """llama.cpp knows it by its 46 layers, and takes hidden_size / num_attention_heads there."""
    make_model(tmp_path / "m", "gemma2", head_dim=24, query_pre_attn_scalar=24)
    config = open_checkpoint(tmp_path / "m").config
    large = replace(config, layers=config.layers[:1] * 46)
    assert not list(misread(WRITTEN["gemma2"], config))
    assert [why for why in misread(WRITTEN["gemma2"], large) if "root of 16, this model by that of 24" in why]
    assert not list(misread(WRITTEN["gemma2"], replace(large, query_scale=16**-0.5)))


def test_layers_of_different_shapes_are_refused_where_an_architecture_has_one(tmp_path) -> None:
    make_model(tmp_path / "m", "qwen2")
    said = json.loads((tmp_path / "m" / "config.json").read_text())
    said["gossamer_layers"] = [{}, {}, {"biases": ["q", "k"]}]
    (tmp_path / "m" / "config.json").write_text(json.dumps(said))
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["model.layers.2.self_attn.v_proj.bias"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match="architecture qwen2 has one shape for all"):
        run_export(tmp_path / "m", "gguf", tmp_path / "m.gguf")


@pytest.mark.parametrize(("slides", "written"), [([1, 1, 0], [1, 1, 0]), ([0, 0, 0], None), ([1, 0, 1], None)])
def test_which_layers_slide_is_said_where_it_is_not_as_usual(tmp_path, slides, written) -> None:
    types = ["sliding_attention" if one else "full_attention" for one in slides]
    make_model(tmp_path / "m", "gemma2", layer_types=types)
    run_export(tmp_path / "m", "gguf", tmp_path / "m.gguf")
    field = gguf.GGUFReader(tmp_path / "m.gguf").fields.get("gemma2.attention.sliding_window_pattern")
    assert (None if field is None else field.contents()) == written
    assert [layer.window for layer in open_checkpoint(tmp_path / "m.gguf").config.layers] == [
        16 if one else None for one in slides
    ]


def test_a_pattern_of_layers_may_be_a_number(tmp_path, monkeypatch) -> None:
    make_model(tmp_path / "m", "gemma3_text", layer_types=None, rope_parameters=None)
    row, key = ARCHITECTURES["gemma3"], "attention.sliding_window_pattern"
    monkeypatch.setitem(WRITTEN, "gemma3_text", replace(row, says=lambda config: {**row.says(config), key: 2}))
    run_export(tmp_path / "m", "gguf", tmp_path / "m.gguf")
    layers = open_checkpoint(tmp_path / "m.gguf").config.layers
    assert [layer.window for layer in layers] == [16, None, 16]


@pytest.mark.parametrize("value", [0, "two", 2.5, [True, False], [1, 0, 1, 0], ["a", "b", "c"]], ids=str)
def test_a_pattern_of_layers_that_makes_no_sense_is_an_error(tmp_path, monkeypatch, value) -> None:
    make_model(tmp_path / "m", "gemma2")
    row, key = ARCHITECTURES["gemma2"], "attention.sliding_window_pattern"
    monkeypatch.setitem(WRITTEN, "gemma2", replace(row, says=lambda config: {**row.says(config), key: value}))
    run_export(tmp_path / "m", "gguf", tmp_path / "m.gguf")
    with pytest.raises(CorruptCheckpoint, match=r"m\.gguf"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("pre", TOKENIZERS)
def test_the_rule_for_splitting_of_each_family_has_its_name(tmp_path, pre) -> None:
    make_model(tmp_path / "m", "gpt2")
    TOKENIZERS[pre]().save(str(tmp_path / "m" / "tokenizer.json"))
    run_export(tmp_path / "m", "gguf", tmp_path / "m.gguf")
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.pre"].contents() == pre
    ours, theirs = (open_checkpoint(path).tokenizer() for path in (tmp_path / "m", tmp_path / "m.gguf"))
    for text in ("It's 12345, and  e\u0301t\u00e9!", "(a|b)\n\n\u3002 x"):
        assert ours.encode(text) == theirs.encode(text)


def test_a_rule_that_no_name_means_is_refused(tmp_path) -> None:
    make_model(tmp_path / "m", "gpt2")
    split_by(split(BLOOM), ignore_merges=True).save(str(tmp_path / "m" / "tokenizer.json"))
    with pytest.raises(ExportError, match="no name for how this tokenizer splits"):
        run_export(tmp_path / "m", "gguf", tmp_path / "m.gguf")


def test_the_tokenizer_of_gemma_becomes_sentencepiece_without_a_space_before(tmp_path) -> None:
    make_model(tmp_path / "m", "gemma2")
    gemma_tokenizer().save(str(tmp_path / "m" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(settings))
    run_export(tmp_path / "m", "gguf", tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is False
    ours, theirs = (open_checkpoint(path).tokenizer() for path in (tmp_path / "m", tmp_path / "m.gguf"))
    for text in ("hello  hello", " hello 12", "\u00e9<eos>hello"):
        assert ours.encode(text) == theirs.encode(text)
