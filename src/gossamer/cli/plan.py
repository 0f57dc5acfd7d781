"""`gossamer plan`: will it fit, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._console import emit_json
from ._options import Json, Model, Quiet
from .compress import RecipeOption, Sequences, available_memory, free_disk, read_recipe, with_overrides


def plan(
    model: Model,
    recipe: RecipeOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the result would go.")] = Path(),
    calibration_sequences: Sequences = None,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens of context to plan the cache for.")] = 2048,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a recipe will make of a model and what that takes; exit code 1 if it does not fit.

    \b
    gossamer plan smollm2 --recipe int4-gptq
    """
    from ..checkpoint import open_checkpoint
    from ..compress.method import Needs
    from ..compress.plan import check_fit, make_plan

    checkpoint = open_checkpoint(model)
    recipe_ = with_overrides(read_recipe(recipe), None, calibration_sequences, None, None)
    planned = make_plan(checkpoint.config, recipe_, checkpoint.dtype)
    memory, disk = available_memory(), free_disk(out)
    kv = 4 * checkpoint.config.kv_elements_per_token()
    row = {
        "model": checkpoint.name,
        "recipe": recipe_.name,
        "parameters": planned.parameters,
        "input_bytes": planned.input_bytes,
        "output_bytes": planned.output_bytes,
        "bits_per_weight": round(planned.bits_per_weight, 4),
        "formats": sorted({form.name for form in planned.formats.values()}),
        "compress_peak_bytes": planned.peak_bytes,
        "compress_disk_bytes": planned.disk_bytes,
        "run_bytes": planned.output_bytes + kv * context,
        "kv_bytes_per_token": kv,
        "context": context,
        "memory_available_bytes": memory,
        "disk_available_bytes": disk,
    }
    if json:
        emit_json(row)
    elif not quiet:
        _print(row)
    check_fit(planned, memory, disk, recipe_.methods()[0].needs is not Needs.NOTHING)


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
    table.add_row("disk to compress", f"{mb('compress_disk_bytes')}  of {mb('disk_available_bytes')} free")
    table.add_row("memory to run", f"{mb('run_bytes')}  (weights and {row['context']} tokens of context)")
    Console(highlight=False).print(table)
