"""Made result records for the report's tests: shaped as the schema says, numbers invented."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

Record = dict[str, Any]
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>&amp;|`*"

BASE: Record = {
    "schema": 1,
    "status": "ok",
    "error": None,
    "created": "2026-03-01T10:00:00+00:00",
    "engine": {"name": "gossamer", "backend": "reference", "version": "0.1.0", "dtype": "float32"},
    "machine": {"cpu": "Example CPU", "isa": "avx2", "cores": 2, "threads": 2, "memory_bytes": 8_000_000_000,
                "os": "Linux 6.1", "python": "3.11.9", "torch": "2.13.0"},
}  # fmt: skip
EVAL_PROTOCOL = {"corpus": "pydoc-topics", "corpus_sha256": "c0ffee00" * 8, "context": 1024, "stride": 1024,
                 "scored": 512, "windows": 40, "tokens_scored": 20480, "reference": "smollm2",
                 "reference_fingerprint": "f-smollm2", "threads": 2}  # fmt: skip
BENCH_PROTOCOL = {"prompt_tokens": 128, "output_tokens": 128, "batch": 1, "repetitions": 5, "warmup": 1, "threads": 2}


def model(name: str, size_mb: float = 100, recipe: str | None = None, **extra: Any) -> Record:
    """A model block; compressed if it has a recipe."""
    block = {"name": name, "path": f"models/{name}", "fingerprint": f"f-{name}", "base": "smollm2" if recipe else None,
             "recipe": recipe, "note": None, "parameters": 134_515_008, "weight_bytes": int(size_mb * 1e6),
             "bits_per_weight": size_mb * 8e6 / 134_515_008}  # fmt: skip
    return {**block, **extra}


def record(kind: str, of: Record, protocol: Record, results: Record, **extra: Any) -> Record:
    """One record of this kind; `extra` replaces whole blocks."""
    return copy.deepcopy({**BASE, "kind": kind, "model": of, "protocol": protocol, "results": results, **extra})


def evaluation(of: Record, perplexity: float = 12.0, kld: float | None = None, top1: float | None = None,
               samples: list[Record] | None = None, protocol: Record | None = None,
               **extra: Any) -> Record:  # fmt: skip
    """An eval record; without a divergence it is one without reference."""
    compared = {} if kld is not None else {"reference": None, "reference_fingerprint": None}
    results = {"perplexity": perplexity, "nll": math.log(perplexity), "kld_mean": kld,
               "kld_p99": None if kld is None else kld * 12, "top1_agreement": top1, "seconds": 10.0,
               "activation_kld": None if kld is None else 0.00321,
               "tokens_per_second": 2000.0, "samples": samples or []}  # fmt: skip
    return record("eval", of, {**EVAL_PROTOCOL, **compared, **(protocol or {})}, results, **extra)


def bench(of: Record, decode: float = 30.0, protocol: Record | None = None, **extra: Any) -> Record:
    """A bench record whose other numbers follow from the decode speed."""

    def spread(value: float) -> Record:
        return {"median": value, "min": value * 0.97, "max": value * 1.02, "samples": [value]}

    weights = of["weight_bytes"]
    results = {"wm_bytes": weights, "rm_weights_bytes": weights, "rm_kv_bytes_per_token": 46080,
               "rm_peak_bytes": weights + 190_000_000, "rm_reserved_bytes": 26_500_000, "bare_bytes": 150_000_000,
               "prefill_tokens_per_s": spread(decode * 9), "decode_tokens_per_s": spread(decode),
               "ttft_s": spread(14 / decode), "load_s": 0.4}  # fmt: skip
    return record("bench", of, {**BENCH_PROTOCOL, **(protocol or {})}, results, **extra)


def compression(of: Record, level: float = 0.02, kind: str = "output", blocks: int = 30, **extra: Any) -> Record:
    """A compress record with an error for each linear of each block."""
    scale = {"q": 0.8, "k": 0.7, "v": 1.3, "o": 1.1, "gate": 0.9, "up": 1.0, "down": 2.2}
    layers = [
        {"block": block, "linear": linear, "format": "int4-g64-sym", "bits_per_weight": 4.25,
         "relative_error": level * factor * (1 + 4 * math.exp(-block / 2) + 0.35 * math.sin(3.1 * block + 7 * factor))}
        for block in range(blocks) for linear, factor in scale.items()
    ]  # fmt: skip
    results = {"seconds": 120.0, "peak_rss_bytes": 900_000_000, "error_kind": kind, "layers": layers}
    return record("compress", of, {}, results, **extra)


def failed(of_record: Record, error: str) -> Record:
    """The same record, failed: it keeps everything but its results."""
    return {**of_record, "status": "failed", "error": error, "results": {}}


def write(path: Path, *records: Record) -> Path:
    """The records as a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def study() -> list[Record]:
    """A whole study: a baseline, six recipes of which one failed."""
    prompts = ("Why is the sky blue?", "Write one sentence about rain.")
    said = (
        "The sky appears blue because molecules in the air scatter short wavelengths of sunlight more than long ones. "
        "This is called Rayleigh scattering, and it sends blue light to our eyes from every direction.",
        "Rain falls softly on the roof, and the garden drinks what the clouds no longer hold.",
    )
    changed = {
        "int8": said,
        "int4-gptq": (said[0].replace("and it sends blue light", "which spreads the blue part"), said[1]),
        "int4-rtn": (said[0].replace("short wavelengths", "the blue light"), said[1].replace("softly on", "gently")),
        "int3-gptq": (said[0].replace("because molecules in the air", "as the ocean reflects"), said[1][:31]),
        "prune-20": ("The sky is blue because it is blue because it is the colour of the sky.", "Rain is rain."),
    }
    smollm2 = model("smollm2", 145.3, note="baseline is already 4-bit (Q4_1 GGUF)")
    answers = [{"prompt": p, "output": o} for p, o in zip(prompts, said, strict=True)]
    records = [evaluation(smollm2, 13.21, samples=answers), bench(smollm2, 41.3)]
    for name, size, perplexity, kld, top1, decode, level in (
        ("int8", 136.9, 13.24, 0.0021, 0.985, 52.2, 0.004),
        ("int4-gptq", 84.1, 14.02, 0.061, 0.913, 74.5, 0.03),
        ("int4-rtn", 84.1, 15.77, 0.187, 0.842, 75.2, 0.05),
        ("int3-gptq", 68.0, 22.9, 0.55, 0.701, 71.0, 0.11),
        ("prune-20", 118.0, 31.4, 0.92, 0.624, 48.9, 0.2),
    ):
        made = model(name, size, recipe=name)
        answers = [{"prompt": p, "output": o} for p, o in zip(prompts, changed[name], strict=True)]
        records += [evaluation(made, perplexity, kld, top1, answers), bench(made, decode)]
        if name != "prune-20":
            records.append(compression(made, level, "weight" if name == "int4-rtn" else "output"))
    broken = model("int2-kmeans", 51.0, recipe="int2-kmeans")
    return [*records, failed(evaluation(broken, 99, 3.1, 0.2), "NaN in block 3 down"), bench(broken, 66.0)]
