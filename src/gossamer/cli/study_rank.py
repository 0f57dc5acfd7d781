"""`gossamer study rank`: low rank at several shares of the parameters, the same for all layers or by measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._console import emit_json, progress, remark
from ._options import Activations, Backend, Json, Model, Quiet
from ._study_options import Context, Corpus, Folder, Tokens
from .compress import CalibrationText, Length, Seed, Sequences
from .eval import Threads, make_table
from .study import given_of, made_by, names_of, request_of

if TYPE_CHECKING:
    from ..search.study_rank import RankStudy


def study_rank(
    model: Model,
    out: Folder,
    ratios: Annotated[
        str, typer.Option("--ratios", help="Shares of the layers' parameters to keep.", metavar="SHARE[,SHARE]")
    ] = "0.9,0.8,0.7",
    method: Annotated[str, typer.Option("--method", help="What makes the factors: svd, asvd or svd-llm.")] = "svd-llm",
    corpus: Corpus = "default",
    context: Context = 1024,
    tokens: Tokens = 8192,
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
    """Ranks that are alike beside ranks by measured divergence, at several shares: divergence, parameters, seconds.

    Interrupted? The same command goes on: what is measured is not measured again. Exit code 1 if any of them failed.

    \b
    gossamer study rank smollm2 --out ranks/ --ratios 0.9,0.8
    """
    from ..checkpoint import open_checkpoint
    from ..measure.plans import SpeedPlan
    from ..measure.records import check_writable
    from ..search.study_precision import run_study
    from ..search.study_rank import RankStudy, variants

    study = RankStudy(
        model=model,
        fingerprint=open_checkpoint(model).fingerprint(),
        folder=out,
        request=request_of(corpus, context, tokens, backend, activations, threads),
        speed=SpeedPlan(),
        batches=(),
        formats=variants(names_of(ratios)),
        method=method,
        calibration=given_of(calibration, calibration_sequences, calibration_length, seed),
    )
    for name in study.formats:  # what is wrong with a method is found before any work
        study.recipe(name)
    check_writable(study.records)
    with progress(quiet) as report:
        records = run_study(study, lambda recipe, folder, say: made_by(study, recipe, folder, say), report)
    return _finish(study, records, json, quiet)


def _finish(study: RankStudy, records: Sequence[dict[str, Any]], json: bool, quiet: bool) -> int:
    """Write table and plot beside the records, and show them."""
    from dataclasses import asdict

    from ..report.export import write_text
    from ..report.rank import gains, rank_markdown, rank_table
    from ..report.study import study_rows
    from ..report.study_plot import study_svg

    rows = study_rows(records)
    folders = {row.name: study.model if row.baseline else str(study.artifact(row.name)) for row in rows}
    held = {row.name: _parameters(folders[row.name]) for row in rows if not row.failed}
    write_text(study.folder / "study.svg", study_svg(rows))
    write_text(study.folder / "rank.md", rank_markdown(rows, held, records))
    if json:
        emit_json({"rows": [{**asdict(row), "parameters": held.get(row.name)} for row in rows]})
    else:
        _show(*rank_table(rows, held), gains(rows))
    if not quiet:
        remark(f"wrote rank.md, study.svg and study.jsonl in {study.folder}")
    return 1 if any(row.failed for row in rows) else 0


def _parameters(model: str) -> int:
    """How many numbers a model's weights are made of: of factors, those of both."""
    from ..checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model)
    return sum(checkpoint.format(name).parameters(checkpoint.shape(name)) for name in checkpoint.names())


def _show(titles: list[str], cells: list[list[str]], said: Sequence[str]) -> None:
    from rich.console import Console

    screen = Console(highlight=False, soft_wrap=True)
    if not screen.is_terminal:
        screen = Console(highlight=False, width=10_000)  # a file is not wrapped to a terminal that is not there
    screen.print(make_table(titles, cells))
    for sentence in said:
        screen.print(sentence)
