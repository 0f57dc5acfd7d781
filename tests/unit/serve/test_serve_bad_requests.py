"""What is wrong with a request is a 400 that names the field, in OpenAI's form, and the engine never hears of it."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from serving import Server, chat_body

NAMED = {"type": "function", "function": {"name": "g"}}
TOOL = {"type": "function", "function": {"name": "f"}}
DEEP: Any = []
for _ in range(300):
    DEEP = [DEEP]

BOTH: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 0}, "n", "from 1 to 64"),
    ({"n": 10**9}, "n", "from 1 to 64"),
    ({"n": -1}, "n", "from 1 to 64"),
    ({"n": 1.5}, "n", "integer"),
    ({"n": True}, "n", "integer"),
    ({"n": "2"}, "n", "integer"),
    ({"max_tokens": -1}, "max_tokens", "from 1 to"),
    ({"max_tokens": 0}, "max_tokens", "from 1 to"),
    ({"max_tokens": 10**30}, "max_tokens", "from 1 to"),
    ({"temperature": float("nan")}, "temperature", "from 0 to 100"),
    ({"temperature": float("inf")}, "temperature", "from 0 to 100"),
    ({"temperature": 1e9}, "temperature", "from 0 to 100"),
    ({"temperature": -0.1}, "temperature", "from 0 to 100"),
    ({"temperature": "x"}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "above 0 to 1"),
    ({"top_p": 1.1}, "top_p", "above 0 to 1"),
    ({"top_k": -1}, "top_k", "from 0"),
    ({"min_p": 2}, "min_p", "from 0 to 1"),
    ({"presence_penalty": 3}, "presence_penalty", "from -2 to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "from -2 to 2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "above 0 to 10"),
    ({"seed": -1}, "seed", "from 0"),
    ({"seed": 2**63}, "seed", "from 0"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop": [""]}, "stop", "1 to 256 characters"),
    ({"stop": "x" * 257}, "stop", "1 to 256 characters"),
    ({"stop": 3}, "stop", ""),
    ({"stop": [3]}, "stop.0", "string"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "from 0"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids.0", "integer"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "from 0 to 4"),
    ({"ignore_eos": "yes"}, "ignore_eos", "boolean"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "token id"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "token id"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "from -100 to 100"),
    ({"logit_bias": {"1": "x"}}, "logit_bias.1", "number"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "up to 1024"),
    ({"logit_bias": [1]}, "logit_bias", "dictionary"),
    ({"model": 3}, "model", "string"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "include_usage"),
    ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
    ({"guided_json": {"type": "x"}, "guided_regex": "a"}, "guided_json", "one form only"),
    ({"guided_regex": "a" * (1 << 20) + "b"}, "guided_regex", "1,048,576"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needed"),
]
CHAT: list[tuple[dict[str, Any], str, str]] = [
    ({"top_logprobs": 2}, "top_logprobs", "only with logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "from 0 to 20"),
    ({"logprobs": 5}, "logprobs", "boolean"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "from 1 to"),
    ({"max_completion_tokens": 5, "max_tokens": 6}, "max_tokens", "not the same"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hello"}, "messages", "list"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "assistant"),
    ({"messages": [{"role": "user"}]}, "messages.0", "without content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content", ""),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url", "text only"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages.0.tool_call_id", "'tool'"),
    ({"messages": [{"role": "user", "content": "x"}] * 4097}, "messages", "at most 4096"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
    ({"functions": []}, "functions", "tools"),
    ({"tool_choice": "required"}, "tool_choice", "only with tools"),
    ({"tool_choice": "maybe"}, "tool_choice", "required"),
    ({"tool_choice": NAMED, "tools": [TOOL]}, "tool_choice", "none of the tools"),
    ({"tools": [TOOL, TOOL]}, "tools", "one name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
    ({"tools": [TOOL], "tool_choice": "required", "guided_regex": "a"}, "guided_regex", "one form only"),
]
COMPLETION: list[tuple[dict[str, Any], str, str]] = [
    ({"logprobs": 21}, "logprobs", "from 0 to 20"),
    ({"logprobs": True}, "logprobs", "integer"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "from 0 to 20"),
    ({"best_of": 2}, "best_of", "the same as n"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"n": 40, "prompt": ["a", "b"]}, "n", "more than 64"),
    ({"prompt": ["a"] * 65}, "prompt", "1 to 64"),
    ({"prompt": []}, "prompt", "1 to 64"),
    ({"prompt": {"a": 1}}, "prompt", ""),
    ({"prompt": [1, "a"]}, "prompt.0", "string"),
    ({"prompt": None}, "prompt", ""),
]


def check(response: httpx2.Response, param: str, text: str, status: int = 400) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").endswith(param)
    assert text in error["message"]
    assert param.rpartition(".")[2] in error["message"]
    assert len(error["message"]) < 600


def post(server: Server, path: str, body: dict[str, Any]) -> httpx2.Response:
    # By hand, as NaN is no JSON and clients refuse to send it.
    return server.http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})


@pytest.mark.parametrize(("fields", "param", "text"), BOTH + CHAT, ids=str)
def test_a_bad_field_of_a_chat(server: Server, fields: dict[str, Any], param: str, text: str) -> None:
    check(post(server, "/v1/chat/completions", {**chat_body(), **fields}), param, text)


@pytest.mark.parametrize(("fields", "param", "text"), BOTH + COMPLETION, ids=str)
def test_a_bad_field_of_a_completion(server: Server, fields: dict[str, Any], param: str, text: str) -> None:
    check(post(server, "/v1/completions", {"model": "fake", "prompt": "abc", **fields}), param, text)


def test_what_is_needed_is_asked_for(server: Server) -> None:
    check(server.post("/v1/completions", {"prompt": "abc"}), "model", "needed")
    check(server.post("/v1/completions", {"model": "fake"}), "prompt", "needed")
    check(server.post("/v1/chat/completions", {"model": "fake"}), "messages", "needed")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": "x" * 1024}, "1,024 tokens do not fit a context of 1,024"),
        ({"prompt": ["abc", "x" * 5000]}, "5,000 tokens do not fit a context of 1,024"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [97]}, "token 97 is not one of 0 to 96"),
        ({"prompt": [-1]}, "-1 is not a token id"),
        ({"prompt": [10**30]}, "is not a token id"),
        ({"prompt": "\ud800"}, ""),
        ({"logit_bias": {"97": 1}}, "token 97 is not one of 0 to 96"),
        ({"guided_regex": "(a"}, "regex"),
        ({"guided_json": {"type": "nonsense"}}, "json_schema"),
        ({"guided_choice": []}, "choice"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses(server: Server, fields: dict[str, Any], text: str, stream: bool) -> None:
    response = post(server, "/v1/completions", {"model": "fake", "prompt": "abc", **fields, "stream": stream})
    assert response.status_code == 400, response.text
    assert text in response.json()["error"]["message"]
    assert server.is_idle()


def test_a_request_that_is_larger_than_the_whole_cache_is_refused_at_once() -> None:
    with Server("--blocks", 8) as small:
        response = small.complete("x" * 100, max_tokens=100)
        assert response.status_code == 400
        assert "do not fit the KV cache of 128 tokens" in response.json()["error"]["message"]
        answer = small.chat("x" * 100).json()  # which asks for no number of tokens, and gets what there is room for
        assert answer["usage"]["total_tokens"] <= 128
        assert small.chat("x" * 200).status_code == 400


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[1]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b'{"model": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 10_000 + b"]" * 10_000, "nested"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "nested"),
        (json.dumps({"model": "fake", "guided_json": {"a": DEEP}}).encode(), "nested"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_body_that_is_no_request(server: Server, body: bytes, text: str) -> None:
    response = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert text in response.json()["error"]["message"]


def test_a_body_of_another_kind(server: Server) -> None:
    response = server.http.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405)]
)
def test_what_there_is_not_has_the_form_of_an_error_too(server: Server, method: str, path: str, status: int) -> None:
    response = server.http.request(method, path)
    assert response.status_code == status
    assert path in response.json()["error"]["message"]


def test_tokenize_wants_a_text_or_messages(server: Server) -> None:
    messages = [{"role": "user", "content": "a"}]
    assert server.post("/tokenize", {}).status_code == 400
    assert server.post("/tokenize", {"prompt": "a", "messages": messages}).status_code == 400
    assert server.post("/detokenize", {"tokens": [-1]}).status_code == 400
    assert server.post("/detokenize", {"tokens": [10**12]}).status_code == 400
    assert post(server, "/tokenize", {"prompt": "\ud800"}).status_code == 400


def test_after_all_this_the_engine_is_whole(server: Server) -> None:
    assert server.complete("abc", max_tokens=3).json()["choices"][0]["text"] == "def"
    assert server.is_idle()
    assert server.said() == ""
