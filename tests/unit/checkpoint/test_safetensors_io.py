"""The safetensors container: agreement with the library that defined it, streaming, and files made to hurt."""

from __future__ import annotations

import errno
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gossamer.checkpoint import safetensors_io
from gossamer.checkpoint.files import parse_object
from gossamer.checkpoint.safetensors_io import DTYPES, Entry, SafetensorsFile, whole, write_safetensors
from gossamer.errors import CorruptCheckpoint, DoesNotFit, GossamerError, ModelNotFound

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def sample(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(48, dtype=torch.uint8).repeat(8)[: 6 * 8 * dtype.itemsize].view(dtype).reshape(6, 8)


@pytest.mark.parametrize("code", sorted(set(DTYPES) - {"BOOL"}))
def test_every_dtype_reads_and_writes_as_the_library_does(tmp_path: Path, code: str) -> None:
    tensor = sample(DTYPES[code])
    safetensors.torch.save_file({"x": tensor}, tmp_path / "theirs")
    write_safetensors(tmp_path / "ours", [whole("x", tensor)])
    for path in (tmp_path / "theirs", tmp_path / "ours"):
        read = SafetensorsFile(path).read("x")
        assert read.dtype == tensor.dtype
        assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))
    theirs = safetensors.torch.load_file(tmp_path / "ours")["x"]
    assert torch.equal(theirs.view(torch.uint8), tensor.view(torch.uint8))


def test_bools_scalars_and_empty_tensors_survive(tmp_path: Path) -> None:
    tensors = {"b": torch.tensor([True, False]), "s": torch.tensor(3.5), "e": torch.empty(0, 4)}
    write_safetensors(tmp_path / "x", [whole(name, tensor) for name, tensor in tensors.items()])
    file = SafetensorsFile(tmp_path / "x")
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name), tensor)
        assert torch.equal(safetensors.torch.load_file(tmp_path / "x")[name], tensor)


def test_rows_are_read_without_the_rest_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(4000, dtype=torch.float32).reshape(1000, 4)
    write_safetensors(tmp_path / "x", [whole("x", tensor)])
    file = SafetensorsFile(tmp_path / "x")
    taken: list[int] = []
    real = os.preadv

    def counting(fd: int, buffers: list[Any], offset: int) -> int:
        taken.append(real(fd, buffers, offset))
        return taken[-1]

    monkeypatch.setattr(os, "preadv", counting)
    assert torch.equal(file.read("x", slice(100, 107)), tensor[100:107])
    assert sum(taken) == 7 * 16
    assert torch.equal(file.read("x", slice(-3, None)), tensor[-3:])
    assert file.read("x", slice(50, 20)).shape == (0, 4)
    with pytest.raises(ValueError, match="step"):
        file.read("x", slice(0, 10, 2))


def test_bytes_do_not_depend_on_the_order_of_entries_or_the_size_of_chunks(tmp_path: Path) -> None:
    a, b = torch.randn(40, 3), torch.arange(7)
    write_safetensors(tmp_path / "1", [whole("a", a), whole("b", b)])
    chunked = Entry("a", a.dtype, (40, 3), lambda: (a[i : i + 7] for i in range(0, 40, 7)))
    write_safetensors(tmp_path / "2", [whole("b", b), chunked])
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    raw = (tmp_path / "1").read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 8 == 0


def test_writing_returns_the_hash_of_the_file(tmp_path: Path) -> None:
    import hashlib

    digest = write_safetensors(tmp_path / "x", [whole("x", torch.randn(5))])
    assert digest == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "chunks",
    [[torch.zeros(2)], [torch.zeros(4), torch.zeros(1)], [torch.zeros(4, dtype=torch.float16)]],
    ids=["too few", "too many", "another dtype"],
)
def test_chunks_that_are_not_the_announced_tensor_leave_no_file(tmp_path: Path, chunks: list[torch.Tensor]) -> None:
    with pytest.raises(GossamerError, match="'x'"):
        write_safetensors(tmp_path / "x", [Entry("x", torch.float32, (4,), lambda: iter(chunks))])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_file_and_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = os.write, [0]

    def full(fd: int, data: Any) -> int:
        if written[0] > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        written[0] += len(data)
        return real(fd, data)

    def chunks() -> Iterator[torch.Tensor]:
        for _ in range(10):
            yield torch.zeros(10_000)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DoesNotFit, match="No space left"):
        write_safetensors(tmp_path / "x", [Entry("x", torch.float32, (100_000,), chunks)])
    assert list(tmp_path.iterdir()) == []


