"""A folder of every family, as transformers saves it, computes what transformers computes: within 1e-4 in float32."""

from __future__ import annotations

import pytest
import torch
from test_decoder_parity import DenseCache

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.model.decoder import Decoder
from tiny_families import VARIANTS, make_family


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory) -> tuple[torch.nn.Module, Decoder]:
    folder = tmp_path_factory.mktemp("family") / "model"
    oracle = make_family(folder, request.param)
    return oracle, load_decoder(open_checkpoint(folder))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(300, (2, 60), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected(pair, tokens) -> torch.Tensor:
    with torch.no_grad():
        logits = pair[0](tokens).logits
    assert logits.std() > 0.3
    return logits


def test_logits_agree_over_a_whole_text(pair, tokens, expected) -> None:
    torch.testing.assert_close(pair[1](tokens), expected, rtol=0, atol=1e-4)


def test_logits_agree_token_by_token_with_a_cache(pair, tokens, expected) -> None:
    decoder = pair[1]
    cache = DenseCache(decoder.config, 2, 60)
    pieces = [decoder(tokens[:, :17], cache)]
    for at in range(17, 40):
        pieces.append(decoder(tokens[:, at : at + 1], cache, torch.full((2, 1), at)))
    pieces.append(decoder(tokens[:, 40:], cache, torch.arange(40, 60).expand(2, -1)))
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=1e-4)
