"""Files that no reader takes: each is a typed error that names the file, and the tensor or the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from factored import write
from gossamer.checkpoint import open_checkpoint, safetensors_io
from gossamer.checkpoint.files import RandomAccessFile
from gossamer.checkpoint.safetensors_io import whole, write_safetensors
from gossamer.errors import CorruptCheckpoint, GossamerError, TokenizerError, UnsafeCheckpoint, UnsupportedModel
from gossamer.formats import Integer, LowRank
from gossamer.model import config_from_hf
from tiny_llama import make_folder

INDEX, PICKLED = "model.safetensors.index.json", "pytorch_model.bin"
NESTED = "re:" + "(" * 5000 + ")" * 5000
ENDLESS = r"re:(?:(?:\w|\.|[a-z])*)*[!?]"


def quantized_by(*targets: str, stored: str = "pack-quantized", **said: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **said}
    groups = {"group_0": {"targets": list(targets), "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": stored, "config_groups": groups}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"attention_bias": "yes"}, CorruptCheckpoint, "attention_bias is 'yes', expected true or false"),
        ({"num_key_value_heads": 3}, CorruptCheckpoint, "layer 0 has 4 query heads, not a multiple of its 3 key-value"),
        ({"head_dim": 15}, CorruptCheckpoint, "head_dim is 15 with 15 rotary columns.*an even number"),
        ({"rope_parameters": {"rope_type": "yarn"}}, UnsupportedModel, "rope_type 'yarn' is not supported"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"full_attention": 3}},
            CorruptCheckpoint,
            "rope_parameters is not an object of objects",
        ),
    ],
)
def test_a_config_that_no_model_has_is_named(tmp_path: Path, tiny: Any, changes: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=rf"m/config\.json: {message}"):
        open_checkpoint(tiny.folder(tmp_path / "m", **changes))


def test_a_config_from_elsewhere_is_looked_at_too(tiny: Any) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"config\.json: rope_parameters is not an object"):
        config_from_hf(tiny.config(rope_parameters=[1]))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (quantized_by("Linear", group_size=48), r"q_proj\.weight' \[64, 64\]: group_size 48 does not divide 64"),
        (quantized_by("Linear", type="float"), r"config_groups\.group_0: pack-quantized 'float' is not supported"),
        (quantized_by("Linear", num_bits=9), r"config_groups\.group_0: num_bits 9 with strategy 'group' is not"),
        (quantized_by("Linear", strategy="token"), r"config_groups\.group_0: num_bits 4 with strategy 'token' is not"),
        (quantized_by("Linear", stored="marlin-24"), r"config_groups\.group_0: format 'marlin-24' is not supported"),
        (quantized_by("Linear") | {"config_groups": []}, "quantization_config.config_groups is not an object"),
        (quantized_by(NESTED), "quantization_config: maximum recursion depth"),
        (quantized_by("re:("), r"quantization_config target 're:\(' is no usable pattern"),
        (quantized_by(ENDLESS), r"quantization_config target 're:.*' is no usable pattern"),
    ],
    ids=["group", "floats", "bits", "strategy", "format", "a list", "nested deep", "no pattern", "an endless pattern"],
)
def test_a_quantization_that_cannot_be_is_named(tmp_path: Path, tiny: Any, quantization: Any, message: str) -> None:
    with pytest.raises((CorruptCheckpoint, UnsupportedModel), match=message):
        open_checkpoint(tiny.folder(tmp_path / "m", quantization_config=quantization))


@pytest.mark.parametrize("side", ["u", "v"])
def test_a_factor_that_says_another_shape_is_named(tmp_path: Path, side: str) -> None:
    module, form = "model.layers.0.self_attn.q_proj", LowRank(8, Integer(8, None))
    write(make_folder(tmp_path / "dense"), tmp_path / "m", {module: form})
    path, name = tmp_path / "m" / "model.safetensors", f"{module}.weight_{side}_shape"
    tensors = safetensors.torch.load_file(path)
    said = tensors[name].tolist()
    tensors[name] = torch.tensor(said) + 1
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CorruptCheckpoint) as caught:
        open_checkpoint(tmp_path / "m")
    wrong = [n + 1 for n in said]
    assert f"'{name}' says {wrong}, rank8-int8-channel of a weight [32, 32] needs {said}" in caught.value.message


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"], ids=repr)
def test_an_index_that_lists_no_files_is_named(tmp_path: Path, tiny: Any, weight_map: Any) -> None:
    folder = tiny.folder(tmp_path / "m", shards=2)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptCheckpoint, match=r"index\.json: weight_map is not an object of file names"):
        open_checkpoint(folder)


@pytest.mark.parametrize("shard", ["config.json", "weights.bin"])
def test_a_shard_of_another_kind_is_named_and_not_read(tmp_path: Path, tiny: Any, shard: str) -> None:
    folder = tiny.folder(tmp_path / "m", shards=2)
    torch.save(tiny.tensors(), folder / "weights.bin")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tiny.tensors(), shard)}))
    with pytest.raises(CorruptCheckpoint, match=rf"embed_tokens\.weight' is in '{shard}', not a \.safetensors file"):
        open_checkpoint(folder, allow_pickle=True)


@pytest.mark.parametrize("name", ["weights.pt", "model.ckpt"])
def test_a_pickle_of_any_name_is_refused_with_the_way_out(tmp_path: Path, tiny: Any, name: str) -> None:
    folder = tiny.folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save(tiny.tensors(), folder / name)
    with pytest.raises(UnsafeCheckpoint, match=f"{name}: a pickle file can run code") as caught:
        open_checkpoint(folder)
    assert "--allow-pickle" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds a list, not named tensors"),
        ({"step": 7}, "entry 'step' is not a named dense tensor"),
        ({3: torch.ones(2)}, "entry 3 is not a named dense tensor"),
        ({"x": torch.ones(2).to_sparse()}, "entry 'x' is not a named dense tensor"),
    ],
    ids=["a list", "a number", "a number for a name", "a sparse tensor"],
)
def test_a_pickle_of_anything_but_named_tensors_is_refused(
    tmp_path: Path, tiny: Any, content: Any, message: str
) -> None:
    folder = tiny.folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / PICKLED)
    with pytest.raises(CorruptCheckpoint, match=rf"pytorch_model\.bin: {message}"):
        open_checkpoint(folder, allow_pickle=True)


def test_a_pickle_that_is_cut_short_is_named(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save(tiny.tensors(), folder / PICKLED)
    data = (folder / PICKLED).read_bytes()
    (folder / PICKLED).write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptCheckpoint, match=r"pytorch_model\.bin: not a torch checkpoint"):
        open_checkpoint(folder, allow_pickle=True)


def test_a_tensor_that_a_pickled_shard_has_not_is_named(tmp_path: Path, tiny: Any) -> None:
    folder, tensors = tiny.folder(tmp_path / "m"), tiny.tensors()
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors, "pytorch_model-1.bin")}
    (folder / f"{PICKLED}.index.json").write_text(json.dumps(index))
    del tensors["model.norm.weight"]
    torch.save(tensors, folder / "pytorch_model-1.bin")
    with pytest.raises(CorruptCheckpoint, match=r"pytorch_model-1\.bin: no tensor 'model\.norm\.weight'"):
        open_checkpoint(folder, allow_pickle=True)


def test_a_link_to_itself_is_refused(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    with pytest.raises(UnsafeCheckpoint, match=r"config\.json: a link that cannot be followed"):
        open_checkpoint(folder)


def test_what_a_file_has_not_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(10))
    file = RandomAccessFile(tmp_path / "x")
    for offset, count in ((8, 3), (-1, 2), (0, -1), (11, 0)):
        for read in (file.read, file.read_bytes):
            with pytest.raises(CorruptCheckpoint, match=f"x: bytes {offset} to {offset + count} of a file of 10 bytes"):
                read(offset, count)
    file.close()
    with pytest.raises(CorruptCheckpoint, match="x: cannot be read: Bad file descriptor"):
        file.read_bytes(0, 10)


def test_a_tensor_is_written_once_and_a_header_is_no_longer_than_readers_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [whole("x", torch.ones(2)), whole("y", torch.ones(2))]
    with pytest.raises(GossamerError, match="tensor 'x' would be written twice"):
        write_safetensors(tmp_path / "m", [*entries, entries[0]])
    monkeypatch.setattr(safetensors_io, "MAX_HEADER", 100)
    with pytest.raises(GossamerError, match=r"a header of 1\d\d bytes, more than safetensors' 100"):
        write_safetensors(tmp_path / "m", entries)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_tokenizer_says_what_one_is(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="m: no tokenizer") as caught:
        open_checkpoint(folder).tokenizer()
    assert "tokenizer.json, tokenizer.model, or vocab.json" in str(caught.value.hint)


def test_a_tokenizer_that_is_python_only_is_refused(tmp_path: Path, tiny: Any) -> None:
    """Of CTRL's vocabulary files transformers makes a tokenizer that is not one of the library `tokenizers`."""
    folder = tiny.folder(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({"<unk>": 0, "a": 1, "b</w>": 2}))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CTRLTokenizer"}))
    with pytest.raises(TokenizerError, match=r"m: a tokenizer that has no tokenizer\.json form"):
        open_checkpoint(folder).tokenizer()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0a\x02\x08\x01", "a number where bytes belong"),
        (b"\x0a\x06\x0a\x01a\x1a\x01x", "bytes where a number belongs"),
        (b"\x08\x01", "field 1 is not a message"),
    ],
    ids=["a number for a text", "a text for a type", "a number for a piece"],
)
def test_a_tokenizer_model_with_fields_of_other_types_is_refused(
    tmp_path: Path, tiny: Any, data: bytes, message: str
) -> None:
    folder = tiny.folder(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(data)
    with pytest.raises(TokenizerError, match=rf"tokenizer\.model: not a SentencePiece model: {message}") as caught:
        open_checkpoint(folder).tokenizer()
    assert "tokenizer.json" in str(caught.value.hint)


def test_two_tokens_of_one_text_are_refused(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    piece = b"\x0a\x03\x0a\x01a"
    (folder / "tokenizer.model").write_bytes(piece + piece + b"\x12\x02\x18\x02")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: two tokens of the vocabulary have the same text"):
        open_checkpoint(folder).tokenizer()
