"""Runs a recipe over a checkpoint, block by block: bounded memory, durable progress, whole output or none.

    lock -> is it there? does it fit? -> calibration -> journal -> each block: load, compress, write, record -> rename

Every unit is computed from the checkpoint, the calibration tokens and the units before it, never from anything that
only lives in memory: a run that was killed and resumed gives the same bytes as one that was not.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..checkpoint import Checkpoint
from ..checkpoint.atomic import Lock, atomic_folder
from ..checkpoint.manifest import Calibration as CalibrationRecord
from ..checkpoint.manifest import Manifest, base_of, hash_files, read_manifest, write_manifest
from ..checkpoint.memory import available_memory
from ..checkpoint.safetensors_io import Entry, SafetensorsFile, whole, write_safetensors
from ..checkpoint.save import dense_blocks, told, write_companions, write_config, write_weights
from ..errors import CompressionError, NumericalError, OutputExists, ResumeMismatch, UsageError
from ..formats import Codes, Dense, Format, Integer, quantization_config
from ..model import FAMILIES, OWN_PREFIX, tensor_names
from ..model.decoder import Block, Rotation
from .calibration import Calibration
from .journal import Journal, differences, discard, require_same
from .method import Needs, Quantizer
from .plan import ROUND_AT_ONCE, Plan, check_fit, free_disk, make_plan
from .quantize.rtn import RTN
from .recipe import Recipe
from .walk import advance, walk

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""
CALIBRATION_FILE = "calibration.safetensors"


@dataclass(frozen=True)
class Later:
    """A calibration that is made only if it is needed, after every check that does not need it."""

    make: Callable[[], Calibration]
    memory: int = 0
    """Bytes that making it takes."""


@dataclass(frozen=True)
class Result:
    """Where the artifact is, and what each layer lost."""

    path: Path
    layers: list[dict[str, Any]]
    """One entry per weight: block, linear, format, bits_per_weight, relative_error."""
    error_kind: str
    """`output`: error of the layer's output over the calibration inputs; `weight`: of the weight itself."""
    resumed: int
    """Units that an earlier run had finished."""
    existed: bool
    """The very same artifact was there already; nothing was done."""


def compress(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Path,
    calibration: Calibration | Later | None = None,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
    restart: bool = False,
) -> Result:
    """Make `out` from a checkpoint by a recipe; a killed run is resumed by the same call.

    Raises OutputLocked, OutputExists, DoesNotFit and ResumeMismatch before any work; UsageError if the recipe needs a
    calibration and none is given; ShapeMismatch, CompressionError, NumericalError.
    """
    return _Run(checkpoint, recipe, Path(out), calibration, progress or (lambda *_: None)).run(overwrite, restart)


