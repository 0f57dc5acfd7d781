"""The engine of a model on two hosts, as a process: answers prompts and times tokens, one line of stdin after another.

    python tests/nodes_engine.py FOLDER HOST

`tokens` answers PROMPTS; `time` says seconds per token; `stream` generates until it fails, and says when it began.
"""

from __future__ import annotations

import json
import sys
import time

from gossamer.engine import LLM, SamplingParams
from gossamer.engine.sharded.nodes import Nodes
from gossamer.errors import EngineError

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [30, 40, 50, 60, 70], list(range(10, 80))]
GREEDY = SamplingParams(max_tokens=12)
LONG = SamplingParams(max_tokens=80, min_tokens=80)


def main(folder: str, host: str) -> None:
    llm = LLM(folder, tp=2, nodes=Nodes.at(2, host))
    say(llm.backend.describe())
    for line in sys.stdin:
        match line.strip():
            case "tokens":
                say([completion.tokens for completion in llm.generate(PROMPTS, GREEDY)])
            case "time":
                began = time.perf_counter()
                (completion,) = llm.generate(PROMPTS[:1], GREEDY)
                say((time.perf_counter() - began) / len(completion.tokens))
            case "stream":
                try:
                    for count, _ in enumerate(llm.stream(PROMPTS[0], LONG)):
                        if count == 0:
                            say("began")
                    say("finished")
                except EngineError as error:
                    say(error.message)


def say(what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
