"""The compressed model, as a Tuner sees it, and the original's logits beside it.

Weights are computed from what is stored in every forward pass, so gradients reach scales (and zero points, norms, or
the weights behind the codes) or, where a weight is stored in float, its numbers.
Knows codes, blocks and logits; knows no recipe and no loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ..errors import CompressionError, NumericalError
from ..formats import Dense, Format
from ..model.decoder import Block, Rotation, softcap
from ..model.families import LINEARS
from .floatweight import FloatWeight
from .tunedlinear import TunedLinear
from .walk import advance

if TYPE_CHECKING:
    from ..checkpoint.safetensors_io import SafetensorsFile
    from .method import Tuner
    from .source import Source
    from .units import Units

Progress = Callable[[str, int, int], None]
Sampler = Callable[[Mapping[str, Tensor], int, int, int], Tensor]
"""(stored tensors of a model in training, sequences, length, seed) -> tokens [sequences, length] that it writes."""
FILE_PREFIX = "file:"
"""Before the name of a tensor whose bytes are a file of the output, not a tensor of the model."""


class TunedModel(nn.Module):
    """The compressed model [sequences, time] -> logits [sequences, time, vocabulary], in float32.

    Nothing is trainable until `trainable` says so. Blocks are in `blocks`, with a `TunedLinear` for each linear layer.
    """

    def __init__(
        self,
        units: Units,
        teacher: Source,
        tokens: Tensor,
        progress: Progress,
        stage: int,
        seed: int,
        sampler: Sampler | None = None,
    ) -> None:
        super().__init__()
        self.config = units.source.config
        self.tokens = tokens
        """[sequences, time] the calibration tokens: what there is to train on."""
        self.progress = progress
        """progress(label, done, total)"""
        self.recompute = True
        """Compute blocks again in the backward pass, so that one of them at a time is in memory in float."""
        self.generator = torch.Generator().manual_seed((seed * 1_000_003 + 7919 * (stage + 1)) % 2**63)
        """For what a tuner draws before it trains. What is drawn later must follow from the step, or be saved."""
        self.files: dict[str, bytes] = {}
        """Name -> content of files that the output folder gets besides the model, such as an adapter."""
        self._units, self._source, self._sampler = units, units.source, sampler
        self._state_unit = f"tuning-{stage}"
        self._teacher = _Teacher(teacher, tokens)
        files = units.where()
        self.embed = self._end(files, self._source.family.embed)
        self.blocks = nn.ModuleList(self._block(files, i) for i in range(self.config.num_layers))
        self.entrance = self._source.entrance()
        self.final_norm = self._source.norm("final_norm", lambda name: self._dense(files, name))
        tied = self.config.tie_embeddings
        self.head = self.embed if tied else self._end(files, self._source.family.head)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [sequences, time, vocabulary] of tokens [sequences, time]."""
        return self.logits(self.hidden(tokens))

    def hidden(self, tokens: Tensor, states: dict[int, Tensor] | None = None) -> Tensor:
        """Hidden states [sequences, time, hidden] before the final norm.

        `states` is given those behind each block whose number is a key of it.
        """
        rotation = self._source.rotation(tokens.shape[1])
        x = cast(Tensor, self.entrance(self.embed.look_up(tokens), rotation.positions))
        for i, block in enumerate(self.blocks):
            again = self.recompute and torch.is_grad_enabled()
            x = recompute(block, x, rotation, use_reentrant=False) if again else block(x, rotation)
            if states is not None and i in states:
                states[i] = x
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [.., vocabulary], always float32, of hidden states [.., hidden]: final norm and head."""
        return softcap(F.linear(self.final_norm(hidden), self.head.weight()).float(), self.config.final_softcap)

    def teacher_logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [sequences, time, vocabulary] of the original model, without a gradient; or at these positions only.

        The hidden states of calibration sequences are computed once, a block at a time; those of others every time.
        """
        return self._teacher.logits(tokens, positions)

    def watch_teacher(self, layers: Sequence[int]) -> int:
        """Have the original's states behind these blocks kept, too, before its logits are first asked for.

        Returns their width. Raises CompressionError for a block that it does not have.
        """
        return self._teacher.watch(layers)

    def teacher_states(self, tokens: Tensor) -> list[Tensor]:
        """The original's states [sequences, time, hidden] behind each block that is watched."""
        return list(self._teacher.states(tokens)[:-1])

    def sampled(self, sequences: int, length: int, seed: int) -> Tensor:
        """Tokens [sequences, length] that the model as it stands writes at temperature 1 from its start token."""
        assert self._sampler is not None
        return self._sampler(dict(self.stored()), sequences, length, seed)

    def remember(self, tokens: Tensor) -> None:
        """Have the original's hidden states for these sequences, too, until others are remembered."""
        self._teacher.remember(tokens)

    def linears(self) -> dict[str, TunedLinear]:
        """Module name -> linear layer of the blocks, in the model's order."""
        family = self._source.family
        return {
            family.module(role, i): getattr(block, role)
            for i, block in enumerate(self.blocks)
            for role in self.config.layers[i].linear_shapes(self.config.hidden_size)
        }

    def latents(self) -> dict[str, TunedLinear]:
        """Module name -> every layer whose weights behind the codes are there to be trained."""
        return {name: layer for name, layer in self._packed() if layer.latent is not None}

    def trainable(
        self,
        *,
        scales: bool = True,
        zeros: bool = False,
        norms: bool = False,
        ends: bool = False,
        latent: Literal["codes", "weights"] | None = None,
        latent_ends: bool = False,
        floats: bool = False,
        biases: bool = False,
    ) -> dict[str, nn.Parameter]:
        """Make parameters trainable, and give them by name.

        `scales` (a k-means row's levels stand for them) and `zeros` of the blocks' linear layers; `norms`: all norm
        weights; `ends`: scales of a packed embedding and head as well. `latent`: the weights themselves, which are
        rounded in every forward pass (straight-through estimator, LSQ's gradient for scales: arXiv 1902.08153), begun
        at what the codes stand for, or at the original weights, which must not have been folded. `latent_ends`: those
        of a packed embedding and head, too. `floats`: the numbers of linear layers that are stored in float, such as
        dense ones; `biases`: those of the blocks' linear layers.
        """
        layers = list(self.linears().items())
        for name, layer in self._packed() if latent_ends else layers:
            if latent is not None:
                layer.begin_latent(None if latent == "codes" else self._original(name))
        if ends:
            layers += [(n, e) for n, e in (("embed", self.embed), ("head", self.head)) if e.form is not None]
        for _, layer in layers:
            for parameter in layer.trainable(scales, zeros):
                parameter.requires_grad_()
        for layer in self.latents().values():
            assert layer.latent is not None
            layer.latent.requires_grad_()
        for layer in self.linears().values():
            if floats and layer.stored_floats is not None:
                layer.stored_floats.begin()
            if biases and layer.bias is not None:
                layer.bias.requires_grad_()
        for name, parameter in self.named_parameters():
            if norms and name.endswith("norm.weight") and not name.startswith("entrance."):
                parameter.requires_grad_()
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    # Checkpoints of a training.

    def save(
        self, step: int, optimizer: torch.optim.Optimizer | None = None, extra: Mapping[str, Tensor] | None = None
    ) -> None:
        """Make a training durable after `step` steps: what is trainable, the optimizer's state, and `extra` tensors.

        Whatever else decides the steps to come must follow from `step`, or a resumed training ends differently.
        """
        tensors = {f"parameter.{n}": p.detach() for n, p in self.named_parameters() if p.requires_grad}
        tensors |= {f"extra.{name}": tensor for name, tensor in (extra or {}).items()}
        if optimizer is not None:
            for i, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{key}": torch.as_tensor(value) for key, value in state.items()}
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._units.write(self._state_unit, plain, {"step": step}, file=f"{self._state_unit}-{step:08d}")

    def restore(self, optimizer: torch.optim.Optimizer | None = None) -> tuple[int, dict[str, Tensor]]:
        """Go back to the last `save` of a run that was killed: (steps done, extra tensors); (0, {}) if there is none.

        Call it with the same parameters trainable, and an optimizer over them in the same order.
        """
        if not self._units.is_done(self._state_unit):
            return 0, {}
        file = self._units.open(self._state_unit)
        saved = {name: file.read(name) for name in file.names()}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(saved[f"parameter.{name}"])
        if optimizer is not None:
            whole = optimizer.state_dict()
            whole["state"] = {}
            for name, tensor in saved.items():
                if name.startswith("optimizer."):
                    _, i, key = name.split(".", 2)
                    whole["state"].setdefault(int(i), {})[key] = tensor
            optimizer.load_state_dict(whole)
        extra = {n.removeprefix("extra."): t for n, t in saved.items() if n.startswith("extra.")}
        return int(self._units.notes(self._state_unit)["step"]), extra

    # Between the model in training and the tensors on disk.

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that tuning may have changed, as the output stores it. Raises NumericalError."""
        for name, layer in self._packed():
            for local, tensor in layer.stored().items():
                yield f"{name}.{local}", tensor
            if layer.bias is not None:
                yield f"{name}.bias", self._finite(f"{name}.bias", layer.bias)
        for name, norm in self._norms():
            yield f"{name}.weight", self._finite(name, cast(Tensor, norm.weight))

    def _finite(self, name: str, parameter: Tensor) -> Tensor:
        """A norm or bias as it is stored."""
        if not torch.isfinite(parameter).all():
            raise NumericalError(f"{name} is not finite after training", hint="take a lower learning rate")
        return parameter.detach().to(self._source.checkpoint.dtype)

    def _packed(self) -> Iterator[tuple[str, TunedLinear]]:
        family = self._source.family
        if self.embed.form is not None:
            yield family.embed, self.embed
        yield from self.linears().items()
        if not self.config.tie_embeddings and self.head.form is not None:
            yield family.head, self.head

    def _norms(self) -> Iterator[tuple[str, nn.Module]]:
        family = self._source.family
        for i, block in enumerate(self.blocks):
            for role in self.config.layers[i].norm_sizes(self.config.hidden_size):
                yield family.module(role, i), getattr(block, role)
        yield family.final_norm, self.final_norm

    def _end(self, files: Mapping[str, SafetensorsFile], module: str) -> TunedLinear:
        form = self._units.form(module)
        if isinstance(form, Dense):
            return TunedLinear(module, None, self._source.dense(f"{module}.weight"), None)
        return self._linear(files, module, form, None)

    def _linear(
        self, files: Mapping[str, SafetensorsFile], module: str, form: Format, bias: Tensor | None
    ) -> TunedLinear:
        stored = self._units.stored(files, module) or self._given(module, form)
        weight = FloatWeight(module, form, stored) if form.in_float else form.codes(stored)
        return TunedLinear(module, form, weight, bias)

    def _given(self, module: str, form: Format) -> dict[str, Tensor]:
        """Stored tensors of a layer that no stage of this part has touched."""
        name = f"{module}.weight"
        if isinstance(form, Dense):
            return {"weight": self._source.checkpoint.tensor(name, dtype=form.dtype)}
        return self._source.checkpoint.stored(name)

    def _block(self, files: Mapping[str, SafetensorsFile], i: int) -> Block:
        with torch.device("meta"):
            block = Block(self.config, i)
        for role in self.config.layers[i].linear_shapes(self.config.hidden_size):
            module = self._source.family.module(role, i)
            bias = self._dense(files, f"{module}.bias") if self.config.layers[i].has_bias(role) else None
            setattr(block, role, self._linear(files, module, self._units.form(module), bias))
        for name, (role, part) in self._source.dense_names(i).items():
            if role not in LINEARS:
                value = nn.Parameter(self._dense(files, name), requires_grad=False)
                setattr(getattr(block, role), part, value)
        return block.eval()

    def _dense(self, files: Mapping[str, SafetensorsFile], name: str) -> Tensor:
        return files[name].read(name).float() if name in files else self._source.dense(name)

    def _original(self, module: str) -> Tensor:
        """The float weight of a layer. Raises CompressionError if a method has folded scales through the model."""
        norms = {name for i in range(self.config.num_layers) for name in self._source.dense_names(i)}
        folded = [name for name in self._units.where() if name in norms and name.endswith(".weight")]
        if folded:
            raise CompressionError(
                f"the original weights do not fit this model: {folded[0]} was changed when it was quantized",
                hint="begin the training at the codes, or quantize with a method that folds nothing",
            )
        return self._source.weight(module)


class _Teacher:
    """The original's logits; its states for the calibration are kept, for other tokens they are not."""

    def __init__(self, source: Source, tokens: Tensor) -> None:
        self._source, self._tokens = source, tokens
        self._layers: list[int] = []
        self._known: dict[bytes, Tensor] = {}
        self._remembered: dict[bytes, Tensor] = {}
        self._ends: tuple[nn.Module, Tensor] | None = None

    def watch(self, layers: Sequence[int]) -> int:
        assert not self._known
        missing = [layer for layer in layers if layer >= self._source.config.num_layers]
        if missing:
            raise CompressionError(
                f"the original has no block {missing[0]}: its last one is {self._source.config.num_layers - 1}"
            )
        self._layers = list(layers)
        return self._source.config.hidden_size

    @torch.no_grad()
    def logits(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        hidden = self.states(tokens)[-1]
        norm, head = self._norm_and_head()
        logits = F.linear(norm(hidden if positions is None else hidden[:, positions]), head)
        return softcap(logits.float(), self._source.config.final_softcap)

    @torch.no_grad()
    def states(self, tokens: Tensor) -> Tensor:
        """[watched blocks + 1, sequences, time, hidden], the last before the final norm."""
        if not self._known:
            self._known = self._computed(self._tokens)
        known = self._known | self._remembered
        new = [row for row in tokens if _key(row) not in known]
        known |= self._computed(torch.stack(new)) if new else {}
        return torch.stack([known[_key(row)] for row in tokens], dim=1)

    @torch.no_grad()
    def remember(self, tokens: Tensor) -> None:
        self._remembered = self._computed(tokens)

    def _computed(self, tokens: Tensor) -> dict[bytes, Tensor]:
        """Each sequence's states; the original's blocks are read one after another."""
        x = self._source.embed(tokens)
        rotation: Rotation = self._source.rotation(tokens.shape[1])
        found = torch.empty(len(self._layers) + 1, *x.shape)
        for i in range(self._source.config.num_layers):
            advance(self._source.block(i), x, rotation)
            for at, layer in enumerate(self._layers):
                if layer == i:
                    found[at] = x
        found[-1] = x
        return dict(zip(map(_key, tokens), found.unbind(1), strict=True))

    def _norm_and_head(self) -> tuple[nn.Module, Tensor]:
        if self._ends is None:
            self._ends = self._source.norm("final_norm"), self._source.head()
        return self._ends


def _key(row: Tensor) -> bytes:
    return hashlib.sha256(row.long().contiguous().numpy().tobytes()).digest()


def tune(
    units: Units,
    stage: int,
    tuner: Tuner,
    teacher: Source,
    tokens: Tensor,
    progress: Progress,
    seed: int,
    sampler: Sampler | None = None,
) -> None:
    """Run tuner number `stage` over the finished units, and make what it leaves behind a unit of its own."""
    model = TunedModel(units, teacher, tokens, progress, stage, seed, sampler)
    with torch.enable_grad():
        tuner.tune(model)
    tensors = dict(model.stored())
    for name, content in model.files.items():
        tensors[FILE_PREFIX + name] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    units.write(units.tuned[stage], tensors, {"layers": []})
