"""Files damaged at random: readers open them or raise a CheckpointError, and allocate no more than a file holds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer.checkpoint import SafetensorsFile, open_checkpoint
from gossamer.errors import CheckpointError, TokenizerError

LIMIT = 8 << 20
"""Elements of any one tensor: far above what these files hold, far below what a damaged number can ask for."""
bounded = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6)
cuts = st.one_of(st.none(), st.floats(0, 1))


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Fails the test when a tensor larger than LIMIT is made."""
    real = torch.empty

    def guard(*size: Any, **options: Any) -> torch.Tensor:
        count = 1
        for n in size:
            count *= int(n)
        assert count <= LIMIT, f"torch.empty{size}"
        return real(*size, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", guard)
        yield


def damaged(data: bytes, changes: list[tuple[float, int]], cut: float | None, span: int) -> bytes:
    """The file with some of its first `span` bytes changed (its header, mostly), and cut short."""
    result = bytearray(data)
    for where, value in changes:
        result[int(where * min(span, len(result)))] = value
    return bytes(result) if cut is None else bytes(result[: int(cut * len(result))])


@bounded
@given(changes=edits, cut=cuts, span=st.sampled_from([8, 64, 4000, 1 << 20]))
def test_a_damaged_safetensors_file_opens_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, tiny: Any, changes: list[tuple[float, int]], cut: float | None, span: int
) -> None:
    folder = _once(tmp_path_factory, "folder", tiny.folder)
    original = folder / "model.safetensors.original"
    if not original.exists():
        (folder / "model.safetensors").rename(original)
    (folder / "model.safetensors").write_bytes(damaged(original.read_bytes(), changes, cut, span))
    with watched():
        try:
            file = SafetensorsFile(folder / "model.safetensors")
            for name in file.names():
                file.read(name)
            checkpoint = open_checkpoint(folder)
            for name in checkpoint.names():
                checkpoint.tensor(name)
        except CheckpointError as error:
            refusal = str(error)
            assert str(folder) in refusal


@bounded
@given(changes=edits, cut=cuts, span=st.sampled_from([24, 400, 1500, 20_000, 1 << 20]))
def test_a_damaged_gguf_file_opens_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, tiny: Any, changes: list[tuple[float, int]], cut: float | None, span: int
) -> None:
    original = _once(tmp_path_factory, "original.gguf", lambda path: tiny.gguf(path, layers=1))
    path = original.with_name("damaged.gguf")
    path.write_bytes(damaged(original.read_bytes(), changes, cut, span))
    with watched():
        try:
            checkpoint = open_checkpoint(path)
            for name in checkpoint.names():
                checkpoint.tensor(name)
            checkpoint.tokenizer().encode("hello world 12")
        except (CheckpointError, TokenizerError):
            pass


@settings(bounded, max_examples=100)
@given(
    field=st.sampled_from(range(20)),
    value=st.one_of(st.integers(), st.floats(), st.text(), st.none(), st.lists(st.integers())),
)
def test_a_config_of_any_value_opens_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, tiny: Any, field: int, value: Any
) -> None:
    folder = _once(tmp_path_factory, "configs", tiny.folder)
    config = tiny.config(rope_scaling=None, quantization_config=None, gossamer_layers=None, sliding_window=None)
    config[list(config)[field]] = value
    (folder / "config.json").write_text(json.dumps(config))
    with watched(), contextlib.suppress(CheckpointError):
        open_checkpoint(folder)


def _once(factory: pytest.TempPathFactory, name: str, make: Any) -> Path:
    """A file or folder made by the first example and used by all of them."""
    path = factory.getbasetemp() / name
    if not path.exists():
        make(path)
    return path
