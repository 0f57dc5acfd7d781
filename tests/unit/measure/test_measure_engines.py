"""Other engines: which there are, what they are given, and that every one of them leaves a row, whatever happens."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import fake_libraries
import numpy as np
import pytest

from fake_openai import FakeServer, serving
from gossamer.checkpoint import open_checkpoint
from gossamer.cli import main
from gossamer.errors import EngineMissing, MeasureError, UnknownName, UnsupportedModel, UsageError
from gossamer.measure import run
from gossamer.measure.corpus import load_corpus
from gossamer.measure.engines import loop, peers, url
from gossamer.measure.engines.url import bench_server, moments
from gossamer.measure.load.stats import Answer
from gossamer.measure.load.wire import Exchange
from gossamer.measure.plans import SpeedPlan, WindowPlan
from gossamer.measure.speed import make_prompts, ordinary_tokens
from gossamer.measure.timing import Timing, rates
from gossamer.measure.worker import Channel, Job, Worker, WorkerDiedError
from gossamer.report.records import as_record

PLAN = SpeedPlan(prompt_tokens=5, output_tokens=3, batch=2, repetitions=2, warmup=1)
WINDOWS = WindowPlan(32, 32, 16)
ENGINES = Path(loop.__file__).parent


pytestmark = pytest.mark.usefixtures("inline_ours")


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOSSAMER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GOSSAMER_THREADS", "1")
    for peer in peers.PEERS.values():
        monkeypatch.delenv(peer.variable, raising=False)


@pytest.fixture
def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python that has a `vllm`, and what that was told."""
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    (libraries / "torch.py").write_text("")
    (libraries / "vllm.py").write_text(f"{Path(fake_libraries.__file__).read_text()}\n__version__ = '9.9'\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={libraries} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("GOSSAMER_ENGINE_VLLM", str(python))
    monkeypatch.setenv("GOSSAMER_FAKE_TOLD", str(tmp_path / "told.json"))
    return tmp_path / "told.json"


def request_for(tokens: int = 100) -> run.EvalRequest:
    return run.EvalRequest("default", load_corpus("default"), WINDOWS, tokens=tokens, samples=0, threads=1)


def bench(model: Path | str, *engines: str, judged: run.EvalRequest | None = None) -> list[dict[str, Any]]:
    return list(run.bench_models([str(model)], PLAN, lambda *a: None, threads=1, engines=engines, judged=judged))


def test_engines_are_named_once_each_and_all_are_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    server = "http://127.0.0.1:1/v1"
    assert peers.parse_engines(f"vllm, gossamer,vllm,{server}") == ["vllm", "gossamer", server]
    monkeypatch.setenv("GOSSAMER_ENGINE_LLAMA_CPP", sys.executable)
    assert peers.parse_engines("all") == ["gossamer", "llama.cpp"]
    assert peers.parse_engines(f"vllm,all,{server}") == ["gossamer", "llama.cpp", "vllm", server]
    assert [peer.name for peer in peers.absent(["gossamer", "llama.cpp"])] == ["transformers", "openvino", "vllm"]
    with pytest.raises(UnknownName, match=r"llamacpp") as error:
        peers.parse_engines("llamacpp")
    assert "'llama.cpp'" in str(error.value.hint)
    with pytest.raises(UsageError, match="names none"):
        peers.parse_engines(" ,")


def test_a_peers_python_lies_in_the_cache_or_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = peers.PEERS["llama.cpp"]
    with pytest.raises(EngineMissing, match=r"llama\.cpp is not installed") as error:
        peer.python()
    folder = tmp_path / "home" / "peers" / "llama.cpp"
    assert error.value.hint == (
        f"python -m venv {folder} && {folder}/bin/pip install {peer.requirements}, or set GOSSAMER_ENGINE_LLAMA_CPP"
    )
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    assert peer.python() == folder / "bin" / "python"
    monkeypatch.setenv(peer.variable, sys.executable)
    assert peer.python() == Path(sys.executable)
    monkeypatch.setenv(peer.variable, str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="no program"):
        peer.python()


@pytest.mark.parametrize(("name", "form"), [("llama.cpp", "folder"), ("openvino", "folder"), ("vllm", "gguf")])
def test_a_form_that_an_engine_does_not_open_is_refused_with_the_way_out(name: str, form: peers.Form) -> None:
    peer = peers.PEERS[name]
    with pytest.raises(UnsupportedModel, match=f"m is a.* {peer.name} opens a") as error:
        peer.check("m", form)
    assert "gossamer " in str(error.value.hint)
    peer.check("m", peer.opens)


def test_an_engine_gets_the_tokens_that_ours_reads_and_gives_records_like_ours(tiny: Path, fake_python: Path) -> None:
    speed, quality = bench(tiny, "vllm", judged=request_for())
    told = json.loads(fake_python.read_text())
    checkpoint = open_checkpoint(tiny)
    ordinary = ordinary_tokens(checkpoint.tokenizer(), load_corpus("default").text)
    prompts = [make_prompts(ordinary, PLAN, seed) for seed in range(3)]
    assert told["prompts"] == [ids for batch in prompts for ids in batch]
    assert (told["model"], told["threads"], told["max_model_len"]) == (str(tiny), "1", 33)

    assert (speed["status"], speed["error"]) == ("ok", None)
    assert speed["engine"]["name"] == "vllm"
    assert speed["engine"]["version"] == "9.9"
    assert speed["engine"]["dtype"] == speed["engine"]["kv_cache"] == "bfloat16"
    assert speed["model"]["fingerprint"] == checkpoint.fingerprint()
    results = speed["results"]
    kv = sum(2 * layer.kv_size for layer in checkpoint.config.layers) * 2
    assert results["rm_kv_bytes_per_token"] == kv
    assert results["rm_reserved_bytes"] == 100 * 16 * kv
    assert results["wm_bytes"] == checkpoint.weight_bytes()
    assert results["rm_peak_bytes"] >= results["bare_bytes"] > 0
    assert len(results["decode_tokens_per_s"]["samples"]) == 2

    ids = checkpoint.tokenizer().encode(load_corpus("default").text)[:100]
    windows = [ids[start : start + 32] for start in (0, 32, 64)]
    expected = sum(fake_libraries.nll(window, 16) for window in windows) / 48
    assert quality["results"]["nll"] == pytest.approx(expected, rel=1e-9)
    assert quality["results"]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-9)
    assert (quality["kind"], quality["protocol"]["tokens_scored"]) == ("eval", 48)
    for record in (speed, quality):
        assert not as_record(record, "here").failed


