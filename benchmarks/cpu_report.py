"""The figures of the CPU benchmark as a table. Knows no model and no peer: only numbers and their names."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

ALREADY_4_BIT = (
    "SmolLM2-135M-Instruct comes as a Q4_1 GGUF file: it was **already 4-bit** (groups of 32, asymmetric) before any "
    "file here was made from it. Every row measures ours and the peer in turn in one run; the ratio is the median of "
    "the pairs' ratios."
)
QUIET = 0.1
"""Cores that others may use during the median pair; runtimes that spin collapse when they share a core."""
JUDGED = (
    "KL divergence is that to the float model, in nats for each token, of the weights as each file stores them, by "
    "`gossamer eval`. Ours holds the rounding of activations to 8 bits and of the KV cache to bfloat16; a peer's file "
    "is judged with exact activations, so what the peer loses by rounding them is not in its figure."
)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ratio of each pair of samples that were taken one after the other."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def verdict(result: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> str:
    """`pass`, `short`, `information` or `failed`, and what makes the comparison less than it says."""
    if result.get("reason"):
        return f"failed: {result['reason']}"
    complaints = unfair(models.get(result["ours"], {}), models.get(result["theirs"], {}))
    foreign = statistics.median(result["samples"].get("foreign_cores") or [0.0])
    if foreign > QUIET:
        complaints.append(f"others used {foreign:.1f} cores")
    if result["wanted"] is None:
        word = "information"
    else:
        word = "pass" if result["ratio"] >= result["wanted"] else "short"
    return ", but ".join([word, " and ".join(complaints)] if complaints else [word])


def unfair(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """In what our file has it easier than theirs: more bytes for a weight, or further from the float model."""
    found = []
    if ours.get("bits_per_weight") and theirs.get("bits_per_weight", ours["bits_per_weight"]) < ours["bits_per_weight"]:
        found.append("more bits per weight")
    far, near = ours.get("kld"), theirs.get("kld")
    if far is not None and near is not None and far > near:
        found.append("KL divergence is higher")
    return found


def table(results: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows, in Markdown."""
    lines = [
        "| row | work | ours | peer | ours, tokens/s | peer, tokens/s | ratio (all pairs) | wanted | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [_line(result, models) for result in results])


def model_table(models: Mapping[str, Mapping[str, Any]]) -> str:
    """What stands behind the names of the rows."""
    lines = ["| file | bits per weight | MB | KL divergence |", "|---|---|---|---|"]
    for name, facts in models.items():
        bits, size, kld = facts.get("bits_per_weight"), facts.get("weight_bytes"), facts.get("kld")
        cells = (name, _number(bits, 2), _number(size and size / 1e6, 1), _number(kld, 4))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(run: Mapping[str, Any]) -> str:
    """The whole of docs/results/cpu.md, or of cpu-avx2.md."""
    machine, versions = run["machine"], run["versions"]
    named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    protocol = run["protocol"]
    parts = [
        "# CPU: our engine beside its peers",
        f"    {run['command']}",
        f"{machine['cpu']} ({machine['isa']}), {machine['cores']} cores, {machine['os']}; {run['created'][:10]}. "
        f"{protocol['threads']} threads unless a row says another number; {protocol['rounds']} rounds; "
        f"read bandwidth {bandwidth(run['rows'])}. {named}.",
        ALREADY_4_BIT,
        table(run["rows"], run["models"]),
        "## The files",
        f"{JUDGED} The text: {protocol['corpus']}, {protocol['tokens']:,} tokens. Names that begin with `1b` are a "
        "shape with random weights, which predict nothing. A w8a8 folder has its embedding and head in bf16, and the "
        "weights between them as int8 with a scale for each row.",
        model_table(run["models"]),
    ]
    return "\n\n".join(parts) + "\n"


def bandwidth(results: Sequence[Mapping[str, Any]]) -> str:
    """What the machine's memory gave in this run."""
    samples = [s for r in results if r["peer"] == "read bandwidth" for s in r["samples"]["peer"]]
    return f"{statistics.median(samples) / 1e9:.1f} GB/s" if samples else "not measured"


def _line(result: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> str:
    peer = f"{result['peer']} {result['theirs']}".strip()
    unit = 1e9 if result["peer"] == "read bandwidth" else 1.0
    suffix = " GB/s" if unit > 1 else ""
    ours, theirs = (_median(result["samples"][side], unit, suffix) for side in ("ours", "peer"))
    pairs = " ".join(f"{r:.2f}" for r in result["ratios"])
    ratio = f"{result['ratio']:.2f} ({pairs})" if result["ratios"] else "-"
    wanted = _number(result["wanted"], 2)
    cells = (result["key"], result["title"], result["ours"], peer, ours, theirs, ratio, wanted)
    return f"| {' | '.join(cells)} | {verdict(result, models)} |"


def _median(samples: Sequence[float], unit: float, suffix: str) -> str:
    return f"{statistics.median(samples) / unit:,.1f}{suffix}" if samples else "-"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
