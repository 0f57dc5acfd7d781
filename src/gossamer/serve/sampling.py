"""From a request to the engine's SamplingParams. What is wrong becomes an ApiError that names the field."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..engine.params import MAX_CHOICES, MAX_LOGPROBS, Grammar, SamplingParams
from ..errors import EngineError, UsageError
from . import tools
from .protocol import ApiError, ChatRequest, CompletionRequest, Generate, NamedTool

PASSED_ON = (
    "n", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "stop",
    "stop_token_ids", "min_tokens", "ignore_eos",
)  # fmt: skip
"""Fields that mean the same in a request and in SamplingParams."""
COMPLETION_TOKENS = 16
"""What OpenAI's completions give where max_tokens is not said."""


def chat_params(request: ChatRequest, room: int) -> SamplingParams:
    """Params of a chat; without max_tokens an answer may fill the `room` that is left. Raises ApiError."""
    limits = {"max_tokens": request.max_tokens, "max_completion_tokens": request.max_completion_tokens}
    given = {name: value for name, value in limits.items() if value is not None}
    if len(set(given.values())) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens are not the same: say one of them", "max_tokens")
    name = next(iter(given), "max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs", "top_logprobs")
    if not 0 <= (request.top_logprobs or 0) <= MAX_LOGPROBS:
        raise _out_of_bounds("top_logprobs", request.top_logprobs)
    fields = _fields(request, given.get(name, room))
    fields["logprobs"] = (request.top_logprobs or 0) if request.logprobs else None
    return _made(fields, {"max_tokens": name})


def completion_params(request: CompletionRequest, prompts: int) -> SamplingParams:
    """Params of a completion of so many prompts. Raises ApiError."""
    n = 1 if request.n is None else request.n
    if request.best_of is not None and request.best_of != n:
        raise ApiError(400, f"best_of is {request.best_of}, expected {n}, the same as n: all are given", "best_of")
    if 1 <= n <= MAX_CHOICES < n * prompts:
        raise ApiError(400, f"n is {n} for {prompts} prompts: more than {MAX_CHOICES} answers", "n")
    fields = _fields(request, COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens)
    fields["logprobs"] = request.logprobs
    asked = [value for value in (request.prompt_logprobs, request.logprobs if request.echo else None) if value]
    zero = request.prompt_logprobs is not None or (request.echo and request.logprobs is not None)
    fields["prompt_logprobs"] = max(asked, default=0 if zero else None)
    return _made(fields, {})


def _fields(request: Generate, max_tokens: int) -> dict[str, Any]:
    """What is said of a request, as SamplingParams calls it."""
    fields = {name: value for name in PASSED_ON if (value := getattr(request, name)) is not None}
    fields["max_tokens"] = max_tokens
    fields["temperature"] = 1.0 if request.temperature is None else request.temperature
    if request.logit_bias:
        fields["logit_bias"] = {_token(text): bias for text, bias in request.logit_bias.items()}
    fields["grammar"] = grammar(request)
    return fields


def _made(fields: Mapping[str, Any], names: Mapping[str, str]) -> SamplingParams:
    """The params. `names`: what the request calls a field."""
    try:
        return SamplingParams(**fields)
    except (EngineError, UsageError) as error:
        known = (*fields, "n", "logit_bias")
        param = next((f for f in known if re.search(rf"\b{f}\b", error.message.partition(" is ")[0])), None)
        param = param or next((f for f in known if re.search(rf"\b{f}\b", error.message)), None)
        name = names.get(param or "", param)
        message = error.message if param is None or name is None else error.message.replace(param, name, 1)
        raise ApiError(400, message, name) from None


def grammar(request: Generate) -> Grammar | None:
    """What the answer must look like, however that was said. Raises ApiError if it was said twice."""
    found: dict[str, Grammar] = {}
    form = request.response_format
    if form is not None and form.type == "json_object":
        found["response_format"] = Grammar("json")
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise ApiError(400, "response_format.json_schema.schema: it is needed", "response_format.json_schema")
        found["response_format"] = _source("response_format", "json_schema", form.json_schema.schema_)
    if request.guided_json is not None:
        found["guided_json"] = _source("guided_json", "json_schema", request.guided_json)
    if request.guided_regex is not None:
        found["guided_regex"] = _source("guided_regex", "regex", request.guided_regex)
    if request.guided_choice is not None:
        found["guided_choice"] = _source("guided_choice", "choice", request.guided_choice)
    if isinstance(request, ChatRequest) and (called := _called(request)) is not None:
        found["tool_choice"] = _source("tool_choice", "json_schema", called)
    if len(found) > 1:
        raise ApiError(400, f"{' and '.join(found)}: an answer can have one form only", next(iter(found)))
    return next(iter(found.values()), None)


def is_call(request: ChatRequest) -> bool:
    """True if the answer must be a tool call."""
    return request.tool_choice not in (None, "none", "auto")


def _called(request: ChatRequest) -> dict[str, Any] | None:
    """The schema of the tool call that tool_choice demands, if it does. Raises ApiError."""
    choice = request.tool_choice
    names = [tool.function.name for tool in request.tools or ()]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: two functions have one name", "tools")
    if not is_call(request) and (choice != "auto" or names):
        return None
    if not names:
        raise ApiError(400, "tool_choice: only with tools", "tool_choice")
    if not isinstance(choice, NamedTool):
        return tools.call_schema(request.tools or [])
    name = choice.function.name
    wanted = [tool for tool in request.tools or () if tool.function.name == name]
    if not wanted:
        raise ApiError(400, f"tool_choice names {name!r:.80}, which is none of the tools", "tool_choice")
    return tools.call_schema(wanted)


def _source(param: str, kind: Any, value: Any) -> Grammar:
    try:
        source = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        return Grammar(kind, source)
    except (EngineError, ValueError, RecursionError) as error:
        raise ApiError(400, f"{param}: {error}", param) from None


def _token(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 11):
        raise ApiError(400, f"logit_bias has the key {text!r:.80}, expected a token id", "logit_bias")
    return int(text)


def _out_of_bounds(name: str, value: Any) -> ApiError:
    return ApiError(400, f"{name} is {value!r}, expected an integer from 0 to {MAX_LOGPROBS}", name)
