"""The routes, as a FastAPI application over a Service, and the OpenAPI document of what they take and give.

POST /v1/chat/completions  /v1/completions  /tokenize  /detokenize
GET  /v1/models  /v1/models/{id}  /health  /metrics  /version  /  (the playground)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

from .. import __version__
from .protocol import (
    ApiError,
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    Strict,
    TokenizeRequest,
    TokenizeResponse,
    Version,
)
from .service import Service
from .transport import Guard, JSONAnswer, refused

WEB = Path(__file__).with_name("web")
REQUESTS: tuple[type[Strict], ...] = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
PAGE_HEADERS = {
    "Cache-Control": "no-cache",  # a new version of the page counts at once
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "frame-ancestors 'none'",  # no other site may show it as its own, and catch the key
}
REFERENCE = "#/components/schemas/{model}"
WHAT_GOES_WRONG = {
    400: "The request is wrong; `param` names the field.",
    401: "No valid API key.",
    404: "No such model.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "The queue is full; Retry-After says when to come again.",
    500: "The engine could not go on.",
    503: "No engine at the moment, or the server shuts down.",
    504: "Not answered in time.",
}


def make_app(service: Service, api_key: str | None) -> FastAPI:
    """The application. With a key every route but /health wants it."""
    app = FastAPI(title="Gossamer", version=__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_surprise)
    app.add_middleware(Guard, key=api_key, closed=lambda: service.draining)
    _add_answers(app, service)
    _add_models(app, service)
    _add_operations(app, service)
    _add_playground(app)
    _describe_requests(app)
    return app


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", **_takes(ChatRequest, ChatResponse, streams=True))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await service.chat(request)

    @app.post("/v1/completions", **_takes(CompletionRequest, CompletionResponse, streams=True))
    async def completions(request: Request) -> Response:
        """Continue texts."""
        return await service.complete(request)

    @app.post("/tokenize", **_takes(TokenizeRequest, TokenizeResponse))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text, or of a conversation in the chat template."""
        return await service.tokenize(request)

    @app.post("/detokenize", **_takes(DetokenizeRequest, DetokenizeResponse))
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        return await service.detokenize(request)


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses=_responses(ModelList, 401))
    async def models() -> Response:
        """The models that are served."""
        return JSONAnswer({"object": "list", "data": [service.card(model) for model in service.models.values()]})

    @app.get("/v1/models/{name:path}", responses=_responses(ModelCard, 401, 404))
    async def model(name: str) -> Response:
        """One of them."""
        return JSONAnswer(service.card(service.model(name)))


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses=_responses(Health) | {503: {"model": Health}})
    async def health() -> Response:
        """200 while every model can answer; wants no key."""
        status, body = service.health()
        return JSONAnswer(body, status)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}, 401: {"model": ErrorResponse}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version", responses=_responses(Version, 401))
    async def version() -> Response:
        return JSONAnswer({"version": __version__})


def _add_playground(app: FastAPI) -> None:
    """A page to try the models on, at `/`."""
    if not (WEB / "index.html").exists():
        return

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return FileResponse(WEB / "index.html", headers=PAGE_HEADERS)

    app.mount("/web", _Files(directory=WEB), name="web")


class _Files(StaticFiles):
    """What the page needs."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(PAGE_HEADERS)
        return response


def _takes(request: type[Strict], response: type, streams: bool = False) -> dict[str, Any]:
    """What the OpenAPI document says of a route that reads its body itself."""
    content = {"application/json": {"schema": {"$ref": REFERENCE.format(model=request.__name__)}}}
    responses = _responses(response, *WHAT_GOES_WRONG)
    if streams:
        responses[200]["content"] = {"text/event-stream": {}}
    return {"responses": responses, "openapi_extra": {"requestBody": {"required": True, "content": content}}}


def _responses(kind: type, *errors: int) -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {200: {"model": kind}}
    for status in errors:
        found[status] = {"model": ErrorResponse, "description": WHAT_GOES_WRONG[status]}
    return found


def _describe_requests(app: FastAPI) -> None:
    """Put the schemas of the requests where the routes refer to them."""
    document = app.openapi()
    _, schemas = models_json_schema([(kind, "validation") for kind in REQUESTS], ref_template=REFERENCE)
    document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return refused(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    what = {404: f"there is no {request.url.path!r:.120}", 405: f"{request.url.path} takes no {request.method}"}
    message = what.get(error.status_code, str(error.detail))
    return refused(ApiError(error.status_code, message, headers=error.headers))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """The client went away while it was sending: nobody reads this."""
    return Response(status_code=499)


async def _on_surprise(request: Request, error: Exception) -> Response:
    """A mistake of ours: it is logged with its traceback, and nothing of it is told."""
    return refused(ApiError(500, "internal error"))
