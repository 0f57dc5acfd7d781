"""Libraries of other engines for tests, as small as our adapters let them be.

Each stands for one model, `next_logits`: what it says after some tokens. It can be made to fail in every way that a
library has. Written to be imported under the library's own name, in this process or in one that thinks it has it.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

VOCAB = 300


def next_logits(tokens: list[int]) -> list[float]:
    """What the model says after these tokens."""
    draw = random.Random(str(tokens))
    return [draw.uniform(-3, 3) for _ in range(VOCAB)]


def likeliest(tokens: list[int]) -> int:
    logits = next_logits(tokens)
    return logits.index(max(logits))


def logprob(tokens: list[int], token: int) -> float:
    """Of a token after these."""
    logits = next_logits(tokens)
    return logits[token] - math.log(math.fsum(map(math.exp, logits)))


def nll(window: list[int], scored: int) -> float:
    """What every engine should say of a window."""
    return -math.fsum(logprob(window[:i], window[i]) for i in range(len(window) - scored, len(window)))


def _go_wrong(where: str) -> None:
    """Fail as GOSSAMER_FAKE asks: `raise load`, `die run`, ..."""
    how, _, at = os.environ.get("GOSSAMER_FAKE", "").partition(" ")
    if at == where and how == "die":
        print("the fake gave up", file=sys.stderr, flush=True)
        os._exit(3)
    if at == where and how == "raise":
        raise ValueError(f"the fake cannot {where}")
    if at == where and how == "sleep":
        import time

        time.sleep(60)


class SamplingParams:
    def __init__(self, **options: Any) -> None:
        self.__dict__.update(options)


class BFloat16:
    itemsize = 2

    def __str__(self) -> str:
        return "torch.bfloat16"


class LLM:
    """vLLM's, one token for each request and step."""

    def __init__(self, model: str, **options: Any) -> None:
        print("chatter on stdout")
        _go_wrong("load")
        self.told = {"model": model, **options, "threads": os.environ["OMP_NUM_THREADS"], "prompts": []}
        self.llm_engine = self
        cache = SimpleNamespace(num_gpu_blocks=100, block_size=16)
        model_config = SimpleNamespace(dtype=BFloat16())
        self.vllm_config = SimpleNamespace(cache_config=cache, model_config=model_config)
        self.requests: dict[str, tuple[list[int], list[int], int]] = {}

    def add_request(self, name: str, prompt: dict[str, Any], params: SamplingParams) -> None:
        _go_wrong("run")
        assert params.ignore_eos
        assert params.temperature == 0
        self.told["prompts"].append(prompt["prompt_token_ids"])
        self.requests[name] = (prompt["prompt_token_ids"], [], params.max_tokens)
        Path(os.environ["GOSSAMER_FAKE_TOLD"]).write_text(json.dumps(self.told))

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Any]:
        told = []
        for name, (prompt, answer, most) in list(self.requests.items()):
            answer.append(likeliest(prompt + answer))
            told.append(SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=answer)]))
            if len(answer) == most:
                del self.requests[name]
        return told

    def generate(self, prompts: list[dict[str, Any]], params: SamplingParams, use_tqdm: bool) -> list[Any]:
        _go_wrong("judge")
        (prompt,) = (p["prompt_token_ids"] for p in prompts)
        told = [None, *({t: SimpleNamespace(logprob=logprob(prompt[:i], t))} for i, t in enumerate(prompt) if i)]
        return [SimpleNamespace(prompt_logprobs=told)]


class LlamaCpp(ModuleType):
    """llama-cpp-python's lower half. It minds positions, sequences and which logits are wanted."""

    def __init__(self) -> None:
        super().__init__("llama_cpp")
        self.__version__ = "0"
        self.held: dict[int, list[int]] = {}
        self.logits: dict[int, Any] = {}

    def llama_log_callback(self, function: Any) -> Any:
        return function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments: 1  # whatever else there is succeeds

    def llama_context_default_params(self) -> Any:
        return SimpleNamespace()

    def llama_init_from_model(self, model: Any, params: Any) -> Any:
        self.params = params
        return 1

    def llama_vocab_n_tokens(self, vocab: Any) -> int:
        return VOCAB

    def llama_batch_init(self, size: int, embd: int, sequences: int) -> Any:
        rows = [[0] for _ in range(size)]
        return SimpleNamespace(
            n_tokens=0, token=[0] * size, pos=[0] * size, logits=[0] * size, n_seq_id=[0] * size, seq_id=rows
        )

    def llama_decode(self, context: Any, batch: Any) -> int:
        self.logits = {}
        for i in range(batch.n_tokens):
            assert batch.n_seq_id[i] == 1
            held = self.held.setdefault(batch.seq_id[i][0], [])
            if batch.pos[i] != len(held):
                return 1
            held.append(batch.token[i])
            if batch.logits[i]:
                self.logits[i] = (ctypes.c_float * VOCAB)(*next_logits(held))
        return 0

    def llama_get_logits_ith(self, context: Any, place: int) -> Any:
        return ctypes.cast(self.logits[place], ctypes.POINTER(ctypes.c_float))

    def llama_memory_clear(self, memory: Any, data: bool) -> None:
        self.held.clear()


class OpenVINO(ModuleType):
    """openvino-genai's pipeline for many requests."""

    def __init__(self) -> None:
        super().__init__("openvino_genai")
        self.__version__ = "0"
        self.GenerationConfig = self.SchedulerConfig = SimpleNamespace
        self.ContinuousBatchingPipeline = lambda model, scheduler, device, options: self
        self.handles: list[Any] = []

    def add_request(self, number: int, ids: Any, config: Any) -> Any:
        handle = SimpleNamespace(prompt=[int(t) for t in ids.data[0]], answer=[], config=config)
        handle.can_read = lambda: bool(handle.answer)
        handle.read = lambda: {0: self._output(handle)}
        self.handles.append(handle)
        return handle

    def has_non_finished_requests(self) -> bool:
        return any(len(h.answer) < h.config.max_new_tokens for h in self.handles)

    def step(self) -> None:
        for h in self.handles:
            if len(h.answer) < h.config.max_new_tokens:
                h.answer.append(likeliest(h.prompt + h.answer))

    def get_metrics(self) -> Any:
        return SimpleNamespace(kv_cache_size_in_bytes=1 << 30)

    def _output(self, handle: Any) -> Any:
        ids = handle.prompt + handle.answer
        told = [1.0, *(logprob(ids[:i], ids[i]) for i in range(1, len(ids)))]
        return SimpleNamespace(generated_ids=ids, generated_log_probs=told)
