"""KV memory that was asked for by number is taken before the first request."""

from __future__ import annotations

from engine_doubles import CheckedBackend, make_engine
from gossamer.engine.engine import Engine, EngineOptions
from gossamer.engine.params import SamplingParams


class Backend(CheckedBackend):
    """Remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def reserve(self, num_blocks: int) -> None:
        super().reserve(num_blocks)
        self.calls.append(("reserve", num_blocks))

    def touch(self) -> None:
        self.calls.append(("touch", 0))


def test_by_number() -> None:
    backend = Backend()
    engine = make_engine(backend, 50)
    engine.settle()
    assert backend.calls == [("reserve", 50), ("touch", 0)]


def test_without_a_number_it_comes_with_requests() -> None:
    backend = Backend()
    Engine(backend, make_engine(CheckedBackend()).tokenizer, EngineOptions(max_sequences=4)).settle()
    assert backend.calls == []


def test_not_while_requests_run() -> None:
    backend = Backend()
    engine = make_engine(backend, 50)
    engine.add("a", [3, 4], SamplingParams(max_tokens=2))
    calls = list(backend.calls)
    engine.settle()
    assert backend.calls == calls
