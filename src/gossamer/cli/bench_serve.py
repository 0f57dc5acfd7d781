"""`gossamer bench serve`: a load on any OpenAI-compatible server, and what its requests had to wait."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import UsageError
from ._console import console, emit_json, progress
from ._options import Json, Quiet
from .eval import make_table, number


def bench_serve(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server, such as http://127.0.0.1:8000.")],
    model: Annotated[str | None, typer.Option("--model", help="Which model (default: the only one served).")] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", help="Sent as a bearer token; in no record.")] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", "-c", help="Requests under way at a time (default: 8).")
    ] = None,
    request_rate: Annotated[
        float | None, typer.Option("--request-rate", help="Instead: requests per second, at random moments.")
    ] = None,
    requests: Annotated[int, typer.Option("--requests", "-n", help="How many requests.")] = 100,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Text file, a prompt per line, or .jsonl (default: random words).")
    ] = None,
    input_tokens: Annotated[
        str | None,
        typer.Option("--input-tokens", help="Tokens of random prompts (default: 256).", metavar="MEAN[:SPREAD]"),
    ] = None,
    output_tokens: Annotated[
        str, typer.Option("--output-tokens", help="Most tokens of an answer.", metavar="MEAN[:SPREAD]")
    ] = "128",
    shared_prefix: Annotated[
        int, typer.Option("--shared-prefix", help="Tokens that stand before every prompt.", metavar="TOKENS")
    ] = 0,
    endpoint: Annotated[Literal["chat", "completions"], typer.Option("--endpoint", help="Which route.")] = "chat",
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="The same seed asks the same, at the same moments.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Answers go on to their full length.")] = False,
    goodput: Annotated[
        str | None,
        typer.Option("--goodput", help="Count requests within these milliseconds.", metavar="ttft:500,tpot:50"),
    ] = None,
    warmup: Annotated[int, typer.Option("--warmup", help="Requests before those, not counted.")] = 1,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that a request may take.")] = 600.0,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Send a load to a server: throughput, and TTFT, TPOT, ITL and whole time at median, p90 and p99.

    Works with every OpenAI-compatible server. Exit code 1 if any request failed; Ctrl-C shows what was measured.

    \b
    gossamer bench serve http://127.0.0.1:8000 --concurrency 16 --input-tokens 256:128 --goodput ttft:500,tpot:50
    """
    from ..measure.load.measure import measure_load
    from ..measure.load.plan import LoadPlan, parse_goodput, parse_length

    if concurrency is not None and request_rate is not None:
        raise UsageError("--concurrency and --request-rate are two ways to send", hint="give one of them")
    if prompts is not None and input_tokens is not None:
        raise UsageError("--input-tokens is for random prompts, and --prompts has its own")
    plan = LoadPlan(
        requests=requests,
        concurrency=8 if concurrency is None else concurrency,
        rate=request_rate,
        endpoint=endpoint,
        input_tokens=parse_length(input_tokens or "256"),
        output_tokens=parse_length(output_tokens),
        shared_prefix=shared_prefix,
        temperature=temperature,
        seed=seed,
        ignore_eos=ignore_eos,
        warmup=warmup,
        timeout=timeout,
        goodput=parse_goodput(goodput) if goodput is not None else {},
    )
    with progress(quiet) as report:
        record = measure_load(url, plan, report, model=model, api_key=api_key, prompts=prompts)
    if json:
        emit_json(record)
    else:
        _show(record)
    return _exit_code(record["results"])


def _exit_code(results: dict[str, Any]) -> int:
    """1 if a request failed, 130 if it was interrupted; each reason is said on stderr with its count."""
    from rich.text import Text

    for reason, count in results["failures"].items():
        console().print(Text.assemble(("failed: ", "bold red"), f"{count} of {_sent(results)}: {reason}"))
    if results["interrupted"]:
        console().print(f"interrupted: {results['unfinished']} requests were under way or not sent")
        return 130
    return 1 if results["failed"] else 0


def _sent(results: dict[str, Any]) -> int:
    return int(results["completed"] + results["failed"])


def _show(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    screen = Console(highlight=False, soft_wrap=True)
    if not screen.is_terminal:
        screen = Console(highlight=False, width=10_000)  # a file is not wrapped to a terminal that is not there
    results = record["results"]
    screen.print(make_table(["model", *_RATES], [[record["model"]["name"], *_rates(results)]]))
    screen.print()
    screen.print(make_table(["ms", "mean", "median", "p90", "p99"], [_latency(results, name) for name in _LATENCIES]))
    screen.print(Text(_protocol(record), style="dim"))


_RATES = ("requests", "failed", "seconds", "requests/s", "output tokens/s", "all tokens/s", "goodput/s")
_LATENCIES = ("ttft", "tpot", "itl", "e2e")


def _rates(results: dict[str, Any]) -> list[str]:
    goodput = results["goodput"]
    good = "-" if goodput is None else f"{number(goodput['requests_per_s'], 2)} ({goodput['share']:.0%})"
    return [
        str(results["completed"]),
        str(results["failed"]),
        number(results["duration_s"], 1),
        number(results["requests_per_s"], 2),
        number(results["output_tokens_per_s"], 1),
        number(results["total_tokens_per_s"], 1),
        good,
    ]


def _latency(results: dict[str, Any], name: str) -> list[str]:
    found = results[f"{name}_s"] or {}
    seconds = [found.get(point) for point in ("mean", "median", "p90", "p99")]
    return [name.upper() if name != "e2e" else name, *(number(s and s * 1000, 1) for s in seconds)]


def _protocol(record: dict[str, Any]) -> str:
    """How it was measured, in one line."""
    p, results = record["protocol"], record["results"]
    sent = f"{p['concurrency']} at a time" if p["request_rate"] is None else f"{p['request_rate']:g} per second"
    prefix = f" behind {p['shared_prefix_tokens']} shared tokens" if p["shared_prefix_tokens"] else ""
    lengths = {"words": " (counted as words: the server tells no tokens)"}.get(p["lengths_by"], "")
    counts = results["prompt_tokens"], results["output_tokens"]
    tokens = [_range(count, what) for count, what in zip(counts, ("prompt", "output"), strict=True) if count]
    chunks = (
        "; no usage from the server: chunks counted as tokens" if "chunks" in str(results["output_counted_by"]) else ""
    )
    return (
        f"{p['url']}, {p['endpoint']}, {sent}, {p['prompts']} prompts{prefix}{lengths} "
        f"({p['prompts_sha256'][:8]}), seed {p['seed']}, temperature {p['temperature']:g}"
        f"{', EOS ignored' if p['ignore_eos'] else ''}; {', '.join(tokens) or 'no tokens'}{chunks}; "
        f"the client took {number(results['client_cores'], 2)} cores; {record['machine']['cpu']}"
    )


def _range(count: dict[str, Any], what: str) -> str:
    few, many = count["min"], count["max"]
    return f"{few} {what} tokens" if few == many else f"{few} to {many} {what} tokens"
