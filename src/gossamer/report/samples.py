"""Sample outputs side by side, and where each first departs from the baseline's text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .rows import Row, reference_of
from .text import clean

_KEEP = "\n\t"
_LONGEST_WORD = 32  # scripts without spaces: do not walk back further than this


@dataclass(frozen=True)
class Output:
    """One model's continuation: what it shares with the baseline, its first word of its own, and the rest."""

    label: str
    baseline: bool
    same: str
    departure: str
    rest: str
    verdict: str


@dataclass(frozen=True)
class Prompt:
    """One prompt and what every model made of it, in the order of the table."""

    prompt: str
    outputs: tuple[Output, ...]


def prompts(rows: Sequence[Row]) -> list[Prompt]:
    """Every prompt that some model answered, in order of appearance."""
    models = _one_each(rows)
    asked = dict.fromkeys(prompt for row in models for prompt in _answers(row))
    return [Prompt(clean(prompt, _KEEP), tuple(_outputs(prompt, models))) for prompt in asked]


def _one_each(rows: Sequence[Row]) -> list[Row]:
    """A row for each model, in order: the first that has answers, for a model has several rows."""
    found: dict[tuple[str, str | None], Row] = {}
    for row in rows:
        if row.model not in found or not _answers(found[row.model]):
            found[row.model] = row
    return list(found.values())


def _outputs(prompt: str, models: Sequence[Row]) -> list[Output]:
    first = next((row for row in models if row.baseline and prompt in _answers(row)), None)
    found = []
    for row in models:
        output = _answers(row).get(prompt)
        if output is None:
            continue
        reference = reference_of(row, models) or first
        expected = _answers(reference).get(prompt) if reference is not None and not row.baseline else None
        found.append(_output(row, output, expected))
    return found


def _output(row: Row, output: str, expected: str | None) -> Output:
    """The output split at its departure from what was expected."""
    label, output = clean(row.label), clean(output, _KEEP)
    if expected is None:
        return Output(label, row.baseline, output, "", "", "")
    expected = clean(expected, _KEEP)
    if output == expected:
        return Output(label, row.baseline, output, "", "", "identical to the baseline")
    start, end = departure(output, expected)
    words = len(output[:start].split())
    verdict = f"departs at word {words + 1}" if start < len(output) else f"stops after {words} words"
    return Output(label, row.baseline, output[:start], output[start:end], output[end:], verdict)


def departure(output: str, expected: str) -> tuple[int, int]:
    """Start and end of the first word of `output` that `expected` does not have; both its length if it only stops."""
    shared = 0
    for ours, theirs in zip(output, expected, strict=False):
        if ours != theirs:
            break
        shared += 1
    if shared == len(output):
        return shared, shared
    start = shared
    goes_on = shared == len(expected) and output[shared].isspace()  # the baseline ended with this very word
    while not goes_on and start > 0 and shared - start < _LONGEST_WORD and not output[start - 1].isspace():
        start -= 1
    end = shared
    while start == shared and end < len(output) and output[end].isspace():
        end += 1  # where the baseline's text ended or another space began, show the word and not the space alone
    word = end
    while end < len(output) and end - word < _LONGEST_WORD and not output[end].isspace():
        end += 1
    return start, max(end, shared + 1)


def _answers(row: Row) -> dict[str, str]:
    samples = row.evaluation.results.samples if row.evaluation else ()
    return {sample.prompt: sample.output for sample in samples}
