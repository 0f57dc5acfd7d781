"""Tiny models for measurements."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.measure.worker import Job, Progress, Worker
from gossamer.model import ModelConfig
from inline_worker import InlineWorker


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
