"""What both fuzzers share: one file that is written anew for every input, what may escape, and libFuzzer's options.

Inputs that were found to reach new code stay in `build/fuzz/<name>/` and are where the next run begins; one that fails
is written beside them as `crash-...`, and the fuzzer given that file as its argument runs it alone.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType, ModuleType

import atheris

WORK = Path(__file__).resolve().parents[2] / "build" / "fuzz"
MEMORY_MB = 3000
"""More than the libraries take, less than one damaged number could ask for."""
SECONDS_PER_INPUT = 20
MAX_BYTES = 1 << 16
READ_BYTES = 1 << 22
"""Tensors larger than this are not read: a file of MAX_BYTES holds none."""


def instrument(*modules: ModuleType) -> None:
    """Have the fuzzer see which branches of these modules' functions an input takes.

    By hand, because atheris' import hook does not reach through the loader of an editable installation.
    """
    for module in modules:
        for value in list(vars(module).values()):
            members = list(vars(value).values()) if isinstance(value, type) else [value]
            for member in members:
                function = member.fget if isinstance(member, property) else member
                if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                    atheris.instrument_func(function)


def fuzz(
    name: str,
    seeds: Mapping[str, bytes],
    attempt: Callable[[Path], None],
    words: tuple[str, ...],
    mutate: Callable[[bytes, int, random.Random], bytes],
) -> None:
    """Call `attempt` on a file of mutated bytes until the time is up (first argument: seconds, or a file to run).

    `words`: what a mutation may write as a whole, which byte by byte it would hardly ever spell.
    `mutate`: another file from this one, of at most so many bytes.
    """
    corpus, path = WORK / name, WORK / f"{name}.input"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed, data in seeds.items():
        (corpus / seed).write_bytes(data)
    dictionary = WORK / f"{name}.dict"
    dictionary.write_text("".join('"{}"\n'.format(word.replace("\\", "\\\\").replace('"', '\\"')) for word in words))

    def test_one_input(data: bytes) -> None:
        path.write_bytes(data)
        attempt(path)

    valid = list(seeds.values())

    def mutate_one(data: bytes, size: int, seed: int) -> bytes:
        # Most of what is kept for reaching new code is refused early: begin with a whole file again and again.
        chance = random.Random(seed)
        return mutate(chance.choice(valid) if chance.random() < 0.4 else data, size, chance)

    what = sys.argv[1] if len(sys.argv) > 1 else "60"
    options = [
        f"-rss_limit_mb={MEMORY_MB}",
        f"-timeout={SECONDS_PER_INPUT}",
        f"-max_len={MAX_BYTES}",
        f"-artifact_prefix={WORK}/{name}-",
        f"-dict={dictionary}",
        "-print_final_stats=1",
    ]
    run = [f"-max_total_time={what}", str(corpus)] if what.isdigit() else [what]
    atheris.Setup([sys.argv[0], *options, *run], test_one_input, custom_mutator=mutate_one)
    atheris.Fuzz()
