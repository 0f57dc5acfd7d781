"""`gossamer bench`: how fast models run and how much memory they take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Annotated, Any, TypeAlias

import typer

from ..errors import UsageError
from ._console import progress, remark
from ._options import (
    Activations,
    Backend,
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
from .eval import Models, Out, Threads, check_out, computed_by, exit_code, make_table, number, print_table, take

Engines: TypeAlias = Annotated[
    str,
    typer.Option(
        "--engine",
        help="gossamer, transformers, llama.cpp, openvino, vllm, the URL of an OpenAI-compatible server; or all.",
        metavar="NAME[,NAME]",
    ),
]


def bench(
    models: Models,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of each prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option("--output-tokens", help="Tokens to generate for each prompt.")] = 64,
    batch: Annotated[str, typer.Option("--batch", help="Prompts at once; several as 1,8.", metavar="N[,N]")] = "1",
    repetitions: Annotated[int, typer.Option("--repetitions", help="Timed runs, of which the median counts.")] = 5,
    warmup: Annotated[int, typer.Option("--warmup", help="Runs before those, not counted.")] = 1,
    engine: Engines = "gossamer",
    perplexity: Annotated[
        int, typer.Option("--perplexity", help="Judge each engine on so many tokens of text; 0: not.", metavar="TOKENS")
    ] = 0,
    context: Annotated[int, typer.Option("--context", help="Tokens in a window of that text.")] = 1024,
    api_key: Annotated[str | None, typer.Option("--api-key", help="Sent to servers as a bearer token.")] = None,
    weights: Weights = "stored",
    backend: Backend = "auto",
    activations: Activations = "auto",
    kv_cache: KVCache = "auto",
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    nodes: NodeCount = 1,
    master_addr: MasterAddress = None,
    threads: Threads = None,
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Load time, prefill and decode speed, and memory. Several models take turns. Exit code 1 if any model failed.

    Other engines run in Pythons of their own; `all` takes those that are installed and says how to install the rest.

    \b
    gossamer bench smollm2 small/ --batch 1,8 --out runs/bench.jsonl
    gossamer bench model.gguf --engine gossamer,llama.cpp,http://127.0.0.1:8000 --perplexity 8192
    """
    from ..measure.engines.peers import ALL, absent, parse_engines
    from ..measure.plans import SpeedPlan
    from ..measure.run import bench_models

    engines = parse_engines(engine)
    check_out(out)
    plans = [SpeedPlan(prompt_tokens, output_tokens, n, repetitions, warmup) for n in _sizes(batch)]
    if ALL in engine.split(",") and not quiet:
        for peer in absent(engines):
            remark(f"{peer.name} is not installed: {peer.install}")
    own, ranks = (weights, threads, backend, activations, kv_cache), (tp, pp, several_nodes(nodes, master_addr))
    text = _judged(perplexity, context, (*own, *ranks)) if perplexity else None
    with progress(quiet) as report:
        ran = (
            bench_models(models, plan, report, *own, engines, text if i == 0 else None, api_key, *ranks)
            for i, plan in enumerate(plans)  # one text is judged once
        )
        records = take(chain.from_iterable(ran), out, json)
    if not json:
        _show(records)
    return exit_code(records)


def _judged(tokens: int, context: int, own: tuple[Any, ...]) -> Any:
    """What --perplexity asks for: windows of the default text."""
    from ..measure.corpus import load_corpus
    from ..measure.plans import WindowPlan
    from ..measure.run import EvalRequest

    weights, threads, backend, activations, kv_cache, tp, pp, nodes = own
    return EvalRequest(
        "default",
        load_corpus("default"),
        WindowPlan(context, context, context // 2),
        tokens=tokens,
        samples=0,
        weights=weights,
        backend=backend,
        activations=activations,
        threads=threads,
        kv_cache=kv_cache,
        tp=tp,
        pp=pp,
        nodes=nodes,
    )


def _sizes(text: str) -> list[int]:
    """Batch sizes out of "1,8"."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise UsageError(f"--batch {text!r} is not a list of numbers", hint="such as --batch 1,8") from error


def _show(records: Sequence[dict[str, Any]]) -> None:
    benches = [r for r in records if r["kind"] == "bench"]
    judged = {_who(r): r for r in records if r["kind"] == "eval"}
    memory = ("WM MB", "RM weights MB", "KV kB/token", "RM reserved MB", "RM peak MB")
    columns = ["model", "engine", "batch", *memory, "load s", "TTFT s", "prefill t/s", "decode t/s", "perplexity"]
    rows = [[*_row(record), _perplexity(judged.get(_who(record)))] for record in benches]
    shown = [i for i, name in enumerate(columns) if name != "perplexity" or judged]
    if all(r["engine"]["name"] == "gossamer" for r in benches):
        shown.remove(columns.index("engine"))
    p = benches[0]["protocol"]
    computed = any(r["results"].get("rm_kv_source") == "computed" for r in benches)
    alone = dict.fromkeys(r["model"]["name"] for r in benches if r["protocol"].get("turns") == "alone")
    print_table(
        benches,
        make_table([columns[i] for i in shown], [[row[i] for i in shown] for row in rows]),
        f"prompt {p['prompt_tokens']}, output {p['output_tokens']} tokens, median of {p['repetitions']} after "
        f"{p['warmup']} warm-up, in turns; {p['weights']} weights, {computed_by(benches)}"
        + (f"; no room beside the others, so alone after them: {', '.join(alone)}" if alone else "")
        + ("; * KV from the model's shape" if computed else "")
        + _judged_on(judged.values()),
    )


def _who(record: dict[str, Any]) -> tuple[str, str]:
    return record["model"]["name"], record["engine"]["name"]


def _judged_on(records: Iterable[dict[str, Any]]) -> str:
    p = next((record["protocol"] for record in records if record["status"] == "ok"), None)
    return "" if p is None else f"; perplexity of {p['tokens_scored']} tokens of {p['corpus']}, context {p['context']}"


def _perplexity(record: dict[str, Any] | None) -> str:
    if record is None:
        return "-"
    return "failed" if record["status"] == "failed" else number(record["results"]["perplexity"], 3)


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    results, who = record["results"], (*_who(record), str(record["protocol"]["batch"]))
    if not results:
        return (*who, "failed", *["-"] * 8)

    def mega(name: str) -> str:
        return number(None if results[name] is None else results[name] / 1e6, 1)

    kv = results["rm_kv_bytes_per_token"]
    return (
        *who,
        mega("wm_bytes"),
        mega("rm_weights_bytes"),
        number(None if kv is None else kv / 1e3, 1) + ("*" if results["rm_kv_source"] == "computed" else ""),
        mega("rm_reserved_bytes"),
        mega("rm_peak_bytes"),
        number(results["load_s"], 2),
        number(results["ttft_s"]["median"], 3),
        number(results["prefill_tokens_per_s"]["median"], 1),
        number(results["decode_tokens_per_s"]["median"], 1),
    )
