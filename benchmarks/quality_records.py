"""Rows of the quality benchmark that outlive their model files: one JSON line each, and one for the tokens.

The model's own samples depend on how a processor rounds, so the tokens that rows were calibrated on are kept beside
them: a run on another machine that resumes from the file calibrates on the same.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quality_report
from gossamer.compress.recipe import CalibrationSpec
from gossamer.measure.records import append_record

Result = dict[str, Any]


@dataclass
class Records:
    """What one run after another has found: results by their identity, tokens by what was asked for."""

    results: dict[str, Result] = field(default_factory=dict)
    tokens: list[tuple[dict[str, Any], Tensor]] = field(default_factory=list)
    out: Path | None = None
    """Where new ones are appended."""

    @staticmethod
    def load(file: Path | None, out: Path | None = None) -> Records:
        """All of a file, or nothing if there is none. Raises OSError if it cannot be read."""
        records = Records(out=out)
        for record in _records(file) if file is not None and file.exists() else ():
            if "tokens" in record:
                records.tokens.append((record["calibration"], torch.tensor(record["tokens"])))
            else:
                records.results[record["identity"]] = record["result"]
        return records

    def keep(self, result: Result, identity: str | None) -> None:
        """Write down a row, if all of it succeeded."""
        if self.out is not None and quality_report.good([result]):
            append_record(self.out, {"identity": identity, "result": result})

    def tokens_for(self, spec: CalibrationSpec) -> Tensor | None:
        """Tokens [sequences, length] that rows of the file were calibrated on."""
        return next((tokens for known, tokens in self.tokens if known == spec.model_dump()), None)

    def keep_tokens(self, spec: CalibrationSpec, tokens: Tensor) -> None:
        """Write down the tokens, unless the file has some for these options."""
        if self.out is not None and self.tokens_for(spec) is None:
            append_record(self.out, {"calibration": spec.model_dump(), "tokens": tokens.tolist()})


def _records(file: Path) -> Iterator[Any]:
    """Every line; one that a crash cut off is as if it had never been written."""
    for line in file.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)
