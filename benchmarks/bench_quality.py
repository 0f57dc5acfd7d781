"""Quantized models of ours beside its peers', made from the same tokens and judged by one judge in one run.

    python benchmarks/bench_quality.py [--corpus FILE] [--recipe FILE] [--only ROW,ROW] [--quick] [--write]

Peers and model files are made below the cache and --work when first asked for, which takes hours; what nothing has
changed of is used again. `--out FILE` keeps each row as soon as it is judged, and `--resume FILE` takes from there what
the same code made and judged in the same way, on another machine too. A row that fails is a row that says why. Progress
goes to stderr; to stdout go a Markdown page, a JSON line for each row, and one for the run. Exit code 1 if a row failed
or an order, comparison or target is broken.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import quality_report
import quality_rows
from gossamer.compress.recipe import CalibrationSpec
from gossamer.measure.records import machine_block
from gossamer.settings import cache_dir
from gossamer.settings import threads as default_threads
from quality_judge import TOGETHER, Judge, Judgement, Text
from quality_make import Failed, Made, Workshop
from quality_records import Records, Result
from quality_rows import Row

PAGE = Path(__file__).parent.parent / "docs" / "results" / "quality.md"
QUICK_TOKENS = 2048


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended
    args = parse_arguments()
    rows = rows_of(args)
    texts = [Text.load(source) for source in dict.fromkeys([*args.corpus, "default"])]
    spec = CalibrationSpec(source="self", sequences=args.sequences, length=args.length, seed=args.seed)
    records = Records.load(args.resume, args.out)
    kept = records.tokens_for(spec)
    shop = Workshop(args.work, args.threads, spec, args.minutes, args.iterations, kept)
    if kept is not None and not torch.equal(kept, shop.calibration.tokens):
        cache = cache_dir() / "calibration"
        sys.exit(f"{args.resume}: its rows were calibrated on other tokens than {cache} holds; move that folder away")
    records.keep_tokens(spec, shop.calibration.tokens)
    judge = Judge(shop.base, args.tokens, args.threads, args.work / "judgements.json")
    results = results_of(rows, shop, judge, texts, records, args.again)
    run = {
        "benchmark": "bench_quality",
        "command": " ".join(["python benchmarks/bench_quality.py", *shown(sys.argv[1:])]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_block(args.threads),
        "protocol": {
            **asdict(judge.plan),
            "tokens": args.tokens,
            "texts": [text.corpus.name for text in texts],
            "texts_sha256": [text.corpus.sha256 for text in texts],
            "sequences": spec.sequences,
            "length": spec.length,
            "seed": spec.seed,
            "iterations": args.iterations,
            "parameters": shop.parameters,
        },
        "comparisons": [asdict(f) for f in quality_report.comparisons(results)],
        "grids": [asdict(f) for f in quality_report.on_one_grid(results)],
        "targets": [asdict(f) for f in quality_report.targets(results)],
        "orders": [asdict(f) for f in quality_report.orders(results)],
    }
    return show(run, results, args)


def show(run: dict[str, Any], results: Sequence[Result], args: argparse.Namespace) -> int:
    """Print everything, write what was asked for, and say whether all is well."""
    text = quality_report.page({**run, "results": results})
    print(text)
    for line in [*results, run]:
        print(json.dumps(line))
    if args.write:
        PAGE.write_text(text)
    broken = [f for kind in ("comparisons", "grids", "targets", "orders") for f in run[kind] if not f["held"]]
    for finding in broken:
        say(quality_report.Finding(**finding).line())
    return int(bool(broken) or len(quality_report.good(results)) < len(results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--corpus", action="append", default=[], metavar="FILE", help="text to judge on, beside the default one")
    add("--recipe", action="append", default=[], metavar="RECIPE", help="one more of ours: a YAML file")
    add("--only", default="*", metavar="ROW,ROW", help="only these rows; `llama.cpp/*` works")
    add("--quick", action="store_true", help="a row of each road on few tokens: does it work?")
    add("--tokens", type=int, default=8192, help="tokens of each text")
    add("--sequences", type=int, default=32, help="of calibration, for every method that calibrates")
    add("--length", type=int, default=512, help="tokens of each of them")
    add("--seed", type=int, default=0)
    add("--iterations", type=int, default=40, help="of auto-round, for each block")
    add("--threads", type=int, default=default_threads())
    add("--minutes", type=float, default=150.0, help="that a row may take to be made")
    add("--work", type=Path, default=Path("runs/quality"), help="where models are put")
    add("--again", action="store_true", help="make and judge everything anew")
    add("--out", type=Path, metavar="FILE", help="append each row as a JSON line here as soon as it is judged")
    add("--resume", type=Path, metavar="FILE", help="rows of that file that nothing has changed of are not made again")
    add("--write", action="store_true", help=f"write docs/results/{PAGE.name}")
    args = parser.parse_args()
    if args.quick:
        args.tokens = min(args.tokens, QUICK_TOKENS)
    return args


def rows_of(args: argparse.Namespace) -> list[Row]:
    """The rows that were asked for; leaves if a name is none."""
    rows = [*quality_rows.CONTROLS, *quality_rows.our_rows(args.recipe), *quality_rows.PEERS]
    if args.quick:
        rows = quality_rows.chosen(rows, quality_rows.QUICK)
    try:
        return quality_rows.chosen(rows, args.only.split(","))
    except ValueError as error:
        sys.exit(str(error))


def results_of(
    rows: Sequence[Row], shop: Workshop, judge: Judge, texts: Sequence[Text], records: Records, again: bool
) -> list[Result]:
    """A result for each row; so many as one pass of the float model serves are made, judged and kept at a time."""
    identities = {row.key: identity(row, shop, judge, texts) for row in rows}
    known = {} if again else records.results
    found = {key: known[what] for key, what in identities.items() if what in known}
    missing = [row for row in rows if row.key not in found]
    for start in range(0, len(missing), TOGETHER):
        group = missing[start : start + TOGETHER]
        say(f"{len(found)} of {len(rows)} rows are done")
        made = make_all(shop, group, again)
        quality = judge_all(judge, made, texts, again)
        for row in group:
            found[row.key] = result_of(row, made[row.key], quality, shop.parameters)
            records.keep(found[row.key], identities[row.key])
    return [found[row.key] for row in rows]


def identity(row: Row, shop: Workshop, judge: Judge, texts: Sequence[Text]) -> str:
    """Hash of all that decides a row's figures but the machine, which decides only its time."""
    if row.reason is not None:
        return row.reason
    what = [shop.key_of(row), [judge.protocol(text) for text in texts]]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def make_all(shop: Workshop, rows: Sequence[Row], again: bool) -> dict[str, Made | Failed]:
    """Every row's file, or why there is none."""
    found: dict[str, Made | Failed] = {}
    for done, row in enumerate(rows):
        say(f"[{done + 1}/{len(rows)}] {row.key}")
        try:
            found[row.key] = shop.make(row, again)
        except Failed as error:
            found[row.key] = error
            say(f"  failed: {error}")
    return found


