"""A load on a server that answers right, wrong, late and not at all."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_openai import FakeServer, serving, text_of
from gossamer.errors import MeasureError, UsageError
from gossamer.measure.load import prompts
from gossamer.measure.load.measure import measure_load
from gossamer.measure.load.plan import Length, LoadPlan
from gossamer.measure.load.send import Sender
from gossamer.measure.load.target import Target, root_of

SHORT = LoadPlan(requests=12, concurrency=4, input_tokens=Length(20, 10), output_tokens=Length(6, 3), warmup=0)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving() as server:
        yield server


def load(fake: FakeServer, plan: LoadPlan = SHORT, **options: Any) -> dict[str, Any]:
    return measure_load(fake.url, plan, lambda label, done, total: None, **options)


def changed(**changes: Any) -> LoadPlan:
    return LoadPlan(**{**SHORT.__dict__, **changes})


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_every_request_is_answered_and_counted_by_the_server(fake: FakeServer, endpoint: str) -> None:
    fake.per_piece = 3
    record = load(fake, changed(endpoint=endpoint))
    results = record["results"]
    assert record["status"] == "ok"
    assert (results["completed"], results["failed"], results["unfinished"]) == (12, 0, 0)
    assert results["output_tokens"]["total"] == sum(body["max_tokens"] for body in fake.asked)
    assert results["output_counted_by"] == "usage"
    assert results["ttft_s"]["median"] > 0
    assert record["engine"]["name"] == "fakes"
    assert record["model"]["name"] == "fake"


def test_a_record_carries_its_whole_protocol(fake: FakeServer) -> None:
    fake.key = "very-secret"
    record = load(fake, changed(ignore_eos=True, seed=3, goodput={"ttft": 0.5}), api_key="very-secret")
    protocol = record["protocol"]
    assert protocol["url"] == fake.url
    assert protocol["concurrency"] == 4
    assert protocol["input_tokens"] == "20:10"
    assert protocol["output_tokens"] == "6:3"
    assert protocol["seed"] == 3
    assert protocol["ignore_eos"] is True
    assert protocol["goodput_s"] == {"ttft": 0.5}
    assert len(protocol["prompts_sha256"]) == 64
    assert record["machine"]["cpu"]
    assert "very-secret" not in json.dumps(record)


def test_no_more_than_the_asked_requests_are_under_way(fake: FakeServer) -> None:
    fake.delay = 0.003
    load(fake, changed(concurrency=3))
    assert fake.most == 3


def test_requests_of_a_rate_do_not_wait_for_each_other(fake: FakeServer) -> None:
    fake.delay = 0.05
    results = load(fake, changed(rate=1000.0, concurrency=1))["results"]
    assert results["completed"] == 12
    assert fake.most > 1


def test_the_same_seed_asks_the_same_and_another_seed_something_else(fake: FakeServer) -> None:
    first, second, other = (load(fake, changed(seed=seed))["protocol"]["prompts_sha256"] for seed in (5, 5, 6))
    assert first == second != other
    texts = [sorted(map(text_of, fake.asked[i : i + 12])) for i in (0, 12, 24)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("tokenizer", "by"), [(True, "tokenize"), (False, "usage")])
def test_random_prompts_have_the_wanted_tokens_as_the_server_counts_them(
    fake: FakeServer, tokenizer: bool, by: str
) -> None:
    fake.overhead, fake.tokenizer = 11, tokenizer
    record = load(fake, changed(input_tokens=Length(40)))
    assert record["results"]["prompt_tokens"] == {"total": 480, "mean": 40.0, "min": 40, "max": 40}
    assert record["protocol"]["lengths_by"] == by


def test_a_server_that_counts_nothing_gets_words_and_that_is_said(fake: FakeServer) -> None:
    fake.usage = False
    record = load(fake, changed(input_tokens=Length(40)))
    assert record["protocol"]["lengths_by"] == "words"
    assert {len(text_of(body).split()) for body in fake.asked} == {40}
    assert record["results"]["output_counted_by"] == "chunks"
    assert record["results"]["output_tokens"]["total"] == sum(body["max_tokens"] for body in fake.asked)
    assert record["results"]["total_tokens_per_s"] is None


def test_a_shared_prefix_stands_before_every_prompt_and_before_no_other_text(fake: FakeServer) -> None:
    fake.overhead = 7
    record = load(fake, changed(shared_prefix=30, input_tokens=Length(20), warmup=2))
    counted = [text_of(body).split() for body in fake.asked[2:]]
    assert len({tuple(words[:30]) for words in counted}) == 1
    assert len({tuple(words[30:]) for words in counted}) == 12
    assert record["results"]["prompt_tokens"]["min"] == record["results"]["prompt_tokens"]["max"] == 50
    assert all(text_of(body).split()[:5] != counted[0][:5] for body in fake.asked[:2])


def test_warm_up_requests_do_not_count(fake: FakeServer) -> None:
    results = load(fake, changed(warmup=3))["results"]
    assert len(fake.asked) == 15
    assert results["completed"] == 12


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ({"status": 429}, "HTTP 429: too many requests"),
        ({"status": 500}, "HTTP 500: too many requests"),
        ({"cut_after": 2}, "stream: cut off before its end"),
        ({"error_after": 1}, "stream: the engine died"),
    ],
)
def test_failed_requests_are_reported_beside_the_others(fake: FakeServer, trouble: dict[str, int], reason: str) -> None:
    fake.every = 3
    for name, value in trouble.items():
        setattr(fake, name, value)
    results = load(fake)["results"]
    assert (results["completed"], results["failed"]) == (8, 4)
    assert results["failures"] == {reason: 4}
    assert results["output_tokens"]["total"] == sum(b["max_tokens"] for i, b in enumerate(fake.asked) if (i + 1) % 3)


def test_requests_that_take_too_long_are_given_up(fake: FakeServer) -> None:
    fake.delay = 30.0
    record = load(fake, changed(timeout=0.2, requests=4))
    assert record["status"] == "failed"
    assert record["results"]["failures"] == {"timeout: not complete after 0.2 s": 4}


def test_a_load_that_is_stopped_keeps_what_is_complete(fake: FakeServer) -> None:
    sender = Sender(Target(fake.url, "fake", {}), SHORT, [prompts.Ask("a b", 3)] * 12, lambda *_: None, "requests")
    task: asyncio.Task[None]

    def progress(label: str, done: int, total: int) -> None:
        if done == 4:
            fake.delay = 30.0
            task.cancel()

    async def run() -> None:
        nonlocal task
        sender.progress = progress
        task = asyncio.create_task(sender.run())
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
    assert sender.load.unfinished == 12 - len(sender.load.answers) > 0
    assert [answer.error for answer in sender.load.answers] == [None] * len(sender.load.answers)
    assert len(sender.load.answers) >= 4


def test_a_server_that_is_not_there_is_said_before_any_work() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(MeasureError, match=f"127.0.0.1:{port}"):
        measure_load(f"http://127.0.0.1:{port}", SHORT, lambda *_: None)


def test_a_server_that_goes_away_fails_the_requests_and_not_the_load() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        target = Target(f"http://127.0.0.1:{listener.getsockname()[1]}", "fake", {})

        def hang_up() -> None:
            for _ in range(4):
                listener.accept()[0].close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        sender = Sender(target, SHORT, [prompts.Ask("a b", 3)] * 4, lambda *_: None, "requests")
        asyncio.run(sender.run())
        thread.join(10)
    assert len(sender.load.answers) == 4
    assert all((answer.error or "").startswith("connection: ") for answer in sender.load.answers)


def test_a_wrong_key_is_said_before_any_work(fake: FakeServer) -> None:
    fake.key = "k"
    with pytest.raises(MeasureError, match=r"401.*wrong key"):
        load(fake, api_key="other")
    assert not fake.asked


def test_one_of_several_models_must_be_named(fake: FakeServer) -> None:
    fake.models = ("a", "b")
    with pytest.raises(UsageError, match="a, b"):
        load(fake)
    load(fake, changed(requests=1), model="b")
    assert fake.asked[0]["model"] == "b"


def test_prompts_of_a_file_are_asked_in_turn(fake: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    file.write_text(f"{json.dumps({'prompt': 'one two', 'max_tokens': 2})}\n\n{json.dumps({'messages': chat})}\n")
    record = load(fake, changed(requests=4, concurrency=1), prompts=file)
    assert [body["messages"] for body in fake.asked] == [[{"role": "user", "content": "one two"}], chat] * 2
    assert fake.asked[0]["max_tokens"] == 2
    assert record["protocol"]["prompts"] == "prompts.jsonl"
    with pytest.raises(UsageError, match="chat endpoint"):
        load(fake, changed(endpoint="completions"), prompts=file)


def test_every_line_of_a_text_is_a_prompt(fake: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    load(fake, changed(requests=2, concurrency=1, shared_prefix=2), prompts=tmp_path / "p.txt")
    assert [text_of(body).split()[2] for body in fake.asked] == ["one", "two"]


WRONG_LINES = [
    "{",
    "[]",
    "3",
    '{"text": "x"}',
    '{"prompt": ""}',
    '{"messages": []}',
    '{"messages": "x"}',
    '{"prompt": "a", "max_tokens": 0}',
]


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_line_that_is_no_prompt_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "good"}}\n{line}\n')
    with pytest.raises(UsageError, match=r"p\.jsonl:2"):
        prompts.from_file(tmp_path / "p.jsonl", SHORT)


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://h:1", "http://h:1"),
        ("http://h:1/", "http://h:1"),
        ("http://h:1/v1", "http://h:1"),
        ("http://h:1/v1/", "http://h:1"),
        ("http://h:1/v1/chat/completions", "http://h:1"),
        ("https://h/api/v1", "https://h/api"),
        ("localhost:8000", "http://localhost:8000"),
    ],
)
def test_a_url_is_taken_with_or_without_its_version(url: str, root: str) -> None:
    assert root_of(url) == root


@pytest.mark.parametrize("url", ["", "ftp://h", "http://", "http://h:x", "http://h:99999", "http://me:secret@h"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        root_of(url)
