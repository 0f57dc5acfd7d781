"""`gossamer plan`: will it fit, and how fast can it be, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._console import emit_json, remark
from ._options import Json, Model, PipelineParallel, Quiet, TensorParallel
from ._plan_speed import LINK_GBPS, LINK_LATENCY_US, Machines, speed
from .compress import CalibrationText, Length, RecipeOption, Sequences, calibration_of, read_recipe, with_overrides

if TYPE_CHECKING:
    import torch

    from ..compress.plan import Plan as Planned
    from ..formats import Format
    from ..model import ModelConfig
    from ..parallel import Plan as Cut


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
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines that hold as many ranks each.")] = 1,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences that decode together, beside one.")] = 16,
    link_gbps: Annotated[
        float | None,
        typer.Option("--link-gbps", help=f"Gbit/s between two machines (default: {LINK_GBPS:g})."),
    ] = None,
    link_latency_us: Annotated[
        float | None,
        typer.Option(
            "--link-latency-us", help=f"Microseconds of a message between them (default: {LINK_LATENCY_US:g})."
        ),
    ] = None,
    memory_gbps: Annotated[
        float | None,
        typer.Option("--memory-gbps", help="GB (10^9 bytes) that a machine reads in a second (default: this one's)."),
    ] = None,
    compute_gmacs: Annotated[
        float | None,
        typer.Option("--compute-gmacs", help="10^9 products of a machine in a second (default: this one's)."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a recipe will make of a model, what that takes, and how fast it can decode; exit 1 if it does not fit.

    Speeds are bounds: what bandwidth, products and links allow, for one sequence and for --batch of them.

    \b
    gossamer plan smollm2 --recipe int4-gptq
    gossamer plan smollm2 --recipe int4-gptq --tp 4 --nodes 4 --link-gbps 25 --link-latency-us 20
    """
    from ..checkpoint import open_checkpoint
    from ..checkpoint.memory import available_memory
    from ..compress.pipeline import Later, transformed
    from ..compress.plan import RUN_BYTES, check_fit, free_disk, make_plan
    from ..parallel import make_plan as cut_in
    from ..parallel.roofline import place

    machines = Machines(nodes, link_gbps, link_latency_us, memory_gbps, compute_gmacs)
    place(tp * pp, nodes)  # which refuses what does not come out even, before anything is read
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
    forms = _formats(planned, source.config, source.dtype)
    cut = None if (tp, pp) == (1, 1) else cut_in(source.config, forms, tp, pp)
    if cut is not None:
        row |= _ranks(cut, forms)
    row |= speed(source.config, forms, cut, machines, batch, context)
    if json:
        emit_json(row)
    else:
        _print(row)
    check_fit(planned, memory, disk, recipe_.needs_calibration())
    if running > memory and not quiet:
        remark("the result would not run in the memory that is free now: take fewer bits or a shorter --context")


def _formats(planned: Planned, config: ModelConfig, dtype: torch.dtype) -> dict[str, Format]:
    """How each tensor of the result is stored."""
    from ..formats import Dense
    from ..model.families import tensor_names

    return {name: planned.formats.get(name.removesuffix(".weight"), Dense(dtype)) for name in tensor_names(config)}


def _ranks(cut: Cut, forms: dict[str, Format]) -> dict[str, object]:
    """What each rank of the result will hold, and hand to others."""
    return {
        "tp": cut.tp,
        "pp": cut.pp,
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
    for name, text in _speed_rows(row):
        table.add_row(name, text)
    Console(highlight=False, markup=False).print(table)


def _speed_rows(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The machines that speeds are of, and the speeds."""
    each = f"{row['memory_gbytes_per_s']:,.1f} GB/s of memory, {row['compute_gmacs']:,.0f} * 10^9 products/s"
    rows = [("a machine", each)]
    if row["nodes"] > 1:
        link = f"{row['link_gbits_per_s']:g} Gbit/s, {row['link_latency_us']:g} us for each message"
        rows.append((f"{row['nodes']} machines", link))
    for step in row["steps"]:
        waits = 1e3 * (step["link_latency_s"] + step["link_transfer_s"])
        rows.append(
            (
                f"{step['batch']} at a time" if step["batch"] > 1 else "one at a time",
                f"at most {step['tokens_per_s']:,.1f} tokens/s: a step of {1e3 * step['step_s']:,.2f} ms, "
                f"{waits:,.2f} of it between ranks; most of it is {step['bottleneck']}",
            )
        )
    return rows
