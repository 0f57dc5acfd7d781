"""Engines that are not there, fall silent, die or talk nonsense: each is an error that names it, and nothing is left.

The engines are small programs that stand where a Python, llama-server or llama-quantize would.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from exports import make_artifact, run_export
from gossamer.checkpoint import memory
from gossamer.cli import main
from gossamer.errors import CorruptCheckpoint, ExportError, ProofFailed
from gossamer.export import engines
from gossamer.export.engines import llama_cpp
from gossamer.export.run import Proving
from gossamer.formats import Integer

SILENT = "exec sleep 60"
SERVER = """#!{python}
import http.server, os, sys

ANSWERS = {answers!r}

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path not in ANSWERS:
            print("ggml: out of memory: failed", flush=True)
            os._exit(9)
        status, said = ANSWERS[self.path]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(said.encode())

    do_POST = do_GET

    def log_message(self, *words):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
HEALTH, PROPS = {"/health": (200, "{}")}, {"/props": (200, '{"build_info": "b1-test"}')}


def program(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(0o755)
    return path


def interpreter(folder: Path, worker: str) -> Path:
    """A Python that has whatever package it is asked for, and runs a worker as this line of sh does."""
    return program(folder / "python", f'#!/bin/sh\n[ "$1" = -c ] && exit 0\n{worker}\n')


def server(folder: Path, answers: dict[str, tuple[int, str]]) -> Path:
    """A llama-server with these answers; at any other question it dies."""
    return program(folder / "llama-server", SERVER.format(python=sys.executable, answers=answers))


def refused(tmp_path: Path, target: str, proving: Proving | None = None, **options: object) -> ExportError:
    """The error of an export that fails; what was there before is all that is there then."""
    model, before = make_artifact(tmp_path / "m", Integer(4, 32)), sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ExportError) as caught:
        run_export(model, target, tmp_path / "out.gguf", proving=proving or Proving(), **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    return caught.value


@pytest.mark.parametrize(
    ("worker", "words"),
    [
        ("echo 'RuntimeError: no kernel for int4' >&2; exit 3", "cannot run .*no kernel for int4"),
        ("exit 3", "cannot run .*: nothing"),
        ("exit 0", "answered '' for .*no tokens"),
        (r"printf '\377\376 loading\n'", "answered '.* loading' for .*no tokens"),
        ("""echo '{"tokens": [[1], [2], [3]]}'""", "answered '{.*no tokens"),
        ("""echo '{"version": "1", "tokens": [["a"], [2], [3]]}'""", "answered '{.*no tokens"),
        ("""echo '{"version": "1", "tokens": 7}'""", "answered '{.*no tokens"),
    ],
)
def test_a_worker_that_fails_is_named_with_what_it_said(tmp_path, worker, words) -> None:
    error = refused(tmp_path, "transformers", Proving(python=interpreter(tmp_path, worker)))
    assert re.search(f"^transformers .*{words}", error.message)
    assert "out.gguf" in error.message
    assert "--no-verify" in str(error.hint)


def test_a_worker_that_never_answers_is_waited_for_only_so_long(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(engines, "MINUTES", 0.01)
    error = refused(tmp_path, "transformers", Proving(python=interpreter(tmp_path, SILENT)))
    assert "transformers took longer than 0.01 minutes on " in error.message
    assert "--no-verify" in str(error.hint)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([[1]], "answered 1 of 3 prompts"),
        ([[1], [2], [320]], r"answered \[320\], which are no tokens of the model"),
        ([[7] * 16] * 3, "standard deviations of the logits below ours"),
    ],
)
def test_a_worker_that_answers_another_model_is_caught(tmp_path, tokens, words) -> None:
    said = json.dumps({"version": "1.0", "tokens": tokens})
    error = refused(tmp_path, "transformers", Proving(python=interpreter(tmp_path, f"echo '{said}'")))
    assert isinstance(error, ProofFailed)
    assert re.search(f"^transformers 1.0 .*{words}", error.message)
    assert "reads the model wrongly" in str(error.hint)


