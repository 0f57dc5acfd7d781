"""Tiny models for measurements."""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from gossamer.measure.worker import Channel, Job, Progress, Worker, WorkerError, describe
from gossamer.model import ModelConfig


class InlineWorker(Iterator[Any]):
    """A worker without a process, for tests of what is measured; the process has tests of its own."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self.facts: dict[str, Any] = {}
        module, _, name = job.function.partition(":")
        channel = Channel(io.BytesIO())
        channel.fact = self.facts.__setitem__  # type: ignore[method-assign]
        channel.progress = progress  # type: ignore[method-assign]
        self._start = lambda: getattr(import_module(module), name)(channel, **job.arguments)
        self._values: Iterator[Any] | None = None

    def __next__(self) -> Any:
        try:
            if self._values is None:
                result = self._start()
                self._values = result if isinstance(result, Iterator) else iter([result])
            return next(self._values)
        except StopIteration:
            raise
        except Exception as error:
            raise WorkerError(**describe(error)) from error

    def close(self, kill: bool = False) -> None:
        pass

    def __enter__(self) -> InlineWorker:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run in this process."""
    monkeypatch.setattr("gossamer.measure.run.Worker", InlineWorker)


@pytest.fixture
def inline_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own jobs run in this process; other engines have theirs."""

    def worker(job: Job, progress: Progress) -> Worker | InlineWorker:
        return Worker(job, progress) if job.command else InlineWorker(job, progress)

    monkeypatch.setattr("gossamer.measure.run.Worker", worker)
    monkeypatch.setattr("gossamer.measure.engines.entries.Worker", worker)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA folder."""
    from tiny_llama import make_folder

    return make_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny_config() -> ModelConfig:
    """The tiny LLaMA's config."""
    from gossamer.model import config_from_hf
    from tiny_llama import CONFIG

    return config_from_hf(CONFIG)
