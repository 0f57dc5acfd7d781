"""A study of number formats as rows, a table, and a recommendation that follows from the rows.

One row is one variant: how it is stored, what it lost, and how fast it runs at each batch size. Knows records only.
The picture of the same rows is in `study_plot.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .columns import FAILED, MISSING
from .pareto import front
from .protocol import machine_sentence
from .records import BenchRecord, CompressRecord, EvalRecord, Record, as_record
from .rows import finite
from .text import amount, clean, divergence, megabytes, number, percent, quality

USUAL_KLD = 0.1
"""What a model may differ by, in nats per token, where the user names no bound."""


@dataclass(frozen=True)
class StudyRow:
    """One variant; what was not measured is None."""

    name: str
    baseline: bool = False
    format: str | None = None
    bits: float | None = None
    nbytes: int | None = None
    kld: float | None = None
    kld_p99: float | None = None
    perplexity: float | None = None
    top1: float | None = None
    decode: tuple[tuple[int, float], ...] = ()
    """Batch size and median decode speed in tokens per second, by rising batch size."""
    prefill: tuple[tuple[int, float], ...] = ()
    kv_cache: str | None = None
    """What keys and values were stored as, where that is what the variant is about."""
    kv_bytes: float | None = None
    """Of each token of context."""
    backend: str | None = None
    """What multiplied: `cpu avx512`, `reference`."""
    made_seconds: float | None = None
    made_bytes: int | None = None
    """Peak memory while it was made."""
    errors: tuple[str, ...] = ()
    """What failed, in a few words each."""

    @property
    def failed(self) -> bool:
        return bool(self.errors)

    def speed(self, batch: int) -> float | None:
        """Decode speed at this batch size."""
        return dict(self.decode).get(batch)


def study_rows(values: Iterable[Mapping[str, Any]]) -> list[StudyRow]:
    """The rows of a study's records, as it gave them: the model itself first, then by size. Raises MeasureError."""
    rows: dict[str, StudyRow] = {}
    known: dict[str, str] = {}
    for record in (as_record(value, f"record {n}") for n, value in enumerate(values, start=1)):
        name = _name(record, known)
        cache = _kv_cache(record)
        new = StudyRow(name, baseline=name not in known.values() and cache is None, kv_cache=cache)
        rows[name] = _with(rows.get(name, new), record)
    return sorted(rows.values(), key=_order)


def _order(row: StudyRow) -> tuple[bool, bool, float, str]:
    return not row.baseline, row.kv_cache is not None, math.inf if row.nbytes is None else row.nbytes, row.name


def _kv_cache(record: Record) -> str | None:
    """What keys and values were asked to be stored as; None where the backend chose."""
    cache = record.protocol.get("kv_cache")
    return None if cache in (None, "auto") else clean(str(cache))


def _name(record: Record, known: dict[str, str]) -> str:
    """The variant that a record is of, by the fingerprint or the name under which it was made."""
    cache = _kv_cache(record)
    if cache is not None:
        return f"kv-{cache}"
    model = record.model
    if isinstance(record, CompressRecord):
        name = clean(model.recipe or model.name)
        known.update({key: name for key in (model.fingerprint, model.name) if key})
        return name
    return known.get(model.fingerprint or "") or known.get(model.name) or clean(model.name)


def _with(row: StudyRow, record: Record) -> StudyRow:
    """The row with what one more record says."""
    model = record.model
    row = replace(
        row,
        format=row.format or model.format,
        bits=model.bits_per_weight if row.bits is None else row.bits,
        nbytes=model.weight_bytes if row.nbytes is None else row.nbytes,
    )
    if record.failed:
        what = {"compress": "making it", "eval": "judging it", "bench": "timing it"}[record.kind]
        return replace(row, errors=(*row.errors, clean(f"{what} failed: {record.error or 'no reason recorded'}")))
    if isinstance(record, CompressRecord):
        return replace(row, made_seconds=record.results.seconds, made_bytes=record.results.peak_rss_bytes)
    if isinstance(record, EvalRecord):
        found = record.results
        return replace(
            row,
            kld=finite(found.kld_mean),
            kld_p99=finite(found.kld_p99),
            perplexity=finite(found.perplexity),
            top1=finite(found.top1_agreement),
        )
    return _timed(row, record)


def _timed(row: StudyRow, record: BenchRecord) -> StudyRow:
    batch, found = int(record.protocol.get("batch", 1)), record.results
    decode, prefill = dict(row.decode), dict(row.prefill)
    if found.decode_tokens_per_s is not None:
        decode[batch] = found.decode_tokens_per_s.median
    if found.prefill_tokens_per_s is not None:
        prefill[batch] = found.prefill_tokens_per_s.median
    backend = clean(" ".join(part for part in (record.engine.backend, record.engine.kernels) if part)) or None
    return replace(
        row,
        decode=tuple(sorted(decode.items())),
        prefill=tuple(sorted(prefill.items())),
        kv_bytes=row.kv_bytes if found.rm_kv_bytes_per_token is None else found.rm_kv_bytes_per_token,
        backend=backend,
    )


