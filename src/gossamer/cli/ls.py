"""`gossamer ls`: the models on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ._console import emit_json
from ._options import Json


def ls(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER...]", help="Where to look for artifacts (default: here).")
    ] = None,
    json: Json = False,
) -> None:
    """Models in the hub's cache, and artifacts in folders: their size, what they are made from, what is missing.

    \b
    gossamer ls runs/
    """
    from ..checkpoint.library import models

    found = models(folders or [Path()])
    if json:
        for model in found:
            emit_json({**vars(model), "path": str(model.path)})
    else:
        _show(found)


def _show(found: list[Any]) -> None:
    from rich.console import Console

    from .eval import make_table

    rows = [
        (
            model.name,
            model.where,
            f"{model.nbytes / 1e6:,.1f}",
            model.recipe or "-",
            model.base or "-",
            model.problem or (f"lacks {', '.join(model.missing[:3])}" if model.missing else ""),
        )
        for model in found
    ]
    screen = Console(highlight=False, soft_wrap=True)
    if not screen.is_terminal:
        screen = Console(highlight=False, width=10_000)  # a file is not wrapped to a terminal that is not there
    screen.print(make_table(("model", "where", "MB", "recipe", "from", ""), rows))
