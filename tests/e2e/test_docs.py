"""What the pages say is so: recipes load, links lead somewhere, and the reference is the commands' own help."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


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
