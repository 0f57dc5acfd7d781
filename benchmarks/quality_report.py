"""The figures of the quality benchmark: comparisons, orders, targets, and the page. Knows no model: only numbers.

A result is a dictionary: the row's `key`, `maker`, `method`, `bits`, `grid`, `act_order` and `on_source_grid`; what was
made (`bits_per_weight`, `stored_bytes`, `seconds`, `inside_seconds`, `peak_bytes`, `foreign_cores`, `version`,
`machine`, `created`);
`quality`, from the name of a text to its figures; and `reason` where it failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

from cpu_report import QUIET
from quality_rows import FLOAT, LEARNED, LLAMA, OURS

Result = Mapping[str, Any]

CLEARLY = 0.7
"""Of a peer's divergence, at LOW_BITS and below: what counts as clearly better."""
LOW_BITS = 4
SAME_BITS = 0.005
"""Bits per weight by which two files may differ and still count as equal."""
SOURCE = (
    "SmolLM2-135M-Instruct comes as a Q4_1 GGUF file: it was **already 4-bit** (groups of 32, asymmetric) before any "
    "file here was made from it, and the float model is that file unpacked to bf16. Rows whose codes lie on that very "
    "grid are marked and take part in no comparison."
)
JUDGED = (
    "Every model is read back as float weights and judged by the same code: {tokens:,} tokens of each text in windows "
    "of {context}, the last {scored} of each scored, all activations exact, so that only the weights differ. KLD is "
    "the mean KL divergence to the float model in nats for each token. Bits per weight count every stored tensor, "
    "embedding and head included, over the {parameters:,} weights of the float model. Time and peak memory are those "
    "of the whole process that makes the file, libraries and loading counted; `inside` is what a peer's worker says of "
    "its method alone. All methods that calibrate do so on the same {sequences} x {length} tokens, which the model "
    "wrote itself; a row that says `trained on` has learned from more of such text, and only counts for the targets."
)


@dataclass(frozen=True)
class Target:
    """What the best of ours must reach with at most so many bits for a weight of the whole model."""

    bits_per_weight: float
    kld: float
    perplexity_ratio: float | None


TARGETS = (Target(4.6, 0.10, 1.08), Target(3.6, 0.30, 1.25), Target(2.6, 0.90, None))


@dataclass(frozen=True)
class Finding:
    """One statement, whether it holds, and the figures that decide it."""

    title: str
    held: bool
    figures: str

    def line(self) -> str:
        return f"{'held' if self.held else 'BROKEN'}: {self.title} ({self.figures})"


def good(results: Sequence[Result]) -> list[Result]:
    """Those that were made and could be judged on every text."""
    return [r for r in results if not r["reason"] and not any("reason" in q for q in r["quality"].values())]


def kld(result: Result, text: str) -> float:
    return float(result["quality"][text]["kld_mean"])


# Orders: what must hold of methods, whoever wrote them.


def orders(results: Sequence[Result]) -> list[Finding]:
    """Every pair of rows that an order speaks of, in the sequence of the orders."""
    found = []
    for title, better, worse, strict in _pairs(good(results)):
        found.append(_ordered(title, better, worse, strict))
    return found


def _pairs(results: Sequence[Result]) -> Iterator[tuple[str, Result, Result, bool]]:
    """(title, the row that must be no worse, the other, whether it must be better)."""
    for a, b in _within_grids(results, lambda r: r["method"] == "gptq", lambda r: r["method"] == "rtn"):
        yield "GPTQ <= RTN", a, b, False
    for a, b in _within_grids(results, lambda r: r["method"] == "awq", lambda r: r["method"] == "rtn"):
        yield "AWQ <= RTN", a, b, False
    for a, b in _within_grids(results, lambda r: r["act_order"] is True, lambda r: r["act_order"] is False):
        if a["method"] == b["method"]:
            yield "with act-order <= without", a, b, False
    low = [r for r in results if r["bits"] is not None and r["bits"] <= 3]
    for a, b in _within_grids(low, lambda r: r["method"] in LEARNED, lambda r: r["method"] == "gptq"):
        yield "learned block by block < GPTQ", a, b, True
    by_bits = sorted((r for r in results if r["maker"] == LLAMA), key=lambda r: -r["bits_per_weight"])
    for a, b in pairwise(by_bits):
        if a["bits"] > b["bits"]:
            yield "llama.cpp: more bits, less divergence", a, b, True


