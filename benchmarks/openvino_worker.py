"""openvino-genai as a benchmark worker: MODEL.gguf THREADS. A decode time is that of two answers, subtracted."""

from __future__ import annotations

import importlib.metadata
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from worker_loop import Request, prompts, serve

VOCAB = 8000
"""Ids of ordinary tokens; every model here has as many."""


def load() -> tuple[Callable[[Request], float], dict[str, Any]]:
    pipeline = genai.LLMPipeline(sys.argv[1], "CPU", INFERENCE_NUM_THREADS=int(sys.argv[2]))

    def seconds(request: Request, output: int) -> float:
        tokens = np.array(prompts(request, VOCAB), np.int64)
        started = time.perf_counter()
        pipeline.generate(ov.Tensor(tokens), max_new_tokens=output, do_sample=False, ignore_eos=True)
        return time.perf_counter() - started

    def seconds_of(request: Request) -> float:
        if request.batch != 1:
            raise ValueError("only batch 1 is driven here")
        seconds(request, 1)  # warms up
        first = seconds(request, 1)
        return first if request.op == "prefill" else seconds(request, request.output + 1) - first

    return seconds_of, {"version": importlib.metadata.version("openvino-genai")}


if __name__ == "__main__":
    serve(load)
