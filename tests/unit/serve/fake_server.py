"""The whole server over engines that need no model: for tests, and by hand.

    python tests/unit/serve/fake_server.py --port 8123
    python tests/unit/serve/fake_server.py --names original small --delay 0.02

The models count: after "abc" comes "defg...". A message with `say:` makes them answer with the rest of its line, after
which they end; so an answer can be anything, tool calls too. After `nan:` their logits are no numbers, and `boom:`
breaks them.
"""

from __future__ import annotations

import argparse
import dataclasses
import string
import sys

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gossamer.checkpoint.tokenizer import SpecialTokens, Tokenizer
from gossamer.serve.client import Watch
from gossamer.serve.messages import WorkerSpec
from gossamer.serve.server import ModelSpec, ServerOptions, serve
from gossamer.serve.service import Limits

END = "<end>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments.city }}]{% endfor %}"
    "{{ '\n' }}{% endfor %}"
    "{% if tools %}tools:{% for t in tools %} {{ t.function.name }}{% endfor %}{{ '\n' }}{% endif %}"
    "{% if add_generation_prompt %}> {% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """The tokenizer of `gossamer.engine.fake`, made without torch, with a template that knows tools."""
    characters = [c for c in string.printable if c.isprintable() or c == "\n"]
    vocab = {c: i for i, c in enumerate(characters)} | {END: len(characters)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([tokenizers.AddedToken(END, special=True, normalized=False)])
    special = SpecialTokens({"eos": END}, frozenset([len(characters)]))
    return Tokenizer(backend, special, chat_template=CHAT_TEMPLATE, model_vocab_size=len(vocab))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--names", nargs="+", default=["fake"])
    parser.add_argument("--delay", type=float, default=0.0, help="seconds of a step")
    parser.add_argument("--token-delay", type=float, default=0.0, help="seconds of each token of a step")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=512, help="blocks of the KV cache")
    parser.add_argument("--max-sequences", type=int, default=64)
    parser.add_argument("--max-batch-tokens", type=int, default=512)
    parser.add_argument("--drain-seconds", type=float, default=10.0)
    parser.add_argument("--silence", type=float, default=10.0, help="seconds until a silent worker is lost")
    parser.add_argument("--losses", type=int, default=3, help="lost workers until the server gives up")
    parser.add_argument("--api-key")
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--fail", help="a file whose presence makes the next worker fail")
    for limit in dataclasses.fields(Limits):
        parser.add_argument(f"--{limit.name.replace('_', '-')}", type=type(limit.default), default=limit.default)
    args = parser.parse_args()
    options = {
        "kv_memory": args.blocks * 16 * 8,
        "max_sequences": args.max_sequences,
        "max_batch_tokens": args.max_batch_tokens,
    }
    arguments = {
        "delay": args.delay, "token_delay": args.token_delay, "context": args.context, "options": options,
        "fail": args.fail,
    }  # fmt: skip
    served = [ModelSpec(name, make_tokenizer, WorkerSpec("fake_engine:make_engine", arguments)) for name in args.names]
    limits = Limits(**{limit.name: getattr(args, limit.name) for limit in dataclasses.fields(Limits)})
    serve(
        served,
        ServerOptions(
            args.host,
            args.port,
            args.api_key,
            args.insecure,
            args.drain_seconds,
            limits,
            Watch(silence=args.silence, losses=args.losses),
        ),
        lambda url: print(f"ready {url}", flush=True),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