def _within_grids(
    results: Sequence[Result], better: Callable[[Result], bool], worse: Callable[[Result], bool]
) -> Iterator[tuple[Result, Result]]:
    """Pairs of rows with the same kind of codes; ours are compared with ours, peers with each other."""
    for a, b in product(filter(better, results), filter(worse, results)):
        if a["grid"] == b["grid"] and (a["maker"] == OURS) == (b["maker"] == OURS):
            yield a, b


def _ordered(title: str, better: Result, worse: Result, strict: bool) -> Finding:
    figures = {text: (kld(better, text), kld(worse, text)) for text in better["quality"]}
    held = all(a < b or (a == b and not strict) for a, b in figures.values())
    said = "; ".join(f"{text}: {a:.4f} and {b:.4f}" for text, (a, b) in figures.items())
    return Finding(f"{title}: {better['key']} and {worse['key']}", held, said)


# Comparisons: ours beside each peer at equal or fewer bits for a weight of the whole model.


def comparisons(results: Sequence[Result]) -> list[Finding]:
    """One finding for each peer row that was judged: the best of ours with no more bits, by the first text.

    What was trained on more text than the peers were calibrated on is left out.
    """
    return [_compared(peer, results) for peer in good(results) if peer["maker"] not in (OURS, FLOAT)]


def _compared(peer: Result, results: Sequence[Result]) -> Finding:
    limit = peer["bits_per_weight"]
    wanted = CLEARLY if peer["bits"] <= LOW_BITS else 1.0
    title = f"{peer['key']} at {limit:.2f} bits"
    best = best_of_ours([r for r in results if not trained_tokens(r)], limit)
    if best is None:
        return Finding(title, False, "nothing of ours takes so few bits")
    title += f": {best['key']} at {best['bits_per_weight']:.2f} bits, at most {wanted} of its divergence"
    return _beside(title, best, peer, wanted)


def _beside(title: str, ours: Result, peer: Result, wanted: float) -> Finding:
    """Whether ours has at most `wanted` of the peer's divergence on every text."""
    ratios = {text: kld(ours, text) / kld(peer, text) for text in peer["quality"]}
    said = "; ".join(
        f"{text}: {kld(ours, text):.4f} against {kld(peer, text):.4f}, ratio {ratio:.2f}"
        for text, ratio in ratios.items()
    )
    return Finding(title, max(ratios.values()) <= wanted, said)


def on_one_grid(results: Sequence[Result]) -> list[Finding]:
    """One finding for each peer row whose kind of codes some row of ours has: the best such one, by the first text.

    Bits spent elsewhere (embedding, head, zero points) are the same here, so that only the choice of codes differs.
    """
    ours = [r for r in good(results) if r["maker"] == OURS and r["grid"] and not trained_tokens(r)]
    found = []
    for peer in (r for r in good(results) if r["maker"] not in (OURS, FLOAT)):
        best = _least([r for r in ours if r["grid"] == peer["grid"]])
        if best is not None:
            found.append(_beside(f"{peer['key']}: {best['key']}, no more divergence", best, peer, 1.0))
    return found


def best_of_ours(results: Sequence[Result], bits_per_weight: float) -> Result | None:
    """Ours with the least divergence on the first text, with so many bits for a weight, not on the source's grid."""
    ours = [r for r in good(results) if r["maker"] == OURS and not r["on_source_grid"]]
    return _least([r for r in ours if r["bits_per_weight"] <= bits_per_weight + SAME_BITS])


def _least(results: Sequence[Result]) -> Result | None:
    """The one with the least divergence on the first text."""
    return min(results, key=lambda r: kld(r, next(iter(r["quality"]))), default=None)


def trained_tokens(result: Result) -> int | None:
    """Tokens of its own text that a row was trained on, if those are more than all others were calibrated on."""
    tokens: int | None = result["options"].get("trained_tokens")
    return tokens


def targets(results: Sequence[Result]) -> list[Finding]:
    """TARGETS on every text, each by the best of ours."""
    plain = next((r for r in good(results) if r["maker"] == FLOAT), None)
    return [] if plain is None else [_target(target, plain, results) for target in TARGETS]


def _target(target: Target, plain: Result, results: Sequence[Result]) -> Finding:
    title = f"at most {target.bits_per_weight} bits: KLD at most {target.kld}"
    if target.perplexity_ratio is not None:
        title += f", perplexity within {target.perplexity_ratio - 1:.0%}"
    best = best_of_ours(results, target.bits_per_weight)
    if best is None:
        return Finding(title, False, "nothing of ours takes so few bits")
    held, said = True, []
    for text, figures in best["quality"].items():
        ratio = figures["perplexity"] / plain["quality"][text]["perplexity"]
        held &= figures["kld_mean"] <= target.kld and ratio <= (target.perplexity_ratio or ratio)
        said.append(f"{text}: {figures['kld_mean']:.4f}, perplexity {ratio - 1:+.1%}")
    return Finding(f"{title}: {best['key']}", held, "; ".join(said))


