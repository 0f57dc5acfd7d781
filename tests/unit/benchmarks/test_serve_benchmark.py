"""The parts of the serving benchmark that measure nothing: its rows, its prompts, and how samples become a page."""

from __future__ import annotations

import asyncio
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import bench_serve
import cpu_models
import peers
import serve_report
import serve_rows
import serve_sides
from cpu_sides import Failed
from serve_lm_eval import TASKS, passages_of, read_scores, write_task
from serve_rows import GOSSAMER, LLAMA_SERVER, VLLM, Load, Side

MODELS: dict[str, dict[str, Any]] = {
    "int4": {"bits_per_weight": 4.3, "weight_bytes": 72e6, "kld": 0.2},
    "q4_0": {"bits_per_weight": 4.5, "weight_bytes": 76e6, "kld": 0.4},
}


def sample(speed: float, ttft: float = 0.1, p99: float = 0.2, prompt: int = 1000) -> dict[str, Any]:
    """The results of a load, as `gossamer bench serve` gives them."""
    times = {"mean": ttft, "median": ttft, "p90": p99, "p99": p99}
    tokens = {"total": 500, "mean": 50.0, "min": 50, "max": 50}
    return {
        "output_tokens_per_s": speed, "total_tokens_per_s": speed * 3, "output_tokens": tokens,
        "prompt_tokens": {**tokens, "total": prompt}, "cached_prompt_tokens": None, "client_cores": 0.1,
        "ttft_s": times, "itl_s": times, "e2e_s": times,
    }  # fmt: skip


def result(**changes: Any) -> dict[str, Any]:
    """A row's result as bench_serve makes it."""
    row: dict[str, Any] = {
        "key": "mixed-llama", "title": "64 clients", "metric": "throughput", "wanted": 2.0, "p99_ttft": True,
        "ours": {"server": "gossamer", "model": "int4"}, "peer": {"server": "llama-server", "model": "q4_0"},
        "samples": {"ours": [sample(600), sample(640)], "peer": [sample(300, p99=0.3), sample(200, p99=0.3)]},
        "foreign_cores": [0.0, 0.02], "reason": None,
    }  # fmt: skip
    row |= changes
    pairs = serve_report.pair_ratios(row) if row["samples"]["ours"] else []
    return {"ratios": pairs, "ratio": sum(pairs) / len(pairs) if pairs else None} | row


def test_every_row_names_servers_and_files_that_can_be_made() -> None:
    assert len({row.key for row in serve_rows.ROWS}) == len(serve_rows.ROWS)
    for row in serve_rows.ROWS:
        assert set(row.models) <= set(cpu_models.MODELS)
        assert row.ours.server == GOSSAMER
        assert row.peer.server == GOSSAMER or row.peer.server in peers.PEERS
        assert {row.ours.server, row.peer.server} <= set(serve_sides.VARIANTS) & set(serve_sides.VERSIONS)


def test_a_load_fits_the_slots_and_contexts_of_the_servers() -> None:
    for row in serve_rows.ROWS:
        for side in ("ours", "peer"):
            load = row.load_of(side)
            prompt, output = (bench_serve.parse_length(text) for text in (load.prompts, load.outputs))
            longest = prompt.mean + prompt.spread + output.mean + output.spread + load.prefix
            room = serve_sides.SLOT if LLAMA_SERVER in (row.ours.server, row.peer.server) else serve_sides.CONTEXT
            assert longest < room
            assert load.concurrency <= serve_sides.SEQUENCES


def test_rows_are_chosen_by_name_and_a_wrong_name_is_said() -> None:
    assert [row.key for row in serve_rows.chosen("prefix-reuse,mixed-vllm")] == ["mixed-vllm", "prefix-reuse"]
    with pytest.raises(ValueError, match="mixed-tgi"):
        serve_rows.chosen("mixed-vllm,mixed-tgi")