def batches(rows: Sequence[StudyRow]) -> list[int]:
    """Every batch size that any row was timed at."""
    return sorted({batch for row in rows for batch, _ in row.decode})


def study_table(rows: Sequence[StudyRow], noun: str = "format") -> tuple[list[str], list[list[str]]]:
    """Titles and cells, as text: for a terminal or Markdown. `noun` is what a row is of."""
    sizes = batches(rows)
    titles = [noun, "bits/weight", "MB", "KLD mean", "KLD p99", "perplexity", "top-1 same"]
    titles += [f"decode t/s, batch {n}" for n in sizes] + [f"prefill t/s, batch {sizes[0]}"] * bool(sizes)
    titles += ["KV kB/token", "runs on", "made in s", "with MB"]
    return titles, [_cells(row, sizes) for row in rows]


def _cells(row: StudyRow, sizes: Sequence[int]) -> list[str]:
    def cell(value: float | None, text: Any) -> str:
        return (FAILED if row.failed else MISSING) if value is None else str(text(value))

    none = MISSING if row.baseline or row.kv_cache else None
    return [
        f"{row.name} (as it is)" if row.baseline else row.name,
        cell(row.bits, lambda v: number(v, 2)),
        cell(row.nbytes, megabytes),
        cell(row.kld, divergence),
        cell(row.kld_p99, divergence),
        cell(row.perplexity, quality),
        cell(row.top1, lambda v: f"{percent(v)}%"),
        *(cell(row.speed(n), amount) for n in sizes),
        *(cell(dict(row.prefill).get(n), amount) for n in sizes[:1]),
        cell(row.kv_bytes, lambda v: amount(v / 1e3)),
        row.backend or (FAILED if row.failed else MISSING),
        none or cell(row.made_seconds, lambda v: number(v, 0)),
        none or cell(row.made_bytes, megabytes),
    ]


def recommendation(
    rows: Sequence[StudyRow], max_bytes: int | None = None, max_kld: float | None = None, noun: str = "format"
) -> list[str]:
    """What to take, and what the numbers say against the rest: sentences. `noun` is what a row is of.

    Bounds are the user's; without any, a KL divergence of USUAL_KLD. Of what keeps to a bound on divergence alone the
    smallest is taken, to a bound on size alone the closest, to both the fastest at the smallest batch.
    """
    judged = [r for r in rows if not (r.baseline or r.kv_cache) and r.nbytes is not None and r.kld is not None]
    failures = [f"{row.name}: {error}" for row in rows for error in row.errors]
    if not judged:
        return [f"No {noun} could be judged, so nothing can be recommended.", *_caches(rows), *failures]
    bound = USUAL_KLD if max_bytes is None and max_kld is None else max_kld
    within = [r for r in judged if _fits(r, max_bytes, bound)]
    bounds = _bounds(max_bytes, bound, usual=max_bytes is None and max_kld is None)
    if within:
        pick = _pick(within, max_bytes, max_kld)
        kept = f"{len(within)} of {len(judged)} {noun}s keep to {bounds}"
        said = [_taken(pick, rows, kept), *_fastest(within, pick, rows)]
    else:
        said = [_nearest_miss(judged, max_bytes, f"None of {len(judged)} {noun}s keeps to {bounds}")]
    best = [judged[i] for i in front([(float(r.nbytes or 0), r.kld or 0.0) for r in judged], more_is_better=False)]
    said.append(f"No other is both smaller and closer than: {', '.join(r.name for r in best)}.")
    beaten = [_beaten(row, best) for row in judged if row not in best]
    return [*said, *(["Beaten: " + "; ".join(beaten) + "."] if beaten else []), *_caches(rows), *failures]


def _caches(rows: Sequence[StudyRow]) -> list[str]:
    """What smaller keys and values cost and save, over any weights."""
    base = next((row.kv_bytes for row in rows if row.baseline), None)
    said = []
    for row in rows:
        if row.kv_cache and row.kld is not None and row.kv_bytes is not None:
            share = f", {number(row.kv_bytes / base, 2)} of the usual" if base else ""
            said.append(
                f"Keys and values in {row.kv_cache}: {amount(row.kv_bytes / 1e3)} kB for each token of context{share}, "
                f"KL divergence {divergence(row.kld)} by itself."
            )
    return said


def _fits(row: StudyRow, max_bytes: int | None, max_kld: float | None) -> bool:
    small = max_bytes is None or (row.nbytes or 0) <= max_bytes
    return small and (max_kld is None or (row.kld or 0.0) <= max_kld)


def _pick(within: Sequence[StudyRow], max_bytes: int | None, max_kld: float | None) -> StudyRow:
    by_size = sorted(within, key=lambda r: (r.nbytes or 0, r.kld or 0.0))
    by_kld = sorted(within, key=lambda r: (r.kld or 0.0, r.nbytes or 0))
    if max_bytes is None:
        return by_size[0]
    if max_kld is None:
        return by_kld[0]
    return max(by_kld, key=lambda r: r.decode[0][1] if r.decode else 0.0)