class _Run:
    """One run's fixed facts, and the steps that use them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        out: Path,
        calibration: Calibration | Later | None,
        progress: Progress,
    ) -> None:
        self.checkpoint, self.recipe, self.out, self.progress = checkpoint, recipe, out, progress
        self.config = checkpoint.config
        self.family = FAMILIES[self.config.family]
        (self.method,) = recipe.methods()
        if self.method.needs is Needs.NOTHING:
            calibration = None
        elif calibration is None:
            raise UsageError(f"{self.method.name} needs calibration tokens", hint="see compress.calibration.calibrate")
        self.later = calibration if isinstance(calibration, Later) else None
        self.calibration = None if isinstance(calibration, Later) else calibration
        self.plan: Plan = make_plan(
            self.config, recipe, checkpoint.dtype, sampling_bytes=self.later.memory if self.later else 0
        )
        self.work = out.parent / f".{out.name}.work"
        self.replaced = self.work / "replaced"
        """Where an artifact that is overwritten waits until the new one has its name."""

    def run(self, overwrite: bool, restart: bool) -> Result:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with Lock(self.out):
            self._bring_back()
            existing = self._existing(overwrite)
            if existing is not None:
                return existing
            if restart:
                discard(self.work)
            require_same(self.work, self._header())
            check_fit(
                self.plan,
                available_memory(),
                free_disk(self.out) + _bytes_below(self.work),
                self.method.needs is not Needs.NOTHING,
            )
            self._calibrate()
            journal = Journal(self.work, self._header())
            resumed = len(journal.done)
            self._compress_ends(journal)
            if self.calibration is None:
                self._compress_blocks(journal)
            else:
                self._compress_blocks_calibrated(journal, self.calibration.tokens)
            layers = [note for unit in self._units() for note in journal.done[unit]["notes"]["layers"]]
            self._assemble(layers)
            discard(self.work)
        return Result(self.out, layers, self._error_kind(), resumed, existed=False)

    def _error_kind(self) -> str:
        return "weight" if self.method.needs is Needs.NOTHING else "output"

    def _calibrate(self) -> None:
        """Have the tokens, and refuse any that are not this model's. Raises what making them raises."""
        if self.later is not None and self.calibration is None:
            self.calibration = self.later.make()
        if self.calibration is None:
            return
        tokens, size = self.calibration.tokens, self.config.vocab_size
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
            raise CompressionError(
                f"calibration tokens from {int(tokens.min())} to {int(tokens.max())} are not of this model, "
                f"whose vocabulary has {size}",
                hint="give --calibration self, or a text file",
            )

    def _header(self) -> dict[str, Any]:
        """All that decides the output's bytes; the calibration comes last, and only when it is known."""
        header = {
            "model": self.checkpoint.fingerprint(),
            "recipe": self.recipe.canonical(),
            "gossamer": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        if self.calibration is not None:
            header["calibration"] = self.calibration.record["sha256"]
        return header

    def _bring_back(self) -> None:
        """An artifact whose replacement was killed between the two renames gets its name again; after them it goes."""
        if self.replaced.exists() and self.out.exists():
            shutil.rmtree(self.replaced)
        elif self.replaced.exists():
            self.replaced.rename(self.out)

    def _existing(self, overwrite: bool) -> Result | None:
        """The finished artifact if it is just what was asked for. Raises OutputExists if it is something else."""
        if not self.out.exists():
            return None
        if self.out.resolve() == self.checkpoint.path.resolve():
            raise OutputExists(f"{self.out} is the model that is read", hint="choose another --out")
        manifest = read_manifest(self.out) if self.out.is_dir() else None
        if manifest is None:
            raise OutputExists(f"{self.out} exists and is not an artifact of ours", hint="choose another --out")
        if overwrite:
            return None
        self._require_made_alike({"model": manifest.base.fingerprint, "recipe": manifest.recipe})
        if manifest.calibration is not None:
            if manifest.calibration.kind != "self":  # model and recipe, its seed included, say what a model samples
                self._calibrate()
            if self.calibration is not None:
                self._require_made_alike({"calibration": manifest.calibration.sha256})
        self._sweep()
        return Result(self.out, manifest.results["layers"], self._error_kind(), 0, existed=True)

    def _require_made_alike(self, was: dict[str, Any]) -> None:
        header = self._header()
        for path, old, new in differences(was, {key: header[key] for key in was}):
            raise OutputExists(
                f"{self.out} exists, made differently: {path} was {old!r}, is now {new!r}",
                hint="choose another --out, or give --overwrite",
            )

    def _sweep(self) -> None:
        """Remove what a run of this very artifact left when it was killed at its end; other work is not ours to end."""
        try:
            require_same(self.work, self._header())
        except ResumeMismatch:
            return
        discard(self.work)

    # Units: each is one file of stored tensors, and one line of the journal.

    def _units(self) -> list[str]:
        ends = [m for m in (self.family.embed, self.family.head) if isinstance(self.plan.formats.get(m), Integer)]
        return ends + [f"block-{i:04d}" for i in range(self.config.num_layers)]

    def _write(self, journal: Journal, unit: str, tensors: dict[str, Tensor], layers: list[dict[str, Any]]) -> None:
        path = self.work / f"{unit}.safetensors"
        write_safetensors(path, [whole(name, t) for name, t in tensors.items()])
        journal.add(unit, path, {"layers": layers})

    def _compress_ends(self, journal: Journal) -> None:
        """Embedding and untied head, if the recipe packs them: rounded to nearest, a slice of rows at a time."""
        for module in (self.family.embed, self.family.head):
            form = self.plan.formats.get(module)
            if not isinstance(form, Integer) or module in journal.done:
                continue
            role = "embed" if module == self.family.embed else "head"
            codes, error = self._round_weight(f"{module}.weight", form, RTN(self.method.options))
            tensors = {f"{module}.{local}": t for local, t in form.pack(codes).items()}
            self._write(journal, module, tensors, [self._note(None, role, form, tuple(codes.codes.shape), error)])

    def _compress_blocks(self, journal: Journal) -> None:
        """Every block by a method that needs no data."""
        for i in range(self.config.num_layers):
            self.progress("compressing blocks", i, self.config.num_layers)
            if f"block-{i:04d}" in journal.done:
                continue
            tensors: dict[str, Tensor] = {}
            notes: list[dict[str, Any]] = []
            for role, shape in self.config.layers[i].linear_shapes(self.config.hidden_size).items():
                module = self.family.module(role, i)
                form = self._form(module)
                codes, error = self._round_weight(f"{module}.weight", form, self.method)
                tensors |= {f"{module}.{local}": t for local, t in form.pack(codes).items()}
                notes.append(self._note(i, role, form, shape, error))
            self._write(journal, f"block-{i:04d}", tensors, notes)
        self.progress("compressing blocks", self.config.num_layers, self.config.num_layers)

    def _round_weight(self, name: str, form: Integer, method: Quantizer) -> tuple[Codes, float]:
        """Codes of a weight that needs no statistics, and its relative squared error, a slice of rows at a time."""
        rows, columns = self.checkpoint.shape(name)
        step = max(1, ROUND_AT_ONCE // columns)
        parts, lost, total = [], 0.0, 0.0
        for start in range(0, rows, step):
            weight = self.checkpoint.tensor(name, rows=slice(start, min(start + step, rows)))
            _check_finite(name, weight)
            part = _named([name], partial(method.quantize, weight, form, None))
            lost += float((part.dequantize() - weight).square_().sum())
            total += float(weight.square().sum())
            parts.append(part)
        zero = None if form.symmetric else torch.cat([p.zero for p in parts if p.zero is not None])
        codes = Codes(torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts]), zero)
        return codes, lost / total if total else 0.0

    def _compress_blocks_calibrated(self, journal: Journal, tokens: Tensor) -> None:
        """Every block by a method that needs its inputs: x [sequences, length, hidden] goes from block to block."""
        count = self.config.num_layers
        todo = [i for i in range(count) if f"block-{i:04d}" not in journal.done]
        if not todo:
            return
        x = self._embed(tokens)
        rotation = Rotation(
            torch.arange(tokens.shape[1]).unsqueeze(0), self.config.rope, self.config.layers[0].head_dim
        )
        for i in range(max(todo) + 1):
            unit = f"block-{i:04d}"
            if unit in journal.done:
                self.progress("catching up with finished blocks", i, count)
                advance(self._finished_block(i), x, rotation)
                continue
            self.progress("compressing blocks", i, count)
            tensors, notes = self._compress_block(i, x, rotation)
            self._write(journal, unit, tensors, notes)
        self.progress("compressing blocks", count, count)

    def _compress_block(self, i: int, x: Tensor, rotation: Rotation) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        block = self._block(i, lambda module, role: self.checkpoint.tensor(f"{module}.weight"))
        tensors: dict[str, Tensor] = {}
        notes: list[dict[str, Any]] = []

        def compress_point(roles: tuple[str, ...], hessian: Tensor | None) -> None:
            assert hessian is not None
            linears = [getattr(block, role) for role in roles]
            sizes = [linear.weight.shape[0] for linear in linears]
            # Same inputs, same grid: rounded as one.
            weight = torch.cat([linear.weight for linear in linears]) if len(linears) > 1 else linears[0].weight
            names = [self.family.module(role, i) for role in roles]
            for name, linear in zip(names, linears, strict=True):
                _check_finite(f"{name}.weight", linear.weight)
            form = self._form(names[0])
            codes = _named(names, partial(self.method.quantize, weight, form, hessian))
            for role, name, linear, part, w in zip(
                roles, names, linears, _split(codes, sizes), torch.split(weight, sizes), strict=True
            ):
                value = part.dequantize()
                notes.append(self._note(i, role, form, tuple(w.shape), _relative_error(w, value, hessian)))
                linear.weight = nn.Parameter(value, requires_grad=False)
                tensors.update({f"{name}.{local}": t for local, t in form.pack(part).items()})

        walk(block, x, rotation, compress_point)
        return tensors, notes

    def _finished_block(self, i: int) -> Block:
        stored = SafetensorsFile(self.work / f"block-{i:04d}.safetensors")

        def weight(module: str, role: str) -> Tensor:
            form = self._form(module)
            shape = self.config.layers[i].linear_shapes(self.config.hidden_size)[role]
            return form.unpack({local: stored.read(f"{module}.{local}") for local in form.stored(shape)})

        return self._block(i, weight)

    def _block(self, i: int, weight: Callable[[str, str], Tensor]) -> Block:
        """Block i in float32, its linear weights from `weight(module, role)`, all else from the checkpoint."""
        with torch.device("meta"):
            block = Block(self.config, i)
        for role in self.config.layers[i].linear_shapes(self.config.hidden_size):
            module, linear = self.family.module(role, i), getattr(block, role)
            linear.weight = nn.Parameter(weight(module, role), requires_grad=False)
            if self.config.layers[i].has_bias(role):
                linear.bias = nn.Parameter(self._dense(f"{module}.bias"), requires_grad=False)
        for role in ("attn_norm", "ffn_norm"):
            norm = self._dense(f"{self.family.module(role, i)}.weight")
            getattr(block, role).weight = nn.Parameter(norm, requires_grad=False)
        return block.eval()

    def _embed(self, tokens: Tensor) -> Tensor:
        """Embedded calibration tokens [sequences, length, hidden], as the finished model will embed them."""
        module = self.family.embed
        form = self.plan.formats[module]
        if isinstance(form, Integer):
            stored = SafetensorsFile(self.work / f"{module}.safetensors")
            shape = (self.config.vocab_size, self.config.hidden_size)
            packed = {local: stored.read(f"{module}.{local}") for local in form.stored(shape)}

        def rows(part: slice) -> Tensor:
            if isinstance(form, Integer):
                return form.unpack(packed, part)
            return self._dense(f"{module}.weight", part)

        x = torch.empty(*tokens.shape, self.config.hidden_size)
        step = max(1, ROUND_AT_ONCE // self.config.hidden_size)
        for start in range(0, self.config.vocab_size, step):
            stop = min(start + step, self.config.vocab_size)
            here = (tokens >= start) & (tokens < stop)
            if here.any():
                x[here] = rows(slice(start, stop))[tokens[here] - start]
        return x

    def _dense(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor that stays in float, as the output will store it, in float32."""
        return self.checkpoint.tensor(name, rows, self.checkpoint.dtype).float()

    def _form(self, module: str) -> Integer:
        form = self.plan.formats[module]
        assert isinstance(form, Integer)
        return form

    def _note(self, block: int | None, role: str, form: Format, shape: tuple[int, ...], error: float) -> dict[str, Any]:
        bits = form.bits_per_weight(shape)
        return {"block": block, "linear": role, "format": form.name, "bits_per_weight": bits, "relative_error": error}

    # Output: an ordinary model folder, complete or absent.

    def _assemble(self, layers: list[dict[str, Any]]) -> None:
        """Write the output beside its place; one that is overwritten keeps its name until the new one is whole."""
        with atomic_folder(self.out, replaced=self.replaced) as folder:
            write_config(folder, self._hf_config())
            write_companions(folder, self.checkpoint)
            write_weights(folder, told(list(self._entries()), self.progress))
            if self.calibration is not None:
                tokens = self.calibration.tokens.to(torch.int32).contiguous()
                write_safetensors(folder / CALIBRATION_FILE, [whole("tokens", tokens)])
            write_manifest(folder, self._manifest(folder, layers))

    def _manifest(self, folder: Path, layers: list[dict[str, Any]]) -> Manifest:
        base = self.checkpoint
        return Manifest(
            base=base_of(base.name, base.fingerprint(), base.source_note, base.manifest),
            recipe=self.recipe.canonical(),
            seed=self.recipe.calibration.seed if self.calibration else None,
            calibration=None if self.calibration is None else CalibrationRecord(**self.calibration.record),
            versions=versions(),
            files=hash_files(folder),
            results={"layers": layers, "error_kind": self._error_kind()},
        )

    def _hf_config(self) -> dict[str, Any]:
        config = dict(self.checkpoint.hf_config)
        config["quantization_config"] = quantization_config(self.plan.formats, self.plan.kinds, self.family.head)
        if isinstance(self.plan.formats[self.family.embed], Integer):
            # transformers and vLLM have no packed embedding and would read noise: a name they refuse is safer.
            config["model_type"] = OWN_PREFIX + self.config.family
            config["architectures"] = [f"Gossamer{self.family.architecture}"]
        else:  # the base may have been such a folder
            config["model_type"], config["architectures"] = self.config.family, [self.family.architecture]
        return config

    def _entries(self) -> Iterator[Entry]:
        """Every stored tensor of the output, in the model's order, read when written."""
        files = {unit: SafetensorsFile(self.work / f"{unit}.safetensors") for unit in self._units()}
        where = {name: file for file in files.values() for name in file.names()}
        for name, shape in tensor_names(self.config).items():
            form = self.plan.formats.get(name.removesuffix(".weight"))
            if not isinstance(form, Integer) or not name.endswith(".weight"):
                form = Dense(self.checkpoint.dtype)
                yield Entry(name, form.dtype, shape, partial(dense_blocks, self.checkpoint, name))
                continue
            for local, (dtype, stored) in form.stored(shape).items():
                full = f"{name.removesuffix('.weight')}.{local}"
                yield Entry(full, dtype, stored, _file_chunks(where[full], full))


def _file_chunks(file: SafetensorsFile, name: str) -> Callable[[], Iterator[Tensor]]:
    return lambda: iter((file.read(name),))


def _named(names: list[str], quantize: Callable[[], Codes]) -> Codes:
    """The codes of weights with these names, which an error of theirs then carries."""
    try:
        return quantize()
    except NumericalError as e:
        raise NumericalError(f"{', '.join(names)}: {e.message}", hint=e.hint) from e


def _split(codes: Codes, sizes: list[int]) -> Iterator[Codes]:
    zeros = [None] * len(sizes) if codes.zero is None else list(torch.split(codes.zero, sizes))
    for c, s, z in zip(torch.split(codes.codes, sizes), torch.split(codes.scale, sizes), zeros, strict=True):
        yield Codes(c, s, z)


def _relative_error(weight: Tensor, value: Tensor, hessian: Tensor) -> float:
    """Squared error of the layer's output over its squared output: tr(E H E^T) / tr(W H W^T)."""
    error = value - weight
    lost = float(((error @ hessian) * error).sum())
    total = float(((weight @ hessian) * weight).sum())
    return max(lost, 0.0) / total if total > 0 else 0.0


def _check_finite(name: str, weight: Tensor) -> None:
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise NumericalError(f"{name} has {bad} weights that are NaN or infinite", hint="the checkpoint is damaged")


def versions() -> dict[str, str]:
    """What the bytes of an artifact depend on besides model, recipe and tokens."""
    packages = {name: version(name) for name in ("torch", "compressed-tensors", "safetensors", "tokenizers")}
    threads = str(torch.get_num_threads())
    return {"gossamer": __version__, "python": platform.python_version(), "threads": threads, **packages}


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