def test_a_quick_row_asks_the_same_servers_for_less() -> None:
    row = serve_rows.chosen("prefix-reuse")[0]
    small = serve_rows.quick(row)
    assert (small.ours, small.peer) == (row.ours, row.peer)
    assert small.load.requests < row.load.requests
    assert small.load.shared
    assert not small.load_of("peer").shared
    assert small.wanted is None


@pytest.mark.parametrize("server", [GOSSAMER, LLAMA_SERVER, VLLM])
def test_a_server_is_started_with_its_model_port_and_variant(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_models, "path_of", lambda name: Path("/models") / name)
    monkeypatch.setattr(peers, "folder_of", lambda name: Path("/peers") / name)
    for variant in serve_sides.VARIANTS[server]:
        command, environment = serve_sides.launch(Side(server, "bf16"), variant, 1234, 2)
        assert "/models/bf16" in command
        assert command[command.index("--port") + 1] == "1234"
        assert set(variant.options) <= set(command)
        assert set(variant.environment) <= set(environment)
        assert "FIRST" not in environment.values()


def words(text: str) -> list[int]:
    return list(range(len(text.split())))


def test_prompts_have_the_tokens_that_the_load_wants_and_are_new_in_each_round() -> None:
    load = Load(requests=20, concurrency=4, prompts="20:10", outputs="8:4")
    asks = asyncio.run(bench_serve.make_prompts(load, 1, words))
    lengths = [len(words(str(ask.prompt))) for ask in asks]
    assert len(asks) == 20
    assert 10 <= min(lengths) < max(lengths) <= 30
    assert all(4 <= ask.max_tokens <= 12 for ask in asks)
    assert asks == asyncio.run(bench_serve.make_prompts(load, 1, words))
    assert asks != asyncio.run(bench_serve.make_prompts(load, 2, words))


def test_a_shared_prefix_is_the_same_for_all_and_an_own_one_for_none() -> None:
    load = Load(requests=6, concurrency=1, prompts="8", outputs="4", prefix=40)
    shared, own = (
        [str(ask.prompt).split() for ask in asyncio.run(bench_serve.make_prompts(asked, 1, words))]
        for asked in (load, replace(load, shared=False))
    )
    assert len({tuple(prompt[:40]) for prompt in shared}) == 1
    assert len({tuple(prompt[:8]) for prompt in own}) == 6
    assert [len(prompt) for prompt in shared] == [len(prompt) for prompt in own] == [48] * 6
    assert [prompt[40:] for prompt in shared] == [prompt[40:] for prompt in own]


def test_throughput_is_ours_over_theirs_and_waiting_is_theirs_over_ours() -> None:
    assert serve_report.pair_ratios(result()) == [2.0, 3.2]
    waits = {"ours": [sample(1, ttft=0.1)], "peer": [sample(1, ttft=0.7)]}
    assert serve_report.pair_ratios(result(metric="ttft", samples=waits)) == pytest.approx([7.0])


SLOW_TAIL = {"ours": [sample(600, p99=0.4)], "peer": [sample(300, p99=0.3)]}
OTHER_WORK = {"ours": [sample(600, prompt=900)], "peer": [sample(300, p99=0.3, prompt=1000)]}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "pass"),
        ({"wanted": 2.7}, "short"),
        ({"wanted": None}, "information"),
        ({"samples": SLOW_TAIL}, "short: p99 TTFT worse"),
        ({"samples": SLOW_TAIL, "p99_ttft": False}, "pass"),
        ({"samples": OTHER_WORK}, "pass, but the sides did not count the same tokens"),
        ({"foreign_cores": [0.5, 0.7]}, "pass, but others used 0.6 cores"),
        ({"reason": "no server", "samples": {"ours": [], "peer": []}}, "failed: no server"),
    ],
)
def test_the_verdict_follows_the_ratio_and_the_tail(changes: dict[str, Any], word: str) -> None:
    assert serve_report.verdict(result(**changes), MODELS) == word


def test_a_pass_with_a_larger_file_says_so() -> None:
    swapped = {"int4": MODELS["q4_0"], "q4_0": MODELS["int4"]}
    assert "more bits per weight" in serve_report.verdict(result(), swapped)


