"""vLLM in one process, stepped by hand: a run is timed from its requests to the last token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import count
from typing import Any

LIBRARIES = ("torch", "vllm")


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams

        self.params = SamplingParams
        self.llm = LLM(
            model=job["model"],
            max_model_len=job["context"],
            max_num_seqs=max(job["batch"], 2),
            enable_prefix_caching=False,
        )
        self.engine = self.llm.llm_engine
        config = self.engine.vllm_config
        dtype = config.model_config.dtype
        tokens = (config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size
        self.reserved_bytes: int | None = int(tokens * job["kv_elements"] * dtype.itemsize) or None
        name = str(dtype).removeprefix("torch.")
        self.facts = {"dtype": name, "kv_cache": name, "kv_element_bytes": dtype.itemsize}
        self._names = count()

    def run(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> tuple[float, float]:
        params = self.params(temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        waiting = {str(next(self._names)): {"prompt_token_ids": list(ids)} for ids in prompts}
        began = first = time.perf_counter()
        for name, prompt in waiting.items():
            self.engine.add_request(name, prompt, params)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.outputs and output.outputs[0].token_ids and waiting.pop(output.request_id, None):
                    first = time.perf_counter()
        return first - began, time.perf_counter() - first

    def nll(self, window: Sequence[int], scored: int) -> float:
        params = self.params(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = self.llm.generate([{"prompt_token_ids": list(window)}], params, use_tqdm=False)
        chances = zip(window[-scored:], output.prompt_logprobs[-scored:], strict=True)
        return -float(sum(told[token].logprob for token, told in chances))
