"""`gossamer compress`: a checkpoint and a recipe in, a smaller checkpoint out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._console import Progress, console, emit_json, progress, remark
from ._options import Cluster, Json, Model, Quiet

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..compress.calibration import Calibration
    from ..compress.elsewhere import Spread
    from ..compress.pipeline import Later, Result
    from ..compress.recipe import Recipe

RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", metavar="RECIPE", help="Shipped name, YAML file, or a folder to replay.")
]
CalibrationText = Annotated[
    str | None, typer.Option("--calibration", help="self, a text file, or hub:ORG/DATASET/FILE.", metavar="SOURCE")
]
Sequences = Annotated[
    int | None, typer.Option("--calibration-sequences", min=1, help="How many calibration sequences.")
]
Length = Annotated[int | None, typer.Option("--calibration-length", min=8, help="Tokens of each of them.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the calibration.")]


def compress(
    model: Model,
    recipe: RecipeOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make; absent or complete, never half.")],
    calibration: CalibrationText = None,
    calibration_sequences: Sequences = None,
    calibration_length: Length = None,
    seed: Seed = None,
    record: Annotated[Path | None, typer.Option("--record", help="Append the result record to this .jsonl.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard unfinished work instead of resuming.")] = False,
    ray: Cluster = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress a model by a recipe. Killed? The same command goes on where it stopped.

    With --ray, blocks that do not wait for each other are tasks on the cluster, of as many CPUs as this command has
    threads: those of methods that need no data, and of recover-local with `inputs: teacher`.

    \b
    gossamer compress smollm2 --recipe int4-gptq --out small/
    gossamer compress smollm2 --recipe int4-rtn --out /shared/small --ray
    """
    import torch

    from .. import settings
    from ..checkpoint import open_checkpoint
    from ..compress.pipeline import compress as run
    from ..errors import GossamerError
    from ..measure.memory import peak_rss
    from ..measure.records import append_record, check_writable

    torch.set_num_threads(settings.threads())
    started = time.monotonic()
    checkpoint = open_checkpoint(model)
    recipe_ = with_overrides(read_recipe(recipe), calibration, calibration_sequences, calibration_length, seed)
    if record is not None:
        check_writable(record)
    how = {"overwrite": overwrite, "restart": restart}
    try:
        with _others(ray, recipe_, out, quiet) as spread, progress(quiet) as report:
            text = calibration_of(recipe, recipe_, checkpoint, report, quiet)
            sample = student_sampler(report)
            result = run(checkpoint, recipe_, out, text, progress=report, sample=sample, spread=spread, **how)
    except GossamerError as error:
        if record is not None:
            append_record(record, _failed(checkpoint, recipe_, out, error))
        raise
    cost = {"seconds": round(time.monotonic() - started, 3), "peak_rss_bytes": peak_rss()}
    row = made_record(open_checkpoint(out), recipe_, result, dict.fromkeys(cost) if result.existed else cost)
    if record is not None and not (result.existed and _is_recorded(record, row)):
        append_record(record, row)
    if json:
        emit_json(row)
    elif not quiet:
        _say(row, result)


@contextmanager
def _others(ray: str | None, recipe: Recipe, out: Path, quiet: bool) -> Iterator[Spread | None]:
    """Who makes blocks that do not wait for each other. Raises UsageError if the recipe has none, ClusterError."""
    from .. import settings
    from ..cluster.join import joined
    from ..cluster.tasks import Tasks
    from ..errors import UsageError

    if ray is None:
        yield None
        return
    parts = recipe.parts()
    alone = [part.main.name for part in parts if not part.independent]
    alone += [tuner.name for part in parts for tuner in part.tuners]
    if not any(part.independent for part in parts):
        raise UsageError(
            f"recipe {recipe.name} has only stages whose blocks wait for each other: {', '.join(alone)}",
            hint="leave --ray away; `gossamer sweep --ray` makes several recipes at the same time",
        )
    if alone and not quiet:
        remark(f"stages whose blocks wait for each other run here, not on the cluster: {', '.join(alone)}")
    with joined(ray) as cluster:
        yield Tasks(cluster, settings.threads(), out.absolute().parent).run


def made_record(artifact: Checkpoint, recipe: Recipe, result: Result, cost: dict[str, Any]) -> dict[str, Any]:
    """The record of an artifact; its cost is unknown if an earlier run made it."""
    from ..engine import isa_in_use
    from ..measure.records import engine_block, make_record, model_block

    text = (artifact.manifest or {}).get("calibration")
    return make_record(
        "compress",
        model=model_block(artifact),
        engine=engine_block(kernels=isa_in_use()),
        protocol={
            "recipe": recipe.canonical(),
            "calibration": text and {key: value for key, value in text.items() if key != "line_hashes"},
        },
        results={
            **cost,
            "error_kind": result.error_kind,
            "layers": result.layers,
            "resumed_units": result.resumed,
        },
    )


def _failed(checkpoint: Checkpoint, recipe: Recipe, out: Path, error: Exception) -> dict[str, Any]:
    """The record of an artifact that could not be made."""
    from ..measure.records import engine_block, make_record, unknown_model_block

    model = {**unknown_model_block(str(out)), "base": checkpoint.name, "recipe": recipe.name}
    protocol = {"recipe": recipe.canonical(), "calibration": None}
    return make_record("compress", model=model, engine=engine_block(), protocol=protocol, error=str(error))


def _is_recorded(path: Path, row: dict[str, Any]) -> bool:
    """True if the file holds a good record of these very bytes already. Raises MeasureError for a damaged line."""
    from ..report.records import read_records

    wanted = ("compress", "ok", row["model"]["fingerprint"])
    return any((r.kind, r.status, r.model.fingerprint) == wanted for r in read_records([path]))


