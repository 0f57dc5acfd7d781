"""`gossamer bench`: how fast models run and how much memory they take."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Any

import typer

from ..errors import UsageError
from ._console import progress
from ._options import Activations, Backend, Json, KVCache, Quiet, Weights
from .eval import (
    Engine,
    Models,
    Out,
    Threads,
    check_out,
    computed_by,
    exit_code,
    make_table,
    number,
    print_table,
    take,
)


def bench(
    models: Models,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of each prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option("--output-tokens", help="Tokens to generate for each prompt.")] = 64,
    batch: Annotated[str, typer.Option("--batch", help="Prompts at once; several as 1,8.", metavar="N[,N]")] = "1",
    repetitions: Annotated[int, typer.Option("--repetitions", help="Timed runs, of which the median counts.")] = 5,
    warmup: Annotated[int, typer.Option("--warmup", help="Runs before those, not counted.")] = 1,
    weights: Weights = "stored",
    backend: Backend = "auto",
    activations: Activations = "auto",
    kv_cache: KVCache = "auto",
    engine: Engine = "gossamer",
    threads: Threads = None,
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Load time, prefill and decode speed, and memory. Several models take turns. Exit code 1 if any model failed.

    \b
    gossamer bench smollm2 small/ --batch 1,8 --out runs/bench.jsonl
    """
    from ..measure.plans import SpeedPlan
    from ..measure.run import bench_models, check_engine

    check_engine(engine)
    check_out(out)
    plans = [SpeedPlan(prompt_tokens, output_tokens, n, repetitions, warmup) for n in _sizes(batch)]
    with progress(quiet) as report:
        ran = (bench_models(models, plan, report, weights, threads, backend, activations, kv_cache) for plan in plans)
        records = take(chain.from_iterable(ran), out, json)
    if not json:
        _show(records)
    return exit_code(records)


def _sizes(text: str) -> list[int]:
    """Batch sizes out of "1,8"."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise UsageError(f"--batch {text!r} is not a list of numbers", hint="such as --batch 1,8") from error


def _show(records: Sequence[dict[str, Any]]) -> None:
    memory = ("WM MB", "RM weights MB", "KV kB/token", "RM peak MB")
    columns = ("model", "batch", *memory, "load s", "TTFT s", "prefill t/s", "decode t/s")
    p = records[0]["protocol"]
    computed = any(r["results"].get("rm_kv_source") == "computed" for r in records)
    alone = dict.fromkeys(r["model"]["name"] for r in records if r["protocol"].get("turns") == "alone")
    print_table(
        records,
        make_table(columns, [_row(record) for record in records]),
        f"prompt {p['prompt_tokens']}, output {p['output_tokens']} tokens, median of {p['repetitions']} after "
        f"{p['warmup']} warm-up, in turns; {p['weights']} weights, {computed_by(records)}"
        + (f"; no room beside the others, so alone after them: {', '.join(alone)}" if alone else "")
        + ("; * KV from the model's shape, too small to be measured" if computed else ""),
    )


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    results = record["results"]
    if not results:
        return (record["model"]["name"], str(record["protocol"]["batch"]), "failed", *["-"] * 7)
    return (
        record["model"]["name"],
        str(record["protocol"]["batch"]),
        number(results["wm_bytes"] / 1e6, 1),
        number(results["rm_weights_bytes"] / 1e6, 1),
        number(results["rm_kv_bytes_per_token"] / 1e3, 1) + ("*" if results["rm_kv_source"] == "computed" else ""),
        number(results["rm_peak_bytes"] / 1e6, 1),
        number(results["load_s"], 2),
        number(results["ttft_s"]["median"], 3),
        number(results["prefill_tokens_per_s"]["median"], 1),
        number(results["decode_tokens_per_s"]["median"], 1),
    )
