"""transformers: a model in the dtype of its config, one forward pass for the prompts and one for each token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

LIBRARIES = ("torch", "transformers")
CHUNK = 64
"""Rows of logits [CHUNK, vocab_size] that are held in float32 at once."""


class Engine:
    reserved_bytes: int | None = 0
    """Its cache grows token by token."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(job["threads"])
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto").eval()
        name = str(self.model.dtype).removeprefix("torch.")
        self.facts = {"dtype": name, "kv_cache": name, "kv_element_bytes": self.model.dtype.itemsize}

    def run(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> tuple[float, float]:
        with self.torch.inference_mode():
            began = time.perf_counter()
            out = self.model(self.torch.tensor(prompts), use_cache=True, logits_to_keep=1)
            tokens = out.logits[:, -1].argmax(-1)
            first = time.perf_counter()
            for _ in range(output_tokens - 1):
                out = self.model(tokens[:, None], past_key_values=out.past_key_values, use_cache=True)
                tokens = out.logits[:, -1].argmax(-1)
            return first - began, time.perf_counter() - first

    def nll(self, window: Sequence[int], scored: int) -> float:
        ids = self.torch.tensor([window])
        total = 0.0
        with self.torch.inference_mode():
            logits = self.model(ids, use_cache=False, logits_to_keep=scored + 1).logits[0, :-1]
            for start in range(0, scored, CHUNK):
                wanted = ids[0, -scored:][start : start + CHUNK, None]
                chances = logits[start : start + CHUNK].float().log_softmax(-1).gather(1, wanted)
                total -= float(chances.double().sum())
        return total