# The page.


def page(run: Mapping[str, Any]) -> str:
    """The whole of docs/results/quality.md."""
    results, protocol = run["results"], run["protocol"]
    versions = {r["maker"]: r["version"] for r in results if r.get("version")}
    named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    parts = [
        "# Quality: our methods beside the peers'",
        f"    {run['command']}",
        f"{places(results)}; {run['machine']['threads']} threads, {run['machine']['os']}; {days(results)}. {named}.",
        SOURCE,
        JUDGED.format(**protocol),
        table(results, protocol["texts"]),
        "## At equal or fewer bits",
        f"For each peer's row the best of ours with no more bits for a weight, chosen by {protocol['texts'][0]}. "
        "Wanted: no more than the peer's divergence on every text, and at most "
        f"{CLEARLY} of it at {LOW_BITS} bits and below.",
        findings(run["comparisons"]),
        "## On the peer's own grid",
        "The same kind of codes, the same embedding and head: only how the codes were chosen differs. Wanted: the best "
        f"of ours, chosen by {protocol['texts'][0]}, has no more divergence than the peer on every text.",
        findings(run["grids"]),
        "## Targets over the whole model",
        findings(run["targets"]),
        "## Orders",
        "Of rows whose codes are of the same kind (bits, groups, zero points, embedding and head).",
        findings(run["orders"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def machines(results: Sequence[Result]) -> list[str]:
    """Where files were made, each machine once."""
    return list(dict.fromkeys(r["machine"] for r in results if r.get("machine")))


def places(results: Sequence[Result]) -> str:
    """The machine, or several by the letters that the table names them by."""
    found = machines(results)
    return found[0] if len(found) == 1 else "; ".join(f"{_letter(i)}: {name}" for i, name in enumerate(found))


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def days(results: Sequence[Result]) -> str:
    """When the files were made: the first day, and the last if it is another."""
    made = sorted({r["created"][:10] for r in results if r.get("created")})
    return " to ".join(dict.fromkeys([*made[:1], *made[-1:]]))


def findings(found: Sequence[Mapping[str, Any]]) -> str:
    """Findings as a list; a line where there are none."""
    lines = [f"- {'held' if f['held'] else '**broken**'}: {f['title']} ({f['figures']})" for f in found]
    return "\n".join(lines) or "- nothing to compare in this run"


def table(results: Sequence[Result], texts: Sequence[str]) -> str:
    """All rows, in Markdown; failed ones too, with the reason."""
    judged = [f"{column}, {text}" for text in texts for column in ("KLD", "p99", "perplexity", "top-1")]
    columns = ["row", "bits per weight", "MB", *judged, "s", "inside, s", "peak, GB", ""]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join(lines + [_line(result, texts, machines(results)) for result in results])


def _line(result: Result, texts: Sequence[str], known: Sequence[str]) -> str:
    size, peak = result.get("stored_bytes"), result.get("peak_bytes")
    cells = [result["key"], _number(result.get("bits_per_weight"), 2), _number(size and size / 1e6, 1)]
    for text in texts:
        figures = result["quality"].get(text, {})
        cells += [_number(figures.get(name), digits) for name, digits in (("kld_mean", 4), ("kld_p99", 2))]
        share = figures.get("top1_agreement")
        cells += [_number(figures.get("perplexity"), 2), "-" if share is None else f"{share:.1%}"]
    cells += [_number(result.get("seconds"), 0), _number(result.get("inside_seconds"), 0)]
    where = f"machine {_letter(known.index(result['machine']))}" if len(known) > 1 and result.get("machine") else ""
    cells += [_number(peak and peak / 1e9, 2), "; ".join(filter(None, [remark(result), where]))]
    return f"| {' | '.join(cells)} |"


def remark(result: Result) -> str:
    """Why a row failed, or what must be known to read it."""
    reasons = [result["reason"], *(q["reason"] for q in result["quality"].values() if "reason" in q)]
    why = next((reason for reason in reasons if reason), None)
    if why:
        return f"failed: {why}".replace("|", "\\|")
    foreign = result.get("foreign_cores") or 0.0
    busy = [f"others used {foreign:.1f} cores while it was made"] if foreign > QUIET else []
    trained = trained_tokens(result)
    text = [f"trained on {trained:,} tokens"] if trained else []
    return "; ".join([*(["on the source's grid"] if result["on_source_grid"] else []), *text, *busy])


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
