"""How weights are held once loaded."""

from __future__ import annotations

import torch

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder, resident_bytes
from gossamer.formats.linear import DenseLinear


def test_blocks_of_a_gguf_file_are_held_as_the_folder_that_it_converts_to() -> None:
    checkpoint = open_checkpoint("smollm2")
    assert resident_bytes(checkpoint, torch.float32, packed=True) < 2.01 * checkpoint.parameters()
    held, exact = load_decoder(checkpoint, packed=True), load_decoder(checkpoint)
    assert isinstance(held.blocks[3].down, DenseLinear)
    for weight in exact.parameters():
        if weight.ndim == 2:
            weight.copy_(weight.bfloat16().float())
    tokens = torch.arange(500, 540).unsqueeze(0)
    found, expected = held(tokens), exact(tokens)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
