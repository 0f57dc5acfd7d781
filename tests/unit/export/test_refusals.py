"""What no target takes, and files that are not what was written: each refusal names the thing and the way out."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

import gossamer.export
from exports import make_artifact, run_export
from gguf_families import make_model
from gossamer.checkpoint import open_checkpoint
from gossamer.errors import ExportError, OutputExists, ProofFailed
from gossamer.export import proof
from gossamer.export.base import Options
from gossamer.export.registry import target_class
from gossamer.export.run import Proving, export
from gossamer.formats import Format, Integer
from tiny_llama import make_folder, make_tokenizer

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
SCALED_WINDOW = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
}
SHARED_HEADS = {"model_type": "gpt_neox", "num_key_value_heads": 2, "hidden_act": "gelu", "attention_bias": True}


def test_every_refusal_says_the_way_out() -> None:
    files = sorted(Path(gossamer.export.__file__).parent.rglob("*.py"))
    calls = [
        (f"{file.name}:{node.lineno}", {word.arg for word in node.exc.keywords})
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and "UnknownName" not in ast.dump(node.exc)
    ]
    assert len(calls) > 40
    assert [where for where, words in calls if "hint" not in words] == []


def test_an_odd_number_of_rows_fills_no_bytes_of_tensorrt(tmp_path) -> None:
    odd = {"head_dim": 5, "num_attention_heads": 64, "num_key_value_heads": 1, "partial_rotary_factor": 0.5}
    model = make_artifact(tmp_path / "m", Integer(4, 64), **odd)
    with pytest.raises(ExportError, match=r"k_proj\.weight has 5 rows, and two go into a byte") as caught:
        run_export(model, "tensorrt-llm", tmp_path / "out")
    assert "--to vllm" in str(caught.value.hint)
    assert run_export(model, "vllm", tmp_path / "out")["weights"]["max_abs_error"] == 0.0


@pytest.mark.parametrize(
    ("target", "config", "why"),
    [
        ("mlc", SHARED_HEADS, "gpt_neox: its query heads share no key-value head"),
        ("mlc", {"partial_rotary_factor": 0.5}, "llama: it turns all columns of a head"),
        ("mlc", {"model_type": "mistral", "rope_parameters": LLAMA3}, "mistral: it knows no rotary scaling llama3"),
        ("gguf", SHARED_HEADS, "gptneox has a key-value head for each query head, not for 2"),
        ("gguf", {"partial_rotary_factor": 0.5}, "llama turns all columns of a head, not 0.5 of them"),
        ("gguf", {"model_type": "qwen2", "rope_parameters": LLAMA3}, "qwen2 knows no rotary scaling llama3"),
        ("gguf", {"model_type": "phi3", "gossamer_layers": [{"biases": ["q"]}] * 2}, "holds q k v as one, and in"),
        ("gguf", {"model_type": "qwen2", "tie_word_embeddings": False, "head_dim": 16}, "not 64 in all"),
    ],
)
def test_what_an_engine_would_misread_is_refused_by_name(tmp_path, target, config, why) -> None:
    model = make_folder(tmp_path / "m", **config)
    with pytest.raises(ExportError, match=f"^{target}: .*{why}") as caught:
        run_export(model, target, tmp_path / "out")
    assert "gossamer convert" in str(caught.value.hint)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_types_of_a_file_that_openvino_does_not_read_are_refused_by_name(tmp_path) -> None:
    run_export(make_artifact(tmp_path / "m", Integer(5, 32)), "gguf", tmp_path / "5.gguf")
    with pytest.raises(ExportError, match=r"q_proj\S+ \(q5_0\) would be Q5_0, which openvino does not read") as caught:
        run_export(tmp_path / "5.gguf", "openvino", tmp_path / "out.gguf")
    assert "--allow-rounding" in str(caught.value.hint)
    record = run_export(tmp_path / "5.gguf", "openvino", tmp_path / "out.gguf", rounding=True)
    assert len(record["rounded"]) == 14


def test_scaled_positions_of_layers_with_a_window_are_refused(tmp_path) -> None:
    make_model(tmp_path / "m", "gemma3_text", rope_parameters=SCALED_WINDOW)
    with pytest.raises(ExportError, match="no rotary scaling of layers with a sliding window") as caught:
        run_export(tmp_path / "m", "gguf", tmp_path / "m.gguf")
    assert "gossamer convert" in str(caught.value.hint)


def test_layers_that_no_architecture_lets_differ_have_no_way_but_another_model(tmp_path) -> None:
    layers = [{"ffn_width": 64}, {}]
    model = make_artifact(tmp_path / "m", Integer(4, 64), model_type="qwen2", gossamer_layers=layers)
    for target in ("vllm", "mlc", "tensorrt-llm", "gguf"):
        with pytest.raises(ExportError, match=f"^{target}: the layers of .* differ in heads, width") as caught:
            run_export(model, target, tmp_path / "out")
        assert "only llama and mistral models" in str(caught.value.hint)


def words_only() -> Tokenizer:
    made = Tokenizer(models.WordLevel({"<|end|>": 0, "a": 1}, unk_token="<|end|>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def one_more(*tokens: str | AddedToken) -> Tokenizer:
    made = make_tokenizer(300)
    made.add_special_tokens(list(tokens))
    return made


def ending_in(token: str) -> Tokenizer:
    made = one_more(token)
    template = processors.TemplateProcessing(single=f"$A {token}", special_tokens=[(token, made.token_to_id(token))])
    made.post_processor = template
    return made


@pytest.mark.parametrize(
    ("tokenizer", "why"),
    [
        (words_only(), "a tokenizer of type WordLevel is not written, BPE is"),
        (make_tokenizer(400), r"has token 399 \('.*'\), and the model only the tokens below 320"),
        (ending_in("<sep>"), r"makes \[.*\] of 'a', and \[.*, 300\] with what it puts around a text"),
        (one_more("[PAD310]"), "the tokenizer cannot be read back: .* two tokens .* the same text"),
        (one_more(AddedToken("<|x|>", lstrip=True, rstrip=True)), r"'a <\|x\|> b' is \[.*\] to our tokenizer and \["),
    ],
    ids=["words", "too many", "around", "two alike", "spaces"],
)
def test_tokenizers_that_gguf_has_no_words_for_are_refused(tmp_path, tokenizer, why) -> None:
    model = make_artifact(tmp_path / "m")
    tokenizer.save(str(model / "tokenizer.json"))
    refuse_tokenizer(model, why)


def test_a_chat_template_that_gguf_loses_is_refused(tmp_path) -> None:
    model = make_artifact(tmp_path / "m")
    (model / "chat_template.jinja").write_text("")
    refuse_tokenizer(model, "the chat template '' is read back as None")


def refuse_tokenizer(model: Path, why: str) -> None:
    """It is refused for GGUF, and the way out that is named is one."""
    with pytest.raises(ExportError, match=f"^gguf: .*{why}") as caught:
        run_export(model, "gguf", model.with_name("out.gguf"))
    assert "gossamer convert" in str(caught.value.hint)
    assert sorted(p.name for p in model.parent.iterdir()) == [model.name]


def test_a_tokenizer_without_tokens_is_written_as_it_is(tmp_path) -> None:
    model, nothing = make_artifact(tmp_path / "m"), Tokenizer(models.BPE())
    nothing.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    nothing.save(str(model / "tokenizer.json"))
    run_export(model, "gguf", tmp_path / "m.gguf")
    assert open_checkpoint(tmp_path / "m.gguf").tokenizer().encode("hello") == []


READ_BACK: list[tuple[str, Format | None, str]] = [
    ("transformers", None, r"nothing stores model\.layers\.2\.\S+\.weight"),
    ("vllm", Integer(4, 64), r"nothing stores model\.layers\.2\.\S+\.weight"),
    ("gptq", Integer(4, 64), r"nothing stores model\.layers\.2\.\S+\.qweight"),
    ("awq", Integer(4, 64), r"nothing stores model\.layers\.2\.\S+\.scales"),
    ("tensorrt-llm", Integer(4, 64), r"nothing stores model\.layers\.2\.\S+\.weight"),
    ("mlc", Integer(4, 64), r"tensor-cache\.json has no model\.layers\.2\.\S+\.q_weight"),
    ("gguf", Integer(4, 64), r"package gguf \S+ finds no model\.layers\.2\.\S+\.weight in a file of arch"),
]


@pytest.mark.parametrize(("target", "form", "why"), READ_BACK, ids=[row[0] for row in READ_BACK])
def test_a_file_without_a_tensor_is_not_what_was_meant(tmp_path, target, form, why) -> None:
    """What was written is that of a model of two layers; what was meant has three."""
    run_export(make_artifact(tmp_path / "2", form), target, tmp_path / "out")
    meant = open_checkpoint(make_artifact(tmp_path / "3", form, num_hidden_layers=3))
    made = target_class(target)(meant, Options())
    reader, names = made.reader(tmp_path / "out"), [n for n in meant.names() if ".layers.2." in n]
    for name in (n for n in names if len(meant.shape(n)) == 2):
        with pytest.raises(ProofFailed, match=why) as caught:
            reader.weight(name)
        assert "please report it" in str(caught.value.hint)
    with pytest.raises(ProofFailed):
        proof.read_back(made, reader, lambda *_: None)


def test_a_tensor_of_another_shape_is_not_what_was_meant(tmp_path) -> None:
    run_export(make_artifact(tmp_path / "narrow"), "transformers", tmp_path / "out")
    wide = open_checkpoint(make_artifact(tmp_path / "wide", vocab_size=352))
    made = target_class("transformers")(wide, Options())
    with pytest.raises(ProofFailed, match=r"embed_tokens\.weight \[352, 64\] was read back as \[320, 64\]") as caught:
        proof.read_back(made, made.reader(tmp_path / "out"), lambda *_: None)
    assert "please report it" in str(caught.value.hint)


def test_a_shard_that_changes_after_it_was_written_is_caught(tmp_path) -> None:
    model = open_checkpoint(make_artifact(tmp_path / "m", Integer(4, 32)))

    def another_hand(label: str, done: int, total: int) -> None:
        if label == "writing" and done == total:
            (shard,) = tmp_path.glob(".out.*/params_shard_0.bin")
            data = bytearray(shard.read_bytes())
            data[100] ^= 1
            shard.write_bytes(data)

    with pytest.raises(ProofFailed, match=r"params_shard_0\.bin is not what was written into it") as caught:
        export(model, "mlc", tmp_path / "out", Options(), Proving(engine=False), another_hand)
    assert "export again" in str(caught.value.hint)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_a_folder_that_exists_is_not_written_into(tmp_path) -> None:
    model, out = make_artifact(tmp_path / "m"), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(OutputExists, match="out exists already") as caught:
        run_export(model, "transformers", out)
    assert "choose another --out" in str(caught.value.hint)
    assert [p.name for p in out.iterdir()] == ["mine"]