BAD_HEADERS: dict[str, tuple[Any, bytes]] = {
    "overlap": ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
    "the same range twice": ({"a": F32, "b": F32}, bytes(8)),
    "hole": ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20)),
    "hole at the start": ({"a": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
    "short file": ({"a": F32}, bytes(7)),
    "bytes left over": ({"a": F32}, bytes(9)),
    "range past the end": ({"a": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}, bytes(8)),
    "range of another size": ({"a": {**F32, "shape": [3]}}, bytes(8)),
    "range backwards": ({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8)),
    "one position": ({"a": {**F32, "data_offsets": [8]}}, bytes(8)),
    "positions in words": ({"a": {**F32, "data_offsets": ["0", "8"]}}, bytes(8)),
    "overflowing shape": ({"a": {**F32, "shape": [1 << 62, 4]}}, bytes(8)),
    "huge number": (b'{"a":{"dtype":"F32","shape":[1' + b"0" * 5000 + b'],"data_offsets":[0,8]}}', bytes(8)),
    "negative size": ({"a": {**F32, "shape": [-2]}}, bytes(8)),
    "fractional size": ({"a": {**F32, "shape": [2.0]}}, bytes(8)),
    "boolean size": ({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, bytes(1)),
    "many dimensions": ({"a": {**F32, "shape": [1] * 30 + [2]}}, bytes(8)),
    "unknown dtype": ({"a": {**F32, "dtype": "F31"}}, bytes(8)),
    "dtype a list": ({"a": {**F32, "dtype": ["F32"]}}, bytes(8)),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "unknown field": ({"a": {**F32, "strides": [1]}}, bytes(8)),
    "entry a number": ({"a": 3}, bytes(8)),
    "header a list": ([F32], bytes(8)),
    "header a number": (b"17", b""),
    "header empty": (b"", b""),
    "not UTF-8": (b'{"\xff":1}', b""),
    "not JSON": (b"{'a': 1}", b""),
    "deep nesting": (b"[" * 100_000, b""),
    "deep nesting that pretends": (b'{"a":' + b"[" * 5000 + b" " * 100_000, b""),
    "metadata a list": ({"__metadata__": [], "a": F32}, bytes(8)),
    "metadata of numbers": ({"__metadata__": {"x": 1}, "a": F32}, bytes(8)),
    "a tensor twice": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        bytes(16),
    ),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused(tmp_path: Path, case: str) -> None:
    header, data = BAD_HEADERS[case]
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CorruptCheckpoint, match=r"bad\.safetensors"):
        SafetensorsFile(path)


@pytest.mark.parametrize("length", [100_000_001, 1 << 63, (1 << 64) - 1, 90_000_000])
def test_an_announced_length_allocates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    path = write_raw(tmp_path / "bad", {"a": F32}, bytes(8), length=length)
    sizes: list[int] = [0]
    real = torch.empty

    def watching(*size: Any, **options: Any) -> torch.Tensor:
        sizes.append(int(size[0]))
        return real(*size, **options)

    monkeypatch.setattr(torch, "empty", watching)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpoint, match="header"):
            SafetensorsFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()
    assert max(sizes) <= 4096


def test_a_header_over_100_mb_is_refused_even_when_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "bad"
    with open(path, "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)  # sparse
    with pytest.raises(CorruptCheckpoint, match="100000001"):
        SafetensorsFile(path)


def test_a_missing_file_a_folder_and_a_pipe_are_typed_errors(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelNotFound):
        SafetensorsFile(tmp_path / "absent")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(CorruptCheckpoint, match="not a regular file"):
            SafetensorsFile(path)


def test_a_file_cut_short_after_opening_is_a_typed_error(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", [whole("x", torch.zeros(1000))])
    file = SafetensorsFile(tmp_path / "x")
    os.truncate(tmp_path / "x", 500)
    with pytest.raises(CorruptCheckpoint, match="ends at byte 500"):
        file.read("x")
    with pytest.raises(CorruptCheckpoint, match="'y'"):
        file.read("y")


def test_a_key_that_is_given_twice_among_many_is_named() -> None:
    pairs = [f'"{n}":0' for n in range(200_000)]
    assert len(parse_object("{" + ",".join(pairs) + "}", "x", unique=True)) == 200_000
    with pytest.raises(CorruptCheckpoint, match="'199999' is given twice"):
        parse_object("{" + ",".join([*pairs, pairs[-1]]) + "}", "x", unique=True)


@pytest.mark.parametrize(
    "header",
    [
        '{"a":{"dtype":"F32","shape":[' + "0," * 50 + '0],"data_offsets":[0,0]}}',
        '{"__metadata__":{' + ",".join(f'"{n}":""' for n in range(50)) + "}}",
        "{" + ",".join(f'"{n}":0' for n in range(50)) + "}",
    ],
    ids=["numbers", "metadata", "entries"],
)
def test_a_header_of_more_values_than_tensors_need_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: str
) -> None:
    monkeypatch.setattr(safetensors_io, "MAX_VALUES", 40)
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(CorruptCheckpoint, match=r"bad: header: about \d+ values, more than the 40"):
        SafetensorsFile(write_raw(tmp_path / "bad", header.encode()))


def test_more_tensors_than_plausible_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_io, "MAX_TENSORS", 2)
    write_safetensors(tmp_path / "x", [whole(name, torch.zeros(1)) for name in "ab"])
    assert SafetensorsFile(tmp_path / "x").names() == ("a", "b")
    write_safetensors(tmp_path / "x", [whole(name, torch.zeros(1)) for name in "abc"])
    with pytest.raises(CorruptCheckpoint, match="3 tensors, more than the 2"):
        SafetensorsFile(tmp_path / "x")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_header_in_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(CorruptCheckpoint, match="bad: header: not "):
        SafetensorsFile(write_raw(tmp_path / "bad", json.dumps({"a": F32}).encode(encoding), bytes(8)))


def test_a_name_that_is_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="surrogate"):
        SafetensorsFile(write_raw(tmp_path / "bad", {"\ud800": F32}, bytes(8)))
