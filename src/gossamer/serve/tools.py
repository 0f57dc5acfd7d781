"""Tool calls: the schema that enforces one, what a chat template is told, and finding calls in an answer.

A model that chooses freely says `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Hermes, Qwen and SmolLM
do; where tool_choice demands a call, a grammar makes the whole answer that JSON object. Knows no HTTP and no engine.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .protocol import ChatRequest, Message, TextPart, Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_CALL = 1 << 20
"""Characters of a call; what is longer is text."""


@dataclass(frozen=True)
class Call:
    """A function that the model wants called, with its arguments as JSON."""

    id: str
    name: str
    arguments: str


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """A JSON schema of one call of one of these functions."""
    options = []
    for i, tool in enumerate(tools):
        where = f"#/anyOf/{i}/properties/arguments" if len(tools) > 1 else "#/properties/arguments"
        parameters = tool.function.parameters or {"type": "object"}
        options.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": _moved(parameters, where)},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return options[0] if len(options) == 1 else {"anyOf": options}


def _moved(schema: Any, where: str) -> Any:
    """A schema that now stands at `where`: references to its own parts follow."""
    if isinstance(schema, list):
        return [_moved(item, where) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, where) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = where + reference[1:]
    return moved


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: content is text, arguments are objects, no key without a value."""
    return [_template_message(message) for message in messages]


def template_variables(request: ChatRequest) -> dict[str, Any]:
    """What else the template is told: the tools, unless none may be called."""
    if not request.tools or request.tool_choice == "none":
        return {}
    return {"tools": [tool.model_dump(exclude_none=True) for tool in request.tools]}


def _template_message(message: Message) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content if isinstance(part, TextPart))
    said: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content or ""}
    for key in ("name", "tool_call_id"):
        if getattr(message, key) is not None:
            said[key] = getattr(message, key)
    if message.tool_calls:
        said["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _object(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return said


def _object(arguments: str) -> Any:
    """Arguments as the object that they are, or as they stand."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def call_in(text: str) -> Call | None:
    """The call that a JSON object is, or None."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not isinstance(said.get("name"), str):
        return None
    arguments = said.get("arguments", said.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    return Call(f"call_{secrets.token_hex(12)}", said["name"], json.dumps(arguments, ensure_ascii=False))


class Finder:
    """Parts an answer that comes in pieces into text and calls; text that might begin a call is held back."""

    def __init__(self, enforced: bool) -> None:
        """`enforced`: the whole answer is one call, without a mark around it."""
        self._enforced = enforced
        self._held = ""
        self._inside = enforced

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Text that may be shown, and calls that are whole."""
        self._held += text
        shown, calls = "", list[Call]()
        while not self._enforced:
            before, mark, after = self._held.partition(CLOSE if self._inside else OPEN)
            if not mark:
                break
            if self._inside:
                call = call_in(before)
                if call is not None:
                    calls.append(call)
                else:
                    shown += OPEN + before + CLOSE
            else:
                shown += before
            self._held, self._inside = after, not self._inside
        return shown + self._spare(), calls

    def flush(self) -> tuple[str, list[Call]]:
        """What was held back, once nothing more can follow: a call whose end the model left out, or text."""
        held, self._held = self._held, ""
        if not self._inside:
            return held, []
        call = call_in(held)
        self._inside = False
        if call is not None:
            return "", [call]
        return ("" if self._enforced else OPEN) + held, []

    def _spare(self) -> str:
        """What of the held text cannot be part of a call."""
        if self._inside:
            if self._enforced or len(self._held) <= MAX_CALL:
                return ""
            spare, self._held, self._inside = OPEN + self._held, "", False
            return spare
        keep = next((n for n in range(min(len(OPEN) - 1, len(self._held)), 0, -1) if self._held.endswith(OPEN[:n])), 0)
        spare, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return spare
