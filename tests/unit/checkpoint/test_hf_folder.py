"""Hugging Face folders: what opens, how it is read, and what is refused before anything is run or read."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gossamer.checkpoint import open_checkpoint
from gossamer.errors import (
    CheckpointError,
    CorruptCheckpoint,
    ModelNotFound,
    UnknownName,
    UnsafeCheckpoint,
    UnsupportedModel,
)
from gossamer.formats import Integer


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_come_back_as_they_were_saved(tmp_path: Path, tiny: Any, shards: int) -> None:
    checkpoint = open_checkpoint(tiny.folder(tmp_path / "m", shards=shards))
    tensors = tiny.tensors()
    assert set(checkpoint.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint.tensor(name), tensor.float())
        assert torch.equal(checkpoint.tensor(name, slice(3, 17), torch.bfloat16), tensor[3:17])
        assert checkpoint.format(name).name == "bf16"
        assert torch.equal(checkpoint.stored(name)["weight"], tensor)
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.parameters() == sum(t.numel() for t in tensors.values())
    assert checkpoint.weight_bytes() == 2 * checkpoint.parameters()
    assert checkpoint.bits_per_weight() == 16.0
    assert checkpoint.source_note is None
    assert checkpoint.manifest is None
    with pytest.raises(UnknownName, match="q_projj"):
        checkpoint.tensor("model.layers.0.self_attn.q_projj.weight")


def test_positions_are_said_in_both_ways(tmp_path: Path, tiny: Any) -> None:
    old = open_checkpoint(tiny.folder(tmp_path / "old", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}))
    new = open_checkpoint(
        tiny.folder(
            tmp_path / "new",
            rope_theta=None,
            rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        )
    )
    for checkpoint in (old, new):
        assert checkpoint.hf_config["rope_theta"] == 5e5
        assert checkpoint.hf_config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
        assert checkpoint.config.rope.theta == 5e5
        assert checkpoint.config.rope.factor == 2.0


def test_a_missing_tensor_is_named_with_its_shape(tmp_path: Path, tiny: Any) -> None:
    tensors = tiny.tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CorruptCheckpoint, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*\[96, 64\].*missing"):
        open_checkpoint(tiny.folder(tmp_path / "m", tensors=tensors))


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path: Path, tiny: Any) -> None:
    tensors = tiny.tensors() | {"model.norm.weight": torch.zeros(63, dtype=torch.bfloat16)}
    with pytest.raises(CorruptCheckpoint, match=r"model\.norm\.weight.*\[63\].*\[64\]"):
        open_checkpoint(tiny.folder(tmp_path / "m", tensors=tensors))


def test_a_tensor_too_many_is_refused_unless_harmless(tmp_path: Path, tiny: Any) -> None:
    harmless = {
        "lm_head.weight": tiny.tensors()["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    checkpoint = open_checkpoint(tiny.folder(tmp_path / "m", tensors=tiny.tensors() | harmless))
    assert set(checkpoint.names()) == set(tiny.tensors())
    extra = tiny.tensors() | {"model.layers.2.mlp.up_proj.weight": torch.zeros(96, 64)}
    with pytest.raises(CorruptCheckpoint, match=r"layers\.2\.mlp\.up_proj\.weight.*not one of this model"):
        open_checkpoint(tiny.folder(tmp_path / "n", tensors=extra))


def test_layers_of_different_widths_are_read_by_their_own_shapes(tmp_path: Path, tiny: Any) -> None:
    tensors = tiny.tensors()
    for role, rows in (("gate_proj", slice(0, 40)), ("up_proj", slice(0, 40))):
        name = f"model.layers.1.mlp.{role}.weight"
        tensors[name] = tensors[name][rows].clone()
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"][:, :40].clone()
    folder = tiny.folder(tmp_path / "m", tensors=tensors, gossamer_layers=[{}, {"ffn_width": 40}])
    assert open_checkpoint(folder).shape("model.layers.1.mlp.up_proj.weight") == (40, 64)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "..\\x", "a/../../x", "", 7, None, "x\0"])
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, tiny: Any, shard: Any) -> None:
    folder = tiny.folder(tmp_path / "m", shards=2)
    safetensors.torch.save_file(tiny.tensors(), tmp_path / "outside.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafeCheckpoint):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, tiny: Any, name: str) -> None:
    folder = tiny.folder(tmp_path / "m")
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafeCheckpoint, match="outside the folder"):
        open_checkpoint(folder).tokenizer()


def test_links_within_the_folder_and_of_the_hub_cache_are_followed(tmp_path: Path, tiny: Any) -> None:
    snapshot = tiny.folder(tmp_path / "models--org--name" / "snapshots" / "abc")
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    assert open_checkpoint(snapshot).parameters() > 0
    (snapshot / "config.json").rename(tmp_path / "config.json")
    (snapshot / "config.json").symlink_to("../../../config.json")
    with pytest.raises(UnsafeCheckpoint):
        open_checkpoint(snapshot)


def test_a_pickle_is_refused_until_asked_for(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save(tiny.tensors(), folder / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint, match=r"pytorch_model\.bin"):
        open_checkpoint(folder)
    checkpoint = open_checkpoint(folder, allow_pickle=True)
    for name, tensor in tiny.tensors().items():
        assert torch.equal(checkpoint.tensor(name), tensor.float())
    with pytest.raises(UnsafeCheckpoint, match=r"pytorch_model\.bin"):
        open_checkpoint(folder / "pytorch_model.bin")


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_runs_code_does_not_run_it(tmp_path: Path, tiny: Any, writer: str) -> None:
    folder = tiny.folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    content = {**tiny.tensors(), "bomb": _Bomb(tmp_path / "exploded")}
    if writer == "torch":
        torch.save(content, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(tmp_path / "exploded"), protocol=2))
    with pytest.raises((UnsafeCheckpoint, CorruptCheckpoint)):
        open_checkpoint(folder, allow_pickle=True)
    assert not (tmp_path / "exploded").exists()


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, tiny: Any) -> None:
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", "evil.T"]}
    folder = tiny.folder(tmp_path / "m", auto_map=code)
    (folder / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\nT = Config"
    )
    edit(folder / "tokenizer_config.json", auto_map=code, tokenizer_class="T")
    checkpoint = open_checkpoint(folder)
    assert "auto_map" not in checkpoint.hf_config
    assert checkpoint.tokenizer().encode("hello") == [tiny.vocab.index("hello")]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(UnsafeCheckpoint, match="auto_map"):
        open_checkpoint(folder).tokenizer()
    assert not (tmp_path / "ran").exists()


CONFIGS: dict[str, Any] = {
    "a list": [],
    "text": "llama",
    "hidden_size text": {"hidden_size": "64"},
    "hidden_size a list": {"hidden_size": [64]},
    "no heads": {"num_attention_heads": 0},
    "a billion layers": {"num_hidden_layers": 10**9},
    "too many layers": {"num_hidden_layers": 2000},
    "layers true": {"num_hidden_layers": True},
    "negative vocabulary": {"vocab_size": -1},
    "rope_parameters a list": {"rope_parameters": [1]},
    "rope_scaling text": {"rope_scaling": "linear"},
    "rope_theta text": {"rope_theta": "x"},
    "quantization_config a list": {"quantization_config": [1]},
    "model_type a list": {"model_type": ["llama"]},
    "dtype unknown": {"torch_dtype": "int3"},
    "dtype a list": {"torch_dtype": ["bfloat16"]},
    "gossamer_layers a number": {"gossamer_layers": 3},
    "sliding_window text": {"sliding_window": "x"},
    "hidden_act a list": {"hidden_act": []},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_of_wrong_types_is_a_typed_error(tmp_path: Path, tiny: Any, case: str) -> None:
    folder = tiny.folder(tmp_path / "m")
    change = CONFIGS[case]
    if isinstance(change, dict):
        edit(folder / "config.json", **change)
    else:
        (folder / "config.json").write_text(json.dumps(change))
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[" * 100_000, b"", b'{"a": 1e999999999999', b"nul"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"])
def test_json_that_is_not_json_is_a_typed_error(tmp_path: Path, tiny: Any, name: str, text: bytes) -> None:
    folder = tiny.folder(tmp_path / "m", shards=2)
    (folder / name).write_bytes(text)
    with pytest.raises(CorruptCheckpoint, match=name.replace(".", r"\.")):
        open_checkpoint(folder).tokenizer()


def test_a_config_of_gigabytes_is_not_read(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m")
    os.truncate(folder / "config.json", 1 << 34)
    with pytest.raises(CorruptCheckpoint, match="17179869184 bytes"):
        open_checkpoint(folder)


def test_what_is_not_a_model_folder_says_so(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    folder = tiny.folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match="no weights"):
        open_checkpoint(folder)
    shards = tiny.folder(tmp_path / "n", shards=2)
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"model-00002-of-00002\.safetensors"):
        open_checkpoint(shards)


@pytest.mark.parametrize(
    "form", [Integer(4, 32), Integer(4, 32, symmetric=False), Integer(3, None, symmetric=False), Integer(8, 16)],
    ids=lambda form: form.name,
)  # fmt: skip
def test_quantized_weights_are_read_by_their_own_names_whole_or_by_rows(
    tmp_path: Path, tiny: Any, form: Integer
) -> None:
    floats = tiny.quantized(tmp_path / "m", form)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert set(checkpoint.names()) == set(floats)
    for name, expected in floats.items():
        assert torch.equal(checkpoint.tensor(name), expected)
        for rows in (slice(5, 9), slice(31, 34), slice(30, None), slice(0, 1), slice(9, 9)):
            assert torch.equal(checkpoint.tensor(name, rows), expected[rows])
    linear = "model.layers.0.mlp.up_proj.weight"
    assert checkpoint.format(linear) == form
    assert checkpoint.nbytes(linear) == sum(t.nbytes for t in checkpoint.stored(linear).values())
    assert checkpoint.source_note == f"stored as {form.name}: already {form.bits}-bit"
    on_disk = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    assert checkpoint.weight_bytes() == sum(t.nbytes for t in on_disk.values())


def test_an_unknown_quantization_is_named(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m", quantization_config={"quant_method": "exl9"})
    with pytest.raises(UnsupportedModel, match="exl9") as caught:
        open_checkpoint(folder)
    assert "compressed-tensors" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": None}, "weight_scale.*missing"),
        ({"weight_packed": None}, "weight_packed.*missing"),
        ({"weight_packed": torch.zeros(96, 7, dtype=torch.int32)}, r"weight_packed.*\[96, 7\].*\[96, 8\]"),
        ({"weight_shape": torch.tensor([96, 63])}, r"\[96, 63\].*\[96, 64\]"),
        ({"weight_scale": torch.zeros(96, 2, dtype=torch.int64)}, "scales"),
        ({"weight_g_idx": torch.zeros(64, dtype=torch.int32)}, "weight_g_idx"),
        ({"weight": torch.zeros(96, 64)}, r"up_proj\.weight'.*not one of this model"),
    ],
)
def test_a_quantized_weight_with_a_part_amiss_is_named(
    tmp_path: Path, tiny: Any, change: dict[str, torch.Tensor | None], message: str
) -> None:
    tiny.quantized(tmp_path / "m", Integer(4, 32))
    path = tmp_path / "m" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    for local, tensor in change.items():
        full = f"model.layers.1.mlp.up_proj.{local}"
        tensors.pop(full, None)
        if tensor is not None:
            tensors[full] = tensor
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CorruptCheckpoint, match=message):
        open_checkpoint(tmp_path / "m")


def test_integers_that_no_config_explains_are_refused(tmp_path: Path, tiny: Any) -> None:
    tensors = tiny.tensors() | {"model.layers.0.mlp.up_proj.weight": torch.zeros(96, 64, dtype=torch.int8)}
    with pytest.raises(UnsupportedModel, match=r"up_proj\.weight.*int8"):
        open_checkpoint(tiny.folder(tmp_path / "m", tensors=tensors))


def test_the_fingerprint_is_of_the_content_not_of_the_shards(tmp_path: Path, tiny: Any) -> None:
    one = open_checkpoint(tiny.folder(tmp_path / "one")).fingerprint()
    three = open_checkpoint(tiny.folder(tmp_path / "three", shards=3)).fingerprint()
    tensors = tiny.tensors()
    tensors["model.norm.weight"][3] += 1
    other = open_checkpoint(tiny.folder(tmp_path / "other", tensors=tensors)).fingerprint()
    config = open_checkpoint(tiny.folder(tmp_path / "config", rope_theta=5.0)).fingerprint()
    assert one == three
    assert len({one, other, config}) == 3


def test_the_fingerprint_is_remembered_until_a_file_changes(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny.folder(tmp_path / "m"))
    first = checkpoint.fingerprint()
    calls: list[int] = []
    real = type(checkpoint)._hash
    monkeypatch.setattr(type(checkpoint), "_hash", lambda self: calls.append(1) or real(self))
    assert open_checkpoint(tmp_path / "m").fingerprint() == first
    assert calls == []
    tensors = tiny.tensors()
    tensors["model.norm.weight"][0] += 1
    safetensors.torch.save_file(tensors, tmp_path / "m" / "model.safetensors")
    os.utime(tmp_path / "m" / "model.safetensors", ns=(1, 1))
    assert open_checkpoint(tmp_path / "m").fingerprint() != first
    assert calls == [1]


def test_the_fingerprint_changes_though_size_and_time_are_as_before(tmp_path: Path, tiny: Any) -> None:
    path = tiny.folder(tmp_path / "m") / "model.safetensors"
    first = open_checkpoint(tmp_path / "m").fingerprint()
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    (tmp_path / "other").write_bytes(data)
    (tmp_path / "other").replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert open_checkpoint(tmp_path / "m").fingerprint() != first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(-1, None)])
def test_a_head_that_differs_from_the_embedding_is_used_whatever_the_config_says(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch, rows: slice, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    from gossamer.checkpoint import base
    from gossamer.checkpoint.load import load_decoder

    monkeypatch.setattr(base, "BLOCK_ELEMENTS", 32 * 64)  # more than one block to compare
    tensors = tiny.tensors()
    head = tensors["model.embed_tokens.weight"].to(dtype, copy=True)
    head[rows] *= 2
    folder = tiny.folder(tmp_path / "m", tensors={**tensors, "lm_head.weight": head})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.hf_config["tie_word_embeddings"] is False
    assert torch.equal(checkpoint.tensor("lm_head.weight"), head.float())
    tokens = torch.arange(12).reshape(1, 12)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(load_decoder(checkpoint)(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-3)


def test_a_head_of_another_shape_is_named(tmp_path: Path, tiny: Any) -> None:
    tensors = tiny.tensors() | {"lm_head.weight": torch.zeros(3, 64, dtype=torch.bfloat16)}
    with pytest.raises(CorruptCheckpoint, match=r"lm_head\.weight.*\[3, 64\]"):
        open_checkpoint(tiny.folder(tmp_path / "m", tensors=tensors))


def group(targets: Any, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **weights}
    return {"targets": targets, "weights": weights}


def quantization(*groups: dict[str, Any], **changes: Any) -> dict[str, Any]:
    numbered = {f"group_{n}": g for n, g in enumerate(groups)}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": numbered, "ignore": [],
        **changes,
    }  # fmt: skip


RANKED = [
    group(["Linear"], num_bits=8),
    group(["re:.*mlp.*"], num_bits=7),
    group(["re:.*down_proj"], num_bits=6),
    group(["model.layers.0.mlp.down_proj", "re:model.*norm"], num_bits=5),
    group(["model.layers.0.mlp.up_proj"], num_bits=3),
    group(["model.layers.0.mlp.up_proj"], num_bits=2),
    group(["Module"], num_bits=4),
]
MODULES = [
    *(f"model.layers.{i}.mlp.{role}_proj" for i in (0, 1) for role in ("gate", "up", "down")),
    "model.layers.0.self_attn.q_proj",
    "model.embed_tokens",
    "lm_head",
]


@pytest.mark.parametrize("groups", [RANKED, RANKED[::-1]], ids=["as listed", "reversed"])
@pytest.mark.parametrize("ignore", [[], ["lm_head"], ["re:.*layers.1.*", "Embedding"]])
def test_the_group_of_a_module_is_the_one_that_compressed_tensors_takes(
    groups: list[dict[str, Any]], ignore: list[str]
) -> None:
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    from gossamer.formats import layout_from_quantization_config

    config = quantization(*groups, ignore=ignore)
    model = torch.nn.Module()
    for name in MODULES:
        parent = model
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        made = torch.nn.Embedding(4, 32) if leaf == "embed_tokens" else torch.nn.Linear(32, 4, bias=False)
        parent.add_module(leaf, made)
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    layout = layout_from_quantization_config(config, torch.bfloat16)
    for name in MODULES:
        scheme = getattr(model.get_submodule(name), "quantization_scheme", None)
        form = layout(name, "embedding" if name.endswith("embed_tokens") else "linear")
        assert getattr(form, "bits", None) == (None if scheme is None else scheme.weights.num_bits), name


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (quantization(transform_config={"config_groups": {"u": {}}}), UnsupportedModel, "transform_config"),
        (quantization(transform_config=[1]), UnsupportedModel, "transform_config"),
        (quantization(sparsity_config={"format": "sparse-24-bitmask"}), UnsupportedModel, "sparsity_config"),
        (quantization(sparsity_config={"targets": []}), UnsupportedModel, "sparsity_config"),
        (quantization(ignore=[5]), CorruptCheckpoint, "ignore"),
        (quantization(ignore="lm_head"), CorruptCheckpoint, "ignore"),
        (quantization(group([5])), CorruptCheckpoint, r"group_0\.targets"),
        (quantization(group(["Linear"], strategy=["group"])), CorruptCheckpoint, r"group_0\.weights.*strategy"),
        (quantization(group(["Linear"], symmetric="no")), CorruptCheckpoint, r"group_0\.weights.*symmetric"),
        (quantization(group(["Linear"], group_size=True)), CorruptCheckpoint, r"group_0: group_size is True"),
        (quantization(group(["Linear"], actorder="dynamic")), UnsupportedModel, "actorder"),
        (quantization({**group(["Linear"]), "output_activations": {}}), UnsupportedModel, "activations"),
        (quantization(config_groups={"x": 1}), CorruptCheckpoint, r"config_groups\.x"),
    ],
)
def test_a_quantization_that_is_not_understood_is_named(
    tmp_path: Path, tiny: Any, config: dict[str, Any], error: type[CheckpointError], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_checkpoint(tiny.folder(tmp_path / "m", quantization_config=config))


@pytest.mark.parametrize("sparsity", [None, {}, {"format": "dense", "global_sparsity": 0.1}])
def test_a_sparsity_that_changes_nothing_is_accepted(tmp_path: Path, tiny: Any, sparsity: Any) -> None:
    config = quantization(sparsity_config=sparsity, transform_config={}, ignore=None)
    assert open_checkpoint(tiny.folder(tmp_path / "m", quantization_config=config)).parameters() > 0


@pytest.mark.parametrize("name", ["\ud800.safetensors", "x" * 300 + ".safetensors", "x/" * 3000 + "a.safetensors"])
def test_a_shard_that_no_file_can_be_named_is_a_typed_error(tmp_path: Path, tiny: Any, name: str) -> None:
    folder = tiny.folder(tmp_path / "m", shards=2)
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptCheckpoint, match=r"ud800|xxxx|x/x/"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "gossamer.json", "model.safetensors.index.json"])
def test_half_a_surrogate_pair_is_refused_as_key_and_as_value(tmp_path: Path, tiny: Any, name: str) -> None:
    for n, content in enumerate(({"\ud800": "x"}, {"files": {"\udfff": "x"}}, {"x": [["a\ud83d"]]})):
        folder = tiny.folder(tmp_path / str(n), shards=2)
        (folder / name).write_text(json.dumps(tiny.config(schema_version=1) | content))
        with pytest.raises(CorruptCheckpoint, match=name.replace(".", r"\.") + ".*surrogate"):
            open_checkpoint(folder)


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m", _name_or_path="\U0001f389")
    assert "\\ud83c" in (folder / "config.json").read_text()
    assert open_checkpoint(folder).hf_config["_name_or_path"] == "\U0001f389"


def test_an_index_of_millions_of_values_is_refused_before_it_is_parsed(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gossamer.checkpoint import hf

    folder = tiny.folder(tmp_path / "m", shards=2)
    monkeypatch.setattr(hf, "MAX_VALUES", 10)
    with pytest.raises(CorruptCheckpoint, match=r"index\.json: about \d+ values"):
        open_checkpoint(folder)


@pytest.mark.parametrize("tensor", [torch.zeros(1).bfloat16().expand(64), torch.empty(64, device="meta")])
def test_a_pickled_tensor_that_claims_more_than_the_file_holds_is_refused(
    tmp_path: Path, tiny: Any, tensor: torch.Tensor
) -> None:
    folder = tiny.folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save(tiny.tensors() | {"model.norm.weight": tensor}, folder / "pytorch_model.bin")
    with pytest.raises(CorruptCheckpoint, match=r"pytorch_model\.bin: tensor 'model\.norm\.weight' \[64\]"):
        open_checkpoint(folder, allow_pickle=True)


@pytest.mark.parametrize(
    ("model_type", "changes", "window"),
    [
        ("mistral", {"max_position_embeddings": 4096}, None),
        ("mistral", {"max_position_embeddings": 4097}, 4096),
        ("mistral", {"max_position_embeddings": 8192, "sliding_window": None}, None),
        ("mistral", {"max_position_embeddings": 8192, "sliding_window": 8192}, None),
        ("mistral", {"max_position_embeddings": 8192, "sliding_window": 4096}, 4096),
        ("llama", {"max_position_embeddings": 8192}, None),
    ],
)
def test_a_mistral_without_a_window_has_the_one_of_transformers(
    tmp_path: Path, tiny: Any, model_type: str, changes: dict[str, Any], window: int | None
) -> None:
    config = open_checkpoint(tiny.folder(tmp_path / "m", model_type=model_type, **changes)).config
    assert {layer.window for layer in config.layers} == {window}


@pytest.mark.parametrize("pickled", [False, True])
def test_a_tensor_is_the_callers_own_and_as_it_is_in_the_file(tmp_path: Path, tiny: Any, pickled: bool) -> None:
    folder = tiny.folder(tmp_path / "m")
    if pickled:
        torch.save(tiny.tensors(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    checkpoint = open_checkpoint(folder, allow_pickle=pickled)
    for name, expected in tiny.tensors().items():
        for rows in (None, slice(1, 3), slice(2, 2)):
            tensor = checkpoint.tensor(name, rows, dtype=expected.dtype)
            assert torch.equal(tensor, expected if rows is None else expected[rows])
            assert tensor.is_contiguous()
            tensor.fill_(7)
        assert torch.equal(checkpoint.tensor(name, dtype=expected.dtype), expected)


def test_the_tokenizer_is_made_once(tmp_path: Path, tiny: Any) -> None:
    tiny.gguf(tmp_path / "m.gguf")
    for checkpoint in (open_checkpoint(tiny.folder(tmp_path / "m")), open_checkpoint(tmp_path / "m.gguf")):
        assert checkpoint.tokenizer() is checkpoint.tokenizer()
