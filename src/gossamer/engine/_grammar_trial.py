"""The process in which a grammar is compiled for the first time: reads one on stdin, says on stdout what is wrong.

A grammar comes with a request, and some take the compiler hours or all memory. Here it has SECONDS of the processor and
MEMORY; what it exhausts, or crashes, is this process alone. It is run as a file, isolated: `python -I
_grammar_trial.py`. Knows nothing of Gossamer, and no tokenizer: the tokens are the single bytes.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

MEMORY = 1 << 30
SECONDS = 1.0


class Bytes:
    """A tokenizer whose tokens are the 256 bytes and an end."""

    tokens = (*(bytes([i]) for i in range(256)), b"<end>")
    special_token_ids = (256,)
    eos_token_id, bos_token_id = 256, None

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def main() -> None:
    """Answer {"error": text}, the text empty for a good grammar; or be killed by a limit."""
    request = json.load(sys.stdin)
    tokenizer = LLTokenizer(TokenizerWrapper(Bytes()), slices=[])
    for name, limit in (("RLIMIT_AS", MEMORY), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        with contextlib.suppress(ValueError, OSError):  # a system that does not take this limit; the others hold
            resource.setrlimit(getattr(resource, name), (limit, limit))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process: no handler would run in the compiler
    matcher = LLMatcher(tokenizer, request["grammar"], log_level=0, limits=LLParserLimits(**request["limits"]))
    if not matcher.is_error():
        matcher.compute_bitmask()
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.write(json.dumps({"error": matcher.get_error()}))


if __name__ == "__main__":
    main()
