"""The process in which chat templates run: reads requests on stdin, answers on stdout. Knows nothing of Gossamer.

A template is a program that came with a model or a request. Here it has no attribute of Python's own to reach for
(jinja2's immutable sandbox), 512 MB of memory, a few seconds of the processor, no file to write to; and its parent
kills the process at the deadline. It is run as a file, isolated: `python -I _template_worker.py`.

A frame is four bytes of length, big-endian, and JSON. Request: {"template", "variables"}; answer: {"text"} or
{"error", "kind"}. The first frame, {"ready": true}, says that it listens.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY = 512 << 20
SECONDS = 3
MAX_OUTPUT = 1 << 20
MAX_CACHED = 16


class RefusedError(TemplateError):
    """The template itself refused the conversation."""


class TooLongError(TemplateError):
    """More text than any prompt has."""


class Generation(Extension):
    """`{% generation %}` marks the model's own words for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PlainNamespace(Namespace):
    """A namespace without underscored names, through which templates have left sandboxes."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **values)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which says no where the original quietly gives nothing."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"the attribute {attribute!r} of a {type(obj).__name__}")


def environment() -> ImmutableSandboxedEnvironment:
    """What transformers offers to chat templates, by the same names."""
    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    env.globals["namespace"] = PlainNamespace
    return env


def render(env: jinja2.Environment, cache: dict[str, jinja2.Template], request: dict[str, Any]) -> dict[str, str]:
    """The answer to one request; whatever the template does is an answer too."""
    source = request["template"]
    try:
        if source not in cache:
            if len(cache) >= MAX_CACHED:
                cache.clear()
            cache[source] = env.from_string(source)
        pieces: list[str] = []
        length = 0
        for piece in cache[source].generate(**request["variables"]):
            length += len(piece)
            if length > MAX_OUTPUT:
                raise TooLongError(f"prints more than {MAX_OUTPUT} characters")
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except TemplateSyntaxError as error:
        return _error("syntax", f"line {error.lineno}: {error.message}")
    except SecurityError as error:
        return _error("security", f"reaches for what it may not: {error}")
    except (TooLongError, MemoryError, RecursionError) as error:
        return _error("limit", str(error) or f"needs more memory than {MEMORY >> 20} MB")
    except RefusedError as error:
        return _error("raised", str(error))
    except Exception as error:
        return _error("failed", f"{type(error).__name__}: {error}")


def main() -> None:
    """Serve until stdin ends or the parent is gone."""
    env, cache, parent = environment(), dict[str, jinja2.Template](), os.getppid()
    _limit()
    _send({"ready": True})
    while (request := _receive(parent)) is not None:
        _budget()
        answer = render(env, cache, request)
        signal.alarm(0)
        try:
            _send(answer)
        except MemoryError:
            _send(_error("limit", f"needs more memory than {MEMORY >> 20} MB"))


def _limit() -> None:
    for name, limit in (("RLIMIT_AS", MEMORY), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        with contextlib.suppress(ValueError, OSError):  # a system that does not take this limit; the others hold
            resource.setrlimit(getattr(resource, name), (limit, limit))


def _budget() -> None:
    """Seconds of processor and of the clock for this request, should the parent not be there to watch."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(usage.ru_utime + usage.ru_stime)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS + 1, hard))
    signal.alarm(SECONDS)


def _receive(parent: int) -> dict[str, Any] | None:
    while not select.select([0], [], [], 5.0)[0]:
        if os.getppid() != parent:  # a fork may hold the pipe open when the parent is long dead
            return None
    header = _read(4)
    if header is None:
        return None
    body = _read(int.from_bytes(header, "big"))
    request: dict[str, Any] | None = None if body is None else json.loads(body)
    return request


def _read(count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        piece = os.read(0, count - len(data))
        if not piece:
            return None
        data += piece
    return bytes(data)


def _send(answer: dict[str, Any]) -> None:
    body = json.dumps(answer).encode()
    view = memoryview(len(body).to_bytes(4, "big") + body)
    while view:
        view = view[os.write(1, view) :]


def _error(kind: str, message: str) -> dict[str, str]:
    return {"kind": kind, "error": message[:500]}


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the name {name!r}")


def _raise_exception(message: object) -> NoReturn:
    raise RefusedError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(0)
