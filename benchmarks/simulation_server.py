"""Our server, its engine noting every step: how long it took and what was in it.

    python benchmarks/simulation_server.py MODEL PORT FILE

FILE gets a JSON line with the engine's options, then one for each step: seconds, tokens of prompts, of answers and of
context. Otherwise this is `gossamer serve MODEL --port PORT --kv-memory 2GiB`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gossamer.checkpoint import open_checkpoint
from gossamer.serve import server
from gossamer.serve import worker as real
from gossamer.serve.messages import WorkerSpec
from gossamer.simulate.cost import StepWork
from gossamer.simulate.measure import TimedEngine

KV_MEMORY = 2 << 30


def load(steps: str, **arguments: Any) -> TimedEngine:
    """The factory of the worker: a real engine that notes."""
    engine = real.load(**arguments)
    file = Path(steps).open("w", buffering=1)  # noqa: SIM115  # as long as the worker lives
    options = engine.options
    told = (engine.blocks.num_blocks, options.max_batch_tokens, options.max_sequences)
    file.write(json.dumps(told) + "\n")

    def note(work: StepWork, seconds: float) -> None:
        file.write(f"[{seconds:.6f}, {work.prompt_tokens}, {work.decode_tokens}, {work.context_tokens}]\n")

    return TimedEngine(engine, note)


def main() -> None:
    model, port, steps = sys.argv[1:]
    choice = {"backend": "auto", "weights": "stored", "activations": "auto", "kv_cache": "auto", "tp": 1, "pp": 1}
    arguments = {"model": model, "options": {"kv_memory": KV_MEMORY}, "choice": choice, "steps": steps}
    spec = WorkerSpec("simulation_server:load", arguments, False)
    models = [server.ModelSpec(model, open_checkpoint(model).tokenizer, spec)]
    server.serve(models, server.ServerOptions(port=int(port)), lambda url: None)


if __name__ == "__main__":
    main()
