"""`gossamer soak`: does a model stay what it is over hours."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ._console import console, progress
from ._options import Activations, Backend, Json, KVCache, Model, Quiet, Weights
from .eval import Out, Threads, check_out, computed_by, exit_code, make_table, number, print_table, take


def soak(
    model: Model,
    minutes: Annotated[float, typer.Option("--minutes", help="How long conversations go on.")] = 60.0,
    rounds: Annotated[int | None, typer.Option("--rounds", help="At most so many conversations.")] = None,
    context: Annotated[
        int | None, typer.Option("--context", help="Tokens of each (default: all that the model sees).")
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", "-r", help="Model to compare with, position by position.")
    ] = None,
    corpus: Annotated[
        str, typer.Option("--corpus", help="default (Python's own docs), wikitext2, or a UTF-8 text file.")
    ] = "default",
    windows: Annotated[int, typer.Option("--windows", help="Windows of text judged before and after.")] = 1,
    turn: Annotated[int, typer.Option("--turn", help="Tokens of each question and each answer.")] = 64,
    bound: Annotated[
        float | None, typer.Option("--bound", help="Nats that repeated numbers may differ by (default: 0 for cpu).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same seed holds the same conversations.")] = 0,
    weights: Weights = "stored",
    backend: Backend = "auto",
    activations: Activations = "auto",
    kv_cache: KVCache = "auto",
    threads: Threads = None,
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Conversations up to the full context, over hours: quality by position, and whether anything drifts or breaks.

    The same probe is answered after each round and must give the same numbers. Ctrl-C ends it with what there is. Exit
    code 1 if anything was found.

    \b
    gossamer soak small/ --reference smollm2 --minutes 240 --out runs/soak.jsonl
    """
    from ..measure.corpus import load_corpus
    from ..measure.plans import SoakPlan, WindowPlan
    from ..measure.run import EvalRequest, soak_model

    check_out(out)
    plan = SoakPlan(minutes, rounds, context, windows, turn, bound, seed)
    request = EvalRequest(
        corpus,
        load_corpus(corpus),
        WindowPlan(),
        reference=reference,
        weights=weights,
        backend=backend,
        activations=activations,
        threads=threads,
        kv_cache=kv_cache,
    )
    with progress(quiet) as report:
        records = take([soak_model(model, request, plan, report)], out, json)
    if not json and records[0]["results"]:
        _show(records)
    results = records[0]["results"]
    for finding in results.get("findings", ()):
        console().print(f"{finding['kind']} in round {finding['round']}: {finding['detail']}" + _place(finding))
    if exit_code(records) or not results["sound"]:
        return 1
    return 0 if results["complete"] else 130


def _place(finding: dict[str, Any]) -> str:
    return "" if finding["position"] is None else f", first at position {finding['position']}"


def _show(records: list[dict[str, Any]]) -> None:
    results, p = records[0]["results"], records[0]["protocol"]
    columns = ("positions", "perplexity", "KLD", "generated", "its perplexity")
    print_table(
        records, make_table(columns, [_row(part) for part in results["positions"]]), _sentence(results, p, records)
    )


def _row(part: dict[str, Any]) -> tuple[str, ...]:
    from math import exp

    own = part["generated_nll"]
    return (
        f"{part['from']}-{part['to']}",
        number(part["perplexity"], 3),
        number(part["kld"], 4),
        number(part["generated_tokens"], 0),
        number(None if own is None else exp(own), 3),
    )


def _sentence(results: dict[str, Any], p: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """How it was measured, and what became of the numbers that must repeat."""
    after = results["position_drift"]
    return (
        f"{results['rounds']} rounds in {results['seconds']:,.0f} s, {results['generated_tokens']:,} tokens generated, "
        f"{results['cached_prompt_tokens']:,} read from the cache; {results['probes']} probes moved by "
        f"{results['probe_drift']:.3g}, positions by {'?' if after is None else f'{after:.3g}'}, bound "
        f"{results['bound']:g}; {'' if results['complete'] else 'interrupted; '}"
        f"{p['windows']} x {results['context']} tokens of {p['corpus']}; {computed_by(records)}"
    )
