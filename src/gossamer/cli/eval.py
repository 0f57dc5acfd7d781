"""`gossamer eval`: how well models predict a text, and how far they have moved from a reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from ..errors import GossamerError, UsageError
from ._console import Progress, console, emit_json, print_error, progress
from ._options import (
    Activations,
    Backend,
    Cluster,
    Json,
    KVCache,
    MasterAddress,
    NodeCount,
    PipelineParallel,
    Quiet,
    TensorParallel,
    Weights,
    several_nodes,
)

if TYPE_CHECKING:
    from ..measure.run import EvalRequest

Models: TypeAlias = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Folders, .gguf files, hub ids or aliases (smollm2).")
]
Out: TypeAlias = Annotated[Path | None, typer.Option("--out", "-o", help="Append the records to this .jsonl file.")]
Threads: TypeAlias = Annotated[
    int | None, typer.Option("--threads", min=1, help="Compute threads (default: GOSSAMER_THREADS, or all cores).")
]
Engine: TypeAlias = Annotated[str, typer.Option("--engine", help="What runs the models: gossamer.")]


def eval_(
    models: Models,
    reference: Annotated[
        str | None, typer.Option("--reference", "-r", help="Model to compare with: KL divergence, agreement.")
    ] = None,
    corpus: Annotated[
        str, typer.Option("--corpus", help="default (Python's own docs), wikitext2, or a UTF-8 text file.")
    ] = "default",
    context: Annotated[int, typer.Option("--context", help="Tokens in a window.")] = 1024,
    stride: Annotated[int | None, typer.Option("--stride", help="Tokens between windows (default: context).")] = None,
    scored: Annotated[
        int | None, typer.Option("--scored", help="Tokens scored at each window's end (default: half of it).")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=2, help="Use only so many tokens of the text.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=0, help="Built-in prompts to answer greedily.")] = 3,
    weights: Weights = "stored",
    backend: Backend = "auto",
    activations: Activations = "auto",
    kv_cache: KVCache = "auto",
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    nodes: NodeCount = 1,
    master_addr: MasterAddress = None,
    engine: Engine = "gossamer",
    threads: Threads = None,
    ray: Cluster = None,
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Perplexity on a text, and divergence from a reference model. Exit code 1 if any model failed.

    With --ray a few windows of the text at a time are a task on the cluster, of as many CPUs as it has threads; the
    numbers are the same. Interrupted? With --out the same command goes on where it stopped.

    \b
    gossamer eval smollm2 small/ --reference smollm2 --out runs/eval.jsonl
    gossamer eval smollm2 small/ --reference smollm2 --out /shared/eval.jsonl --ray
    """
    from ..measure.corpus import load_corpus
    from ..measure.plans import WindowPlan
    from ..measure.run import EvalRequest, check_engine

    check_engine(engine)
    check_out(out)
    if ray is not None and nodes > 1:
        raise UsageError("--nodes and --ray both spread a model's work", hint="leave one of them away")
    request = EvalRequest(
        corpus_source=corpus,
        corpus=load_corpus(corpus),
        plan=WindowPlan(context, context if stride is None else stride, context // 2 if scored is None else scored),
        reference=reference,
        tokens=tokens,
        samples=samples,
        weights=weights,
        backend=backend,
        activations=activations,
        threads=threads,
        kv_cache=kv_cache,
        tp=tp,
        pp=pp,
        nodes=several_nodes(nodes, master_addr),
    )
    with progress(quiet) as report:
        records = _evaluated(models, request, report, ray, out, json)
    if not json:
        _show(records)
    return exit_code(records)


def _evaluated(
    models: Sequence[str], request: EvalRequest, report: Progress, ray: str | None, out: Path | None, json: bool
) -> Taken:
    """The records, by this machine or by a cluster."""
    from ..measure.run import evaluate_models

    if ray is None:
        return take(evaluate_models(models, request, report), out, json)
    from ..cluster.join import joined
    from ..cluster.tasks import Tasks
    from ..measure.shards import evaluate_in_shards
    from ..settings import threads

    cpus = threads() if request.threads is None else request.threads
    request = replace(request, threads=cpus)  # nodes may have others
    work = None if out is None else out.absolute().parent / f".{out.name}.work"
    with joined(ray) as cluster:
        tasks = Tasks(cluster, cpus)
        return take(evaluate_in_shards(models, request, report, tasks.run, work), out, json)


def check_out(out: Path | None) -> None:
    """Raises UsageError if records cannot be appended to --out: before the work, which would be lost."""
    from ..measure.records import check_writable

    if out is not None:
        check_writable(out)


class Taken(list[dict[str, Any]]):
    """Records as they came, and what kept the file from taking some of them."""

    unwritten: OSError | None = None


def take(records: Iterable[dict[str, Any]], out: Path | None, json: bool) -> Taken:
    """Keep records as they come: in the file, on stdout with --json, and in a list.

    A disk that fills up while models are measured costs the file some records, not the user the table.
    """
    from ..measure.records import append_record

    kept = Taken()
    for record in records:
        kept.append(record)
        if out is not None:
            try:
                append_record(out, record)
            except OSError as error:
                kept.unwritten = error
        if json:
            emit_json(record)
    return kept


def exit_code(records: Taken) -> int:
    """1 if any measurement failed or is missing in the file; each failure is said on stderr."""
    from rich.text import Text

    failed = [record for record in records if record["status"] == "failed"]
    for record in failed:
        engine = record["engine"]["name"]
        where = "" if engine == "gossamer" else f" in {engine}"
        said = f"{record['model']['name']}{where}: {record['error']}"
        console().print(Text.assemble(("failed: ", "bold red"), said))
    if records.unwritten is not None:
        print_error(GossamerError(f"not every record could be written: {records.unwritten}"))
    return 1 if failed or records.unwritten is not None else 0


def make_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """A plain table: the first column to the left, numbers to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def print_table(records: Sequence[dict[str, Any]], table: Any, protocol: str) -> None:
    """The table, how it was measured, and what must be known of a model to read it."""
    from rich.console import Console
    from rich.text import Text

    from ..report.sources import source_sentence

    screen = Console(highlight=False, soft_wrap=True)
    if not screen.is_terminal:
        screen = Console(highlight=False, width=10_000)  # a file is not wrapped to a terminal that is not there
    screen.print(table)
    machine = records[0]["machine"]
    screen.print(Text(f"{protocol}; {machine['threads']} threads, {machine['cpu']} ({machine['isa']})", style="dim"))
    by_note: dict[str, list[str]] = {}
    for model in (record["model"] for record in records):
        if model["note"]:
            note = source_sentence(model["note"], model["bits_per_weight"], model["format"])
            by_note.setdefault(note, []).append(model["name"])
    for note, names in by_note.items():
        screen.print(Text(f"{', '.join(dict.fromkeys(names))}: {note}", style="dim"))


def computed_by(records: Sequence[dict[str, Any]]) -> str:
    """What computed, in a few words: `cpu backend (avx512, int8 activations)`; more than one if models differ."""
    found = []
    for engine in (record["engine"] for record in records if record["status"] == "ok"):
        if engine["name"] != "gossamer":
            found.append(" ".join(filter(None, (engine["name"], engine["version"]))))
            continue
        words = (("activations", "activations"), ("kv_cache", "KV cache"))
        details = [engine["kernels"], *(f"{engine[name]} {what}" for name, what in words if engine[name])]
        found.append(f"{engine['backend']} backend ({', '.join(detail for detail in details if detail)})")
    return " and ".join(dict.fromkeys(found)) or "nothing computed"


def number(value: float | None, digits: int) -> str:
    """A number with so many digits after the point, or a dash."""
    return "-" if value is None else f"{value:,.{digits}f}"


def _show(records: Sequence[dict[str, Any]]) -> None:
    columns = ("model", "bits/weight", "MB", "perplexity", "KLD mean", "KLD p99", "KLD int8", "top-1 same", "tokens/s")
    table = make_table(columns, [_row(record) for record in records])
    p = next((r["protocol"] for r in records if r["status"] == "ok"), records[0]["protocol"])
    against = f", against {p['reference']}" if p["reference"] else ""
    scored = "nothing" if p["windows"] is None else f"{p['tokens_scored']} tokens"
    windows = "windows" if p["windows"] is None else f"{p['windows']} windows"
    print_table(
        records,
        table,
        f"{p['corpus']} ({p['corpus_sha256'][:8]}): {scored} scored in {windows} of "
        f"{p['context']}, the last {p['scored']} of each, stride {p['stride']}{against}; {p['weights']} weights, "
        f"{computed_by(records)}",
    )
    _show_samples(records)


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    model, results = record["model"], record["results"]
    size = model["weight_bytes"]
    share = results.get("top1_agreement")
    return (
        model["name"],
        number(model["bits_per_weight"], 2),
        number(None if size is None else size / 1e6, 1),
        number(results.get("perplexity"), 3) if results else "failed",
        number(results.get("kld_mean"), 4),
        number(results.get("kld_p99"), 3),
        number(results.get("activation_kld"), 4),
        "-" if share is None else f"{share:.1%}",
        number(results.get("tokens_per_second"), 0),
    )


def _show_samples(records: Sequence[dict[str, Any]]) -> None:
    """Each prompt with the first words of every model's answer below it."""
    from rich.console import Console
    from rich.text import Text

    screen = Console(highlight=False, soft_wrap=True)
    answers: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        for sample in record["results"].get("samples", ()):
            answers.setdefault(sample["prompt"], []).append((record["model"]["name"], sample["output"]))
    for prompt, outputs in answers.items():
        screen.print(Text(f"\n{prompt}", style="bold"))
        for name, output in outputs:
            words = " ".join(output.split())
            screen.print(Text(f"  {name}: {words[:160]}{'...' if len(words) > 160 else ''}"))
