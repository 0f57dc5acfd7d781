"""A server by its URL: its routes, the model it serves, and how many tokens it makes of a text.

Asked before a load, never during it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ...errors import MeasureError, UsageError
from .plan import Endpoint

if TYPE_CHECKING:
    import httpx2

ROUTES = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
SECONDS = 60.0
"""For a question that is not part of the load."""


@dataclass(frozen=True)
class Target:
    """A server and one model of it."""

    root: str
    """The URL without /v1."""
    model: str
    headers: dict[str, str]
    engine: str | None = None
    """What the server calls itself, where it does."""

    def url(self, endpoint: Endpoint) -> str:
        return self.root + ROUTES[endpoint]

    async def prompt_tokens(self, body: dict[str, Any], endpoint: Endpoint) -> int | None:
        """Tokens that the server counts in the prompt of a request; None if it does not tell. Raises MeasureError."""
        # Two tokens: there are servers that count one as none.
        asked = {**body, "max_tokens": 2, "stream": False}
        asked.pop("stream_options", None)
        async with client(self.headers) as http:
            answer = await ask(http, "POST", self.url(endpoint), asked)
        usage = answer.get("usage")
        return usage.get("prompt_tokens") if isinstance(usage, dict) else None

    async def tokenize(self, http: httpx2.AsyncClient, text: str) -> int | None:
        """Tokens of a text alone; None if the server has no such route."""
        # `prompt` is what vLLM reads, `content` is llama-server's.
        asked = {"model": self.model, "prompt": text, "content": text, "add_special_tokens": False}
        try:
            answer = await ask(http, "POST", f"{self.root}/tokenize", asked)
        except MeasureError:
            return None
        tokens, count = answer.get("tokens"), answer.get("count")
        return len(tokens) if isinstance(tokens, list) else count if isinstance(count, int) else None


async def find_target(url: str, model: str | None, api_key: str | None) -> Target:
    """Look at the server behind a URL. Raises UsageError (a bad URL, no such model) or MeasureError (no answer)."""
    root = root_of(url)
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    async with client(headers) as http:
        try:
            listed = (await ask(http, "GET", f"{root}/v1/models")).get("data")
        except MeasureError:
            if model is None:
                raise
            listed = None  # a server may have no such route: then the load itself shows whether it answers
    models = {str(entry.get("id")): entry for entry in listed or () if isinstance(entry, dict)}
    if model is None and len(models) != 1:
        raise UsageError(f"{root} serves {', '.join(models) or 'no model'}", hint="--model says which one is meant")
    name = next(iter(models)) if model is None else model
    engine = models.get(name, {}).get("owned_by")
    return Target(root, name, headers, None if engine is None else str(engine))


def root_of(url: str) -> str:
    """Scheme, host, port and path of a URL, without /v1 and what may follow it. Raises UsageError."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        known = False
    if not known:
        raise UsageError(f"{url!r} is no address of a server", hint="such as http://127.0.0.1:8000")
    if parts.username is not None:
        raise UsageError("the URL holds a name or a password", hint="--api-key takes a key, and no record shows it")
    path = parts.path.partition("/v1/")[0].rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}"


def client(headers: dict[str, str]) -> httpx2.AsyncClient:
    """A client for questions."""
    import httpx2

    return httpx2.AsyncClient(headers=headers, timeout=SECONDS)


async def ask(http: httpx2.AsyncClient, method: str, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object that a route answers. Raises MeasureError."""
    import httpx2

    try:
        response = await http.request(method, url, json=body)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise MeasureError(f"no answer from {url}: {error or type(error).__name__}") from error
    if response.status_code != 200:
        raise MeasureError(f"{url} answered {response.status_code}: {' '.join(response.text.split())[:200]}")
    try:
        found = json.loads(response.content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise MeasureError(f"{url} answered no JSON object")
    return found