def _say(row: dict[str, Any], result: Result) -> None:
    from ..model import OWN_PREFIX

    model, cost = row["model"], row["results"]
    if result.existed:
        remark(f"{result.path} is there already, made from the same model by the same recipe")
        return
    resumed = f", {result.resumed} units from an earlier run" if result.resumed else ""
    console().print(
        f"{result.path}: {model['weight_bytes'] / 1e6:.1f} MB, {model['bits_per_weight']:.2f} bits per weight, "
        f"made in {cost['seconds']:.0f} s with at most {cost['peak_rss_bytes'] / 1e9:.2f} GB of memory{resumed}"
    )
    if OWN_PREFIX in (result.path / "config.json").read_text(encoding="utf-8"):
        remark("only Gossamer reads this folder, transformers and vLLM refuse it: they lack its formats or its shapes")


def read_recipe(name: str) -> Recipe:
    """A recipe by shipped name, file or artifact."""
    from ..compress.recipe import load_recipe

    return load_recipe(name, recipes_folder())


def recipes_folder() -> Path:
    """Where the shipped recipes lie: in the installed package, or at the root of a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent.parent / "recipes"


def with_overrides(
    recipe: Recipe, source: str | None, sequences: int | None, length: int | None, seed: int | None
) -> Recipe:
    """The recipe with its calibration changed by what the command line gives. Raises UsageError if it uses none."""
    from ..compress.recipe import parse_recipe
    from ..errors import UsageError

    given = {"source": source, "sequences": sequences, "length": length, "seed": seed}
    given = {key: value for key, value in given.items() if value is not None}
    if given and not recipe.needs_calibration():
        options = {"source": "--calibration", "seed": "--seed"}
        named = ", ".join(options.get(key, f"--calibration-{key}") for key in given)
        raise UsageError(
            f"recipe {recipe.name} uses no calibration, but the command line gives {named}",
            hint="leave it away, or take a recipe with method gptq",
        )
    plain = recipe.model_dump(mode="json")
    plain["calibration"] |= given
    return parse_recipe(plain, "command line")


def calibration_of(
    name: str, recipe: Recipe, checkpoint: Checkpoint, report: Progress, quiet: bool
) -> Calibration | Later | None:
    """What the recipe named `name` calibrates on: nothing, an artifact's own tokens, or text yet to be had."""
    from ..compress.calibration import cached_samples, calibrate
    from ..compress.pipeline import Later

    if not recipe.needs_calibration():
        return None
    replay = _recorded(name, recipe, checkpoint, quiet)
    if replay is not None:
        return replay

    def generate(sequences: int, length: int, seed: int) -> Any:
        from ..engine import LLM

        def step(label: str, done: int, total: int) -> None:
            report("sampling calibration text from the model", done, total)

        return LLM(checkpoint, progress=report).sample_tokens(sequences, length, seed, progress=step)

    spec = recipe.calibration
    memory = 0
    if spec.source == "self" and not cached_samples(spec, checkpoint):
        from ..engine import sampling_bytes

        memory = sampling_bytes(checkpoint, spec.sequences, spec.length)
    return Later(lambda: calibrate(spec, checkpoint, generate), memory)


def student_sampler(report: Progress) -> Callable[[Path, int, int, int], Any]:
    """What lets a model in training write text: (folder, sequences, length, seed) -> tokens."""

    def sample(folder: Path, sequences: int, length: int, seed: int) -> Any:
        from ..checkpoint import open_checkpoint
        from ..engine import LLM

        def step(label: str, done: int, total: int) -> None:
            report("sampling text from the model in training", done, total)

        return LLM(open_checkpoint(str(folder)), progress=report).sample_tokens(sequences, length, seed, progress=step)

    return sample


def _recorded(name: str, recipe: Recipe, checkpoint: Checkpoint, quiet: bool) -> Calibration | None:
    """The calibration tokens of the artifact that is replayed, unless the command line or the model asks for others."""
    from ..checkpoint.manifest import read_manifest
    from ..checkpoint.safetensors_io import SafetensorsFile
    from ..compress.calibration import replayed
    from ..compress.pipeline import CALIBRATION_FILE
    from ..compress.recipe import artifact_folder
    from ..errors import UsageError

    folder = artifact_folder(name, recipes_folder())
    manifest = None if folder is None else read_manifest(folder)
    if folder is None or manifest is None or manifest.calibration is None or not (folder / CALIBRATION_FILE).exists():
        return None
    if manifest.recipe.get("calibration") != recipe.calibration.model_dump(mode="json"):
        return None
    if manifest.base.fingerprint != checkpoint.fingerprint():
        if manifest.calibration.kind == "self":
            return None  # `self` means the model at hand
        raise UsageError(
            f"{folder} records the tokens of {recipe.calibration.source} for another model",
            hint="give the text again with --calibration FILE",
        )
    if not quiet:
        _say_differences(folder, manifest.versions)
    tokens = SafetensorsFile(folder / CALIBRATION_FILE).read("tokens").long()
    return replayed(recipe.calibration, manifest.calibration.model_dump(mode="json"), tokens)


def _say_differences(folder: Path, recorded: dict[str, str]) -> None:
    """A replay gives the same bytes only with the same arithmetic: say what is not the same here."""
    from ..compress.pipeline import versions

    here = versions()
    changed = [
        f"{name} {was}, here {here.get(name)}" for name, was in sorted(recorded.items()) if here.get(name) != was
    ]
    if changed:
        remark(f"{folder} was made with {'; '.join(changed)}: the bytes may differ")
