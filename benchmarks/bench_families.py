"""Do the survey's orders of pruning and quantization hold in the OPT and BLOOM families? LLaMA stands beside them.

    python benchmarks/bench_families.py [--only FAMILY,FAMILY] [--tokens N] [--write]

A tiny model of each family is trained (`train_tiny.py`), then each row is made of it, judged beside it on the default
text and timed. Methods that calibrate do so on text that the models learned from, which is not the judged one. Models
are made below the cache when first asked for; with one thread, training takes about four minutes of CPU for each. A row
that a family cannot have is listed with the reason. Progress goes to stderr, the page to stdout; the last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path
from typing import Any

import torch

import train_tiny
from cpu_rows import DECODE
from engine_worker import seconds_of
from gossamer.checkpoint import Checkpoint, open_checkpoint
from gossamer.compress.calibration import calibrate
from gossamer.compress.pipeline import compress
from gossamer.compress.recipe import CalibrationSpec, parse_recipe
from gossamer.engine.backend import choose
from gossamer.errors import CompressionError
from gossamer.measure.corpus import load_corpus
from gossamer.measure.plans import WindowPlan
from gossamer.measure.records import machine_block
from gossamer.measure.run import EvalRequest, evaluate_models
from gossamer.settings import cache_dir, threads

PAGE = Path(__file__).parent.parent / "docs" / "results" / "families.md"
FAMILIES = ("opt", "bloom", "llama")
SIZE, SCHEDULE = train_tiny.Size(), train_tiny.Schedule()
WINDOWS = WindowPlan(context=SIZE.context, stride=SIZE.context, scored=SIZE.context // 2)
ROUNDS = 5
SEQUENCES = 64
"""Of SIZE.context tokens, for every method that calibrates."""
STRUCTURED = ("wanda-sp", "flap", "llm-pruner")
Stage = Mapping[str, Any]


def _grid(bits: int) -> dict[str, Any]:
    return {"bits": bits, "group_size": "channel" if bits == 8 else 64}


ROWS: dict[str, Stage] = {
    **{f"{method}-20": {"method": method, "ratio": 0.2} for method in STRUCTURED},
    **{f"{method}-20-ffn": {"method": method, "ratio": 0.2, "heads": "keep"} for method in STRUCTURED},
    "flap-20-ffn-even": {"method": "flap", "ratio": 0.2, "heads": "keep", "uniform": True},
    **{f"{method}-50": {"method": method, "sparsity": 0.5} for method in ("magnitude", "wanda", "sparsegpt")},
    **{
        f"{method}-{bits}": {"method": method, **_grid(bits)} for bits in (8, 4, 3) for method in ("rtn", "gptq", "awq")
    },
    "nf4": {"method": "rtn", "format": "nf4", "group_size": 64},
    "llm-int8": {"method": "llm-int8"},
    "smoothquant-8": {"method": "smoothquant"},
    "slicegpt-20": {"method": "slicegpt", "ratio": 0.2},
}
"""Name -> the one stage; embedding and head stay in float.

