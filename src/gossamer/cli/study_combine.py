"""`gossamer study combine`: stages of a recipe, two at a time: which add up, which help each other, which hurt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._console import emit_json, progress, remark
from ._options import Activations, Backend, Json, Model, Quiet
from ._study_options import Context, Corpus, Tokens
from .compress import CalibrationText, Length, Seed, Sequences
from .eval import Threads, make_table
from .study import given_of, made_by, names_of, request_of

if TYPE_CHECKING:
    from ..search.study_combine import CombineStudy


def study_combine(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of records, artifacts and table.")],
    stages: Annotated[
        str | None, typer.Option("--stages", help="Only these (default: all).", metavar="NAME[,NAME]")
    ] = None,
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
    """Each stage alone and each pair in each legal order: what they cost together beside the sum of both.

    Interrupted? The same command goes on: what is measured is not measured again. Exit code 1 if any of them failed.

    \b
    gossamer study combine smollm2 --out combined/ --stages flap,svd-llm,int4
    """
    from ..checkpoint import open_checkpoint
    from ..measure.plans import SpeedPlan
    from ..measure.records import check_writable
    from ..search.study_combine import STAGES, CombineStudy, variants
    from ..search.study_precision import run_study

    given = given_of(calibration, calibration_sequences, calibration_length, seed)
    made, refused = variants(list(STAGES) if stages is None else names_of(stages), STAGES, given)
    study = CombineStudy(
        model=model,
        fingerprint=open_checkpoint(model).fingerprint(),
        folder=out,
        request=request_of(corpus, context, tokens, backend, activations, threads),
        speed=SpeedPlan(),
        batches=(),
        formats=tuple(made),
        calibration=given,
    )
    check_writable(study.records)
    with progress(quiet) as report:
        records = run_study(study, lambda recipe, folder, say: made_by(study, recipe, folder, say), report)
    return _finish(study, refused, records, json, quiet)


def _finish(
    study: CombineStudy, refused: Mapping[str, str], records: Sequence[dict[str, Any]], json: bool, quiet: bool
) -> int:
    """Write the tables beside the records, and show them."""
    from dataclasses import asdict

    from ..report.combine import combine_markdown, combine_tables, pairs_of
    from ..report.export import write_text
    from ..report.study import study_rows

    rows = study_rows(records)
    write_text(study.folder / "combine.md", combine_markdown(rows, refused, records))
    if json:
        pairs = [{**asdict(pair), "verdict": pair.verdict} for pair in pairs_of(rows)]
        emit_json({"rows": [asdict(row) for row in rows], "pairs": pairs, "refused": dict(refused)})
    else:
        _show(combine_tables(rows, refused))
    if not quiet:
        remark(f"wrote combine.md and study.jsonl in {study.folder}")
    return 1 if any(row.failed for row in rows) else 0


def _show(tables: Sequence[tuple[str, list[str], list[list[str]]]]) -> None:
    from rich.console import Console

    screen = Console(highlight=False, soft_wrap=True)
    if not screen.is_terminal:
        screen = Console(highlight=False, width=10_000)  # a file is not wrapped to a terminal that is not there
    for what, titles, cells in tables:
        if cells:
            screen.print(what)
            screen.print(make_table(titles, cells))
