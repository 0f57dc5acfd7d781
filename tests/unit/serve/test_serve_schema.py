"""The OpenAPI document against the server: whatever it allows or forbids, answers are as documented and never a 500."""

from __future__ import annotations

from typing import Any

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
from serving import PATIENCE, Server

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
SETTINGS = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
OPERATIONS = 9


def test_answers_are_as_the_document_says(server: Server) -> None:
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) == OPERATIONS
    seen = {
        (operation.path, mode): _statuses(operation, mode)
        for operation in operations
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    }
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
        assert {200, 400} <= seen[path, GenerationMode.POSITIVE]
        assert {400} <= seen[path, GenerationMode.NEGATIVE] <= {400, 404}
    assert server.complete("abc", max_tokens=3).json()["choices"][0]["text"] == "def"
    assert "Traceback" not in server.said()


def _statuses(operation: Any, mode: GenerationMode) -> set[int]:
    """What some requests that the document allows, or forbids, were answered with."""
    found = set[int]()
    if mode is GenerationMode.NEGATIVE and operation.method == "get":
        return found  # there is nothing that could be wrong

    @SETTINGS
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body |= {"model": "fake", **({"max_tokens": 3} if "max_tokens" in case.body else {})}
        found.add(case.call_and_validate(checks=CHECKS, timeout=PATIENCE).status_code)

    check()
    return found