`ffn`: heads stay, and as much goes from channels alone. `even`: from every layer alike, as Wanda-SP cuts.
"""


@dataclass(frozen=True)
class Order:
    """What the survey and the papers found: `less` diverges less than `factor` times as much as `more`."""

    title: str
    less: str
    more: str
    factor: float = 1.0
    mutual: bool = False
    """And the other way round."""

    def holds(self, kld: Mapping[str, float]) -> bool | None:
        """None if a row is not there."""
        if not {self.less, self.more} <= kld.keys():
            return None
        less, more = kld[self.less], kld[self.more]
        return less < self.factor * more and (not self.mutual or more < self.factor * less)


ORDERS = (
    Order("FLAP < Wanda-SP", "flap-20", "wanda-sp-20"),
    Order("FLAP < LLM-Pruner", "flap-20", "llm-pruner-20"),
    Order("LLM-Pruner < Wanda-SP", "llm-pruner-20", "wanda-sp-20"),
    Order("FLAP < Wanda-SP, channels alone", "flap-20-ffn", "wanda-sp-20-ffn"),
    Order("FLAP < LLM-Pruner, channels alone", "flap-20-ffn", "llm-pruner-20-ffn"),
    Order("LLM-Pruner < Wanda-SP, channels alone", "llm-pruner-20-ffn", "wanda-sp-20-ffn"),
    Order("FLAP < Wanda-SP, channels alone, layers alike", "flap-20-ffn-even", "wanda-sp-20-ffn"),
    Order("SparseGPT < Wanda", "sparsegpt-50", "wanda-50"),
    Order("Wanda < magnitude", "wanda-50", "magnitude-50"),
    Order("Wanda < half of magnitude", "wanda-50", "magnitude-50", 0.5),
    Order("SparseGPT < half of magnitude", "sparsegpt-50", "magnitude-50", 0.5),
    Order("SparseGPT and Wanda within a quarter", "sparsegpt-50", "wanda-50", 1.25, mutual=True),
    Order("GPTQ < RTN, 3 bits", "gptq-3", "rtn-3"),
    Order("AWQ < RTN, 3 bits", "awq-3", "rtn-3"),
    Order("GPTQ < RTN, 4 bits", "gptq-4", "rtn-4"),
    Order("AWQ < RTN, 4 bits", "awq-4", "rtn-4"),
    Order("GPTQ < RTN, 8 bits", "gptq-8", "rtn-8"),
    Order("NF4 < RTN, 4 bits", "nf4", "rtn-4"),
    Order("RTN: 4 bits < half of 3 bits", "rtn-4", "rtn-3", 0.5),
    Order("LLM.int8 < a tenth of RTN, 4 bits", "llm-int8", "rtn-4", 0.1),
    Order("SmoothQuant < a tenth of RTN, 4 bits", "smoothquant-8", "rtn-4", 0.1),
)
PROTOCOL = """{cpu} ({isa}), {threads} thread(s). No trained model of these families is at hand here, so each is a tiny
one ({layers} layers, {hidden_size} wide, {heads} heads, {vocab_size} tokens) that `train_tiny.py` trained from random
weights, all by the same {steps} steps on the docstrings of Python's standard library. They tell how methods meet an
architecture; what a model of billions of weights loses, and whether it has outliers, they do not tell. One seed: a
small difference is none. Methods that calibrate do so on {sequences} x {context} tokens of that text. Judged is the
default text, {corpus}, another and a harder one: the last {scored} tokens of each window of {context}, of
{tokens:,} in all. Embedding and head stay in bfloat16. Activations are what our engine makes them: rounded to 8 bits
before they meet packed integers. Decoding is one sequence of {output} tokens, the median of {rounds} rounds in turns;
others may have used the machine meanwhile. Names end in the share that goes (`ffn`: from the channels of feed-forward
networks alone, heads stay; `even`: from every layer alike) or in bits; groups have 64 weights, at 8 bits a row.
GPTQ and SparseGPT zero weights whose inputs are zero in all of the calibration, such as units of OPT's ReLU that do not
fire there: SparseGPT's file is smaller for it, and where another text fires them, it may cost."""


@dataclass(frozen=True)
class Found:
    """All that is known of a family."""

    family: str
    training: Mapping[str, float]
    records: Mapping[str, dict[str, Any]]
    """Row -> how it was judged; `baseline` is the model itself."""
    speeds: Mapping[str, float]
    """Row -> tokens decoded in a second."""
    refused: Mapping[str, str]
    """Row -> why it is not made."""

    @property
    def kld(self) -> dict[str, float]:
        """Row -> mean KL divergence from the baseline, of those that could be judged."""
        return {row: r["results"]["kld_mean"] for row, r in self.records.items() if r["status"] == "ok"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(FAMILIES), metavar="FAMILY,FAMILY")
    parser.add_argument("--tokens", type=int, default=10240, help="of the default text, to judge on")
    parser.add_argument("--write", action="store_true", help=f"write docs/results/{PAGE.name}")
    args = parser.parse_args()
    torch.set_num_threads(threads())
    text = train_tiny.docstrings()
    found = [measured(family, text, args.tokens) for family in args.only]
    written = page(found, args.tokens)
    print(written)
    if args.write:
        PAGE.write_text(written)
    families = [{"family": f.family, "training": f.training, "kld": f.kld, "decode": f.speeds} for f in found]
    print(json.dumps({"benchmark": "bench_families", "machine": machine_block(), "families": families}))
    return int(any(record["status"] == "failed" for f in found for record in f.records.values()))


