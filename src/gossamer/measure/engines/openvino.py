"""openvino-genai: its pipeline for many requests, stepped by hand, over a GGUF file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

LIBRARIES = ("numpy", "openvino", "openvino_genai")
GIB = 1 << 30


class Engine:
    def __init__(self, job: dict[str, Any]) -> None:
        import numpy
        import openvino
        import openvino_genai

        self.np, self.ov, self.genai = numpy, openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = -(-job["kv_memory"] // GIB)
        scheduler.max_num_seqs = job["batch"]
        # As its own pipeline for single prompts has it: a prompt is read in one step.
        scheduler.max_num_batched_tokens = max(256, job["batch"] * job["context"])
        options = {"INFERENCE_NUM_THREADS": job["threads"]}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(job["model"], scheduler, "CPU", options)
        self.reserved_bytes: int | None = None
        self.facts = {"dtype": None, "kv_cache": None, "kv_element_bytes": None}
        self._asked = 0

    def run(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> tuple[float, float]:
        began = time.perf_counter()
        handles = [self._ask(ids, self._config(output_tokens)) for ids in prompts]
        first = None
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            if first is None and all(handle.can_read() for handle in handles):
                first = time.perf_counter()
        ended = time.perf_counter()
        if first is None:
            raise RuntimeError("openvino-genai ended its requests without an answer")
        self.reserved_bytes = int(self.pipeline.get_metrics().kv_cache_size_in_bytes)
        return first - began, ended - first

    def nll(self, window: Sequence[int], scored: int) -> float:
        config = self._config(1)
        config.echo, config.logprobs = True, 1
        handle = self._ask(window, config)
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        (output,) = handle.read().values()
        if list(output.generated_ids)[: len(window)] != list(window):
            raise RuntimeError("openvino-genai gave no log-probabilities of the prompt")
        return -float(sum(list(output.generated_log_probs)[len(window) - scored : len(window)]))

    def _ask(self, ids: Sequence[int], config: Any) -> Any:
        self._asked += 1
        return self.pipeline.add_request(self._asked, self.ov.Tensor(self.np.array([ids], self.np.int64)), config)

    def _config(self, output_tokens: int) -> Any:
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = output_tokens, True, False
        return config
