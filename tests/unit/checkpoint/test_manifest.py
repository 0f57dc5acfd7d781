"""gossamer.json: what is written is read, what is changed is noticed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.manifest import (
    Base,
    Calibration,
    Manifest,
    hash_files,
    read_manifest,
    verify_files,
    write_manifest,
)
from gossamer.errors import CheckpointError, CorruptCheckpoint, UnsafeCheckpoint, UnsupportedModel


def manifest(**changes: Any) -> Manifest:
    return Manifest(
        base=Base(name="smollm2", fingerprint="ab" * 32, note="already 4-bit"),
        recipe={"version": 1, "stages": [{"gptq": {"bits": 4}}]},
        seed=3,
        calibration=Calibration(kind="self", sha256="cd" * 32, sequences=4, length=128, seed=1, line_hashes=["aa"]),
        **changes,
    )


def test_what_is_written_is_read_and_equal_manifests_give_equal_bytes(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest())
    first = (tmp_path / "gossamer.json").read_bytes()
    assert read_manifest(tmp_path) == manifest()
    write_manifest(tmp_path, Manifest.model_validate(manifest().model_dump()))
    assert (tmp_path / "gossamer.json").read_bytes() == first


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"schema_version": 2}, UnsupportedModel, "schema_version 2"),
        ({"schema_version": "1"}, UnsupportedModel, "schema_version '1'"),
        ({"sede": 3}, CorruptCheckpoint, "sede"),
        ({"seed": "three"}, CorruptCheckpoint, "seed"),
        ({"base": None}, CorruptCheckpoint, "base"),
        ({"files": {"a": 7}}, CorruptCheckpoint, r"files\.a"),
        ({"calibration": {"kind": "x"}}, CorruptCheckpoint, r"calibration\.sha256"),
    ],
)
def test_a_manifest_of_another_kind_is_refused_by_field(
    tmp_path: Path, change: dict[str, Any], error: type[CheckpointError], message: str
) -> None:
    content = manifest().model_dump(mode="json") | change
    (tmp_path / "gossamer.json").write_text(json.dumps(content))
    with pytest.raises(error, match=message):
        read_manifest(tmp_path)


def test_a_changed_or_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    listed = manifest(files=hash_files(tmp_path))
    assert set(listed.files) == {"sub/a", "b"}
    verify_files(tmp_path, listed)
    (tmp_path / "sub" / "a").write_text("0ne")
    os.utime(tmp_path / "sub" / "a", ns=(1, 1))
    with pytest.raises(CorruptCheckpoint, match=r"sub/a.*changed"):
        verify_files(tmp_path, listed)
    (tmp_path / "sub" / "a").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"sub/a is missing"):
        verify_files(tmp_path, listed)


def test_a_file_that_has_not_changed_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.checkpoint import manifest as module

    (tmp_path / "a").write_text("one")
    listed = manifest(files=hash_files(tmp_path))
    hashed: list[Path] = []
    real = module.sha256
    monkeypatch.setattr(module, "sha256", lambda path: hashed.append(path) or real(path))
    verify_files(tmp_path, listed)
    verify_files(tmp_path, listed)
    assert len(hashed) == 1


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("one")
    listed = manifest(files=hash_files(tmp_path))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path / "file"))
    verify_files(tmp_path, listed)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    (tmp_path / "m").mkdir()
    with pytest.raises(UnsafeCheckpoint):
        verify_files(tmp_path / "m", manifest(files={"../outside": "00"}))


def test_an_artifact_that_was_tampered_with_does_not_open(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m")
    write_manifest(folder, manifest(files=hash_files(folder)))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.manifest is not None
    assert checkpoint.manifest["base"]["name"] == "smollm2"
    assert checkpoint.source_note == "made from a baseline already 4-bit"
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors.*changed"):
        open_checkpoint(folder)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_change_is_noticed_though_size_and_time_are_as_before(tmp_path: Path, replaced: bool) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    listed = manifest(files=hash_files(tmp_path))
    verify_files(tmp_path, listed)
    before = path.stat()
    if replaced:
        (tmp_path / "b").write_text("0ne")
        (tmp_path / "b").replace(path)
    while not replaced and path.stat().st_ctime_ns == before.st_ctime_ns:  # the system's clock moves in steps
        path.write_text("0ne")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(CorruptCheckpoint, match="a: changed"):
        verify_files(tmp_path, listed)


def test_a_recipe_nested_too_deep_is_a_typed_error(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m")
    nested: dict[str, Any] = {}
    for _ in range(400):
        nested = {"a": nested}
    content = manifest().model_dump(mode="json") | {"recipe": nested}
    (folder / "gossamer.json").write_text(json.dumps(content))
    with pytest.raises(CorruptCheckpoint, match=r"gossamer\.json.*nested"):
        open_checkpoint(folder)