def test_answers_that_no_memory_is_left_to_judge_are_not_said_to_be_judged(tmp_path, monkeypatch) -> None:
    said = json.dumps({"version": "1.0", "tokens": [[7]] * 3})
    python = interpreter(tmp_path, f"echo '{said}'")
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    model = make_artifact(tmp_path / "m", Integer(4, 32))
    record = run_export(model, "transformers", tmp_path / "out", proving=Proving(python=python))
    assert record["engine"].startswith("transformers was not judged: ")
    assert record["weights"]["max_abs_error"] == 0.0


def test_a_python_without_the_engine_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(engines, "PROBE_SECONDS", 0.5)
    (tmp_path / "text").write_text("no program")
    pythons = [
        tmp_path / "absent",
        tmp_path,
        tmp_path / "text",
        program(tmp_path / "rubbish", b"\x00\x01"),
        program(tmp_path / "silent", f"#!/bin/sh\n{SILENT}\n"),
        Path(sys.executable),
    ]
    for python in pythons:
        with pytest.raises(ExportError) as caught:
            engines.find("vllm", python)
        assert caught.value.message == f"{python} is no Python that has vllm"
        assert "ENV/bin/python" in str(caught.value.hint)


def test_a_python_that_nothing_runs_in_is_refused(tmp_path, capsys) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 32))
    for words, why in (
        (["mlc"], "mlc: no engine of this target is driven"),
        (["tensorrt-llm", "--layout", "f16", "--allow-rounding"], "no engine of this target is driven"),
        (["gptq", "--no-verify"], "gptq: nothing is run without verifying"),
        (["gguf"], "llama.cpp is a program"),
    ):
        line = ["export", str(model), "--out", str(tmp_path / "out"), "--engine", sys.executable, "--to", *words]
        assert main(line) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert why in said
        assert sys.executable in said
        assert "leave out --engine" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_a_folder_of_llama_cpp_that_is_none_or_serves_nothing_is_refused(tmp_path, capsys) -> None:
    model = make_artifact(tmp_path / "m", Integer(4, 32))
    for target, folder, why, way_out in (
        ("gguf", tmp_path / "absent", f"{tmp_path}/absent is no folder", "llama-server and llama-quantize"),
        ("gguf", model / "config.json", "config.json is no folder", "llama-server and llama-quantize"),
        ("vllm", tmp_path, f"vllm: no program of llama.cpp is run for it, and {tmp_path}", "leave out --llama-cpp"),
    ):
        assert main(["export", str(model), "--to", target, "-o", str(tmp_path / "o"), "--llama-cpp", str(folder)]) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert why in said
        assert way_out in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("#!/bin/sh\necho 'error: unknown architecture' >&2\necho bye >&2\nexit 5\n", "code 5.*it said error: unknown"),
        ("#!/bin/sh\nprintf '\\377\\376 sorry'\nexit 1\n", "code 1.*it said .* sorry"),
        ("#!/bin/sh\nexit 1\n", "code 1.*it said nothing"),
        (b"\x00\x01", "cannot be started: Exec format error"),
    ],
    ids=["error", "bytes", "nothing", "no program"],
)
def test_a_server_that_does_not_start_is_named_with_what_it_said(tmp_path, content, words) -> None:
    made = program(tmp_path / "llama-server", content)
    error = refused(tmp_path, "gguf", llama_cpp=tmp_path)
    assert re.search(f"(?s)^{re.escape(str(made))} .*{words}", error.message)
    assert "--no-verify" in str(error.hint)


