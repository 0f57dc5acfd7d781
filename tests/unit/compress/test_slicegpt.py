"""SliceGPT: the axes are those of the stream, and a stream that fills only some of them is cut without a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import difference, logits, make_model, name, prune, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.compress.prune.slicegpt import SlicedCheckpoint, covariance
from gossamer.compress.source import Source
from gossamer.errors import CompressionError

STAGE = {"method": "slicegpt", "ratio": 1 / 3}


def flat_model(folder: Path, **changes: Any) -> Path:
    """A model whose residual stream lies in 64 of its 96 dimensions, not along the channels."""
    make_model(folder, **changes)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    plane = torch.linalg.qr(torch.randn(96, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).Q
    project = (plane @ plane.T).float()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] @ project
    for i in range(3):
        for role in ("o", "down"):
            for kind in ("weight", "bias"):
                if name(role, i, kind) in tensors:
                    tensors[name(role, i, kind)] = project @ tensors[name(role, i, kind)]
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"attention_bias": True, "mlp_bias": True}])
def test_what_the_stream_does_not_fill_goes_without_a_trace(tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    model = flat_model(tmp_path / "model", num_attention_heads=4, num_key_value_heads=2, **changes)
    pruned = prune(model, tmp_path / "out", STAGE)
    assert pruned.config.hidden_size == 64
    assert not pruned.config.tie_embeddings
    assert difference(logits(pruned), logits(open_checkpoint(model))) < 1e-3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert difference(oracle(tokens()).logits, load_decoder(pruned)(tokens())) < 1e-4


def test_all_axes_are_the_same_model(tmp_path: Path) -> None:
    base = open_checkpoint(make_model(tmp_path / "model"))
    axes = torch.linalg.qr(torch.randn(96, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    sliced = SlicedCheckpoint(base, axes)
    assert difference(logits(sliced), logits(base)) < 1e-4
    for tensor in sliced.names():
        whole = sliced.tensor(tensor)
        assert tuple(whole.shape) == sliced.shape(tensor)
        assert torch.equal(sliced.tensor(tensor, slice(3, 9)), whole[3:9]), tensor
    assert sliced.fingerprint() != base.fingerprint()


def test_axes_are_of_all_that_the_norms_give(tmp_path: Path) -> None:
    base = open_checkpoint(make_model(tmp_path / "model"))
    decoder, seen = load_decoder(base, torch.float64), list[Tensor]()
    norms = [norm for block in decoder.blocks for norm in (block.attn_norm, block.ffn_norm)] + [decoder.final_norm]
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    decoder(tokens())
    rows = torch.cat([x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() for x in seen])
    wanted = rows.T @ rows
    found = covariance(Source(base), tokens(), lambda *_: None)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_widths_that_leave_nothing_or_all_are_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    for ratio, left in ((0.05, 96), (0.95, 0)):
        with pytest.raises(CompressionError, match=f"leaves {left} of 96 channels, in steps of 32"):
            prune(model, tmp_path / "out", {"method": "slicegpt", "ratio": ratio})
