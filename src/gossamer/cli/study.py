"""`gossamer study precision`: every number format on one model, by size, speed and divergence, and which to take."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ._console import emit_json, progress
from ._options import Activations, Backend, Json, Model, Quiet
from ._study_options import (
    BatchSizes,
    Context,
    Corpus,
    Folder,
    MaxKld,
    MaxSize,
    OutputTokens,
    PromptTokens,
    Repetitions,
    Tokens,
)
from .compress import CalibrationText, Length, Seed, Sequences
from .eval import Threads, make_table

if TYPE_CHECKING:
    from ..compress.recipe import Recipe
    from ..measure.run import EvalRequest
    from ..measure.worker import Channel, Progress
    from ..report.study import StudyRow
    from ..search.study_precision import PrecisionStudy

UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def study_precision(
    model: Model,
    out: Folder,
    formats: Annotated[
        str | None, typer.Option("--formats", help="Only these (default: all).", metavar="NAME[,NAME]")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="What makes the formats that name no method: gptq, rtn, ...")
    ] = "gptq",
    max_size: MaxSize = None,
    max_kld: MaxKld = None,
    batch: BatchSizes = "1,8,64",
    corpus: Corpus = "default",
    context: Context = 1024,
    tokens: Tokens = 32768,
    prompt_tokens: PromptTokens = 128,
    output_tokens: OutputTokens = 32,
    repetitions: Repetitions = 3,
    calibration: CalibrationText = None,
    calibration_sequences: Sequences = None,
    calibration_length: Length = None,
    seed: Seed = None,
    backend: Backend = "auto",
    activations: Activations = "auto",
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Every number format on this model: bytes, speed, divergence, and which one to take.

    Interrupted? The same command goes on: what is measured is not measured again. Exit code 1 if any format failed.

    \b
    gossamer study precision smollm2 --out study/ --max-size 100MB
    """
    from ..checkpoint import open_checkpoint
    from ..measure.plans import SpeedPlan
    from ..measure.records import check_writable
    from ..search.study_precision import VARIANTS, PrecisionStudy, run_study

    study = PrecisionStudy(
        model=model,
        fingerprint=open_checkpoint(model).fingerprint(),
        folder=out,
        request=request_of(corpus, context, tokens, backend, activations, threads),
        speed=SpeedPlan(prompt_tokens, output_tokens, 1, repetitions, 1),
        batches=batches_of(batch, prompt_tokens, output_tokens, repetitions),
        formats=VARIANTS if formats is None else tuple(names_of(formats)),
        method=method,
        calibration=given_of(calibration, calibration_sequences, calibration_length, seed),
    )
    for name in study.formats:  # what is wrong with a name or a method is found before any work
        if name not in study.kv_caches:
            study.recipe(name)
    limit = None if max_size is None else bytes_of(max_size)
    check_writable(study.records)
    with progress(quiet) as report:
        records = run_study(study, lambda recipe, folder, say: made_by(study, recipe, folder, say), report)
    return finish(study, records, limit, max_kld, json, quiet)


