"""From a plan to a record: the server is looked at, prompts are made, the load is sent, the answers are summed up."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..records import Record, make_record, unknown_model_block
from . import prompts as p
from .plan import LoadPlan
from .send import Load, Progress, Sender
from .stats import summarize
from .target import Target, client, find_target

if TYPE_CHECKING:
    import httpx2


def measure_load(
    url: str,
    plan: LoadPlan,
    progress: Progress,
    *,
    model: str | None = None,
    api_key: str | None = None,
    prompts: Path | None = None,
) -> Record:
    """One load on a server, as a record; Ctrl-C in the middle of it ends it early and keeps what is complete.

    Raises UsageError (a bad URL, an unknown model, a bad file) or MeasureError (no answer, no right to one).
    """
    return asyncio.run(_measure(url, plan, progress, model, api_key, prompts))


async def _measure(
    url: str, plan: LoadPlan, progress: Progress, model: str | None, api_key: str | None, prompts: Path | None
) -> Record:
    target = await find_target(url, model, api_key)
    asks, lengths = await prepare(target, plan, prompts)
    if plan.warmup:
        await Sender(target, plan, p.warmups(plan), progress, "warm-up").run()
    sender = Sender(target, plan, asks, progress, "requests")
    try:
        await sender.run()
    except asyncio.CancelledError:  # Ctrl-C: what was measured is worth its record
        _go_on()
    described = {"prompts": prompts.name if prompts is not None else "synthetic", "prompts_sha256": p.digest(asks)}
    return _record(target, plan, sender.load, {**described, **lengths})


async def prepare(target: Target, plan: LoadPlan, prompts: Path | None) -> tuple[list[p.Ask], dict[str, Any]]:
    """What will be asked, and how the prompts' lengths were found."""
    asks = p.from_file(prompts, plan) if prompts is not None else None
    if asks is not None and not plan.shared_prefix:
        return asks, {"input_tokens": None, "lengths_by": None}

    async def whole(text: str) -> int | None:
        body = p.Ask(text, 2).body(plan.endpoint, target.model, plan, 0)
        return await target.prompt_tokens(body, plan.endpoint)

    ruler = await p.calibrate(whole, plan.seed)
    async with client(target.headers) as http:
        exact = await _exact(target, http, whole, plan.seed) if ruler.measured else None
        prefix = await p.shared_prefix(plan, ruler, exact) if plan.shared_prefix else None
        made = await p.synthetic(plan, ruler, exact) if asks is None else asks
    lengths = "tokenize" if exact is not None else "usage" if ruler.measured else "words"
    wanted = str(plan.input_tokens) if asks is None else None
    return (
        made if prefix is None else [ask.after(prefix) for ask in made],
        {"input_tokens": wanted, "lengths_by": lengths},
    )


async def _exact(target: Target, http: httpx2.AsyncClient, whole: p.Count, seed: int) -> p.Count | None:
    """What counts a whole prompt without computing it; None if the server has no route for that."""
    sample = p.text("ruler", seed, words=8)
    bare, full = await target.tokenize(http, sample), await whole(sample)
    if bare is None or full is None:
        return None
    around = full - bare

    async def count(text: str) -> int | None:
        tokens = await target.tokenize(http, text)
        return None if tokens is None else tokens + around

    return count


def _go_on() -> None:
    """This task was to end and will do so by itself, so it is not seen as cancelled."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()


def _record(target: Target, plan: LoadPlan, load: Load, described: dict[str, Any]) -> Record:
    results = {
        **summarize(load.answers, load.duration, plan.goodput),
        "unfinished": load.unfinished,
        "interrupted": load.unfinished > 0,
        "client_cores": round(load.cpu / load.duration, 3) if load.duration > 0 else None,
    }
    reasons = ", ".join(f"{reason} ({count})" for reason, count in results["failures"].items())
    none = f"no request was answered: {reasons or 'interrupted'}"
    record = make_record(
        "load",
        model=unknown_model_block(target.model),
        engine={"name": target.engine, "version": None},
        protocol={"url": target.root, **plan.protocol(), **described},
        error=None if results["completed"] else none,
    )
    return record | {"results": results}
