"""Models of this machine and of the hub: opened, saved with a card, published, listed, removed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

import gossamer
from gossamer.checkpoint import Lock, library, open_checkpoint, read_manifest
from gossamer.checkpoint.card import card
from gossamer.checkpoint.manifest import Base, Calibration, Manifest
from gossamer.cli import main
from gossamer.errors import (
    CheckpointError,
    CorruptCheckpoint,
    ModelNotFound,
    OutputLocked,
    UnsafeCheckpoint,
    UsageError,
)

REVISION = "ab" * 20


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return folder


def cached(cache: Path, tiny: Any, name: str = "org/name") -> Path:
    """A model in the cache as the hub's library lays it out; its snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot: Path = tiny.folder(repository / "snapshots" / REVISION)
    (repository / "blobs").mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(repository / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return snapshot


@pytest.fixture
def artifact(tmp_path: Path, tiny: Any) -> Path:
    model = gossamer.from_pretrained(tiny.folder(tmp_path / "source"))
    return Path(gossamer.save_pretrained(model, tmp_path / "made"))


def records(path: Path, fingerprint: str) -> Path:
    """A file with an evaluation and a bench of a model, and a failure, which no card shows."""
    common = {
        "schema": 1, "status": "ok", "model": {"name": "m", "fingerprint": fingerprint},
        "engine": {"name": "gossamer", "version": "1", "backend": "cpu"},
        "machine": {"cpu": "A | CPU", "isa": "avx2"},
    }  # fmt: skip
    judged = {"kind": "eval", "results": {"perplexity": 12.5, "kld_mean": 0.25}, "protocol": {"corpus": "text"}}
    timed = {"kind": "bench", "results": {"decode_tokens_per_s": {"median": 99.5}, "rm_peak_bytes": 5_000_000}}
    failed = {"kind": "eval", "status": "failed", "results": {"perplexity": 666.0}}
    path.write_text("\n".join(json.dumps(common | kind) for kind in (judged, timed, failed)))
    return path


def test_the_three_verbs_are_names_of_the_package_that_load_nothing() -> None:
    code = "import sys, gossamer; print('torch' in sys.modules, 'huggingface_hub' in sys.modules, gossamer.__all__)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("False False")
    with pytest.raises(AttributeError, match="has no attribute 'from_pretrain'"):
        _ = gossamer.from_pretrain


def test_what_is_saved_opens_and_has_a_card(artifact: Path, tmp_path: Path) -> None:
    source, made = open_checkpoint(tmp_path / "source"), gossamer.from_pretrained(artifact)
    assert made.fingerprint() == source.fingerprint()
    front = ModelCard((artifact / "README.md").read_text()).data
    assert front.library_name == "gossamer"
    assert front.base_model is None  # a folder's name is no id of the hub
    text = (artifact / "README.md").read_text()
    for name, digest in read_manifest(artifact).files.items():  # type: ignore[union-attr]
        assert f"`{name}` | `{digest}`" in text


def test_a_card_shows_results_with_their_machine(artifact: Path, tmp_path: Path, tiny: Any) -> None:
    model = gossamer.from_pretrained(artifact)
    results = records(tmp_path / "r.jsonl", model.fingerprint())
    text = (gossamer.save_pretrained(model, tmp_path / "again", results=results) / "README.md").read_text()
    (found,) = ModelCard(text).data.to_dict()["model-index"][0]["results"]
    assert found["metrics"] == [{"type": "perplexity", "value": 12.5}, {"type": "kl_divergence", "value": 0.25}]
    assert "| `eval` | `perplexity 12.5, KL divergence 0.25` | `gossamer 1 cpu` | `A / CPU avx2` |" in text
    assert "decode tokens/s 99.5, peak MB 5" in text
    assert "perplexity 666" not in text
    with pytest.raises(UsageError, match="no finished record of this model"):
        gossamer.save_pretrained(model, tmp_path / "third", results=records(tmp_path / "o.jsonl", "another"))
    assert not (tmp_path / "third").exists()
    (tmp_path / "bad.jsonl").write_text("[]\n")
    with pytest.raises(UsageError, match="line 1 is no record"):
        gossamer.save_pretrained(model, tmp_path / "third", results=tmp_path / "bad.jsonl")


def test_a_strangers_words_cannot_leave_their_place_in_a_card() -> None:
    evil = "x`|\n---\n# <script>`` [a](javascript:b)"
    manifest = Manifest(
        base=Base(name=evil, fingerprint=evil, note=evil),
        recipe={"name": evil, "text": "```\n# out"},
        calibration=Calibration(kind=evil, sha256=evil, sequences=1, length=2),
        files={evil: evil},
    )
    text = card(evil, manifest, [{"kind": "eval", "protocol": {"corpus": evil}, "results": {"perplexity": evil}}])
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["tags"] == ["gossamer", evil]
    inside = False
    for line in body.splitlines():
        if line.startswith("````"):
            inside = not inside
        elif not inside:
            assert "<script>" not in "".join(line.split("`")[::2]), line
            assert not line.startswith("# <"), line


def test_a_card_names_a_base_of_the_hub() -> None:
    front = ModelCard(card("m", Manifest(base=Base(name="org/base-1.5", fingerprint="f")))).data
    assert (front.base_model, front.to_dict()["base_model_relation"]) == ("org/base-1.5", "quantized")


class FakeApi:
    """Stands for `HfApi`."""

    asked: list[tuple[str, dict[str, Any]]]
    error: Exception | None = None

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, name: str, **options: Any) -> str:
        if self.error is not None:
            raise self.error
        self.asked.append((name, {**options, "token": self.token}))
        return f"https://hub/{name}"

    def upload_folder(self, **options: Any) -> None:
        self.asked.append(("upload", options))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    FakeApi.asked, FakeApi.error = [], None
    return FakeApi


