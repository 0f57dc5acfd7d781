"""The model card of an artifact: README.md, as the hub shows it, from its manifest and from result records.

Says what it was made from, by which recipe, which files it has, and what was measured on which machine. Everything in
it comes from files, which may be a stranger's: text stands in code spans that it cannot end. Knows no tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError
from .atomic import write_file
from .manifest import Manifest

FILE_NAME = "README.md"
LONGEST = 200
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_card(folder: Path, manifest: Manifest, results: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write README.md into an artifact's folder. `results`: eval and bench records of this model."""
    path = folder / FILE_NAME
    write_file(path, card(folder.resolve().name, manifest, results).encode())
    return path


def card(name: str, manifest: Manifest, results: Sequence[Mapping[str, Any]] = ()) -> str:
    """The text of the card. The same manifest and records give the same text."""
    front = yaml.safe_dump(_front_matter(name, manifest, results), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{front}---", f"# {_code(name)}", _origin(manifest), _usage(), *_recipe(manifest)]
    parts += [*_measured(results), _files(manifest)]
    return "\n\n".join(parts) + "\n"


def records_of(path: Path, fingerprints: Iterable[str]) -> list[dict[str, Any]]:
    """The finished eval and bench records of a model in a .jsonl file. Raises UsageError if there is none."""
    known, found = set(fingerprints), []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            record = json.loads(line) if line.strip() else {}
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is no record")
            model = record.get("model")
            if isinstance(model, dict) and model.get("fingerprint") in known and record.get("status") == "ok":
                found.append(record)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: no result records: {error}") from error
    wanted = [record for record in found if record.get("kind") in ("eval", "bench")]
    if not wanted:
        raise UsageError(f"{path}: no finished record of this model", hint="gossamer eval and bench write them")
    return wanted


def _front_matter(name: str, manifest: Manifest, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the hub reads."""
    recipe = manifest.recipe.get("name")
    found: dict[str, Any] = {"library_name": "gossamer", "pipeline_tag": "text-generation"}
    if _HUB_ID.fullmatch(manifest.base.name):
        found |= {"base_model": manifest.base.name, "base_model_relation": "quantized"}
    found["tags"] = ["gossamer", *([str(recipe)[:LONGEST]] if recipe else [])]
    metrics = [_metric(record) for record in results if record.get("kind") == "eval"]
    if metrics:
        found["model-index"] = [{"name": name, "results": metrics}]
    return found


def _metric(record: Mapping[str, Any]) -> dict[str, Any]:
    corpus = str(_part(record, "protocol").get("corpus"))[:LONGEST]
    found = _part(record, "results")
    values = {"perplexity": found.get("perplexity"), "kl_divergence": found.get("kld_mean")}
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": corpus, "type": corpus},
        "metrics": [{"type": name, "value": value} for name, value in values.items() if value is not None],
    }


def _origin(manifest: Manifest) -> str:
    base = manifest.base
    lines = [f"Made by [Gossamer](https://pypi.org/project/gossamer/) from {_code(base.name)}"]
    lines[0] += f" (fingerprint {_code(base.fingerprint[:16])})."
    if base.note:
        lines.append(f"That one is {_code(base.note)}.")
    text = manifest.calibration
    if text is not None:
        lines.append(
            f"Calibrated on {text.sequences} sequences of {text.length} tokens: {_code(text.kind)}, "
            f"sha256 {_code(text.sha256[:16])}. It must not be judged on them."
        )
    return "\n".join(lines)


def _usage() -> str:
    return '```\ngossamer run MODEL "Why is the sky blue?"\ngossamer serve MODEL\n```'


def _recipe(manifest: Manifest) -> list[str]:
    if not manifest.recipe:
        return ["## Recipe", "None: a plain conversion."]
    text = yaml.safe_dump(manifest.recipe, sort_keys=False, allow_unicode=True).rstrip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    versions = ", ".join(f"{_code(name)} {_code(version)}" for name, version in sorted(manifest.versions.items()))
    made = f"Seed {manifest.seed}; made with {versions}." if versions else f"Seed {manifest.seed}."
    return ["## Recipe", f"{fence}yaml\n{text}\n{fence}", made]


def _measured(results: Sequence[Mapping[str, Any]]) -> list[str]:
    if not results:
        return []
    rows = ["| what | result | engine | machine | protocol |", "|---|---|---|---|---|", *map(_row, results)]
    return ["## Results", "\n".join(rows)]


def _row(record: Mapping[str, Any]) -> str:
    found, protocol = _part(record, "results"), _part(record, "protocol")
    if record.get("kind") == "eval":
        said = {"perplexity": found.get("perplexity"), "KL divergence": found.get("kld_mean")}
        how = {
            "text": protocol.get("corpus"),
            "context": protocol.get("context"),
            "scored": protocol.get("tokens_scored"),
        }
    else:
        rates = {name: _part(found, f"{name}_tokens_per_s").get("median") for name in ("prefill", "decode")}
        peak = found.get("rm_peak_bytes")
        said = {f"{name} tokens/s": rate for name, rate in rates.items()}
        said["peak MB"] = peak / 1e6 if isinstance(peak, int | float) else None
        how = {name: protocol.get(name) for name in ("prompt_tokens", "output_tokens", "batch", "threads")}
    engine, machine = _part(record, "engine"), _part(record, "machine")
    engines = " ".join(str(engine[key]) for key in ("name", "version", "backend") if engine.get(key))
    machines = " ".join(str(machine[key]) for key in ("cpu", "isa") if machine.get(key))
    cells = (str(record["kind"]), _pairs(said), engines, machines, _pairs(how))
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _files(manifest: Manifest) -> str:
    rows = [f"| {_cell(name)} | {_cell(digest)} |" for name, digest in sorted(manifest.files.items())]
    return "\n".join(["## Files", "", "| file | sha256 |", "|---|---|", *rows])


def _pairs(values: Mapping[str, Any]) -> str:
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)


def _part(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = value.get(name)
    return found if isinstance(found, Mapping) else {}


def _cell(text: str) -> str:
    """A code span in a table, where a bar would end the cell."""
    return _code(text.replace("|", "/")) if text else ""


def _code(text: object) -> str:
    """A stranger's text on one line, in a code span that it cannot end."""
    return f"`{' '.join(str(text).replace('`', chr(39)).split())[:LONGEST] or ' '}`"
