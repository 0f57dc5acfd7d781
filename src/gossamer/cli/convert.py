"""`gossamer convert`: any checkpoint as an ordinary Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._console import console, emit_json, progress
from ._options import Json, Model, Quiet


def convert(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make.")],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Save a model (a GGUF file, say) as a Hugging Face folder that transformers loads.

    \b
    gossamer convert smollm2 --out smollm2-hf/
    """
    from ..checkpoint import open_checkpoint
    from ..checkpoint.save import save_folder

    checkpoint = open_checkpoint(model)
    with progress(quiet) as report:
        save_folder(checkpoint, out, progress=report)
    saved = open_checkpoint(out)
    if json:
        emit_json({"path": str(out), "weight_bytes": saved.weight_bytes(), "note": saved.source_note})
    elif not quiet:
        console().print(f"{out}: {saved.weight_bytes() / 1e6:.1f} MB, {saved.bits_per_weight():.2f} bits per weight")
