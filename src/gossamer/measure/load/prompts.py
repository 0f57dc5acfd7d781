"""What a load asks: the lines of a file, or random words that make a prompt of a wanted length.

The same seed gives the same words. Knows no server: what counts tokens is handed in.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from ...errors import UsageError
from .plan import Endpoint, LoadPlan, draw_lengths

Count: TypeAlias = Callable[[str], Awaitable[int | None]]
"""Tokens that a server makes of a prompt; None where it does not tell."""

_COMMON = """
    time year people way day man thing woman life child world school state family student group country problem hand
    part place case week company system program question work government number night point home water room mother area
    money story fact month lot right study book eye job word business issue side kind head house service friend father
    power hour game line end member law car city name president team minute idea body information back parent face
    level office door health person art war history party result change morning reason research girl guy moment air
    teacher force education foot boy age policy music market sense nation plan college interest death experience effect
    use class control field development role effort rate heart drug show leader light voice wife police mind price
    report decision son view town road arm difference value building action season society tax director position player
    record paper space ground form event official matter center couple site project activity star table need court
    production half picture term cost food land sound field water run walk talk think find give tell work call try ask
    feel become leave put mean keep let begin seem help show hear play move live believe bring happen write sit stand
    lose pay meet include continue set learn lead understand watch follow stop create speak read spend grow open win
"""
WORDS = tuple(_COMMON.split())
"""Short common English words: most vocabularies have each as one token, with the space before it."""
TRIES = 4
"""Corrections of a prompt's length, where the server counts a text for nothing."""


@dataclass(frozen=True)
class Ask:
    """One request: a text, or the messages of a chat, and how many tokens to answer."""

    prompt: str | list[dict[str, Any]]
    max_tokens: int

    def body(self, endpoint: Endpoint, model: str, plan: LoadPlan, place: int) -> dict[str, Any]:
        """What is sent. Raises UsageError if messages meet an endpoint that takes text."""
        if endpoint == "completions":
            if not isinstance(self.prompt, str):
                raise UsageError("a prompt of messages needs the chat endpoint", hint="--endpoint chat")
            asked: dict[str, Any] = {"prompt": self.prompt}
        else:
            chat = isinstance(self.prompt, list)
            asked = {"messages": self.prompt if chat else [{"role": "user", "content": self.prompt}]}
        return {
            "model": model,
            **asked,
            "max_tokens": self.max_tokens,
            "temperature": plan.temperature,
            "seed": plan.seed + place,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if plan.ignore_eos else {}),
        }

    def after(self, prefix: str) -> Ask:
        """The same request with a text before it."""
        if isinstance(self.prompt, str):
            return replace(self, prompt=f"{prefix} {self.prompt}")
        first, *others = self.prompt
        return replace(self, prompt=[{**first, "content": f"{prefix} {first.get('content', '')}"}, *others])


def digest(asks: Sequence[Ask]) -> str:
    """A hash of all that is asked, prompts and lengths, in order."""
    lines = (json.dumps([ask.prompt, ask.max_tokens], sort_keys=True) for ask in asks)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def warmups(plan: LoadPlan) -> list[Ask]:
    """Requests that do not count, of words that none of the others has in this order."""
    return [Ask(text("warm-up", plan.seed, i, words=64), min(16, plan.output_tokens.mean)) for i in range(plan.warmup)]


def from_file(path: Path, plan: LoadPlan) -> list[Ask]:
    """As many requests as the plan has, from the lines of a file, over and over. Raises UsageError.

    A line of a .jsonl file has `prompt` or `messages`, and may have `max_tokens`; of any other it is the prompt.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    if not lines:
        raise UsageError(f"{path} has no prompt")
    dice = random.Random(f"{plan.seed} output")
    lengths = [plan.output_tokens.draw(dice) for _ in range(plan.requests)]
    found = [
        _parse(line, f"{path}:{i + 1}") if path.suffix == ".jsonl" else (line, None) for i, line in enumerate(lines)
    ]
    chosen = (found[i % len(found)] for i in range(plan.requests))
    return [Ask(prompt, own or length) for (prompt, own), length in zip(chosen, lengths, strict=True)]


def _parse(line: str, where: str) -> tuple[str | list[dict[str, Any]], int | None]:
    """Prompt and answer length of one JSON line."""
    try:
        entry = json.loads(line)
        prompt = entry["messages"] if "messages" in entry else entry["prompt"]
        tokens = entry.get("max_tokens")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{where} has neither prompt nor messages", hint='{"prompt": "Why?", "max_tokens": 64}'
        ) from error
    kind = list if "messages" in entry else str
    if not (isinstance(prompt, kind) and prompt and (kind is str or all(isinstance(turn, dict) for turn in prompt))):
        raise UsageError(f"{where}: a prompt is a text, messages are a list of objects")
    if tokens is not None and not (type(tokens) is int and tokens > 0):
        raise UsageError(f"{where}: max_tokens is {tokens!r}, must be 1 or more")
    return prompt, tokens


def text(*seed: object, words: int) -> str:
    """Random words; of the same seed a longer text begins with the shorter one."""
    dice = random.Random(" ".join(map(str, seed)))
    return " ".join(dice.choice(WORDS) for _ in range(words))


@dataclass(frozen=True)
class Ruler:
    """How many words make how many tokens."""

    overhead: float = 0.0
    """Tokens of a prompt without a word: the chat template, a start token."""
    per_word: float = 1.0
    measured: bool = False

    def words(self, tokens: int) -> int:
        """Words of a prompt with about so many tokens; at least one."""
        return max(1, round((tokens - self.overhead) / self.per_word))


async def calibrate(count: Count, seed: int) -> Ruler:
    """Measure with two texts, which no prompt begins with. A server that counts nothing: a token for each word."""
    short, long = 64, 256
    counts = [await count(text("ruler", seed, n, words=n)) for n in (short, long)]
    if counts[0] is None or counts[1] is None or counts[1] <= counts[0]:
        return Ruler()
    per_word = (counts[1] - counts[0]) / (long - short)
    return Ruler(counts[0] - per_word * short, per_word, measured=True)


async def synthetic(plan: LoadPlan, ruler: Ruler, exact: Count | None = None) -> list[Ask]:
    """Random prompts and answer lengths; `exact`, which counts a whole prompt, corrects each prompt's length."""
    asks = []
    for i, (tokens, output) in enumerate(draw_lengths(plan)):
        asks.append(Ask(await _sized(("prompt", plan.seed, i), tokens, ruler, exact), output))
    return asks


async def shared_prefix(plan: LoadPlan, ruler: Ruler, exact: Count | None = None) -> str:
    """The text before every prompt: of so many tokens by itself, without what the server adds to a whole prompt."""
    bare = replace(ruler, overhead=0.0)

    async def count(words: str) -> int | None:
        whole = None if exact is None else await exact(words)
        return None if whole is None else whole - round(ruler.overhead)

    return await _sized(("prefix", plan.seed), plan.shared_prefix, bare, count if exact is not None else None)


async def _sized(seed: tuple[object, ...], tokens: int, ruler: Ruler, exact: Count | None) -> str:
    """Random words that make so many tokens."""
    words = ruler.words(tokens)
    for _ in range(TRIES if exact is not None else 0):
        assert exact is not None
        counted = await exact(text(*seed, words=words))
        if counted is None or counted == tokens or words + tokens - counted < 1:
            break
        words += tokens - counted
    return text(*seed, words=words)
