"""`gossamer pull`: download a model, so that it is there when there is no network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ._console import console, emit_json
from ._options import Json, Quiet


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Hub id, such as org/name, or an alias (smollm2).")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Download a model from the hub into its cache: weights, config and tokenizer, never code.

    Offline (HF_HUB_OFFLINE) it says what is missing.

    \b
    gossamer pull smollm2
    """
    from .. import from_pretrained

    if Path(name).exists():
        raise UsageError(f"{name} is here already: a {'folder' if Path(name).is_dir() else 'file'}")
    model = from_pretrained(name, revision=revision)
    if json:
        emit_json({"name": name, "path": str(model.path), "weight_bytes": model.weight_bytes()})
    elif not quiet:
        console().print(f"{name}: {model.weight_bytes() / 1e6:.1f} MB in {model.path}")
