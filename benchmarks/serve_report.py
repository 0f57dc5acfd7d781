"""The figures of the serving benchmark as a page. Knows no server: only numbers and their names."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cpu_report import ALREADY_4_BIT, JUDGED, QUIET, model_table, ratios, unfair

HOW = (
    "A server is started for each sample, alone on the machine but for the clients, which are one process that is the "
    "same for all (`gossamer bench serve`); rounds take turns. Both sides of a row get the same prompts, made with the "
    "model's own tokenizer, new ones in each round, at temperature 0 with EOS ignored, so that both generate the same "
    "number of tokens. The ratio is the median of the pairs' ratios. Peers run with the fastest of the settings that "
    "were tried; ours with its defaults."
)
RATIO = {
    "throughput": "output tokens/s, ours over the peer's",
    "ttft": "mean TTFT, the peer's over ours",
}


def pair_ratios(row: Mapping[str, Any]) -> list[float]:
    """Of each pair: above 1 is better, whatever the metric."""
    ours, peer = (values(row["samples"][side], row["metric"]) for side in ("ours", "peer"))
    return ratios(ours, peer) if row["metric"] == "throughput" else ratios(peer, ours)


def values(samples: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    """The metric of each sample, which is the results of a load."""
    if metric == "throughput":
        return [sample["output_tokens_per_s"] for sample in samples]
    return [sample["ttft_s"]["mean"] for sample in samples]


def p99_ratio(row: Mapping[str, Any]) -> float | None:
    """Median over pairs of p99 TTFT, the peer's over ours: 1 or more is no worse."""
    ours, peer = ([s["ttft_s"]["p99"] for s in row["samples"][side]] for side in ("ours", "peer"))
    return statistics.median(ratios(peer, ours)) if ours and peer else None


def verdict(row: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> str:
    """`pass`, `short`, `information` or `failed`, and what makes the comparison less than it says."""
    if row["reason"]:
        return f"failed: {row['reason']}"
    complaints = unfair(models.get(row["ours"]["model"], {}), models.get(row["peer"]["model"], {}))
    foreign = statistics.median(row["foreign_cores"] or [0.0])
    if foreign > QUIET:
        complaints.append(f"others used {foreign:.1f} cores")
    if not same_work(row):
        complaints.append("the sides did not count the same tokens")
    word = "information" if row["wanted"] is None else "pass" if row["ratio"] >= row["wanted"] else "short"
    if row["p99_ttft"] and (p99_ratio(row) or 0.0) < 1.0:
        word = f"{word}, p99 TTFT worse" if word != "pass" else "short: p99 TTFT worse"
    return ", but ".join([word, " and ".join(complaints)] if complaints else [word])


def same_work(row: Mapping[str, Any]) -> bool:
    """True if both servers counted as many tokens of output in every pair, and of prompts within 1%."""
    for ours, peer in zip(row["samples"]["ours"], row["samples"]["peer"], strict=True):
        if ours["output_tokens"] != peer["output_tokens"]:
            return False
        counts = [sample["prompt_tokens"]["total"] for sample in (ours, peer) if sample["prompt_tokens"]]
        if len(counts) == 2 and abs(counts[0] - counts[1]) > 0.01 * counts[1]:
            return False
    return True


def page(run: Mapping[str, Any]) -> str:
    """The whole of docs/results/serve.md."""
    machine, protocol = run["machine"], run["protocol"]
    named = ", ".join(f"{name} {version}" for name, version in sorted(run["versions"].items()))
    settings = [
        f"- {server}, {model}: {entry['variant']}\n\n      {entry['command']}"
        for server, entries in run["settings"].items()
        for model, entry in entries.items()
    ]
    parts = [
        "# Serving: our server beside its peers",
        f"    {run['command']}",
        f"{machine['cpu']} ({machine['isa']}), {machine['cores']} cores, {machine['os']}; {run['created'][:10]}. "
        f"{protocol['threads']} threads; {protocol['rounds']} rounds. {named}.",
        ALREADY_4_BIT,
        HOW,
        table(run["rows"], run["models"]),
        "Times are medians over the rounds, in milliseconds, at median / p99. `client`: cores that the clients took. "
        "`reused`: prompt tokens that the server took from its cache, where it says so.",
        latency_table(run["rows"]),
        "## The settings",
        "\n".join(settings),
        "## The files",
        f"{JUDGED} The text: {protocol['corpus']}, {protocol['tokens']:,} tokens.",
        model_table(run["models"]),
    ]
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]]) -> str:
    """The comparisons, in Markdown."""
    lines = [
        "| row | load | ours | peer | what | ours | peer | ratio (all pairs) | wanted | p99 TTFT, peer over ours | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [_line(row, models) for row in rows])


def latency_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a request waited, in Markdown."""
    lines = [
        "| row | server | TTFT | ITL | end to end | output tokens/s | all tokens/s | client | reused |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for side in ("ours", "peer"):
            lines += [_latency_line(row, side)] if row["samples"][side] else []
    return "\n".join(lines)


def _line(row: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> str:
    unit, digits = (1.0, 1) if row["metric"] == "throughput" else (1000.0, 1)
    what = "output tokens/s" if row["metric"] == "throughput" else "mean TTFT, ms"
    sides = [_median(values(row["samples"][side], row["metric"]), unit, digits) for side in ("ours", "peer")]
    pairs = " ".join(f"{ratio:.2f}" for ratio in row["ratios"])
    ratio = f"{row['ratio']:.2f} ({pairs})" if row["ratios"] else "-"
    wanted = "-" if row["wanted"] is None else f"{row['wanted']:.1f}"
    p99 = p99_ratio(row) if row["p99_ttft"] else None
    cells = (
        row["key"],
        row["title"],
        f"{row['ours']['server']} {row['ours']['model']}",
        f"{row['peer']['server']} {row['peer']['model']}",
        what,
        *sides,
        ratio,
        wanted,
        "-" if p99 is None else f"{p99:.2f}",
        verdict(row, models),
    )
    return f"| {' | '.join(cells)} |"


def _latency_line(row: Mapping[str, Any], side: str) -> str:
    samples = row["samples"][side]

    def at(name: str) -> str:
        points = (statistics.median(s[name][point] * 1000 for s in samples if s[name]) for point in ("median", "p99"))
        return " / ".join(f"{point:,.0f}" for point in points) if all(s[name] for s in samples) else "-"

    def middle(name: str, digits: int = 1) -> str:
        return _median([s[name] for s in samples if s[name] is not None], 1.0, digits)

    rates = (middle("output_tokens_per_s"), middle("total_tokens_per_s"), middle("client_cores", 2))
    reused = middle("cached_prompt_tokens", 0)
    times = (at("ttft_s"), at("itl_s"), at("e2e_s"))
    return f"| {' | '.join((row['key'], row[side]['server'], *times, *rates, reused))} |"


def _median(samples: Sequence[float], unit: float, digits: int) -> str:
    return f"{statistics.median(samples) * unit:,.{digits}f}" if samples else "-"
