"""Every command that the README and the how-tos show runs, in the order of its page, in an empty folder.

Not here: docs/howto/study.md and quality.md, whose commands take hours.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    *(f"docs/howto/{name}.md" for name in ("compress", "engines", "export", "hub", "measure", "parallel", "simulate")),
)
SERVING = ("docs/howto/load.md", "docs/howto/playground.md", "docs/howto/serve.md")
"""Pages whose commands start a server on its own port: one after another."""
START_SECONDS = 120.0


def commands(page: Path) -> list[str]:
    """The lines of a page's `sh` blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize(
    "page", [*PAGES, *(pytest.param(page, marks=pytest.mark.xdist_group("port")) for page in SERVING)]
)
def test_every_command_of_a_page_runs(page: str, tmp_path: Path) -> None:
    lines = commands(ROOT / page)
    assert lines
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path}
    with ExitStack() as servers:
        for line in lines:
            if line.startswith("gossamer serve "):
                servers.close()
                servers.enter_context(serving(line.removesuffix("&"), tmp_path, env))
                continue
            done = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True)
            assert done.returncode == 0, f"{line}\n{done.stderr.decode()}"


@contextmanager
def serving(line: str, folder: Path, env: dict[str, str]) -> Iterator[None]:
    """A server for as long as the block lasts, from the moment in which it is healthy; then it ends with code 0."""
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(line.split(), cwd=folder, env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not healthy():
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, f"{line} is not healthy after {START_SECONDS:.0f} s"
            time.sleep(0.2)
        yield
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, (folder / "server.log").read_text()
    finally:
        server.kill()
        server.wait()


def healthy() -> bool:
    try:
        with urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
