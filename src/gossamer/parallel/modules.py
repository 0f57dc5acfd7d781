"""Puts the sums into a loaded Decoder, which knows of none: behind o and down, and behind the lookup of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..model.decoder import Decoder
from .group import Peers
from .plan import Share


class Summed(nn.Module):
    """A linear layer whose columns are cut over the ranks: each computes a part of every output."""

    def __init__(self, inner: nn.Module, peers: Peers) -> None:
        super().__init__()
        self.inner, self.peers = inner, peers

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x).contiguous()
        self.peers.sum(y)
        return y


class VocabularyPart(nn.Module):
    """An embedding of some tokens; the others' rows are zero here, and another rank's part of the sum."""

    def __init__(self, inner: nn.Module, share: Share, peers: Peers) -> None:
        super().__init__()
        self.inner, self.peers = inner, peers
        self.first, self.stop = share.vocab

    def forward(self, tokens: Tensor) -> Tensor:
        mine = (tokens >= self.first) & (tokens < self.stop)
        rows: Tensor = self.inner(torch.where(mine, tokens - self.first, 0))
        rows = rows.masked_fill(~mine.unsqueeze(-1), 0.0)
        self.peers.sum(rows)
        return rows


def share_decoder(decoder: Decoder, share: Share, peers: Peers) -> None:
    """Make a Decoder of a rank's weights compute its part of the whole model."""
    model: nn.Module = decoder  # whose modules may be of any kind
    if share.tp > 1:
        for block in decoder.blocks:
            for role in ("o", "down"):
                setattr(block, role, Summed(getattr(block, role), peers))
        if share.is_first:
            model.embed = VocabularyPart(decoder.embed, share, peers)
    if not share.is_first:
        model.embed = nn.Identity()  # states come from the stage before
    if not share.is_last:
        model.head, model.final_norm = nn.Identity(), nn.Identity()
