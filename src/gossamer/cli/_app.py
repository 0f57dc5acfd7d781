"""The frame of the command line: commands, errors, exit codes. Loads no torch; each command imports what it needs.

Exit codes: 0 done, 1 failed, 2 the request is wrong, 130 interrupted. Errors that Gossamer raises on purpose are shown
as one message; GOSSAMER_DEBUG=1 or --debug shows where they came from.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import GossamerError, ModelNotFound, UnknownName, UsageError
from ..settings import debugging
from ._console import print_error
from .bench import bench
from .bench_serve import bench_serve
from .chat import chat
from .compress import compress
from .convert import convert
from .doctor import doctor
from .eval import eval_
from .export import export
from .join import join
from .ls import ls
from .plan import plan
from .pull import pull
from .report import report
from .rm import rm
from .run import run
from .serve import serve
from .simulate import simulate
from .soak import soak
from .study import study_precision
from .study_combine import study_combine
from .study_rank import study_rank
from .sweep import sweep

CLUSTER_ADDRESS = re.compile(r"auto|local|[^\s/]+:\d+")
"""What may stand behind `--ray`; anything else there is the next argument."""


class _Commands(TyperGroup):
    """The commands, with our own words for one that does not exist."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if " ".join(args[:2]) in self.commands:  # a command of two words; `bench` itself takes models, not commands
            args = [" ".join(args[:2]), *args[2:]]
        known = not args or args[0] in self.commands or args[0].startswith("-")
        if not known and not ctx.resilient_parsing:  # which is how the shell's completion parses: nothing may be said
            raise UnknownName("command", args[0], self.commands)
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"gossamer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (or GOSSAMER_DEBUG=1).")] = False,
) -> None:
    """Make a language model faster and lighter, see what that cost in quality, and run it.

    \b
    gossamer run smollm2 "Why is the sky blue?"
    gossamer compress smollm2 --recipe int4-gptq --out small/
    gossamer eval small/ --reference smollm2
    """


app.command()(run)
app.command()(chat)
app.command()(serve)
app.command()(join)
app.command()(compress)
app.command()(plan)
app.command()(simulate)
app.command()(convert)
app.command()(export)
app.command("eval")(eval_)
app.command()(bench)
app.command("bench serve")(bench_serve)
app.command("study precision")(study_precision)
app.command("study combine")(study_combine)
app.command("study rank")(study_rank)
app.command()(sweep)
app.command()(soak)
app.command()(report)
app.command()(pull)
app.command()(ls)
app.command()(rm)
app.command()(doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if _take_debug(args):
        os.environ["GOSSAMER_DEBUG"] = "1"
    _take_any_cluster(args)
    args = args or ["--help"]
    _let_threads_sleep()
    try:
        code = typer.main.get_command(app).main(args, prog_name="gossamer", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        return _close_quietly()
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except ModelNotFound as error:
        error.hint = _with_neighbours(error)
        return _failed(error)
    except GossamerError as error:
        return _failed(error)
    except typer.TyperException as error:
        return _failed(_usage_error(error))
    except (MemoryError, OSError, RuntimeError) as error:
        known = _known_failure(error)
        if known is None or debugging():
            raise
        return _failed(known)


def _let_threads_sleep() -> None:
    """Have OpenMP's threads wait for each other asleep, unless the environment says how they are to wait.

    By default they spin for milliseconds. Where another process wants a core, that made sampling 3 to 20 times slower
    than on one thread; a short spin costs nothing measurable. Read when torch is loaded, so set before.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _take_debug(args: list[str]) -> bool:
    """Remove --debug from anywhere before `--`, so that it may be added at the end of a command line that failed."""
    end = args.index("--") if "--" in args else len(args)
    wanted = "--debug" in args[:end]
    args[:end] = [a for a in args[:end] if a != "--debug"]
    return wanted


def _take_any_cluster(args: list[str]) -> None:
    """Say `--ray=auto` for a `--ray` without an address: the parser knows no options whose value may be left out."""
    end = args.index("--") if "--" in args else len(args)
    for at in range(end):
        if args[at] == "--ray" and not (at + 1 < end and CLUSTER_ADDRESS.fullmatch(args[at + 1])):
            args[at] = "--ray=auto"


def _failed(error: GossamerError) -> int:
    if debugging():
        raise error
    print_error(error)
    return error.exit_code


def _known_failure(error: Exception) -> GossamerError | None:
    """What the machine refused (memory, a file), as an error of ours; None if it may be a mistake of the program."""
    if isinstance(error, OSError):
        return GossamerError(str(error))
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch raises RuntimeError
        return GossamerError("out of memory", hint="gossamer plan says how much is needed; take a smaller model")
    return None


def _usage_error(error: typer.TyperException) -> GossamerError:
    """What the parser refused, in the words of our own errors."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "gossamer"
    if hasattr(error, "possibilities") and context is not None:
        return _unknown_option(str(getattr(error, "option_name", "")), context)
    message = getattr(error, "format_message", lambda: str(error))()
    return UsageError(message.rstrip("."), hint=f"{path} --help shows what it takes")


def _unknown_option(name: str, context: Any) -> GossamerError:
    """An option that does not exist, or a prompt that was taken for one."""
    parameters = context.command.get_params(context)
    known = {option for parameter in parameters for option in parameter.opts if option.startswith("--")}
    error = UnknownName("option", name, known)
    if any(parameter.name == "prompt" for parameter in parameters):
        near = error.hint if name.startswith("--") and error.hint and error.hint.endswith("?") else None
        way_out = f"-- goes before a PROMPT that begins with -; {context.command_path} --help lists the options"
        error.hint = way_out if near is None else f"{near} {way_out}"
    return error


def _with_neighbours(error: ModelNotFound) -> str | None:
    """The hint, with the models on disk whose names are nearest to the one that was asked for."""
    near = _models_near(Path(error.asked)) if error.asked else []
    if not near:
        return error.hint
    hint = "did you mean " + " or ".join(map(repr, near)) + "?"
    # The hint may speak of aliases, which are the lesser guess: what lies beside the name is what was meant.
    aliases = error.hint is None or error.hint.endswith("?") or error.hint.startswith("known: ")
    return hint if aliases else f"{hint} If not: {error.hint}"


def _models_near(path: Path) -> list[str]:
    """Folders with a model and .gguf files beside a path that does not exist, whose names are near its own."""
    try:
        models = {entry.name: str(entry) for entry in path.parent.iterdir() if _holds_model(entry)}
    except OSError:
        return []
    return [models[name] for name in difflib.get_close_matches(path.name, models, n=3)]


def _holds_model(path: Path) -> bool:
    return path.suffix == ".gguf" or (path / "config.json").exists() or any(path.glob("*.gguf"))


def _close_quietly() -> int:
    """The reader of stdout has gone (`| head`): nothing to say, and nothing more to flush."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