def _bounds(max_bytes: int | None, max_kld: float | None, usual: bool) -> str:
    parts = [f"a KL divergence of at most {divergence(max_kld)}" if max_kld is not None else None]
    parts.append(f"at most {megabytes(max_bytes)} MB" if max_bytes is not None else None)
    return " and ".join(part for part in parts if part) + (" (the usual bound: none was given)" if usual else "")


def _taken(pick: StudyRow, rows: Sequence[StudyRow], kept: str) -> str:
    speeds = [f"{amount(v)} tokens/s at batch {n}{_against(rows, n, v)}" for n, v in pick.decode]
    return (
        f"Take {pick.name}: {megabytes(pick.nbytes or 0)} MB, {number(pick.bits or 0.0, 2)} bits per weight, "
        f"KL divergence {divergence(pick.kld or 0.0)}"
        + (f", perplexity {quality(pick.perplexity)}" if pick.perplexity is not None else "")
        + (f"; it decodes {', '.join(speeds)}" if speeds else "")
        + f". {kept}."
    )


def _against(rows: Sequence[StudyRow], batch: int, speed: float) -> str:
    """`(2.1 times the model as it is)`, where that was timed."""
    base = next((row.speed(batch) for row in rows if row.baseline), None)
    return f" ({number(speed / base, 2)} times the model as it is)" if base else ""


def _fastest(within: Sequence[StudyRow], pick: StudyRow, rows: Sequence[StudyRow]) -> list[str]:
    """Where another format within the bounds is faster than the one taken: bits alone do not decide speed."""
    said = []
    for batch in batches(rows):
        timed = [(speed, row) for row in within if (speed := row.speed(batch)) is not None]
        if not timed:
            continue
        speed, row = max(timed, key=lambda pair: pair[0])
        mine = pick.speed(batch)
        if row is not pick and mine and speed > 1.05 * mine:
            said.append(f"{row.name} at batch {batch} ({number(speed / mine, 2)} times as fast)")
    return [f"Within the same bounds, faster: {', '.join(said)}."] if said else []


def _nearest_miss(judged: Sequence[StudyRow], max_bytes: int | None, missed: str) -> str:
    closest = min(
        (r for r in judged if max_bytes is None or (r.nbytes or 0) <= max_bytes),
        key=lambda r: r.kld or 0.0,
        default=None,
    )
    near = closest or min(judged, key=lambda r: r.nbytes or 0)
    return (
        f"{missed}. The nearest is {near.name}: "
        f"{megabytes(near.nbytes or 0)} MB, KL divergence {divergence(near.kld or 0.0)}."
    )


def _beaten(row: StudyRow, best: Sequence[StudyRow]) -> str:
    """`fp4 by nf4 (as small, closer)`."""
    better = [r for r in best if (r.nbytes or 0) <= (row.nbytes or 0) and (r.kld or 0.0) <= (row.kld or 0.0)]
    winner = min(better, key=lambda r: r.kld or 0.0)
    less = 1 - (winner.nbytes or 0) / (row.nbytes or 1)
    size = f"{percent(less)}% smaller" if less >= 0.0005 else "as small"
    apart = f"KL divergence {divergence(winner.kld or 0.0)} for {divergence(row.kld or 0.0)}"
    return f"{row.name} by {winner.name} ({size}, {apart})"


def study_markdown(
    rows: Sequence[StudyRow],
    sentences: Sequence[str],
    values: Sequence[Mapping[str, Any]],
    noun: str = "format",
    title: str = "Number formats, compared",
    picture: str = "study.svg",
) -> str:
    """The whole study as a page, with the picture that lies beside it."""
    titles, cells = study_table(rows, noun)
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
    parts = [f"# {title}", *sentences[:1], f"![size and speed against divergence]({picture})"]
    parts += ["\n".join(lines), *sentences[1:], *protocol_sentences(values)]
    return "\n\n".join(parts) + "\n"


def protocol_sentences(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """How it was measured, and on what."""
    records = [as_record(value, f"record {n}") for n, value in enumerate(values, start=1)]
    evals = [r.protocol for r in records if isinstance(r, EvalRecord) and not r.failed]
    benches = [r.protocol for r in records if isinstance(r, BenchRecord) and not r.failed]
    said = []
    if evals:
        p = evals[0]
        said.append(
            clean(
                f"Quality: {p.get('corpus')} ({str(p.get('corpus_sha256'))[:8]}), {p.get('tokens_scored')} tokens "
                f"scored in {p.get('windows')} windows of {p.get('context')}, against {p.get('reference')}."
            )
        )
    if benches:
        p = benches[0]
        said.append(
            clean(
                f"Speed: prompts of {p.get('prompt_tokens')} tokens, {p.get('output_tokens')} generated for each, "
                f"median of {p.get('repetitions')} after {p.get('warmup')} warm-up; up to four models take turns."
            )
        )
    if records:
        said.append(f"Machine: {machine_sentence(records[-1].machine)}.")
    return said
