"""What the routes do: which model, whether there is room, from a request to a prompt, and from there to an answer.

Knows requests and engines; knows no paths and no sockets.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from ..checkpoint import Tokenizer
from ..engine.params import MAX_CHOICES, SamplingParams
from ..engine.sequence import Output
from ..errors import EngineError, TokenizerError, did_you_mean
from . import sampling, tools
from .admission import Bodies, Queue
from .answers import ChatForm, Clock, CompletionForm
from .client import EngineClient, Generation, Started, WorkerLost
from .metrics import Metrics
from .protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generate,
    Message,
    Strict,
    TokenizeRequest,
    read_as,
)
from .transport import ClientGone, EventStream, JSONAnswer, shutting_down, while_connected

TOKENIZER_THREADS = 4
TEMPLATE_THREADS = 4
"""Apart from the others: a template that is stopped after two seconds delays no plain text."""
T = TypeVar("T")
R = TypeVar("R", bound=Strict)
Form: TypeAlias = ChatForm | CompletionForm
Begin: TypeAlias = "Callable[[Any, Served, Clock, ExitStack], Awaitable[tuple[Form, Generation]]]"
"""From a request of one kind to its prompts in the engine; what must be given back goes on the stack."""


@dataclass(frozen=True)
class Limits:
    """What the server takes, and how long it waits."""

    max_queue: int = 128
    """Completions of one model that may wait besides those that run."""
    max_body: int = 4 << 20
    """Bytes of one request's body."""
    max_bodies: int = 64 << 20
    """Bytes of all bodies that are being taken in."""
    body_seconds: float = 30.0
    request_seconds: float = 600.0


@dataclass
class Served:
    """One model."""

    name: str
    client: EngineClient
    tokenizer: Tokenizer
    queue: Queue
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def context(self) -> int | None:
        """Most tokens of a prompt and its answer together; None while the engine is restarted."""
        ready = self.client.ready
        return None if ready is None else ready.max_prompt_tokens + 1


