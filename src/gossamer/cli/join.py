"""`gossamer join`: this machine holds ranks of a model whose engine is on another one."""

from __future__ import annotations

from typing import Annotated

import typer

from ._console import log_remarks
from ._imports import importing
from ._options import Quiet


def join(
    address: Annotated[str, typer.Argument(metavar="HOST[:PORT]", help="What the engine was given as --master-addr.")],
    quiet: Quiet = False,
) -> None:
    """Hold ranks of a model for a command with --nodes on another machine, until that ends. Exit code 1 if it is lost.

    Both need the same GOSSAMER_JOIN_TOKEN in their environment, and the model under the same name.

    \b
    gossamer join 10.0.0.1
    """
    with importing():
        from ..engine.sharded import join, nodes
    with log_remarks("gossamer.engine", quiet):
        join.join(nodes.host_and_port(address))