@pytest.mark.parametrize("answers", [None, {"/health": (503, "{}")}], ids=["silent", "loads for ever"])
def test_a_server_that_is_never_ready_is_waited_for_only_so_long(tmp_path, monkeypatch, answers) -> None:
    monkeypatch.setattr(llama_cpp, "SECONDS", 1.0)
    silent = answers is None
    made = program(tmp_path / "llama-server", f"#!/bin/sh\n{SILENT}\n") if silent else server(tmp_path, answers)
    error = refused(tmp_path, "gguf", llama_cpp=tmp_path)
    assert error.message.startswith(f"{made} took longer than 1 s to load the file")
    assert error.message.endswith("it said nothing")
    assert "--no-verify" in str(error.hint)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (HEALTH, "llama-server does: .*it said ggml: out of memory"),
        (HEALTH | PROPS, "llama-server does: .*it said ggml: out of memory"),
        (HEALTH | {"/props": (200, "hello")}, "llama-server does: Invalid JSON"),
        (HEALTH | {"/props": (200, "{}")}, "llama-server does: Field required"),
        (
            HEALTH | PROPS | {"/completion": (200, '{"tokens": "a"}')},
            "llama-server does: Input should be a valid array",
        ),
        (HEALTH | PROPS | {"/completion": (500, "{}")}, "llama-server does: HTTP Error 500"),
    ],
    ids=["dies", "dies later", "no JSON", "no version", "no tokens", "status 500"],
)
def test_a_server_that_talks_nonsense_is_named(tmp_path, answers, words) -> None:
    made = server(tmp_path, answers)
    error = refused(tmp_path, "gguf", llama_cpp=tmp_path)
    assert re.search(f"(?s)^{re.escape(str(made))} .*{words}", error.message)
    assert "out.gguf" in error.message
    assert "--no-verify" in str(error.hint)


def test_a_server_that_speaks_no_http_is_named(tmp_path) -> None:
    lines = [
        f"#!{sys.executable}",
        "import socket, sys",
        "port = int(sys.argv[sys.argv.index('--port') + 1])",
        "listening = socket.create_server(('127.0.0.1', port))",
        "while True:",
        "    caller, _ = listening.accept()",
        "    caller.recv(4096)",
        "    caller.sendall(b'220 mail.example ESMTP\\r\\n')",
        "    caller.close()",
    ]
    made = program(tmp_path / "llama-server", "\n".join(lines))
    error = refused(tmp_path, "gguf", llama_cpp=tmp_path)
    assert error.message.startswith(f"{made} does not answer as llama-server does: 220 mail.example")


def test_a_server_that_answers_another_model_is_caught(tmp_path) -> None:
    server(tmp_path, HEALTH | PROPS | {"/completion": (200, '{"tokens": [7, 7, 7, 7]}')})
    error = refused(tmp_path, "gguf", llama_cpp=tmp_path)
    assert isinstance(error, ProofFailed)
    assert error.message.startswith("llama.cpp b1-test gave a token")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("#!/bin/sh\necho 'no such type' >&2\nexit 3\n", "failed with code 3, and said: no such type"),
        ("#!/bin/sh\necho all is well\n", "made no file of q4_k_m, and said: all is well"),
        (b"\x00\x01", "cannot be started: Exec format error"),
    ],
    ids=["fails", "writes nothing", "no program"],
)
def test_a_llama_quantize_that_makes_nothing_is_named(tmp_path, content, words) -> None:
    tool = program(tmp_path / "llama-quantize", content)
    error = refused(tmp_path, "gguf", Proving(engine=False), layout="q4_k_m", llama_cpp=tmp_path, rounding=True)
    assert error.message.startswith(f"gguf: {tool} {words}")
    assert "--llama-cpp" in str(error.hint)


def test_what_llama_quantize_makes_is_read_with_suspicion(tmp_path) -> None:
    program(tmp_path / "llama-quantize", '#!/bin/sh\necho rubbish > "$2"\n')
    model = make_artifact(tmp_path / "m")
    with pytest.raises(CorruptCheckpoint, match=r"m\.gguf: does not start with GGUF"):
        run_export(model, "gguf", tmp_path / "m.gguf", layout="q4_k_m", llama_cpp=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama-quantize", "m"]
