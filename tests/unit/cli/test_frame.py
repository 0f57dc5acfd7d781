"""The frame of the command line: help, unknown names, errors, exit codes, and the manners of stdout and stderr."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import subprocess
import sys

import pytest
import typer

from gossamer import __version__
from gossamer.cli import _app, _console, main
from gossamer.cli._imports import importing
from gossamer.errors import DoesNotFit, UsageError


@pytest.fixture(autouse=True)
def no_debugging(monkeypatch):
    monkeypatch.setenv("GOSSAMER_DEBUG", "0")  # so that what --debug sets is taken back


COMMANDS = ["run", "chat", "compress", "eval", "bench", "report", "plan", "doctor"]


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert [c for c in COMMANDS if f"\n  {c} " not in listed] == []


def test_no_arguments_show_the_help(capsys):
    assert main([]) == 0
    assert "Usage: gossamer" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"  gossamer {command}" in text.split("\n", 1)[1]
    assert "--json" in text or command == "chat"
    assert "--quiet" in text


def test_help_imports_nothing_heavy():
    code = "import sys; from gossamer.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "transformers", "tokenizers", "plotly", "jinja2", "gguf", "rich", "pydantic", "psutil"}
    assert heavy & set(done.stderr.split()) == set()


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gossamer {__version__}\n"


def test_unknown_command_suggests_the_nearest(capsys):
    assert main(["rnu", "smollm2"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: unknown command 'rnu'\n  did you mean 'run'?\n"


def test_unknown_option_suggests_the_nearest(capsys):
    assert main(["run", "smollm2", "hello", "--temprature", "1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: unknown option '--temprature'\n  did you mean '--temperature'")


@pytest.mark.parametrize("prompt", ["-hello", "-1 plus 1", "- item", "--hello"])
def test_a_prompt_that_looks_like_an_option_is_told_of_the_dashes_before_it(prompt, capsys):
    assert main(["run", "smollm2", prompt]) == 2
    assert "-- goes before a PROMPT that begins with -" in capsys.readouterr().err


def test_an_option_of_a_command_without_a_prompt_is_an_option(capsys):
    assert main(["doctor", "--jsn"]) == 2
    assert capsys.readouterr().err == "error: unknown option '--jsn'\n  did you mean '--json'?\n"


@pytest.mark.parametrize("words", ["gossamer rnu sm", "gossamer ru"])
def test_completion_says_nothing_of_its_own(words, monkeypatch, capsys):
    monkeypatch.setenv("_GOSSAMER_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    with contextlib.suppress(SystemExit):
        main(["x"])
    out, err = capsys.readouterr()
    assert (out.split(), err) == (["run"] if words.endswith("ru") else [], "")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """runs/small and runs/tiny.gguf, beside things that are no models."""
    (tmp_path / "runs" / "small").mkdir(parents=True)
    (tmp_path / "runs" / "small" / "config.json").write_text("{}")
    (tmp_path / "runs" / "tiny.gguf").write_bytes(b"GGUF")
    (tmp_path / "runs" / "smalls").mkdir()
    (tmp_path / "runs" / "small.txt").write_text("")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.mark.parametrize(("name", "near"), [("runs/smal", "runs/small"), ("runs/tiny.guf", "runs/tiny.gguf")])
def test_a_model_on_disk_is_suggested_by_its_path(models, capsys, name, near):
    assert main(["run", name, "hi"]) == 2
    err = capsys.readouterr().err
    assert f"did you mean {near!r}?" in err
    assert "smalls" not in err
    assert ".txt" not in err


def test_a_model_beside_is_suggested_before_an_alias(models, capsys, monkeypatch):
    monkeypatch.chdir(models)
    assert main(["run", "smal", "hi"]) == 2
    err = capsys.readouterr().err
    assert "did you mean 'small'?" in err
    assert "smollm2" not in err
    assert main(["run", "tin.gguf", "hi"]) == 2
    assert capsys.readouterr().err.endswith("  did you mean 'tiny.gguf'?\n")
    assert main(["run", str(models / "smal"), "hi"]) == 2
    assert f"did you mean {str(models / 'small')!r}?" in capsys.readouterr().err


def test_nothing_on_disk_is_suggested_where_nothing_is_near(models, capsys):
    assert main(["run", "runs/other", "hi"]) == 2
    assert "did you mean" not in capsys.readouterr().err
    assert main(["run", "nowhere/small", "hi"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_missing_argument_is_a_usage_error(capsys):
    assert main(["run"]) == 2
    err = capsys.readouterr().err
    assert "MODEL" in err
    assert "gossamer run --help" in err


def _raising(monkeypatch, error):
    app = typer.Typer(rich_markup_mode=None)

    @app.callback()
    def root() -> None: ...

    @app.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(_app, "app", app)


def test_an_error_is_one_message_with_its_hint_and_exit_code(monkeypatch, capsys):
    _raising(monkeypatch, DoesNotFit("needs [9] MB, has [1] MB", hint="buy memory"))
    assert main(["fail"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: needs [9] MB, has [1] MB\n  buy memory\n")


def test_a_usage_error_exits_with_2(monkeypatch):
    _raising(monkeypatch, UsageError("no"))
    assert main(["fail"]) == 2


@pytest.mark.parametrize("argv", [["--debug", "fail"], ["fail", "--debug"]])
def test_debug_shows_where_an_error_came_from(monkeypatch, argv):
    _raising(monkeypatch, DoesNotFit("x"))
    with pytest.raises(DoesNotFit):
        main(argv)


def test_debug_by_environment(monkeypatch):
    _raising(monkeypatch, DoesNotFit("x"))
    monkeypatch.setenv("GOSSAMER_DEBUG", "1")
    with pytest.raises(DoesNotFit):
        main(["fail"])


def test_debug_reaches_worker_processes(monkeypatch):
    _raising(monkeypatch, DoesNotFit("x"))
    with pytest.raises(DoesNotFit):
        main(["fail", "--debug"])
    assert os.environ["GOSSAMER_DEBUG"] == "1"


@pytest.mark.parametrize("options", [["-q"], []])
def test_quiet_silences_the_hub_library_too(options, tmp_path):
    code = (
        "import sys; from gossamer.cli import main; main(sys.argv[1:]); "
        "from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS as off; print(off)"
    )
    clean = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_PROGRESS_BARS"}
    command = [sys.executable, "-c", code, "run", str(tmp_path / "none"), "hi", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean)
    assert done.stdout == ("True\n" if options else "None\n")


def test_interrupt_exits_with_130(monkeypatch, capsys):
    _raising(monkeypatch, KeyboardInterrupt())
    assert main(["fail"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_threads_wait_asleep_unless_told_otherwise(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    main(["--version"])
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    main(["--version"])
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    main(["--version"])
    assert 0 < int(os.environ["GOMP_SPINCOUNT"]) < 5000


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (OSError(28, "No space left on device", "out.jsonl"), "No space left on device: 'out.jsonl'"),
    ],
)
def test_what_the_machine_refuses_is_a_message(monkeypatch, capsys, error, message):
    _raising(monkeypatch, error)
    assert main(["fail"]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_mistake_of_ours_is_not_hidden(monkeypatch):
    _raising(monkeypatch, RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        main(["fail"])


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; from gossamer.cli import main; sys.exit(main(['run', '--help']))"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run([sys.executable, "-c", code], stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""
    assert done.returncode == 1


def test_json_is_one_line_and_refuses_nan(capsys):
    _console.emit_json({"text": "zwei\nZeilen é"})
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert json.loads(line) == {"text": "zwei\nZeilen é"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        _console.emit_json({"x": float("nan")})


def test_progress_off_a_terminal_is_sparse_lines_of_what_takes_long(capsys, monkeypatch):
    clock = iter([0, 4, 11, 12, 20, 0, 3])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with _console.progress() as step:
        for done in range(5):
            step("reading", done, 4)
        for done in range(2):
            step("writing", done, 1)
    assert capsys.readouterr() == ("", "reading: 2/4, about 11 s left\nreading: 4/4\n")


def test_the_time_left_counts_from_where_the_work_began(capsys, monkeypatch):
    clock = iter([0, 20, 40, 100, 130])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with _console.progress() as step:
        step("judging", 6, 10)  # six were done in an earlier run
        step("judging", 6, 10)
        step("judging", 7, 10)
        step("judging", 0, 10)  # the next model
        step("judging", 1, 10)
    assert capsys.readouterr().err == (
        "judging: 6/10\njudging: 7/10, about 2 min left\njudging: 1/10, about 4 min left\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (40.4, "40 s"), (130, "2 min"), (5990, "1 h 40 min"), (7500, "2 h 5 min")]
)
def test_durations_are_coarse(seconds, text):
    assert _console.duration(seconds) == text


def test_quiet_progress_says_nothing(capsys):
    with _console.progress(quiet=True) as step:
        step("reading", 1, 1)
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_draws_one_bar_at_a_time(monkeypatch):
    from rich.console import Console

    drawn = Console(force_terminal=True, file=io.StringIO(), record=True, width=100)
    monkeypatch.setattr(_console, "console", lambda: drawn)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with _console.progress() as step:
        step("reading", 1, 2)
        step("writing", 1, 4)
    assert "writing" in drawn.export_text()


def test_a_terminal_shows_the_time_left_even_of_slow_steps_and_labels_as_they_are(monkeypatch):
    from rich.console import Console
    from rich.progress import Progress

    drawn = Console(force_terminal=True, file=io.StringIO(), record=True, width=100)
    now = [0.0]
    monkeypatch.setattr(_console, "console", lambda: drawn)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(Progress, "get_time", lambda self: now[0], raising=False)
    monkeypatch.setattr(drawn, "get_time", lambda: now[0])
    with _console.progress() as step:
        for done in range(4):
            now[0] = 300.0 * done  # five minutes each
            step("model[/b] [x]", done, 10)
    text = drawn.export_text()
    assert "model[/b] [x]" in text
    assert "0:35:00" in text


def test_the_console_shows_brackets_and_colons_as_they_are(capsys):
    _console.console().print("c[/b] [bold]x :smile:")
    assert capsys.readouterr().err == "c[/b] [bold]x :smile:\n"


def test_what_is_imported_is_kept_from_the_garbage_collector():
    frozen = gc.get_freeze_count()
    with contextlib.suppress(ImportError), importing():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen
    gc.unfreeze()
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_request_that_is_wrong_is_refused_before_torch_is_loaded():
    code = (
        "import sys; from gossamer.cli import main;"
        "wrong = [''], ['hi', '--temperature', '-1'], ['hi', '--min-p', '2'];"
        "print(*(main(['run', 'smollm2', *rest]) for rest in wrong), *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    words = done.stdout.split()
    assert words[:3] == ["2", "2", "2"]
    assert not {"torch", "numpy", "tokenizers"} & set(words)


def test_run_loads_no_library_that_is_slow_to_import(tiny_model):
    code = "import sys; from gossamer.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, "run", str(tiny_model), "hello", "--max-tokens", "2", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    slow = {"transformers", "gguf", "huggingface_hub", "compressed_tensors", "jinja2", "plotly", "rich", "yaml"}
    assert slow & set(done.stderr.split()) == set()
