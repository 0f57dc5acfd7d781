"""Methods of every kind, small enough to be followed by hand: what the pipeline feeds them is what is tested."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gossamer.checkpoint import Checkpoint
from gossamer.compress import recipe as recipe_module
from gossamer.compress import registry
from gossamer.compress.blockview import BlockView
from gossamer.compress.grids import linear_shapes
from gossamer.compress.method import (
    BlockMethod,
    BlockQuantizer,
    LayerMethod,
    Needs,
    Options,
    QuantizeOptions,
    Quantizer,
    Reducer,
    StageMethod,
    Transform,
    Tuner,
)
from gossamer.compress.quantize.grid import grid_of, quantize
from gossamer.compress.tune import groups_of
from gossamer.compress.tuning import TunedModel
from gossamer.compress.units import Units
from gossamer.formats import Codes, Dense, Format
from gossamer.model import FAMILIES, ModelConfig, tensor_names

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


class _View(Checkpoint):
    """Another checkpoint, all of it in float32."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        for field in ("name", "path", "config", "hf_config", "dtype", "manifest", "source_note", "_shapes"):
            setattr(self, field, getattr(base, field))

    def format(self, name: str) -> Format:
        return Dense(torch.float32)

    def stored(self, name: str) -> dict[str, Tensor]:
        return {"weight": self.tensor(name)}

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        return self._base.tensor(name, slice(start, stop))

    def _make_tokenizer(self) -> Any:
        return self._base.tokenizer()

    def _files(self) -> list[Path]:
        return self._base._files()

    def _contents(self) -> Iterator[tuple[str, Iterator[Tensor]]]:
        raise AssertionError("the fingerprint of a view is never asked for")


class _Doubled(_View):
    """The weights of `up` doubled and those of `down` halved: the same function."""

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        SEEN.setdefault("read", []).append((name, stop - start))
        return super()._read(name, start, stop) * {"up_proj": 2.0, "down_proj": 0.5}.get(name.split(".")[-2], 1.0)


class _Shorter(_View):
    """Without one of its blocks."""

    def __init__(self, base: Checkpoint, gone: int) -> None:
        super().__init__(base)
        self._gone = gone
        layers = base.config.layers
        self.config = replace(base.config, layers=layers[:gone] + layers[gone + 1 :])
        self.hf_config = {**base.hf_config, "num_hidden_layers": len(layers) - 1}
        self._shapes = dict(tensor_names(self.config))

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        head, at, rest = name.partition("layers.")
        if at:
            number, _, rest = rest.partition(".")
            name = f"{head}{at}{int(number) + (int(number) >= self._gone)}.{rest}"
        return self._base.tensor(name, slice(start, stop))


class DropOptions(Options):
    block: int = 1


class Drop(Reducer):
    """Leaves one block away."""

    name = "fake-drop"
    needs = Needs.BLOCK
    Options = DropOptions

    def expect(self, config: ModelConfig) -> ModelConfig:
        return replace(config, layers=config.layers[1:])

    def decide(self, units: Units, tokens: Tensor | None, progress: Any) -> dict[str, Tensor]:
        assert tokens is not None
        SEEN.setdefault("deciding over", []).append(units.source.config.num_layers)
        return {"gone": torch.tensor([self.options.block])}

    def apply(self, checkpoint: Checkpoint, decision: Mapping[str, Tensor]) -> Checkpoint:
        return _Shorter(checkpoint, int(decision["gone"]))

    def layers_kept(self, decision: Mapping[str, Tensor], count: int) -> list[int]:
        return [i for i in range(count) if i != int(decision["gone"])]

    def peak_bytes(self, config: ModelConfig, sequences: int, length: int) -> int:
        return 1 << 20


class Coarse(LayerMethod):
    """Stores signs times the mean magnitude, in float."""

    name = "fake-coarse"
    family = "factorize"
    needs = Needs.HESSIAN
    Options = Options

    def formats(self, config: ModelConfig, before: Mapping[str, Format]) -> dict[str, Format]:
        return dict.fromkeys(linear_shapes(config), Dense(torch.float32))

    def store(self, weight: Tensor, form: Format, hessian: Tensor | None) -> dict[str, Tensor]:
        assert hessian is not None
        return {"weight": weight.sign() * weight.abs().mean()}


class Repair(StageMethod, BlockMethod):
    """Notes what it is given, doubles the first norm, and stores every weight as it is."""

    name = "fake-repair"
    family = "distill"
    Options = Options

    def formats(self, config: ModelConfig, before: Mapping[str, Format]) -> dict[str, Format]:
        return {module: before[module] for module in linear_shapes(config)}

    def compress(self, view: BlockView) -> None:
        SEEN.setdefault("target", []).append(view.target.clone())
        SEEN.setdefault("x", []).append(view.x.clone())
        view.block.attn_norm.weight.mul_(2.0)
        for role in view.roles:
            view.store(role, {"weight": getattr(view.block, role).weight.detach().clone()})


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


FAKES = (Sensitive, Folding, Forgetful, Double, Tune, Drop, Coarse, Repair)


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the fakes known to recipes for one test."""
    SEEN.clear()
    for fake in FAKES:
        monkeypatch.setitem(registry.METHODS, fake.name, fake)
    assert recipe_module.METHODS is registry.METHODS


def linear_names(block: int) -> dict[str, str]:
    return {role: FAMILIES["llama"].module(role, block) for role in ("q", "k", "v", "o", "gate", "up", "down")}
