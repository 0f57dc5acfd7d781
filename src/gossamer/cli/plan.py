"""`gossamer plan`: will it fit, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._console import emit_json, remark
from ._options import Json, Model, PipelineParallel, Quiet, TensorParallel
from .compress import CalibrationText, Length, RecipeOption, Sequences, calibration_of, read_recipe, with_overrides

if TYPE_CHECKING:
    import torch

    from ..compress.plan import Plan as Planned
    from ..model import ModelConfig


def plan(
    model: Model,
    recipe: RecipeOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the result would go.")] = Path(),
    calibration: CalibrationText = None,
    calibration_sequences: Sequences = None,
    calibration_length: Length = None,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens of context to plan the cache for.")] = 2048,
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a recipe will make of a model and what that takes; exit code 1 if it does not fit.

    \b
    gossamer plan smollm2 --recipe int4-gptq
    gossamer plan smollm2 --recipe int4-gptq --tp 2
    """
    from ..checkpoint import open_checkpoint
    from ..checkpoint.memory import available_memory
    from ..compress.pipeline import Later, transformed
    from ..compress.plan import RUN_BYTES, check_fit, free_disk, make_plan

    checkpoint = open_checkpoint(model)
    recipe_ = with_overrides(read_recipe(recipe), calibration, calibration_sequences, calibration_length, None)
    text = calibration_of(recipe, recipe_, checkpoint, lambda label, done, total: None, quiet)
    sampling = text.memory if isinstance(text, Later) else 0
    source = transformed(checkpoint, recipe_)
    planned = make_plan(source.config, recipe_, source.dtype, sampling)
    memory, disk = available_memory(), free_disk(out)
    kv = 4 * source.config.kv_elements_per_token()
    running = RUN_BYTES + planned.output_bytes + kv * context
    row = {
        "model": checkpoint.name,
        "recipe": recipe_.name,
        "parameters": planned.parameters,
        "input_bytes": planned.input_bytes,
        "output_bytes": planned.output_bytes,
        "bits_per_weight": round(planned.bits_per_weight, 4),
        "formats": sorted({form.name for form in planned.formats.values()}),
        "sampling_bytes": planned.sampling_bytes,
        "compress_peak_bytes": planned.peak_bytes,
        "compress_phases_bytes": dict(planned.phases),
        "compress_disk_bytes": planned.disk_bytes,
        "run_bytes": running,
        "kv_bytes_per_token": kv,
        "context": context,
        "memory_available_bytes": memory,
        "disk_available_bytes": disk,
    }
    if (tp, pp) != (1, 1):
        row |= _ranks(planned, source.config, source.dtype, tp, pp)
    if json:
        emit_json(row)
    else:
        _print(row)
    check_fit(planned, memory, disk, recipe_.needs_calibration())
    if running > memory and not quiet:
        remark("the result would not run in the memory that is free now: take fewer bits or a shorter --context")


def _ranks(planned: Planned, config: ModelConfig, dtype: torch.dtype, tp: int, pp: int) -> dict[str, object]:
    """What each rank of the result will hold, and hand to others. Raises EngineError for a model that cannot be cut."""
    from ..formats import Dense
    from ..model.families import tensor_names
    from ..parallel import make_plan

    forms = {name: planned.formats.get(name.removesuffix(".weight"), Dense(dtype)) for name in tensor_names(config)}
    cut = make_plan(config, forms, tp, pp)
    return {
        "tp": tp,
        "pp": pp,
        "rank_weight_bytes": cut.weight_bytes(forms),
        "rank_kv_bytes_per_token": [4 * share.rank_config.kv_elements_per_token() for share in cut.shares],
        "wire_bytes_per_token": cut.wire_bytes_per_token(),
    }


def _print(row: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    def mb(key: str) -> str:
        return f"{int(str(row[key])) / 1e6:,.1f} MB"

    table = Table(box=None, show_header=False, title=f"{row['model']} by {row['recipe']}", title_justify="left")
    table.add_row("weights now, in float", mb("input_bytes"))
    table.add_row("weights after", f"{mb('output_bytes')}  ({row['bits_per_weight']} bits per weight)")
    table.add_row("formats", ", ".join(row["formats"]))  # type: ignore[arg-type]
    table.add_row("memory to compress", f"{mb('compress_peak_bytes')}  of {mb('memory_available_bytes')} free")
    phases = row["compress_phases_bytes"]
    assert isinstance(phases, dict)
    if len(phases) > 1:
        for name, peak in phases.items():
            table.add_row("", f"{peak / 1e6:,.1f} MB  {name}")
    if row["sampling_bytes"]:
        table.add_row("", f"{mb('sampling_bytes')} of it for the model, which writes its own calibration text")
    table.add_row("disk to compress", f"{mb('compress_disk_bytes')}  of {mb('disk_available_bytes')} free")
    table.add_row("memory to run", f"{mb('run_bytes')}  (the process, its weights, {row['context']} tokens of context)")
    weights, kv = row.get("rank_weight_bytes", []), row.get("rank_kv_bytes_per_token", [])
    assert isinstance(weights, list)
    assert isinstance(kv, list)
    for rank, (held, cache) in enumerate(zip(weights, kv, strict=True)):
        table.add_row(
            f"rank {rank}", f"{held / 1e6:,.1f} MB of weights, {cache / 1e3:,.1f} kB of KV cache for each token"
        )
    if weights:
        table.add_row("between ranks", f"{int(str(row['wire_bytes_per_token'])) / 1e3:,.1f} kB for each token and rank")
    Console(highlight=False, markup=False).print(table)