def request_of(
    corpus: str, context: int, tokens: int | None, backend: Backend, activations: Activations, threads: int | None
) -> EvalRequest:
    """How a study judges: windows of `context` tokens, of which the second half is scored."""
    from ..measure.corpus import load_corpus
    from ..measure.plans import WindowPlan
    from ..measure.run import EvalRequest

    return EvalRequest(
        corpus_source=corpus,
        corpus=load_corpus(corpus),
        plan=WindowPlan(context, context, context // 2),
        tokens=tokens,
        samples=0,
        backend=backend,
        activations=activations,
        threads=threads,
    )


def given_of(source: str | None, sequences: int | None, length: int | None, seed: int | None) -> dict[str, Any]:
    """What the command line says of the calibration text."""
    text = {"source": source, "sequences": sequences, "length": length, "seed": seed}
    return {key: value for key, value in text.items() if value is not None}


def finish(
    study: PrecisionStudy,
    records: Sequence[dict[str, Any]],
    max_bytes: int | None,
    max_kld: float | None,
    json: bool,
    quiet: bool,
    noun: str = "format",
    title: str = "Number formats, compared",
) -> int:
    """Write table and plot beside the records, and say what follows from them. `noun` is what a row is of."""
    from dataclasses import asdict

    from ..report.export import write_text
    from ..report.study import protocol_sentences, recommendation, study_markdown, study_rows
    from ..report.study_plot import study_svg

    rows = study_rows(records)
    said = recommendation(rows, max_bytes, max_kld, noun)
    page, picture = (study.records.with_suffix(suffix) for suffix in (".md", ".svg"))
    write_text(picture, study_svg(rows))
    write_text(page, study_markdown(rows, said, records, noun, title, picture.name))
    if json:
        emit_json({"rows": [asdict(row) for row in rows], "recommendation": said})
    else:
        _show(rows, said, protocol_sentences(records), noun)
    if not quiet:
        from ._console import remark

        remark(f"wrote {page.name}, {picture.name} and {study.records.name} in {study.folder}")
    return 1 if any(row.failed for row in rows) else 0


def _show(rows: Sequence[StudyRow], said: Sequence[str], protocol: Sequence[str], noun: str) -> None:
    from rich.console import Console
    from rich.text import Text

    from ..report.study import study_table

    screen = Console(highlight=False, soft_wrap=True)
    if not screen.is_terminal:
        screen = Console(highlight=False, width=10_000)  # a file is not wrapped to a terminal that is not there
    screen.print(make_table(*study_table(rows, noun)))
    for sentence in protocol:
        screen.print(Text(sentence, style="dim"))
    for n, sentence in enumerate(said):
        screen.print(Text(sentence, style="bold" if n == 0 else ""))


def made_by(study: PrecisionStudy, recipe: Recipe, out: Path, report: Progress) -> dict[str, Any]:
    """The record of an artifact that is made in a process of its own, so that its cost is its own."""
    from ..measure.records import engine_block, make_record, unknown_model_block
    from ..measure.worker import Job, WorkerError, run_job

    arguments = {"model": study.model, "recipe": recipe.model_dump(mode="json"), "out": str(out)}
    try:
        made: dict[str, Any] = run_job(
            Job("gossamer.cli.study:make_artifact", arguments, study.request.threads), report
        )
        return made
    except WorkerError as error:
        hint = "" if error.hint is None else f" ({error.hint})"
        return make_record(
            "compress",
            model={**unknown_model_block(str(out)), "base": study.model, "recipe": recipe.name},
            engine=engine_block(),
            protocol={"recipe": recipe.canonical(), "calibration": None},
            error=f"{error.kind}: {error.message}{hint}",
        )


def make_artifact(channel: Channel, model: str, recipe: dict[str, Any], out: str) -> dict[str, Any]:
    """Make one artifact in this process and return its record.

    The folder belongs to the study: what lies there made by another recipe or from another model is made anew.
    """
    import torch

    from .. import settings
    from ..checkpoint import open_checkpoint
    from ..compress.pipeline import compress
    from ..compress.recipe import parse_recipe
    from ..errors import OutputExists, ResumeMismatch
    from ..measure.memory import peak_rss
    from .compress import calibration_of, made_record

    torch.set_num_threads(settings.threads())
    started = time.monotonic()
    checkpoint, checked = open_checkpoint(model), parse_recipe(recipe, "the study")
    text = calibration_of("", checked, checkpoint, channel.progress, quiet=True)
    try:
        result = compress(checkpoint, checked, Path(out), text, progress=channel.progress)
    except (OutputExists, ResumeMismatch):
        result = compress(checkpoint, checked, Path(out), text, progress=channel.progress, overwrite=True, restart=True)
    cost = {"seconds": round(time.monotonic() - started, 3), "peak_rss_bytes": peak_rss()}
    return made_record(open_checkpoint(out), checked, result, dict.fromkeys(cost) if result.existed else cost)


def batches_of(text: str, prompt_tokens: int, output_tokens: int, repetitions: int) -> tuple[int, ...]:
    """Batch sizes out of "1,8,64". Raises UsageError, also for what cannot be timed."""
    from ..measure.plans import SpeedPlan

    try:
        sizes = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise UsageError(f"--batch {text!r} is not a list of numbers", hint="such as --batch 1,8,64") from error
    for size in sizes:
        SpeedPlan(prompt_tokens, output_tokens, size, repetitions, 1)
    return sizes


def names_of(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def bytes_of(text: str) -> int:
    """Bytes out of "100MB", "0.5 GB" or a plain number. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not found or found[2] not in UNITS:
        raise UsageError(f"--max-size {text!r} is not a size", hint="such as 100MB, 0.5GB or 64MiB")
    return int(float(found[1]) * UNITS[found[2]])
