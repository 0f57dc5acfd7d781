"""Files damaged at random: readers open them or raise a CheckpointError, and allocate no more than a file holds."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer.checkpoint import SafetensorsFile, open_checkpoint
from gossamer.checkpoint.manifest import Manifest, write_manifest
from gossamer.checkpoint.save import write_config
from gossamer.errors import CheckpointError, TokenizerError
from gossamer.formats import Integer

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


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.sampled_from(["group", "channel", "int", "Linear", "re:.*", "re:(", "pack-quantized", "model.norm", "\ud800"]),
)  # fmt: skip
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear", "re:.*mlp.*"],
            "weights": {
                "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
                "actorder": None,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    },
    "ignore": ["lm_head"],
    "sparsity_config": {},
    "transform_config": {},
}  # fmt: skip
MANIFEST = {
    "schema_version": 1,
    "base": {"name": "x", "fingerprint": "ab", "note": None},
    "recipe": {"version": 1, "stages": [{"gptq": {"bits": 4}}]},
    "seed": 3,
    "calibration": {"kind": "self", "sha256": "cd", "sequences": 4, "length": 128, "seed": 1, "line_hashes": ["aa"]},
    "versions": {"torch": "2"},
    "files": {},
    "results": {"a": [1.0]},
    "formats": {},
}


@st.composite
def with_anything(draw: st.DrawFn, content: dict[str, Any]) -> dict[str, Any]:
    """This content with anything at all in one place of it, however deep, or under one more key."""
    result = copy.deepcopy(content)
    place: Any = result
    while True:
        keys = list(range(len(place))) if isinstance(place, list) else [*place, draw(st.text(max_size=3))]
        key = draw(st.sampled_from(keys)) if keys else None
        deeper = place[key] if key in keys and (isinstance(place, list) or key in place) else None
        if not isinstance(deeper, dict | list) or not deeper or draw(st.booleans()):
            break
        place = deeper
    place[key] = draw(ANYTHING)
    return result


@settings(bounded, max_examples=200)
@given(config=with_anything(QUANTIZATION))
def test_a_quantization_config_of_anything_opens_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, tiny: Any, config: dict[str, Any]
) -> None:
    folder = _once(tmp_path_factory, "quantized", lambda path: tiny.quantized(path, Integer(4, 32)))
    (folder / "config.json").write_text(json.dumps(tiny.config(quantization_config=config)))
    _open_and_write_again(folder)


@settings(bounded, max_examples=200)
@given(content=with_anything(MANIFEST))
def test_a_manifest_of_anything_opens_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, tiny: Any, content: dict[str, Any]
) -> None:
    folder = _once(tmp_path_factory, "artifact", tiny.folder)
    (folder / "gossamer.json").write_text(json.dumps(content))
    _open_and_write_again(folder)


def _open_and_write_again(folder: Path) -> None:
    """Whatever opens is read to the end, and what it says of itself can be written."""
    with watched(), contextlib.suppress(CheckpointError):
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.names():
            checkpoint.tensor(name)
        write_config(folder, checkpoint.hf_config)
        if checkpoint.manifest is not None:
            write_manifest(folder, Manifest.model_validate(checkpoint.manifest))


def _once(factory: pytest.TempPathFactory, name: str, make: Any) -> Path:
    """A file or folder made by the first example and used by all of them."""
    path = factory.getbasetemp() / name
    if not path.exists():
        make(path)
    return path