def judge_all(
    judge: Judge, made: dict[str, Made | Failed], texts: Sequence[Text], again: bool
) -> dict[str, dict[str, Judgement]]:
    """Row -> text -> figures, for every row that has a file."""
    paths = {key: Path(file.judged) for key, file in made.items() if isinstance(file, Made)}
    by_text = {text.corpus.name: judge.judge(paths, text, again, say) for text in texts}
    return {key: {text: found[key] for text, found in by_text.items()} for key in paths}


def result_of(row: Row, made: Made | Failed, quality: dict[str, dict[str, Judgement]], parameters: int) -> Result:
    """All that is known of a row, as quality_report reads it, without the folders of this machine."""
    facts = {
        "key": row.key,
        "maker": row.maker,
        "method": row.method,
        "bits": row.bits,
        "grid": row.grid,
        "act_order": row.act_order,
        "on_source_grid": row.on_source_grid,
        "options": {key: value for key, value in row.options.items() if key != "recipe"},
        "quality": quality.get(row.key, {}),
        "reason": None,
    }
    if isinstance(made, Failed):
        return {**facts, "reason": str(made)}
    figures = {key: value for key, value in asdict(made).items() if key not in ("path", "judged")}
    return {**facts, **figures, "bits_per_weight": made.stored_bytes * 8 / parameters}


def shown(words: Sequence[str]) -> list[str]:
    """The command line without the folders of this machine."""
    return [Path(word).name if "/" in word and not word.startswith("-") and "*" not in word else word for word in words]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
