"""What speculation is worth: the same requests with drafts and without, in turns, and that their tokens are the same.

    python benchmarks/bench_speculation.py [--rounds N] [--only KEY,...] [--write]

SmolLM2 in bfloat16 and in 8 bits, with a 4-bit form of the same model, with itself rounded to 4 bits, and with prompt
look-up; and a shape of a billion random weights, whose answer to a prompt that repeats itself goes round in circles.
Each row is judged by the median of its pairs' ratios, and the switch must keep every row above 0.97. Prompts are
questions as people ask them. The last line is one JSON object; --write puts the table into docs/results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpu_models
from gossamer.checkpoint import open_checkpoint
from gossamer.engine.build import build_engine
from gossamer.engine.engine import Engine, EngineOptions
from gossamer.engine.params import SamplingParams
from gossamer.engine.sequence import Output
from gossamer.measure.records import machine_block
from gossamer.settings import threads

TABLE = Path(__file__).parents[1] / "docs" / "results" / "speculation.md"
LEAST = 0.97
"""What the automatic switch must keep of the speed without drafts."""
PROMPTS = (
    "Why is the sky blue?",
    "Write a Python function that adds two numbers, with a docstring and three examples.",
    "Repeat this list three times: apple, banana, cherry, date, elderberry, fig, grape.",
    "Translate to French: The weather is nice today, and we are going to the park.",
    "Explain in three paragraphs how bread is baked.",
    "Count from 1 to 60.",
)
OUTPUT = 160


@dataclass(frozen=True)
class Row:
    """One comparison: a model, what drafts for it (`ngram`, `self`, or one of cpu_models.py), and how it samples."""

    key: str
    target: str
    draft: str
    temperature: float = 0.0
    repeating: bool = False
    """True: one prompt of random tokens that repeats itself, instead of questions."""


ROWS = (
    Row("bf16-int4", "bf16", "int4"),
    Row("bf16-int4-sampled", "bf16", "int4", 0.8),
    Row("bf16-self", "bf16", "self"),
    Row("bf16-ngram", "bf16", "ngram"),
    Row("int8-int4", "int8", "int4"),
    Row("int8-self", "int8", "self"),
    Row("int8-ngram", "int8", "ngram"),
    Row("1b-int4", "1b-bf16", "1b-int4", repeating=True),
    Row("1b-self", "1b-bf16", "self", repeating=True),
    Row("1b-ngram", "1b-bf16", "ngram", repeating=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="keys of rows, separated by commas")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    args = parser.parse_args()
    wanted = ROWS if args.only is None else tuple(r for r in ROWS if r.key in args.only.split(","))
    found = []
    for row in wanted:
        print(f"{row.key}: loading", file=sys.stderr, flush=True)
        found.append(measure(row, args.rounds))
        print(line(found[-1]), flush=True)
    if args.write:
        TABLE.write_text(page(found, args.rounds))
    print(json.dumps({"benchmark": "speculation", "machine": machine_block(), "rows": found}))


def measure(row: Row, rounds: int) -> dict[str, Any]:
    """Both ways in turns, over every prompt, after one round that nobody counts."""
    draft = row.draft if row.draft in ("ngram", "self") else str(cpu_models.path_of(row.draft))
    engine = build_engine(
        open_checkpoint(cpu_models.path_of(row.target)),
        EngineOptions(kv_memory=1 << 30, prefix_reuse=False),
        draft=draft,
    )
    speculator = engine.speculator
    assert speculator is not None
    prompts = [repeating_prompt()] if row.repeating else [
        engine.tokenizer.chat([{"role": "user", "content": text}]) for text in PROMPTS
    ]  # fmt: skip
    pairs: list[tuple[float, float]] = []
    same = 0
    for at in range(rounds + 1):
        for number, prompt in enumerate(prompts):
            params = SamplingParams(OUTPUT, row.temperature, seed=number, ignore_eos=row.repeating)
            engine.speculator = None
            tokens, seconds = answer(engine, prompt, params)
            engine.speculator = speculator
            drafted, drafted_seconds = answer(engine, prompt, params)
            same += tokens == drafted
            if at:
                pairs.append((len(tokens) / seconds, len(tokens) / drafted_seconds))
    ratios = [b / a for a, b in pairs]
    return {
        "row": row.key,
        "target": row.target,
        "draft": row.draft,
        "temperature": row.temperature,
        "plain": round(statistics.median(a for a, _ in pairs), 1),
        "drafted": round(statistics.median(b for _, b in pairs), 1),
        "ratio": round(statistics.median(ratios), 3),
        "least": round(min(statistics.median(ratios[i :: len(prompts)]) for i in range(len(prompts))), 3),
        "acceptance": speculator.acceptance_rate,
        "same": same == len(prompts) * (rounds + 1),
        "answers": len(prompts) * (rounds + 1),
        "ratios": [round(r, 3) for r in ratios],
    }


def answer(engine: Engine, prompt: list[int], params: SamplingParams) -> tuple[list[int], float]:
    """Tokens of an answer, and the seconds from the request to its end."""
    began = time.perf_counter()
    engine.add("request", prompt, params)
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
    return [token.id for output in outputs for token in output.tokens], time.perf_counter() - began


def repeating_prompt() -> list[int]:
    """Forty tokens, six times over."""
    return [1000 + 37 * i for i in range(40)] * 6


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    rate = found["acceptance"]
    return (
        f"| {found['target']} | {found['draft']} | {found['temperature']:g} | {found['plain']:,} | {found['drafted']:,}"
        f" | {found['ratio']:.2f} | {found['least']:.2f} | {'-' if rate is None else f'{rate:.0%}'}"
        f" | {'yes' if found['same'] else 'no'} |"
    )


PAGE = """# What speculation is worth

    python benchmarks/bench_speculation.py --write --rounds {rounds}

{cpu}, {threads} threads; one request at a time, {output} tokens at most, the prompt's time included; {rounds} rounds
of every prompt both ways in turns, the ratio is the median of the pairs'. *Worst prompt*: the median of the prompt that
gains least. *Same tokens*: every answer with drafts is the answer without them, token by token.

SmolLM2-135M-Instruct comes as a Q4_1 GGUF file: it was **already 4-bit** before any file here was made from it. `int4`
is its 4-bit form by GPTQ, `self` the model itself rounded to 4 bits as it is loaded, `ngram` prompt look-up. Names that
begin with `1b` are a shape with random weights, whose prompt repeats itself.

| model | draft | temperature | tokens/s | with drafts | ratio | worst prompt | accepted | same tokens |
|---|---|---|---|---|---|---|---|---|
{rows}
"""


def page(rows: list[dict[str, Any]], rounds: int) -> str:
    """The document."""
    table = "\n".join(map(line, rows))
    cpu = machine_block()["cpu"]
    return PAGE.format(rounds=rounds, cpu=cpu, threads=threads(), output=OUTPUT, rows=table)


if __name__ == "__main__":
    main()
