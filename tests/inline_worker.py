"""Measurements without processes of their own, for tests of what is measured; the process has tests of its own."""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from gossamer.measure.worker import Channel, Job, Progress, WorkerError, describe


class InlineWorker(Iterator[Any]):
    """A worker without a process."""

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