class Service:
    """All models of one server."""

    def __init__(self, models: Sequence[Served], limits: Limits) -> None:
        self.models = {model.name: model for model in models}
        self.limits = limits
        self.metrics = Metrics({model.name: _stats_of(model.client) for model in models})
        self.bodies = Bodies(limits.max_body, max(limits.max_bodies, limits.max_body), limits.body_seconds)
        self.draining = False
        self.in_flight = 0
        """Requests for answers that have not ended."""
        self._threads = ThreadPoolExecutor(TOKENIZER_THREADS, "tokenizer")
        self._template_threads = ThreadPoolExecutor(TEMPLATE_THREADS, "template")

    def close(self) -> None:
        for pool in (self._threads, self._template_threads):
            pool.shutdown(wait=False, cancel_futures=True)

    # --- answers -----------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, ChatRequest, self._begin_chat)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, CompletionRequest, self._begin_completion)

    async def _answer(self, http: Request, kind: type[Generate], begin: Begin) -> Response:
        """Read, check, admit, tokenize, generate. What was taken on the way is given back however it ends."""
        arrival = time.monotonic()
        held = ExitStack()
        streamed = False
        try:
            request = await self._read(http, kind)
            model = self.model(request.model)
            clock = Clock(model.name, self.metrics, arrival)
            work = self._generate(request, model, clock, held, begin)
            answer = await while_connected(http.receive, work, self.limits.request_seconds)
            streamed = isinstance(answer, EventStream)
            return answer
        except ClientGone:
            return Response(status_code=499)  # which nobody reads
        except TimeoutError:
            raise ApiError(504, f"not answered within {self.limits.request_seconds:g} s") from None
        finally:
            if not streamed:
                held.close()

    async def _generate(
        self, request: Generate, model: Served, clock: Clock, held: ExitStack, begin: Begin
    ) -> Response:
        """The answer, or the stream that it comes in once the engine has taken the prompts."""
        if self.draining:
            raise shutting_down()
        self.in_flight += 1
        held.callback(self._ended)
        form, generation = await begin(request, model, clock, held)
        events = self._events(model, generation, clock, form)
        if request.stream:
            chunks = self._chunks(request, form, clock, events)
            return EventStream(chunks, held.close, self.limits.request_seconds, lambda: self._note(model, clock))
        async for _ in events:
            pass
        self._note(model, clock)
        body = {**_envelope(form.id, form.kind, request.model), "choices": form.choices(), "usage": clock.usage()}
        return JSONAnswer(body)

    async def _begin_chat(
        self, request: ChatRequest, model: Served, clock: Clock, held: ExitStack
    ) -> tuple[Form, Generation]:
        sampling.chat_params(request, 1)  # what is wrong with the fields is wrong whatever the prompt
        held.enter_context(model.queue.places(request.n or 1))
        self._require_ready(model)
        variables = tools.template_variables(request)
        prompt = await self._chat_tokens(model, request.messages, True, variables)
        params = sampling.chat_params(request, max(1, (model.context or 1) - len(prompt)))
        form = ChatForm(request, model.tokenizer, enforced=sampling.is_call(request))
        return form, await self._submit(model, [prompt], params, clock, held)

    async def _begin_completion(
        self, request: CompletionRequest, model: Served, clock: Clock, held: ExitStack
    ) -> tuple[Form, Generation]:
        prompts = _prompts(request)
        params = sampling.completion_params(request, len(prompts))
        held.enter_context(model.queue.places(len(prompts) * params.n))
        self._require_ready(model)
        texts, tokens = await self._in_thread(lambda: _tokenized(model.tokenizer, prompts))
        form = CompletionForm(request, model.tokenizer, texts, tokens)
        return form, await self._submit(model, tokens, params, clock, held)

    async def _submit(
        self, model: Served, prompts: list[list[int]], params: SamplingParams, clock: Clock, held: ExitStack
    ) -> Generation:
        """Hand prompts to the engine. Raises ApiError for what it refuses."""
        try:
            generation = await model.client.submit(prompts, params)
        except EngineError as error:
            raise _refusal(error) from None
        except WorkerLost as lost:
            raise _lost(lost) from None
        held.callback(clock.end)
        held.callback(generation.close)
        clock.begin(prompts, params.n, model.client.stats)
        return generation

    async def _events(
        self, model: Served, generation: Generation, clock: Clock, form: Form
    ) -> AsyncIterator[dict[str, Any]]:
        """Chunks of the answer as its outputs come. Raises ApiError if the engine cannot go on."""
        numbers = {request: i for i, request in enumerate(generation.ids)}
        try:
            async for event in generation.events():
                if isinstance(event, Started):
                    clock.started()
                    continue
                prompt = numbers[event.request_id]
                index = prompt * generation.params.n + event.choice
                clock.take(index, prompt, event, model.client.stats)
                _require_whole(event, generation.params)
                for chunk in form.take(index, event):
                    yield chunk
        except WorkerLost as lost:
            raise _lost(lost) from None

    async def _chunks(
        self, request: Generate, form: Form, clock: Clock, events: AsyncIterator[dict[str, Any]]
    ) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream."""
        envelope = _envelope(form.id, form.chunk_kind, request.model)
        usage = {"usage": None} if request.include_usage else {}
        for choice in form.opening():
            yield {**envelope, "choices": [choice], **usage}
        async for choice in events:
            yield {**envelope, "choices": [choice], **usage}
        if request.include_usage:
            yield {**envelope, "choices": [], "usage": clock.usage()}

    # --- the rest ----------------------------------------------------------------------------------------------------

    async def tokenize(self, http: Request) -> Response:
        """POST /tokenize."""
        request = await self._read(http, TokenizeRequest)
        model = self.model(request.model)
        with model.queue.places(1):
            if request.messages is not None:
                tokens = await self._chat_tokens(model, request.messages, request.add_generation_prompt, {})
            else:
                text = request.prompt or ""
                tokens = await self._in_thread(lambda: model.tokenizer.encode(text, request.add_special_tokens))
        return JSONAnswer({"count": len(tokens), "max_model_len": model.context, "tokens": tokens})

    async def detokenize(self, http: Request) -> Response:
        """POST /detokenize."""
        request = await self._read(http, DetokenizeRequest)
        model = self.model(request.model)
        with model.queue.places(1):
            text = await self._in_thread(lambda: model.tokenizer.decode(request.tokens, skip_special=False))
        return JSONAnswer({"prompt": text})

    def model(self, name: str | None) -> Served:
        """A model by its name, or the only one. Raises ApiError, 404."""
        if name is None:
            if len(self.models) > 1:
                raise ApiError(400, f"model: it is needed, one of {', '.join(self.models)}", "model")
            return next(iter(self.models.values()))
        if name not in self.models:
            hint = did_you_mean(name[:200], self.models)
            message = f"there is no model {name!r:.120}" + (f"; {hint}" if hint else "")
            raise ApiError(404, message, "model", "model_not_found")
        return self.models[name]

    def card(self, model: Served) -> dict[str, Any]:
        return {
            "id": model.name, "object": "model", "created": model.created, "owned_by": "gossamer",
            "max_model_len": model.context,
        }  # fmt: skip

    def health(self) -> tuple[int, dict[str, Any]]:
        """HTTP status, and how each model stands."""
        models = {m.name: "restarting" if m.client.ready is None else "ready" for m in self.models.values()}
        if self.draining:
            return 503, {"status": "draining", "models": models}
        if "restarting" in models.values():
            return 503, {"status": "unavailable", "models": models}
        return 200, {"status": "ok", "models": models}

    async def _read(self, http: Request, kind: type[R]) -> R:
        with self.bodies.room(http) as body:
            return read_as(kind, await body.json())

    async def _chat_tokens(
        self, model: Served, messages: Sequence[Message], prompt: bool, variables: Mapping[str, Any]
    ) -> list[int]:
        plain = tools.template_messages(messages)
        work = partial(model.tokenizer.chat, plain, prompt, **variables)
        return await self._in_thread(work, self._template_threads)

    async def _in_thread(self, work: Callable[[], T], pool: ThreadPoolExecutor | None = None) -> T:
        """Have a thread do what may take long. Raises ApiError, 400, for text that cannot be taken."""
        try:
            return await asyncio.get_running_loop().run_in_executor(pool or self._threads, work)
        except TokenizerError as error:
            raise ApiError(400, _said(error)) from None

    def _require_ready(self, model: Served) -> None:
        """Raise ApiError, 503, while there is no engine: nothing needs to be tokenized to know that."""
        if model.client.ready is None:
            raise _lost(WorkerLost(f"the engine of {model.name} is being restarted"))

    def _ended(self) -> None:
        self.in_flight -= 1

    def _note(self, model: Served, clock: Clock) -> None:
        model.queue.note(time.monotonic() - clock.arrival)


def _prompts(request: CompletionRequest) -> list[str] | list[list[int]]:
    """The prompts as a list. Raises ApiError if there are none or too many."""
    prompt: Any = request.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not 1 <= len(prompt) <= MAX_CHOICES:
        raise ApiError(400, f"prompt has {len(prompt)} prompts, expected 1 to {MAX_CHOICES}", "prompt")
    return prompt  # type: ignore[no-any-return]


def _tokenized(tokenizer: Tokenizer, prompts: list[str] | list[list[int]]) -> tuple[list[str], list[list[int]]]:
    """Each prompt as text and as tokens."""
    texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in prompts]
    tokens = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    return texts, tokens


def _require_whole(output: Output, params: SamplingParams) -> None:
    """Raise ApiError if the engine could not go on: 400 where that is due to the request's grammar, else 500."""
    if output.error is None:
        return
    if params.grammar is not None and output.error.startswith(f"the {params.grammar.kind} "):
        raise ApiError(400, output.error, code="grammar_too_complex")
    raise ApiError(500, output.error, code="engine_error")


def _refusal(error: EngineError) -> ApiError:
    return ApiError(400, _said(error), code="context_length_exceeded" if "do not fit" in error.message else None)


def _lost(lost: WorkerLost) -> ApiError:
    return ApiError(503, _said(lost), code="engine_lost", headers={"Retry-After": "2"})


def _said(error: EngineError | TokenizerError | WorkerLost) -> str:
    return error.message if error.hint is None else f"{error.message}; {error.hint}"


def _envelope(identifier: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": identifier, "object": kind, "created": int(time.time()), "model": model}


def _stats_of(client: EngineClient) -> Callable[[], Any]:
    return lambda: client.stats