def measured(family: str, text: train_tiny.Text, tokens: int) -> Found:
    """Every row of a family: made, judged and timed."""
    base = trained(family, text)
    made, refused = compressed(open_checkpoint(base), text)
    models = {"baseline": base, **made}
    request = EvalRequest("default", load_corpus("default"), WINDOWS, reference=str(base), tokens=tokens, samples=0)
    records = evaluate_models([*map(str, models.values())], request, said)
    training = json.loads((base / train_tiny.RECORD).read_text())
    return Found(family, training, dict(zip(models, records, strict=True)), decoded(models), refused)


def trained(family: str, text: train_tiny.Text) -> Path:
    """The family's model, trained when it is first asked for."""
    key = json.dumps([asdict(SIZE), asdict(SCHEDULE), asdict(text)])
    folder = cache_dir("bench") / f"tiny-{family}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    if not folder.exists():
        print(f"training {folder}", file=sys.stderr, flush=True)
        train_tiny.train(family, folder, text, SIZE, SCHEDULE)
    return folder


def compressed(checkpoint: Checkpoint, text: train_tiny.Text) -> tuple[dict[str, Path], dict[str, str]]:
    """Row -> folder beside the model, and row -> reason for those that this family cannot have."""
    made, refused = dict[str, Path](), dict[str, str]()
    folder = Path(f"{checkpoint.path}-rows")
    folder.mkdir(exist_ok=True)
    (file := folder / "learned.txt").write_text("\n".join(text.learned), encoding="utf-8")
    spec = CalibrationSpec(source=str(file), sequences=SEQUENCES, length=SIZE.context)
    calibration = calibrate(spec, checkpoint, None)
    for done, (row, stage) in enumerate(ROWS.items()):
        recipe = parse_recipe({"version": 1, "name": row, "calibration": spec.model_dump(), "stages": [stage]}, row)
        key = hashlib.sha256(json.dumps(recipe.canonical(), sort_keys=True).encode()).hexdigest()[:8]
        said(f"{row},", done, len(ROWS))
        try:
            compress(checkpoint, recipe, folder / f"{row}-{key}", calibration, restart=True)
            made[row] = folder / f"{row}-{key}"
        except CompressionError as error:
            refused[row] = f"{error.message} ({error.hint})" if error.hint else error.message
    return made, refused


def decoded(models: Mapping[str, Path]) -> dict[str, float]:
    """Tokens decoded in a second by each model; all are loaded and take turns."""
    backends = {row: choose(open_checkpoint(path)) for row, path in models.items()}
    seconds = dict[str, list[float]]({row: [] for row in backends})
    for done in range(ROUNDS):
        said("timing", done, ROUNDS)
        for row, backend in backends.items():
            seconds[row].append(seconds_of(backend, SIZE.vocab_size, DECODE))
    return {row: DECODE.output / statistics.median(times) for row, times in seconds.items()}


def said(label: str, done: int, total: int) -> None:
    print(f"\r{label} {done} of {total}    ", end="", file=sys.stderr, flush=True)


# The page.


