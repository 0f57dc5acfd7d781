"""One model in every engine that can be had here: memory, speed in batches, and perplexity, by one protocol.

    python benchmarks/bench_engines.py [--batch 1,8] [--repetitions N] [--engines NAME,NAME] [--write]

SmolLM2 as each engine reads it: bfloat16 in a Hugging Face folder, Q8_0 and Q4_0 in GGUF files, 8 and 4 bits of ours.
Engines and files are made below the cache when first asked for. It is `gossamer bench --engine ...` with the rows left
out whose engine does not open such a file; all others take turns. Progress goes to stderr, the table to stdout.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cpu_models
import peers
from gossamer import report
from gossamer.measure.corpus import load_corpus
from gossamer.measure.engines.peers import OURS, PEERS
from gossamer.measure.plans import SpeedPlan, WindowPlan
from gossamer.measure.records import append_record
from gossamer.measure.run import EvalRequest, bench_models

PAGE = Path(__file__).parent.parent / "docs" / "results" / "engines.md"
OWN = ("int8", "int4")
"""In a layout of ours, which no other engine reads."""
MODELS = ("bf16", "q8_0", "q4_0", *OWN)
ENVIRONMENT = {"llama.cpp": "llama-cpp-python"}
"""Engine -> its environment in peers.py, where that has another name."""


def main() -> int:
    args = parse_arguments()
    for engine in args.engines:
        if engine != OURS:
            os.environ.setdefault(PEERS[engine].variable, str(peers.python_of(ENVIRONMENT.get(engine, engine))))
    models = [str(cpu_models.path_of(name)) for name in MODELS]
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        for record in measured(models, args):
            append_record(records, record)
        rows = report.load([records])
    text = page(report.to_markdown(rows))
    print(text)
    if args.write:
        PAGE.write_text(text)
    return int(any(row.failed for row in rows))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--perplexity", type=int, default=4096, help="tokens of the default text; 0: not judged")
    parser.add_argument("--engines", type=lambda text: text.split(","), default=[OURS, *PEERS])
    parser.add_argument("--write", action="store_true", help=f"write docs/results/{PAGE.name}")
    return parser.parse_args()


def measured(models: list[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The records of every model in every engine that opens it."""
    own = [str(cpu_models.path_of(name)) for name in OWN]
    for i, batch in enumerate(args.batch):
        plan = SpeedPlan(args.prompt_tokens, args.output_tokens, batch, args.repetitions, warmup=1)
        text = None
        if args.perplexity and i == 0:  # once is enough
            windows = WindowPlan(context=1024, stride=1024, scored=512)
            text = EvalRequest("default", load_corpus("default"), windows, tokens=args.perplexity, samples=0)
        for record in bench_models(models, plan, said, engines=args.engines, judged=text):
            another = record["engine"]["name"] != OURS and record["model"]["path"] in own
            if not another and not (record["error"] or "").startswith("UnsupportedModel"):
                yield record


def said(label: str, done: int, total: int) -> None:
    print(f"\r{label} {done} of {total}    ", end="", file=sys.stderr, flush=True)


def page(table: str) -> str:
    command = " ".join(["python benchmarks/bench_engines.py", *sys.argv[1:]])
    return f"""# One model, every engine

    {command}

SmolLM2-135M-Instruct comes as a Q4_1 GGUF file: it was **already 4-bit** before any file here was made from it, and
what is called bf16 are the numbers of that file. Each engine has a process and a Python of its own, gets the same
token ids, and takes turns with the others; a row stands where an engine opens the file. Perplexity is each engine's
own, of the same windows of the default text: where two engines read the same weights, it should be the same to the
third digit.

{table}"""


if __name__ == "__main__":
    sys.exit(main())
