"""Arguments and options that several commands share, so that they look and read the same everywhere."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

from ..errors import UsageError

if TYPE_CHECKING:
    from ..engine.sharded.nodes import Nodes


def _hush(quiet: bool) -> bool:
    """Have the hub library draw no bars either: it reads this when it is imported, here and in worker processes."""
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return quiet


Model: TypeAlias = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, .gguf file, hub id or smollm2.")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON line on stdout.")]
Quiet: TypeAlias = Annotated[
    bool, typer.Option("--quiet", "-q", callback=_hush, help="Say nothing on stderr but errors.")
]
Seed: TypeAlias = Annotated[int | None, typer.Option("--seed", help="The same seed samples the same text.")]
MaxTokens: TypeAlias = Annotated[int, typer.Option("--max-tokens", help="Most tokens to generate.")]
Temperature: TypeAlias = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token; 1 samples.")]
TopP: TypeAlias = Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens of this total probability.")]
TopK: TypeAlias = Annotated[int, typer.Option("--top-k", help="Keep this many of the likeliest tokens; 0 keeps all.")]
MinP: TypeAlias = Annotated[float, typer.Option("--min-p", help="Drop tokens below this share of the likeliest one.")]
Stop: TypeAlias = Annotated[list[str] | None, typer.Option("--stop", help="End at this text; may be repeated.")]
Weights: TypeAlias = Annotated[
    Literal["stored", "float"],
    typer.Option("--weights", help="stored: packed as in the file (GGUF: bf16); float: fp32."),
]
Backend: TypeAlias = Annotated[
    Literal["auto", "cpu", "reference"],
    typer.Option("--backend", help="What computes: cpu (C++), reference (torch); auto: cpu if it can."),
]
Activations: TypeAlias = Annotated[
    Literal["auto", "int8", "exact"],
    typer.Option("--activations", help="int8: rounded before they meet packed weights; exact: fp32."),
]
KVCache: TypeAlias = Annotated[
    Literal["auto", "bf16", "int8", "int4", "fp32"],
    typer.Option("--kv-cache", help="What keys and values are stored as; auto: the backend's choice (cpu: bf16)."),
]
TensorParallel: TypeAlias = Annotated[
    int, typer.Option("--tp", min=1, max=64, help="Processes that share every layer (tensor parallelism).")
]
PipelineParallel: TypeAlias = Annotated[
    int, typer.Option("--pp", min=1, max=64, help="Stages of layers, each of --tp processes (pipeline parallelism).")
]
NodeCount: TypeAlias = Annotated[
    int, typer.Option("--nodes", min=1, help="Machines that hold as many ranks each, this one and those that join it.")
]
MasterAddress: TypeAlias = Annotated[
    str | None,
    typer.Option("--master-addr", help="With --nodes: where the others reach this one.", metavar="HOST[:PORT]"),
]
Cluster: TypeAlias = Annotated[
    str | None,
    typer.Option("--ray", help="Use a Ray cluster: this machine's, HOST:PORT or local.", metavar="[ADDRESS]"),
]


def several_nodes(count: int, address: str | None) -> Nodes | None:
    """What --nodes and --master-addr say together. Raises UsageError."""
    if count == 1 and address is None:
        return None
    if count == 1 or address is None:
        raise UsageError("--nodes and --master-addr belong together", hint="--nodes 2 --master-addr HOST[:PORT]")
    from ..engine.sharded.nodes import Nodes

    return Nodes.at(count, address)