def page(found: Sequence[Found], tokens: int) -> str:
    command = " ".join(["python benchmarks/bench_families.py", *sys.argv[1:]])
    facts = machine_block() | asdict(SIZE) | asdict(SCHEDULE) | asdict(WINDOWS)
    facts |= {"sequences": SEQUENCES, "tokens": tokens, "rounds": ROUNDS, "output": DECODE.output}
    parts = [
        "# The survey's rows in other families",
        f"    {command}",
        PROTOCOL.format(**facts, corpus=load_corpus("default").name),
        training_table(found),
        "## Orders",
        "\n".join(sentences(found)),
        orders_table(found),
        "Each cell has the mean KL divergence from the model before compression, of the first row and of the second.",
        *(part for f in found for part in (f"## {f.family}", rows_table(f), refusals(f)) if part),
    ]
    return "\n\n".join(parts) + "\n"


def training_table(found: Sequence[Found]) -> str:
    """What training came to, beside what the frequencies of tokens alone would give."""
    lines = ["| family | parameters | tokens seen | CPU s | perplexity, held-out docstrings | unigram model there |"]
    lines.append("|---|" + "---:|" * 5)
    for f in found:
        t = f.training
        figures = f"{t['parameters']:,} | {t['tokens']:,} | {t['cpu_seconds']:.0f} | {exp(t['validation']):.1f}"
        lines.append(f"| {f.family} | {figures} | {exp(t['unigram']):.1f} |")
    return "\n".join(lines)


def sentences(found: Sequence[Found]) -> list[str]:
    """Which orders hold everywhere, nowhere, and where one does not."""
    verdicts = {order.title: {f.family: order.holds(f.kld) for f in found} for order in ORDERS}
    everywhere = [title for title, by in verdicts.items() if all(by.values())]
    nowhere = [title for title, by in verdicts.items() if all(held is False for held in by.values())]
    lines = [f"- In all of {', '.join(f.family for f in found)}: {listed(everywhere)}."]
    lines += [f"- In none of them: {listed(nowhere)}."] if nowhere else []
    for f in found:
        mixed = [title for title, by in verdicts.items() if by[f.family] is False and title not in nowhere]
        lines += [f"- Not in {f.family}, but in another: {listed(mixed)}."] if mixed else []
    return lines


def listed(titles: Sequence[str]) -> str:
    return "; ".join(titles) or "none"


def orders_table(found: Sequence[Found]) -> str:
    lines = [f"| order | {' | '.join(f.family for f in found)} |", "|---|" + "---|" * len(found)]
    lines += [f"| {order.title} | {' | '.join(verdict(order, f.kld) for f in found)} |" for order in ORDERS]
    return "\n".join(lines)


def verdict(order: Order, kld: Mapping[str, float]) -> str:
    """The figures of an order, and whether it holds."""
    held = order.holds(kld)
    if held is None:
        return "-"
    figures = f"{kld[order.less]:.3g} and {kld[order.more]:.3g}"
    return f"holds: {figures}" if held else f"**not**: {figures}"


def rows_table(found: Found) -> str:
    """All rows of a family that were made."""
    columns = ("row", "bits per weight", "MB", "perplexity", "KLD", "p99", "KLD activations", "top-1", "decode tok/s")
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for row, record in found.records.items():
        model, results = record["model"], record["results"]
        cells = [row, f"{model['bits_per_weight']:.2f}", f"{model['weight_bytes'] / 1e6:.2f}"]
        if record["status"] == "ok":
            activations = results["activation_kld"]
            cells += [f"{results['perplexity']:.2f}", f"{results['kld_mean']:.3g}", f"{results['kld_p99']:.3f}"]
            cells += ["-" if activations is None else f"{activations:.4f}", f"{results['top1_agreement']:.1%}"]
        else:
            cells += [f"failed: {record['error']}", *"----"]
        lines.append(f"| {' | '.join([*cells, f'{found.speeds[row]:,.0f}'])} |")
    return "\n".join(lines)


def refusals(found: Found) -> str:
    return "\n".join(f"- {row} is refused: {reason}." for row, reason in found.refused.items())


if __name__ == "__main__":
    sys.exit(main())
