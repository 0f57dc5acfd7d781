"""Several models in one server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Server, chat_body, wait_until

from gossamer.cli.serve import bytes_in, model_names
from gossamer.errors import UsageError


@pytest.fixture(scope="module")
def two() -> Iterator[Server]:
    with Server("--names", "one", "org/two") as server:
        yield server


def test_each_answers_for_itself(two: Server) -> None:
    assert [card["id"] for card in two.http.get("/v1/models").json()["data"]] == ["one", "org/two"]
    assert two.http.get("/v1/models/org/two").json()["id"] == "org/two"
    for name in ("one", "org/two"):
        answer = two.post("/v1/chat/completions", {**chat_body("say:Hi"), "model": name}).json()
        assert (answer["model"], answer["choices"][0]["message"]["content"]) == (name, "Hi")
    assert two.http.get("/health").json()["models"] == {"one": "ready", "org/two": "ready"}
    assert two.http.get("/metrics").text.count('generation_tokens_total{model_name="') == 2


def test_a_name_is_needed_and_must_be_right(two: Server) -> None:
    missing = two.post("/tokenize", {"prompt": "a"})
    assert missing.status_code == 400
    assert "one of one, org/two" in missing.json()["error"]["message"]
    wrong = two.post("/v1/completions", {"model": "org/tow", "prompt": "a"})
    assert wrong.status_code == 404
    assert "did you mean 'org/two'?" in wrong.json()["error"]["message"]


def test_one_that_is_lost_takes_no_other_with_it(two: Server) -> None:
    two.workers()[0].kill()
    wait_until(lambda: two.http.get("/health").status_code == 503, "the loss")
    lost = [name for name, state in two.http.get("/health").json()["models"].items() if state == "restarting"]
    assert len(lost) == 1
    (other,) = {"one", "org/two"} - set(lost)
    assert two.post("/v1/completions", {"model": other, "prompt": "abc", "max_tokens": 1}).status_code == 200
    wait_until(lambda: two.http.get("/health").status_code == 200, "another worker")


def test_models_are_called_by_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("small", "deep/er"):
        Path(folder).mkdir(parents=True)
    Path("a.gguf").touch()
    assert model_names(["small/", "deep/er", "a.gguf", "org/hub", "smollm2"], []) == [
        "small", "er", "a", "org/hub", "smollm2",
    ]  # fmt: skip
    assert model_names(["small", "deep/er"], ["x", "y"]) == ["x", "y"]
    with pytest.raises(UsageError, match="two models are called 'small'"):
        model_names(["small", "small/"], [])


def test_sizes() -> None:
    assert [bytes_in(size) for size in ("2GB", "1.5 MiB", "100", "1kb")] == [2 * 10**9, 3 << 19, 100, 1000]
