"""The OpenAPI document against the server: whatever it allows or forbids, answers are as documented and never a 500."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import PATIENCE, Server, chat_body

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
SETTINGS = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
OPERATIONS = 9


def test_answers_are_as_the_document_says(server: Server) -> None:
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) == OPERATIONS
    for operation in operations:
        assert 500 not in _statuses(operation, GenerationMode.POSITIVE)
        if operation.method == "post":
            assert 400 in _statuses(operation, GenerationMode.NEGATIVE)
    assert server.complete("abc", max_tokens=3).json()["choices"][0]["text"] == "def"
    assert "Traceback" not in server.said()


TOOL = {"type": "function", "function": {"name": "f"}}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", chat_body("say:Hi")),
    ("/v1/chat/completions", chat_body("say:Hi", n=2, logprobs=True, top_logprobs=2, seed=1, stop=None)),
    ("/v1/chat/completions", chat_body("x", tools=[TOOL], tool_choice="required")),
    ("/v1/chat/completions", chat_body("say:Hi", stream=True)),
    ("/v1/completions", {"model": "fake", "prompt": ["a", "b"], "logprobs": 2, "echo": True, "prompt_logprobs": 1}),
    ("/tokenize", {"prompt": "a"}),
    ("/detokenize", {"tokens": [1]}),
]


@pytest.mark.parametrize(("path", "body"), GOOD)
def test_good_answers_are_as_the_document_says(server: Server, path: str, body: dict[str, Any]) -> None:
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    case = document[path]["POST"].Case(body=body, media_type="application/json")
    assert case.call_and_validate(checks=CHECKS, timeout=PATIENCE).status_code == 200


def _statuses(operation: Any, mode: GenerationMode) -> set[int]:
    """What some requests that the document allows, or forbids, were answered with."""
    found = set[int]()

    @SETTINGS
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body |= {"model": "fake", **({"max_tokens": 3} if "max_tokens" in case.body else {})}
        found.add(case.call_and_validate(checks=CHECKS, timeout=PATIENCE).status_code)

    check()
    return found
