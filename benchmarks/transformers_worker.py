"""transformers in bfloat16 as a benchmark worker: MODEL THREADS. Prefill only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from worker_loop import Request, prompts, serve


def load() -> tuple[Callable[[Request], float], dict[str, Any]]:
    torch.set_num_threads(int(sys.argv[2]))
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()

    def seconds_of(request: Request) -> float:
        if request.op != "prefill":
            raise ValueError("only prefill is driven here")
        with torch.inference_mode():
            for _ in range(2):  # the first warms up
                tokens = torch.tensor(prompts(request, model.config.vocab_size))
                started = time.perf_counter()
                model(tokens, logits_to_keep=1)
                seconds = time.perf_counter() - started
        return seconds

    return seconds_of, {"version": transformers.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    serve(load)
