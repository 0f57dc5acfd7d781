"""Methods of every kind, small enough to be followed by hand: what the pipeline feeds them is what is tested."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gossamer.checkpoint import Checkpoint
from gossamer.compress import recipe as recipe_module
from gossamer.compress import registry
from gossamer.compress.blockview import BlockView
from gossamer.compress.method import BlockQuantizer, Needs, Options, QuantizeOptions, Quantizer, Transform, Tuner
from gossamer.compress.quantize.grid import grid_of, quantize
from gossamer.compress.tune import groups_of
from gossamer.compress.tuning import TunedModel
from gossamer.formats import Codes, Dense, Format
from gossamer.model import FAMILIES

SEEN: dict[str, list[Any]] = {}
"""What methods were given, by what it is; cleared by `register`."""


def nearest(weight: Tensor, form: Format) -> Codes:
    return quantize(weight, *grid_of(weight, form), form)


class Sensitive(Quantizer):
    """Rounds to nearest and notes the gradient that it was given."""

    name = "fake-gradient"
    needs = Needs.GRADIENT
    Options = QuantizeOptions

    def quantize(self, weight: Tensor, form: Format, hessian: Tensor | None, gradient: Tensor | None = None) -> Codes:
        assert hessian is not None
        assert gradient is not None
        assert gradient.shape == weight.shape
        SEEN.setdefault("gradient", []).append(gradient.clone())
        return nearest(weight, form)


class Folding(BlockQuantizer):
    """Doubles the norms, halves the weights behind them, adds what it draws to one bias: folding that can be seen."""

    name = "fake-fold"
    Options = QuantizeOptions

    def compress(self, view: BlockView) -> None:
        SEEN.setdefault("target", []).append(view.target.clone())
        SEEN.setdefault("x", []).append(view.x.clone())
        SEEN.setdefault("drawn", []).append(float(torch.rand((), generator=view.generator)))
        for norm, roles in (("attn_norm", ("q", "k", "v")), ("ffn_norm", ("gate", "up"))):
            getattr(view.block, norm).weight.mul_(2.0)
            for role in roles:
                getattr(view.block, role).weight.mul_(0.5)
        if view.block.o.bias is not None:
            view.block.o.bias.add_(SEEN["drawn"][-1])
        for role in view.roles:
            view.put(role, nearest(getattr(view.block, role).weight, view.form(role)))


class Forgetful(BlockQuantizer):
    """Decides all but one layer."""

    name = "fake-forget"
    Options = QuantizeOptions

    def compress(self, view: BlockView) -> None:
        for role in view.roles[1:]:
            view.put(role, nearest(getattr(view.block, role).weight, view.form(role)))


class _Doubled(Checkpoint):
    """The weights of `up` doubled and those of `down` halved: the same function."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        for field in ("name", "path", "config", "hf_config", "dtype", "manifest", "source_note", "_shapes"):
            setattr(self, field, getattr(base, field))

    def format(self, name: str) -> Format:
        return Dense(torch.float32)

    def stored(self, name: str) -> dict[str, Tensor]:
        return {"weight": self.tensor(name)}

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        SEEN.setdefault("read", []).append((name, stop - start))
        weight = self._base.tensor(name, slice(start, stop))
        return weight * {"up_proj": 2.0, "down_proj": 0.5}.get(name.split(".")[-2], 1.0)

    def _make_tokenizer(self) -> Any:
        return self._base.tokenizer()

    def _files(self) -> list[Path]:
        return self._base._files()

    def _contents(self) -> Iterator[tuple[str, Iterator[Tensor]]]:
        raise AssertionError("the fingerprint of a view is never asked for")


class Double(Transform):
    """up x 2, down / 2."""

    name = "fake-double"
    Options = Options

    def apply(self, checkpoint: Checkpoint) -> Checkpoint:
        return _Doubled(checkpoint)


class TuneOptions(Options):
    steps: int = 4
    latent: bool = False


class Tune(Tuner):
    """A few steps of Adam over all scales and norms, saved after each of them."""

    name = "fake-tune"
    Options = TuneOptions
    stop_after: ClassVar[int | None] = None
    """Raises after this many saves."""

    def tune(self, model: TunedModel) -> None:
        parameters = model.trainable(norms=True, zeros=True, ends=True, latent="codes" if self.options.latent else None)
        groups = groups_of(model, latent=0.04, scale=1e-2, zero=1e-3, weight=1e-3)
        assert len(groups) == len(parameters)
        optimizer = torch.optim.Adam([{"params": group["params"], "lr": group["rate"]} for group in groups])
        done, extra = model.restore(optimizer)
        best = float(extra.get("best", torch.tensor(1e9)))
        for step in range(done, self.options.steps):
            tokens = model.tokens[step % len(model.tokens)].unsqueeze(0)
            wanted = model.teacher_logits(tokens).log_softmax(-1)
            loss = (wanted.exp() * (wanted - model(tokens).log_softmax(-1))).sum(-1).mean()
            value = float(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            best = min(best, value)
            SEEN.setdefault("loss", []).append(value)
            model.save(step + 1, optimizer, {"best": torch.tensor(best)})
            if self.stop_after == step + 1 - done:
                raise KeyboardInterrupt
        model.files["tuned.txt"] = b"done"


FAKES = (Sensitive, Folding, Forgetful, Double, Tune)


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the fakes known to recipes for one test."""
    SEEN.clear()
    for fake in FAKES:
        monkeypatch.setitem(registry.METHODS, fake.name, fake)
    assert recipe_module.METHODS is registry.METHODS


def linear_names(block: int) -> dict[str, str]:
    return {role: FAMILIES["llama"].module(role, block) for role in ("q", "k", "v", "o", "gate", "up", "down")}