def test_the_page_has_a_line_for_every_row_the_failed_ones_too() -> None:
    failed = result(key="mixed-vllm", reason="no server within 900 s", samples={"ours": [], "peer": []})
    run = {
        "command": "python benchmarks/bench_serve.py",
        "created": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "a CPU", "isa": "avx2", "cores": 2, "os": "Linux"},
        "versions": {"gossamer": "0.1.0"},
        "protocol": {"threads": 2, "rounds": 2, "corpus": "a text", "tokens": 1000},
        "settings": {"llama-server": {"q4_0": {"variant": "flash attention", "command": "llama-server -fa on"}}},
        "models": MODELS,
        "rows": [result(), failed],
    }
    page = serve_report.page(json.loads(json.dumps(run)))
    assert "| 620.0 | 250.0 | 2.60 (2.00 3.20) | 2.0 | 1.50 | pass |" in page
    assert "failed: no server within 900 s |" in page
    assert "flash attention" in page
    assert "already 4-bit" in page


def test_a_load_with_a_failed_request_is_no_sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = bench_serve.Bench(2, 1, tmp_path)
    lost = {**sample(600), "failed": 2, "failures": {"HTTP 500: oops": 2}}
    row = serve_rows.chosen("mixed-llama")[0]
    variant = serve_sides.VARIANTS[GOSSAMER][0]
    bench._variants = {row.ours: variant, row.peer: variant}
    monkeypatch.setattr(bench, "_prompts", lambda load, seed: tmp_path / "prompts.jsonl")
    monkeypatch.setattr(bench_serve, "ask", lambda *_: lost)
    monkeypatch.setattr(serve_sides, "running", lambda *_: nullcontext("http://127.0.0.1:9"))
    got = bench.run(row)
    assert got["reason"] == "gossamer: 2 requests failed: HTTP 500: oops (2)"
    assert got["samples"] == {"ours": [], "peer": []}


def test_a_load_that_gives_no_record_is_a_failure_with_its_last_words(tmp_path: Path) -> None:
    load = Load(requests=1, concurrency=1, prompts="8", outputs="4")
    with pytest.raises(Failed, match=r"no answer from http://127\.0\.0\.1:9"):
        bench_serve.ask("http://127.0.0.1:9", load, tmp_path / "none.jsonl", 1)


TEXT = (
    "\n\n".join(f"Paragraph {name}: " + " ".join(f"{name}{i}" for i in range(30)) for name in "abcdefgh") + "\n\nshort"
)


def test_tasks_for_lm_eval_are_made_from_paragraphs_and_name_the_right_ending(tmp_path: Path) -> None:
    passages = passages_of(TEXT, count=6, seed=1)
    assert len(set(passages)) == 6
    assert passages == passages_of(TEXT, count=6, seed=1)
    write_task(tmp_path, passages, seed=1)
    documents = [json.loads(line) for line in (tmp_path / "passages.jsonl").read_text().splitlines()]
    for document, passage in zip(documents, passages, strict=True):
        assert f"{document['beginning']} {document['endings'][document['right']]}" == passage
        assert len(set(document["endings"])) == 4
    assert len({document["right"] for document in documents}) > 1
    for name in TASKS:
        task = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        assert task["task"] == name
        assert task["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "passages.jsonl")


def test_a_text_without_paragraphs_makes_no_tasks() -> None:
    with pytest.raises(ValueError, match="fewer than four"):
        passages_of("a few words", count=6, seed=1)


def test_scores_are_read_from_what_lm_eval_writes(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    found = {"local_choice": {"alias": "local_choice", "acc,none": 0.75, "acc_stderr,none": "N/A"}}
    (tmp_path / "model" / "results_2026.json").write_text(json.dumps({"results": found, "n-samples": {"a": 1}}))
    assert read_scores(tmp_path) == {"scores": {"local_choice": {"acc": 0.75}}, "passages": {"a": 1}}
    with pytest.raises(ValueError, match="no results"):
        read_scores(tmp_path / "absent")
