"""What the documents say is so: their commands run in order, and the reference is the commands' own help."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def commands(page: Path) -> list[str]:
    """The lines of a page's `sh` blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/howto/compress.md",
        "docs/howto/engines.md",
        "docs/howto/export.md",
        "docs/howto/hub.md",
        "docs/howto/measure.md",
    ],
)
def test_every_command_of_a_page_runs(page: str, tmp_path: Path) -> None:
    lines = commands(ROOT / page)
    assert lines
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in lines:
        done = subprocess.run(line, shell=True, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True)
        assert done.returncode == 0, f"{line}\n{done.stderr.decode()}"


def test_the_recipes_in_the_howto_are_some(tmp_path: Path) -> None:
    from gossamer.compress.recipe import load_recipe

    text = (ROOT / "docs/howto/compress.md").read_text()
    names = []
    for found in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        (tmp_path / "one.yaml").write_text(found)
        names.append(load_recipe(tmp_path / "one.yaml", ROOT / "recipes").name)
    assert names == ["mine", "recovered"]


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_reference_is_what_the_commands_say() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import make_reference as m; print(m.reference(), end='')"],
        cwd=ROOT / "docs",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (ROOT / "docs/reference.md").read_text(), "run: python docs/make_reference.py"
