"""Any OpenAI-compatible server as an engine: the same token ids, through /v1/completions, as many at once as the batch.

The server is somebody else's process, maybe on another machine: its memory is not known. Time to first token is that
of the last of a batch to get one.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ...errors import MeasureError, UsageError
from ..load.answer import read_answer
from ..load.stats import Answer
from ..load.target import Target, ask, client, find_target
from ..load.wire import Exchange, exchange
from ..worker import Channel

SECONDS = 600.0
"""For one request, its last token included."""


def bench_server(
    channel: Channel,
    url: str,
    model: str,
    api_key: str | None,
    prompts: Sequence[Sequence[Sequence[int]]],
    output_tokens: int,
    windows: Sequence[Sequence[int]],
    scored: int,
) -> Iterator[dict[str, Any] | None]:
    """One run for each value asked for, then what was measured, as the process of a peer says it."""
    target = asyncio.run(_target(url, model, api_key))
    channel.fact("engine", {"backend": target.engine})
    yield None
    timings = []
    for batch in prompts:
        timings.append(asyncio.run(_run(target, batch, output_tokens)))
        yield None
    unknown = ("bare_bytes", "rm_weights_bytes", "rm_peak_bytes", "rm_reserved_bytes", "load_s", "kv_element_bytes")
    yield {**dict.fromkeys(unknown), "timings": timings, "judged": _judge(channel, target, windows, scored)}


async def _target(url: str, model: str, api_key: str | None) -> Target:
    """The only model that the server has, or the one of this name."""
    try:
        return await find_target(url, None, api_key)
    except UsageError:
        return await find_target(url, model, api_key)


async def _run(target: Target, batch: Sequence[Sequence[int]], output_tokens: int) -> tuple[float, float]:
    """Seconds from the first request to the first token of every prompt, and from there to the last. Raises."""
    options = {"max_tokens": output_tokens, "ignore_eos": True, "stream": True}
    bodies = [_body(target, ids, **options, stream_options={"include_usage": True}) for ids in batch]
    url = target.url("completions")
    got: list[Exchange] = await asyncio.gather(
        *(exchange(url, target.headers, json.dumps(b).encode(), SECONDS) for b in bodies)
    )
    answers = [_checked(one, ids, output_tokens) for one, ids in zip(got, batch, strict=True)]
    first, decode = moments(got, answers)
    if decode <= 0:
        raise MeasureError("the server sent its whole answer at once, so no time between tokens can be told")
    return first, decode


def moments(got: Sequence[Exchange], answers: Sequence[Answer]) -> tuple[float, float]:
    """The two times of a run: until the last of the first tokens came, and from then until the last token."""
    pairs = list(zip(got, answers, strict=True))
    first = max(one.sent + answer.ttft for one, answer in pairs)
    ended = max(one.sent + answer.e2e for one, answer in pairs)
    return first - min(one.sent for one in got), ended - first


def _checked(got: Exchange, ids: Sequence[int], output_tokens: int) -> Answer:
    """The answer, if it is what was asked for. Raises MeasureError: figures of other tokens mean something else."""
    answer = read_answer(got)
    if answer.error is not None:
        raise MeasureError(answer.error)
    if answer.prompt_tokens is None:
        raise MeasureError("the server does not tell how many tokens it read (no usage in its stream)")
    if answer.prompt_tokens != len(ids):
        raise MeasureError(f"the server read {answer.prompt_tokens} tokens, where {len(ids)} were sent")
    if answer.output_tokens != output_tokens:
        raise MeasureError(
            f"the server wrote {answer.output_tokens} tokens, not {output_tokens}", hint="it must heed ignore_eos"
        )
    return answer


def _judge(channel: Channel, target: Target, windows: Sequence[Sequence[int]], scored: int) -> dict[str, Any] | None:
    if not windows:
        return None
    nll, began = 0.0, time.perf_counter()
    try:
        for done, window in enumerate(windows):
            channel.progress("judging", done, len(windows))
            nll += asyncio.run(_nll(target, window, scored))
    except MeasureError as error:
        return {"error": {"kind": "MeasureError", "message": error.message, "hint": error.hint}}
    return {"nll": nll / (len(windows) * scored), "seconds": time.perf_counter() - began}


async def _nll(target: Target, window: Sequence[int], scored: int) -> float:
    """Summed over the last `scored` tokens of a window. Raises MeasureError where the server tells no such thing."""
    body = _body(target, window, max_tokens=1, echo=True, logprobs=1)
    async with client(target.headers) as http:
        answer = await ask(http, "POST", target.url("completions"), body)
    try:
        told = answer["choices"][0]["logprobs"]["token_logprobs"][: len(window)]
        nll = -float(sum(told[len(window) - scored :]))
    except (KeyError, IndexError, TypeError):
        told, nll = [], math.nan
    if len(told) < len(window) or not math.isfinite(nll):
        raise MeasureError("the server tells no log-probabilities of a prompt (completions with echo and logprobs)")
    return nll


def _body(target: Target, ids: Sequence[int], **options: Any) -> dict[str, Any]:
    return {"model": target.model, "prompt": list(ids), "temperature": 0, **options}
