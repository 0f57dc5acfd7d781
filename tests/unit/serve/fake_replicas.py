"""Replicas of `fake_server.py` on a Ray cluster: `python fake_replicas.py ADDRESS REPLICAS DELAY`."""

from __future__ import annotations

import sys
from functools import partial

from fake_server import make_tokenizer

from gossamer.serve.messages import WorkerSpec
from gossamer.serve.replicas.deploy import Scale
from gossamer.serve.replicas.server import serve_on_ray
from gossamer.serve.server import ModelSpec, ServerOptions


def specs(delay: float, meeting: object) -> list[ModelSpec]:
    options = {"kv_memory": 512 * 16 * 8, "max_sequences": 64, "max_batch_tokens": 512}
    arguments = {"delay": delay, "token_delay": 0.0, "context": 1024, "options": options}
    return [ModelSpec("fake", make_tokenizer, WorkerSpec("fake_engine:make_engine", arguments))]


def main(address: str, replicas: str, delay: str) -> None:
    scale = Scale(int(replicas), int(replicas), threads=1, max_sequences=64)
    options = ServerOptions(port=0, drain_seconds=5.0)
    ready = partial(print, "ready", file=sys.stdout, flush=True)
    serve_on_ray("fake", partial(specs, float(delay)), options, scale, address, ready)


if __name__ == "__main__":
    main(*sys.argv[1:])
