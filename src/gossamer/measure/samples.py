"""A few greedy answers to built-in prompts: numbers hide damage that one look at the text shows.

Always the same prompts and the likeliest token, so that outputs of two models can be compared line by line. With a chat
template the prompt is a user's message, without one it is plain text. Knows backends and tokenizers; judges nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..checkpoint import Tokenizer
from ..engine.backend import Backend
from ..engine.runner import KVPool, Rows

PROMPTS = (
    "Why is the sky blue?",
    "Write two sentences about a lighthouse keeper who finds a letter.",
    "A train leaves at 9:40 and arrives at 11:15. How long does the journey take?",
    "Name three animals that live in the sea.",
    "Translate into French: The weather is fine today.",
    "def is_prime(n):",
)
MAX_TOKENS = 48


def sample_prompts(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Token ids of the first `count` prompts. Raises ChatTemplateError, TokenizerError."""
    if tokenizer.chat_template is None:
        return [tokenizer.encode(prompt) for prompt in PROMPTS[:count]]
    return [tokenizer.chat([{"role": "user", "content": prompt}]) for prompt in PROMPTS[:count]]


def sample_texts(backend: Backend, tokenizer: Tokenizer, count: int) -> list[dict[str, str]]:
    """[{"prompt", "output"}] for the first `count` prompts; an output ends at an end token or after MAX_TOKENS."""
    return [
        {"prompt": prompt, "output": tokenizer.decode(greedy(backend, ids, MAX_TOKENS, tokenizer.eos_ids))}
        for prompt, ids in zip(PROMPTS, sample_prompts(tokenizer, count), strict=False)
    ]


def greedy(backend: Backend, prompt: Sequence[int], limit: int, eos_ids: Collection[int]) -> list[int]:
    """The likeliest continuation of a prompt: at most `limit` tokens, less if the context ends; no end token."""
    limit = min(limit, backend.config.max_positions - len(prompt))
    if limit < 1 or not prompt:
        return []
    tokens: list[int] = []
    with Rows(KVPool(backend), [prompt], [len(prompt) + limit]) as rows:
        while (token := int(rows.argmax()[0])) not in eos_ids:
            tokens.append(token)
            if len(tokens) == limit:
                break
            rows.append([token])
    return tokens
