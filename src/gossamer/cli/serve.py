"""`gossamer serve`: models behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ..errors import UsageError
from ..settings import threads
from . import _options as o
from ._imports import importing

if TYPE_CHECKING:
    from ..engine.sharded.nodes import Nodes
    from ..serve.server import ModelSpec

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}

Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders, .gguf files, hub ids or smollm2.")]


def serve(
    models: Models,
    host: Annotated[str, typer.Option("--host", help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="A model's name in requests; repeat it, one for each MODEL.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="GOSSAMER_API_KEY", help="Answer only who has this key.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve other machines without a key.", show_default=False)
    ] = False,
    kv_memory: Annotated[
        str | None,
        typer.Option("--kv-memory", help="KV cache of each model: 2GB; else from free memory.", metavar="SIZE"),
    ] = None,
    kv_cache: o.KVCache = "auto",
    max_sequences: Annotated[int, typer.Option("--max-sequences", help="Most completions that run together.")] = 64,
    max_batch_tokens: Annotated[
        int, typer.Option("--max-batch-tokens", help="Most tokens of a step; fewer let answers flow evenly.")
    ] = 512,
    prefix_reuse: Annotated[
        bool,
        typer.Option("--prefix-reuse/--no-prefix-reuse", help="Keep keys and values for prompts that begin alike."),
    ] = True,
    max_queue: Annotated[
        int, typer.Option("--max-queue", help="Completions that may wait; more are refused (429).", min=0)
    ] = 128,
    draft: Annotated[
        str | None, typer.Option("--draft", help="Guess tokens ahead: ngram, self, or a smaller MODEL.", metavar="HOW")
    ] = None,
    weights: o.Weights = "stored",
    backend: o.Backend = "auto",
    activations: o.Activations = "auto",
    request_seconds: Annotated[
        float, typer.Option("--request-seconds", help="Most time for one request.", min=0.1)
    ] = 600.0,
    drain_seconds: Annotated[
        float, typer.Option("--drain-seconds", help="At the end, time for requests to finish.", min=0.0)
    ] = 30.0,
    tp: o.TensorParallel = 1,
    pp: o.PipelineParallel = 1,
    nodes: o.NodeCount = 1,
    master_addr: o.MasterAddress = None,
    ray: o.Cluster = None,
    replicas: Annotated[int, typer.Option("--replicas", help="With --ray: how many copies of the server.", min=1)] = 1,
    max_replicas: Annotated[
        int | None, typer.Option("--max-replicas", help="With --ray: most copies under load.", min=1)
    ] = None,
    quiet: o.Quiet = False,
) -> None:
    """Serve models over HTTP: OpenAI's API, and a page to try them on. Ctrl-C or SIGTERM ends it.

    \b
    gossamer serve smollm2
    gossamer serve small/ smollm2 --port 8080 --draft ngram
    gossamer serve smollm2 --ray --replicas 4
    gossamer serve large/ --ray --tp 2 --nodes 2 --replicas 4
    """
    if nodes > 1 and len(models) > 1:
        raise UsageError("--nodes are for one model", hint="serve each model by a command of its own")
    if ray is not None and master_addr is not None:
        raise UsageError("--ray finds the other nodes itself", hint="without --master-addr")
    meeting = o.several_nodes(nodes, master_addr) if ray is None else None
    with importing():
        from ..parallel.roofline import place
    place(tp * pp, nodes)  # which refuses what does not come out even
    engine = {
        "options": {
            "kv_memory": None if kv_memory is None else bytes_in(kv_memory),
            "max_batch_tokens": max_batch_tokens,
            "max_sequences": max_sequences,
            "prefix_reuse": prefix_reuse,
        },
        "choice": {"backend": backend, "weights": weights, "activations": activations, "kv_cache": kv_cache}
        | {"tp": tp, "pp": pp},
        "draft": draft,
        "models": len(models),
    }
    if ray is None and (replicas > 1 or max_replicas is not None):
        raise UsageError("replicas are copies on the nodes of a cluster", hint="--ray says which one")
    if max_replicas is not None and max_replicas < replicas:
        raise UsageError(f"--max-replicas {max_replicas} is less than --replicas {replicas}")
    names = model_names(models, name or [])
    with importing():
        from ..serve import server
        from ..serve.service import Limits
    options = server.ServerOptions(
        host=host,
        port=port,
        api_key=api_key,
        insecure=insecure,
        drain_seconds=drain_seconds,
        limits=Limits(max_queue=max_queue, request_seconds=request_seconds),
    )
    server.bind(options).close()  # what is wrong with the address is said before anything is loaded
    specs = partial(_specs, models, names, engine, verbose=not quiet)
    ready = partial(_announce, names=names, out=sys.stdout)
    if ray is None:
        server.serve(specs(meeting), options, ready)
        return
    from ..serve.replicas.deploy import Scale
    from ..serve.replicas.server import serve_on_ray

    specs(None)  # what is wrong with a model is said before a cluster is asked
    scale = Scale(replicas, max_replicas or replicas, threads(), max_sequences, nodes)
    application = re.sub(r"[^\w.-]+", "-", " ".join(names))
    serve_on_ray(application, specs, options, scale, ray, ready)


def bytes_in(size: str) -> int:
    """A number of bytes out of 2GB, 512MiB or 1000000. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", size.strip())
    if found is None or found[2].upper() not in UNITS or float(found[1]) * UNITS[found[2].upper()] < 1:
        raise UsageError(f"--kv-memory {size!r} is not a size", hint="such as 2GB or 512MiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def model_names(models: list[str], names: list[str]) -> list[str]:
    """What models are called in requests: as asked, or the name of the folder or file. Raises UsageError."""
    if names and len(names) != len(models):
        raise UsageError(f"{len(names)} names for {len(models)} models", hint="give --name once for each MODEL")
    names = names or [_name(model) for model in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two models are called {twice!r}", hint="give --name once for each MODEL")
    return names


def _name(model: str) -> str:
    path = Path(model)
    if not path.exists():
        return model
    return path.stem if path.suffix == ".gguf" else path.resolve().name


def _specs(
    models: list[str], names: list[str], engine: dict[str, Any], meeting: Nodes | None, verbose: bool
) -> list[ModelSpec]:
    choice = engine["choice"] | {"nodes": meeting}
    arguments = engine | {"choice": choice}
    return [_spec(model, name, arguments, verbose) for model, name in zip(models, names, strict=True)]


def _spec(model: str, name: str, engine: dict[str, Any], verbose: bool) -> ModelSpec:
    """How to serve a model. Raises CheckpointError if there is none."""
    from ..checkpoint import open_checkpoint
    from ..serve.messages import WorkerSpec
    from ..serve.server import ModelSpec

    checkpoint = open_checkpoint(model)
    worker = WorkerSpec("gossamer.serve.worker:load", {"model": model, **engine}, verbose)
    return ModelSpec(name, checkpoint.tokenizer, worker)


def _announce(url: str, names: list[str], out: TextIO) -> None:
    out.write(f"serving {', '.join(names)} on {url}\n")
    out.flush()