def test_what_the_manifest_lists_is_published_and_nothing_else(artifact: Path, api: type[FakeApi]) -> None:
    (artifact / "secret.txt").write_text("key")
    assert gossamer.push_to_hub(artifact, "me/name", private=True, token="t") == "https://hub/me/name"
    (made, created), (_, sent) = api.asked
    assert (made, created) == ("me/name", {"private": True, "exist_ok": True, "token": "t"})
    manifest = read_manifest(artifact)
    assert manifest is not None
    assert set(sent["allow_patterns"]) == {*manifest.files, "gossamer.json", "README.md"}
    assert (sent["repo_id"], sent["folder_path"]) == ("me/name", artifact)


def test_nothing_is_published_that_is_no_artifact_or_has_changed(
    artifact: Path, api: type[FakeApi], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="no artifact"):
        gossamer.push_to_hub(tmp_path / "source", "me/name")
    api.error = ConnectionError("no route\nto host")
    with pytest.raises(UsageError, match=r"me/name: cannot be sent: no route\n"):
        gossamer.push_to_hub(artifact, "me/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        gossamer.push_to_hub(artifact, "me/name")
    (artifact / "config.json").write_text("{}")
    with pytest.raises(CorruptCheckpoint, match="changed since it was written"):
        gossamer.push_to_hub(artifact, "me/name")
    assert api.asked == []


def test_offline_a_model_that_lacks_files_says_which(cache: Path, tiny: Any) -> None:
    snapshot = cached(cache, tiny)
    assert gossamer.from_pretrained("org/name").path.resolve() == snapshot.resolve()
    assert gossamer.from_pretrained("org/name", revision=REVISION).name == f"org/name@{REVISION}"
    (snapshot / "model.safetensors").unlink()
    (snapshot / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"without config\.json, model\.safetensors") as error:
        gossamer.from_pretrained("org/name")
    assert "gossamer pull org/name" in str(error.value.hint)
    index = {"weight_map": {f"w{i}": f"model-{i}.safetensors" for i in range(9)}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFound, match=r"config\.json, model-0.*model-3\.safetensors and 5 more"):
        gossamer.from_pretrained("org/name")
    with pytest.raises(ModelNotFound, match="not in the hub's cache at revision v9"):
        gossamer.from_pretrained("org/name", revision="v9")
    with pytest.raises(UsageError, match="a revision is for a hub id"):
        gossamer.from_pretrained(snapshot, revision="main")


def test_ls_shows_models_of_cache_and_folders(
    cache: Path, tiny: Any, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = cached(cache, tiny)
    (snapshot / "tokenizer.json").unlink()
    assert main(["ls", "--json"]) == 0
    hub, folder = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (hub["name"], hub["where"], hub["missing"]) == ("org/name", "hub", ["tokenizer.json"])
    assert (folder["name"], folder["where"], folder["base"]) == ("made", "folder", "source")
    assert folder["nbytes"] == sum(file.stat().st_size for file in artifact.iterdir())
    (artifact / "gossamer.json").write_text("{")
    assert main(["ls", str(artifact)]) == 0
    shown = capsys.readouterr().out
    assert "lacks tokenizer.json" in shown
    assert "not valid JSON" in shown


def test_rm_takes_a_model_out_of_the_cache_and_follows_no_link(cache: Path, tiny: Any, tmp_path: Path) -> None:
    snapshot, other = cached(cache, tiny), cached(cache, tiny, "org/other")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("kept")
    (snapshot / "link").symlink_to(outside)
    (snapshot / "file").symlink_to(outside / "kept.txt")
    (cache / "models--org--linked").symlink_to(outside)
    assert main(["rm", "org/name", "--yes"]) == 0
    assert not (cache / "models--org--name").exists()
    assert (outside / "kept.txt").read_text() == "kept"
    assert other.is_dir()
    with pytest.raises(UnsafeCheckpoint, match="not a folder in the hub's cache"):
        library.remove(library.find("org/linked"))
    assert (outside / "kept.txt").is_file()


def test_rm_needs_a_yes(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rm", str(artifact)]) == 2
    assert "--yes" in capsys.readouterr().err
    assert (artifact / "model.safetensors").is_file()
    assert main(["rm", str(artifact), "-y"]) == 0
    assert not artifact.exists()


def test_rm_refuses_what_is_not_ours(
    artifact: Path, cache: Path, tmp_path: Path, tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(artifact.rglob("*"))
    (artifact / "mine").mkdir()
    (artifact / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "link").symlink_to(artifact)
    for name, message in (
        (str(artifact), "holds 'mine/thesis.txt', which Gossamer did not write"),
        (str(tmp_path / "source"), "not made by Gossamer"),
        (str(tmp_path / "link"), "a link, not a model's folder"),
        (str(artifact / "config.json"), "a file, not a model's folder"),
        ("org/absent", "no model 'org/absent' on this machine"),
    ):
        assert main(["rm", name, "--yes"]) in (1, 2)
        assert message in capsys.readouterr().err
    assert set(before) < set(artifact.rglob("*"))
    (artifact / "mine" / "thesis.txt").unlink()
    with Lock(artifact), pytest.raises(OutputLocked):
        library.remove(library.find(str(artifact)))
    # One name that is wrong keeps all from being removed.
    assert main(["rm", str(artifact), "org/absent", "--yes"]) == 2
    assert artifact.is_dir()


def test_rm_of_an_artifact_takes_its_links_and_not_what_they_lead_to(artifact: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.safetensors"
    (artifact / "model.safetensors").rename(kept)
    (artifact / "model.safetensors").symlink_to(kept)
    library.remove(library.find(str(artifact)))
    assert kept.is_file()
    assert not artifact.exists()


@pytest.mark.parametrize("swap", ["a link", "no manifest"])
def test_what_changes_between_its_finding_and_its_removal_stays(artifact: Path, tmp_path: Path, swap: str) -> None:
    model = library.find(str(artifact))
    if swap == "a link":
        artifact.rename(tmp_path / "elsewhere")
        artifact.symlink_to(tmp_path / "elsewhere")
    else:
        (artifact / "gossamer.json").unlink()
    with pytest.raises(UnsafeCheckpoint, match="no longer the artifact that it was"):
        library.remove(model)
    assert (artifact / "model.safetensors").is_file()


def test_pull_says_where_a_model_is(cache: Path, tiny: Any, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = cached(cache, tiny)
    assert main(["pull", "org/name", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(snapshot)
    assert main(["pull", str(artifact)]) == 2
    assert "is here already" in capsys.readouterr().err
    assert main(["pull", "org/absent"]) == 2
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err
