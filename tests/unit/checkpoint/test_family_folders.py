"""Folders of every family: dense ones are again what transformers loads, packed ones that it cannot read say so."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.checkpoint.save import save_folder
from gossamer.compress.pipeline import compress
from gossamer.compress.quantize.rotate import Rotate, RotateOptions
from gossamer.compress.recipe import parse_recipe
from gossamer.errors import CorruptCheckpoint, UnsupportedModel
from gossamer.model import OWN_PREFIX, config_from_hf
from tiny_families import VARIANTS, make_family

FUSED = ("phi3", "gpt2", "gpt_neox", "bloom")
TOKENS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=[name for name in VARIANTS if "-" not in name])
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("family") / request.param
    make_family(path, request.param)
    return path


class Single:
    """A checkpoint that is no folder, so that its tensors are written one by one as layers have them."""

    def __init__(self, base: Any) -> None:
        self._base = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def in_transformers(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_what_is_written_layer_by_layer_is_what_transformers_reads(folder, tmp_path) -> None:
    checkpoint = open_checkpoint(folder)
    save_folder(Single(checkpoint), tmp_path / "out")
    expected = load_decoder(checkpoint)(TOKENS)
    torch.testing.assert_close(in_transformers(tmp_path / "out"), expected, rtol=0, atol=1e-4)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_copy_of_a_folder_is_the_same_tensors(folder, tmp_path) -> None:
    save_folder(open_checkpoint(folder), tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_packed_folder_is_read_by_transformers_or_named_as_ours(folder, tmp_path) -> None:
    recipe = parse_recipe(
        {"version": 1, "name": "r", "stages": [{"method": "rtn", "bits": 8, "group_size": 32}]}, "test"
    )
    compress(open_checkpoint(folder), recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"].startswith(OWN_PREFIX) == (folder.name in FUSED)
    if folder.name in FUSED:
        with pytest.raises(ValueError, match="model type"):
            in_transformers(tmp_path / "out")
    else:
        expected = load_decoder(open_checkpoint(tmp_path / "out"))(TOKENS)
        torch.testing.assert_close(in_transformers(tmp_path / "out"), expected, rtol=0, atol=1e-3)


def test_names_without_the_familys_prefix_are_found(folder, tmp_path) -> None:
    short = make_copy(folder, tmp_path / "short")
    tensors = load_file(short / "model.safetensors")
    prefix = next(iter(n for n in tensors if n.endswith("0.weight") or ".0." in n)).split(".")[0] + "."
    save_file({name.removeprefix(prefix): t for name, t in tensors.items()}, short / "model.safetensors")
    torch.testing.assert_close(
        load_decoder(open_checkpoint(short))(TOKENS), load_decoder(open_checkpoint(folder))(TOKENS)
    )


def test_rows_of_a_part_are_rows_of_the_whole_part(folder) -> None:
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.names():
        whole = checkpoint.tensor(name)
        rows = slice(3, max(4, len(whole) - 2))
        assert torch.equal(checkpoint.tensor(name, rows), whole[rows])
        assert torch.equal(checkpoint.stored(name)["weight"].float(), whole)


@pytest.mark.parametrize("family", FUSED)
def test_a_fused_tensor_of_another_shape_is_named(family, tmp_path) -> None:
    make_family(tmp_path / "model", family)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = next(n for n in tensors if n.endswith(("qkv_proj.weight", "c_attn.weight", "query_key_value.weight")))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match=name.replace(".", r"\.")):
        open_checkpoint(tmp_path / "model")


def test_masks_of_older_files_are_no_tensors_of_the_model(tmp_path) -> None:
    make_family(tmp_path / "model", "gpt2")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.zeros(())}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    open_checkpoint(tmp_path / "model")


def make_copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_a_rotated_phi3_is_fused_again(tmp_path) -> None:
    make_family(tmp_path / "model", "phi3")
    base = open_checkpoint(tmp_path / "model")
    save_folder(Rotate(RotateOptions()).apply(base), tmp_path / "out")
    torch.testing.assert_close(in_transformers(tmp_path / "out"), load_decoder(base)(TOKENS), rtol=0, atol=1e-3)


SAID = {name: {"model_type": name.split("-")[0], **said} for name, said in VARIANTS.items()}
BAD = (None, True, -1, 0, 1.5, "x", [], {}, [1], {"a": []}, 10**30, float("nan"), float("inf"))


@pytest.mark.parametrize("variant", SAID)
def test_a_config_of_wrong_types_is_refused_or_read(variant) -> None:
    said = SAID[variant]
    more = ("tie_word_embeddings", "layer_types", "rope_scaling", "attention_bias", "gossamer_layers", "head_dim")
    for key in {*said, *more, "hidden_act", "sliding_window", "word_embed_proj_dim", "enable_bias", "rope_theta"}:
        for bad in BAD:
            with suppress(CorruptCheckpoint, UnsupportedModel):  # and nothing else comes out of it
                config_from_hf({**said, key: bad})


@pytest.mark.parametrize(
    ("variant", "change", "field"),
    [
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"n_head": "4"}, "n_head"),
        ("gpt2", {"n_embd": 0}, "n_embd"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"rope_parameters": {"full_attention": 3}}, "rope_parameters"),
        ("gemma2", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar"),
        ("gemma2", {"layer_types": ["sliding_attention"]}, "layer_types"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": -3}, "max_window_layers"),
        ("phi3", {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "longrope"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ("gpt_neox", {"rotary_pct": 0.3, "hidden_size": 40}, "rotary"),
        ("gpt_neox", {"use_parallel_residual": "yes"}, "use_parallel_residual"),
        ("qwen3", {"hidden_act": "mish"}, "hidden_act"),
    ],
)
def test_what_a_family_may_not_say(variant, change, field) -> None:
    with pytest.raises((CorruptCheckpoint, UnsupportedModel), match=field):
        config_from_hf({**SAID[variant], **change})