def test_the_protocol_of_another_engine_is_that_of_ours(tiny: Path, fake_python: Path) -> None:
    records = bench(tiny, "vllm", "gossamer", judged=request_for())
    (theirs, ours), (theirs_judged, ours_judged) = (
        [record for record in records if record["kind"] == kind] for kind in ("bench", "eval")
    )
    assert [r["engine"]["name"] for r in records] == ["vllm", "vllm", "gossamer", "gossamer"]
    assert theirs["protocol"] == ours["protocol"]
    assert theirs_judged["protocol"] == ours_judged["protocol"]
    assert set(theirs["results"]) == set(ours["results"])
    assert ours["results"]["rm_reserved_bytes"] > 0
    assert set(theirs_judged["results"]) == set(ours_judged["results"])


def test_the_command_shows_every_engine_and_how_the_absent_are_installed(
    tiny: Path, fake_python: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.jsonl"
    shape = ["--prompt-tokens", "5", "--output-tokens", "3", "--repetitions", "1", "--threads", "1"]
    judged = ["--perplexity", "100", "--context", "32"]
    assert main(["bench", str(tiny), "--engine", "all,openvino", *shape, *judged, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    header, *rows = [line.split() for line in printed.out.splitlines() if line.strip()][:4]
    assert [row[1] for row in rows] == ["gossamer", "vllm", "openvino"]
    assert "reserved" in header
    assert float(rows[1][-1].replace(",", "")) > 100  # the double is near to chance, 300 tokens
    assert rows[2][3] == "failed"
    assert "perplexity of 48 tokens of pydoc-topics" in printed.out
    assert "llama.cpp is not installed: python -m venv" in printed.err
    assert "openvino is not installed:" not in printed.err  # it was asked for by name, and is a row
    assert f"failed: {tiny} in openvino: UnsupportedModel" in printed.err
    assert main(["report", str(out), "--json"]) == 0
    engines = {row["engine"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert {"vllm 9.9 (bfloat16)", "openvino"} <= engines


def test_what_cannot_start_is_a_row_that_failed(tiny: Path, fake_python: Path, tmp_path: Path) -> None:
    records = bench(tiny, "vllm", "llama.cpp", "transformers")
    assert [(r["engine"]["name"], r["status"]) for r in records] == [
        ("vllm", "ok"), ("llama.cpp", "failed"), ("transformers", "failed"),
    ]  # fmt: skip
    assert "UnsupportedModel" in records[1]["error"]
    assert "gossamer export" in records[1]["error"]
    assert "EngineMissing: transformers is not installed" in records[2]["error"]
    assert "pip install" in records[2]["error"]
    assert all(r["model"]["fingerprint"] for r in records)
    (record,) = bench(tmp_path / "nothing", "vllm")
    assert "ModelNotFound" in record["error"]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("raise load", "ValueError: the fake cannot load"),
        ("raise run", "ValueError: the fake cannot run"),
        ("die run", "ended early with exit code 3; its last words: the fake gave up"),
    ],
)
def test_an_engine_that_breaks_is_a_row_that_failed(
    fault: str, error: str, tiny: Path, fake_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOSSAMER_FAKE", fault)
    (record,) = bench(tiny, "vllm", judged=request_for())
    assert error in record["error"]
    assert record["results"] == {}


def test_a_perplexity_that_fails_costs_no_figures_of_speed(
    tiny: Path, fake_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOSSAMER_FAKE", "raise judge")
    speed, quality = bench(tiny, "vllm", judged=request_for())
    assert speed["status"] == "ok"
    assert "the fake cannot judge" in quality["error"]


def test_a_python_without_the_library_says_how_it_is_installed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_ENGINE_VLLM", sys.executable)
    (record,) = bench(tiny, "vllm")
    assert "EngineMissing" in record["error"]
    assert "cannot import vllm" in record["error"]
    assert "pip install vllm" in record["error"]


def job(script: str, seconds: float | None = None) -> Job:
    """Another program as a worker: a line of Python for each value."""
    program = f"import sys\nfor line in sys.stdin:\n    {script}"
    return Job("any", {}, command=(sys.executable, "-u", "-c", program), seconds=seconds)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_another_program_stands_still_between_its_turns() -> None:
    def state() -> str:
        return Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]

    with Worker(job("""print('{"event": "value", "value": 7}')""")) as worker:
        for _ in range(2):
            assert next(worker) == 7
            deadline = time.monotonic() + 10
            while state() != "T" and time.monotonic() < deadline:
                time.sleep(0.01)
            assert state() == "T"


def test_another_program_that_never_answers_is_ended() -> None:
    with (
        Worker(job("import time; time.sleep(60)", seconds=0.2)) as worker,
        pytest.raises(WorkerDiedError, match=r"no answer within 0\.2 s"),
    ):
        next(worker)


# --- adapters over doubles of their libraries -------------------------------------------------------------------------


@pytest.fixture(params=["llama_cpp", "openvino"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An engine for two sequences of up to 40 tokens; prompts are read five tokens at a time."""
    library: ModuleType = fake_libraries.LlamaCpp() if request.param == "llama_cpp" else fake_libraries.OpenVINO()
    monkeypatch.setitem(sys.modules, library.__name__, library)
    openvino = ModuleType("openvino")
    openvino.Tensor = lambda array: SimpleNamespace(data=np.asarray(array))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    module = loop.load_file("engine_under_test", ENGINES / f"{request.param}.py")
    monkeypatch.setattr(module, "STEP", 5, raising=False)
    yield module.Engine(
        {"model": "m", "batch": 2, "context": 40, "threads": 1, "kv_elements": 64, "kv_memory": 1 << 30}
    )
    del sys.modules["engine_under_test"]


def test_an_adapter_judges_a_window_as_its_library_says(engine: Any) -> None:
    for length, scored in ((12, 11), (11, 4), (6, 1), (5, 3)):
        window = list(range(length))
        assert engine.nll(window, scored) == pytest.approx(fake_libraries.nll(window, scored), rel=1e-6)


def test_an_adapter_continues_every_prompt_to_its_end(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    real = fake_libraries.next_logits
    monkeypatch.setattr(fake_libraries, "next_logits", lambda tokens: asked.append(list(tokens)) or real(tokens))
    prompts = [list(range(1, 8)), list(range(11, 18))]
    first, decode = engine.run(prompts, 4)
    assert first > 0
    assert decode > 0
    monkeypatch.undo()
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(4):
            assert tokens in asked
            tokens.append(fake_libraries.likeliest(tokens))
    assert engine.reserved_bytes > 0


@pytest.mark.slow
def test_transformers_judges_as_our_oracle_does(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_ENGINE_TRANSFORMERS", sys.executable)
    records = bench(tiny, "transformers", judged=request_for())
    assert [r["error"] for r in records] == [None, None]
    (ours,) = run.evaluate_models([str(tiny)], replace(request_for(), backend="reference"), lambda *a: None)
    assert records[1]["results"]["nll"] == pytest.approx(ours["results"]["nll"], rel=1e-5)


# --- servers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as fake:
        fake.delay = 0.002
        yield fake


def ask_server(server: FakeServer, **options: Any) -> list[Any]:
    arguments: dict[str, Any] = {
        "url": server.url, "model": "m", "api_key": None, "prompts": [[[1, 2, 3], [4, 5, 6]]], "output_tokens": 4,
        "windows": [], "scored": 0,
    }  # fmt: skip
    return list(bench_server(Channel(io.BytesIO()), **arguments | options))


def test_a_server_gets_token_ids_all_of_a_batch_at_once(server: FakeServer) -> None:
    loaded, ran, found = ask_server(server)
    assert (loaded, ran) == (None, None)
    assert sorted(body["prompt"] for body in server.asked) == [[1, 2, 3], [4, 5, 6]]
    assert all(body["ignore_eos"] and body["max_tokens"] == 4 and body["model"] == "fake" for body in server.asked)
    assert found["rm_peak_bytes"] is None
    assert found["judged"] is None
    ((first, decode),) = found["timings"]
    assert first > 0
    assert decode > 0


def test_a_server_with_several_models_is_asked_for_the_one_of_the_name(server: FakeServer) -> None:
    server.models = ("a", "m")
    ask_server(server)
    assert {body["model"] for body in server.asked} == {"m"}


def test_a_servers_perplexity_is_that_of_the_echoed_prompt(server: FakeServer) -> None:
    server.logprob = -2.5
    found = ask_server(server, windows=[[1, 2, 3, 4, 5]] * 2, scored=3)[-1]
    assert found["judged"]["nll"] == pytest.approx(2.5)
    server.logprob = None
    found = ask_server(server, windows=[[1, 2, 3, 4, 5]], scored=3)[-1]
    assert "no log-probabilities of a prompt" in found["judged"]["error"]["message"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"overhead": 1}, "read 4 tokens, where 3 were sent"),
        ({"usage": False}, "does not tell how many tokens"),
        ({"status": 503}, "HTTP 503"),
        ({"cut_after": 1}, "cut off"),
        ({"per_piece": 4}, "whole answer at once"),
        ({"key": "secret"}, "401"),
    ],
)
def test_a_server_that_measures_something_else_fails(fault: dict[str, Any], message: str, server: FakeServer) -> None:
    vars(server).update(fault)
    with pytest.raises(MeasureError, match=message):
        ask_server(server)


def test_a_row_of_a_server_has_no_memory_and_its_own_name(tiny: Path, server: FakeServer) -> None:
    (record,) = bench(tiny, server.url)
    assert (record["status"], record["engine"]["name"], record["engine"]["backend"]) == ("ok", server.url, "fakes")
    assert record["results"]["rm_peak_bytes"] is None
    assert not as_record(record, "here").failed


@pytest.mark.parametrize("cut", [1, 7, 100, 5000])
@pytest.mark.parametrize("server_name", ["gossamer", "llama-server"])
def test_what_real_servers_said_is_read_whole_however_it_is_cut(server_name: str, cut: int) -> None:
    recorded = (Path(__file__).parent / "recorded" / f"{server_name}.http").read_bytes()
    pieces = [(10.0 + i, recorded[start : start + cut]) for i, start in enumerate(range(0, len(recorded), cut))]
    answer = url._checked(Exchange(pieces=pieces, sent=9.0), [504, 260, 1398, 314], 4)
    assert (answer.prompt_tokens, answer.output_tokens, len(answer.arrivals)) == (4, 4, 4)
    assert list(answer.arrivals) == sorted(answer.arrivals)
    assert answer.e2e >= answer.arrivals[-1]
    with pytest.raises(MeasureError, match="read 4 tokens, where 3 were sent"):
        url._checked(Exchange(pieces=pieces, sent=9.0), [1, 2, 3], 4)
    with pytest.raises(MeasureError, match="wrote 4 tokens, not 5"):
        url._checked(Exchange(pieces=pieces, sent=9.0), [1, 2, 3, 4], 5)
    half = [piece for piece in pieces if piece[0] <= 10 + len(pieces) // 2]
    if len(half) < len(pieces):
        with pytest.raises(MeasureError, match=r"cut off|closed|HTTP|events"):
            url._checked(Exchange(pieces=half, sent=9.0), [504, 260, 1398, 314], 4)


def test_the_first_token_of_a_batch_is_the_last_of_the_first() -> None:
    got = [Exchange(sent=10.0), Exchange(sent=10.5)]
    answers = [Answer(arrivals=(1.0, 2.0), e2e=4.0), Answer(arrivals=(2.0,), e2e=2.5)]
    assert moments(got, answers) == (2.5, 1.5)
    found = rates([Timing(2.5, 1.5)], PLAN)
    assert found["prefill_tokens_per_s"]["median"] == 2 * 5 / 2.5
    assert found["decode_tokens_per_s"]["median"] == pytest.approx(2 * 2 / 1.5)
