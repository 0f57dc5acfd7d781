"""Options of all commands that compare variants of one model: how they are judged, timed and chosen among."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

Folder: TypeAlias = Annotated[Path, typer.Option("--out", "-o", help="Folder of records, artifacts, table and plot.")]
MaxSize: TypeAlias = Annotated[
    str | None, typer.Option("--max-size", help="Bound of the recommendation, such as 100MB.", metavar="SIZE")
]
MaxKld: TypeAlias = Annotated[
    float | None, typer.Option("--max-kld", min=0, help="Bound of the recommendation on KL divergence.")
]
Corpus: TypeAlias = Annotated[
    str, typer.Option("--corpus", help="default (Python's own docs), wikitext2, or a UTF-8 text file.")
]
Context: TypeAlias = Annotated[int, typer.Option("--context", help="Tokens in a window that is judged.")]
Tokens: TypeAlias = Annotated[int | None, typer.Option("--tokens", min=2, help="Use only so many tokens of the text.")]
BatchSizes: TypeAlias = Annotated[str, typer.Option("--batch", help="Prompts at once.", metavar="N[,N]")]
PromptTokens: TypeAlias = Annotated[int, typer.Option("--prompt-tokens", help="Tokens of each prompt that is timed.")]
OutputTokens: TypeAlias = Annotated[int, typer.Option("--output-tokens", help="Tokens to generate for each prompt.")]
Repetitions: TypeAlias = Annotated[int, typer.Option("--repetitions", help="Timed runs, of which the median counts.")]
