"""`gossamer compress`: a checkpoint and a recipe in, a smaller checkpoint out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._console import Progress, console, emit_json, progress
from ._options import Json, Model, Quiet

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..compress.calibration import Calibration
    from ..compress.pipeline import Result
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
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress a model by a recipe. Killed? The same command goes on where it stopped.

    \b
    gossamer compress smollm2 --recipe int4-gptq --out small/
    """
    import torch

    from .. import settings
    from ..checkpoint import open_checkpoint
    from ..compress.method import Needs
    from ..compress.pipeline import compress as run
    from ..compress.plan import check_fit, make_plan
    from ..measure.memory import peak_rss
    from ..measure.records import append_record, engine_block, make_record, model_block

    torch.set_num_threads(settings.threads())
    started = time.monotonic()
    checkpoint = open_checkpoint(model)
    recipe_ = with_overrides(read_recipe(recipe), calibration, calibration_sequences, calibration_length, seed)
    plan = make_plan(checkpoint.config, recipe_, checkpoint.dtype)
    needs = recipe_.methods()[0].needs
    check_fit(plan, available_memory(), free_disk(out), needs is not Needs.NOTHING)
    with progress(quiet) as report:
        text = _calibration(recipe, recipe_, checkpoint, report) if recipe_.needs_calibration() else None
        result = run(checkpoint, recipe_, out, text, progress=report, overwrite=overwrite, restart=restart)
    row = make_record(
        "compress",
        model=model_block(open_checkpoint(out)),
        engine=engine_block(),
        protocol={"recipe": recipe_.canonical(), "calibration": _without_lines(text)},
        results={
            "seconds": round(time.monotonic() - started, 3),
            "peak_rss_bytes": peak_rss(),
            "error_kind": result.error_kind,
            "layers": result.layers,
            "resumed_units": result.resumed,
        },
    )
    if record is not None and not result.existed:
        append_record(record, row)
    if json:
        emit_json(row)
    elif not quiet:
        _say(row, result, plan.shared_head)


def _say(row: dict[str, Any], result: Result, shared_head: bool) -> None:
    model, seconds = row["model"], row["results"]["seconds"]
    if result.existed:
        console().print(f"{result.path} is there already, made from the same model by the same recipe")
        return
    resumed = f", {result.resumed} units from an earlier run" if result.resumed else ""
    console().print(
        f"{result.path}: {model['weight_bytes'] / 1e6:.1f} MB, {model['bits_per_weight']:.2f} bits per weight, "
        f"made in {seconds:.0f} s with at most {row['results']['peak_rss_bytes'] / 1e9:.2f} GB of memory{resumed}"
    )
    if shared_head:
        console().print("embedding and head are packed: Gossamer reads this folder, transformers and vLLM refuse it")


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
    """The recipe with its calibration changed by what the command line gives."""
    from ..compress.recipe import parse_recipe

    given = {"source": source, "sequences": sequences, "length": length, "seed": seed}
    plain = recipe.model_dump(mode="json")
    plain["calibration"] |= {key: value for key, value in given.items() if value is not None}
    return parse_recipe(plain, "command line")


def available_memory() -> int:
    """Bytes that this process may still take."""
    from ..checkpoint.memory import available_memory as available

    return available()


def free_disk(out: Path) -> int:
    """Bytes free where `out` will be."""
    import shutil

    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _calibration(name: str, recipe: Recipe, checkpoint: Checkpoint, report: Progress) -> Calibration:
    from ..compress.calibration import calibrate

    replay = _recorded(name, recipe)
    if replay is not None:
        return replay

    def generate(sequences: int, length: int, seed: int) -> Any:
        from ..engine import LLM

        def step(label: str, done: int, total: int) -> None:
            report("sampling calibration text from the model", done, total)

        return LLM(checkpoint).sample_tokens(sequences, length, seed, progress=step)

    return calibrate(recipe.calibration, checkpoint, generate)


def _recorded(name: str, recipe: Recipe) -> Calibration | None:
    """The calibration tokens of the artifact that is replayed, unless the command line asks for others."""
    from ..checkpoint.manifest import read_manifest
    from ..checkpoint.safetensors_io import SafetensorsFile
    from ..compress.calibration import replayed
    from ..compress.pipeline import CALIBRATION_FILE

    folder = Path(name)
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None or manifest.calibration is None or not (folder / CALIBRATION_FILE).exists():
        return None
    if manifest.recipe["calibration"] != recipe.calibration.model_dump(mode="json"):
        return None
    tokens = SafetensorsFile(folder / CALIBRATION_FILE).read("tokens").long()
    return replayed(recipe.calibration, manifest.calibration.model_dump(mode="json"), tokens)


def _without_lines(calibration: Calibration | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    return {key: value for key, value in calibration.record.items() if key != "line_hashes"}
