"""`gossamer rm`: remove models from this machine."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import UsageError
from ._console import console


def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Hub ids, or folders of artifacts.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove models: from the hub's cache, or artifacts with the files that their manifest lists, and nothing else.

    \b
    gossamer rm small/ --yes
    """
    from ..checkpoint.library import find, remove

    found = [find(name) for name in names]
    for model in found:
        console().print(f"{model.name} ({model.where}): {model.nbytes / 1e6:,.1f} MB in {model.path}")
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nothing was removed: nobody can be asked here", hint="--yes removes without asking")
        typer.confirm("Remove?", abort=True, err=True)
    for model in found:
        remove(model)
