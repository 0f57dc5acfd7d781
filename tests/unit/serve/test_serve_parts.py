"""Parts of the server that need no engine: the queue, the numbers of an answer, what the documents say of them."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gossamer.engine.params import SamplingParams
from gossamer.engine.sequence import EngineStats, Output, Token
from gossamer.serve import client as client_module
from gossamer.serve.admission import Queue
from gossamer.serve.answers import Clock
from gossamer.serve.client import EngineClient
from gossamer.serve.messages import Beat, WorkerSpec, frame
from gossamer.serve.metrics import Metrics
from gossamer.serve.protocol import ApiError, ChatRequest, CompletionRequest, read_as
from gossamer.serve.sampling import chat_params, completion_params

PAGE = Path(__file__).parents[3] / "docs" / "howto" / "serve.md"


def test_a_queue_has_so_many_places_and_gets_them_back() -> None:
    queue = Queue(max_sequences=2, max_queue=1)
    with queue.places(2), queue.places(1):
        with pytest.raises(ApiError) as caught, queue.places(1):
            pass
        assert caught.value.status == 429
        assert caught.value.headers["Retry-After"] == "1"
    with queue.places(10):  # alone
        assert queue.taken == 10
    assert queue.taken == 0


def test_the_wait_that_is_asked_for_grows_with_the_queue_and_is_bounded() -> None:
    queue = Queue(max_sequences=1, max_queue=1000)
    for _ in range(50):
        queue.note(10.0)
    with queue.places(5):
        few = queue.retry_after
    with queue.places(9):
        more = queue.retry_after
    with queue.places(1000):
        most = queue.retry_after
    assert 15 < few < more < most == 60


def test_the_numbers_of_an_answer() -> None:
    metrics = Metrics({"m": EngineStats})
    clock = Clock("m", metrics, arrival=0.0)
    clock.begin([[1, 2, 3], [4]], 2, EngineStats(drafted_tokens=10, accepted_tokens=5))
    stats = EngineStats(drafted_tokens=18, accepted_tokens=11)
    for index in range(4):
        tokens = (Token("a", 1), Token("b", 2))
        clock.take(index, index // 2, Output("r", index % 2, tokens, cached_tokens=16 * (index % 2)), stats)
    clock.take(0, 0, Output("r", 0, (Token("c", 3, "stop"),), "stop"), stats)
    usage = clock.usage()
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (4, 9, 13)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert usage["gossamer"]["acceptance_rate"] == 0.75
    clock.end()
    text = metrics.text().decode()
    assert 'gossamer:request_success_total{finished_reason="stop",model_name="m"} 1.0' in text
    assert 'gossamer:request_success_total{finished_reason="abort",model_name="m"} 3.0' in text


def test_every_metric_is_documented_and_every_documented_one_is_there() -> None:
    section = PAGE.read_text().partition("## Metrics")[2]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    families = text_string_to_metric_families(Metrics({"m": EngineStats}).text().decode())
    there = {f.name.removeprefix("gossamer:") + ("_total" if f.type == "counter" else "") for f in families}
    assert documented == there


def test_fields_reach_the_engine_as_they_were_said() -> None:
    request = read_as(
        ChatRequest,
        {
            "model": "m", "messages": [{"role": "user", "content": "x"}], "n": 2, "max_completion_tokens": 5,
            "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
            "repetition_penalty": 1.5, "seed": 3, "stop": "a", "stop_token_ids": [4], "min_tokens": 2,
            "ignore_eos": True, "logprobs": True, "top_logprobs": 3, "logit_bias": {"5": -2},
        },
    )  # fmt: skip
    assert chat_params(request, 100) == SamplingParams(
        max_tokens=5, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=3, stop=("a",), ignore_eos=True,
        min_tokens=2, n=2, presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5, logit_bias=((5, -2.0),),
        stop_token_ids=(4,), logprobs=3,
    )  # fmt: skip


def test_what_is_not_said_is_as_openai_has_it() -> None:
    chat = read_as(ChatRequest, {"model": "m", "messages": [{"role": "user", "content": "x"}], "n": None})
    assert chat_params(chat, 100) == SamplingParams(max_tokens=100, temperature=1.0)
    completion = read_as(CompletionRequest, {"model": "m", "prompt": "x", "stop": None})
    assert completion_params(completion, 1) == SamplingParams(max_tokens=16, temperature=1.0)


@pytest.mark.parametrize(
    ("fields", "logprobs", "prompt"),
    [
        ({"logprobs": 0}, 0, None),
        ({"logprobs": 0, "echo": True}, 0, 0),
        ({"logprobs": 2, "echo": True, "prompt_logprobs": 3}, 2, 3),
        ({"echo": True}, None, None),
        ({"prompt_logprobs": 0}, None, 0),
    ],
)
def test_log_probabilities_of_prompts_are_asked_for_where_they_are_shown(
    fields: dict[str, object], logprobs: int | None, prompt: int | None
) -> None:
    params = completion_params(read_as(CompletionRequest, {"model": "m", "prompt": "x", **fields}), 1)
    assert (params.logprobs, params.prompt_logprobs) == (logprobs, prompt)


@pytest.mark.parametrize("turns", range(6))
def test_a_supervisor_can_be_cancelled_in_the_moment_in_which_a_message_comes(turns: int) -> None:
    async def cancelled_after(turns: int) -> bool:
        client = EngineClient(WorkerSpec("fake_engine:make_engine", {}), "fake")
        client._process = process = client_module._Process(client.spec)
        try:
            reader = asyncio.StreamReader()
            process._streams = (reader, None)
            supervising = asyncio.ensure_future(client.supervise())
            data = frame(Beat(0.0))
            reader.feed_data(data[:-1])
            await asyncio.sleep(0.05)
            reader.feed_data(data[-1:])
            for _ in range(turns):
                await asyncio.sleep(0)
            supervising.cancel()
            done, _ = await asyncio.wait([supervising], timeout=5)
            return bool(done) and supervising.cancelled()
        finally:
            process._streams = None
            process.kill()

    assert asyncio.run(cancelled_after(turns))


def test_the_side_that_speaks_http_loads_no_torch() -> None:
    code = "import sys, gossamer.serve.server, gossamer.checkpoint.tokenizer; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
