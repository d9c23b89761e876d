"""Every page of docs/ does what it says: its Python runs, and so do its commands, in the order of the page."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from emu3.icons.scenes import COLORS
from emu3.icons.sprites import NOUNS

DOCS = Path(__file__).parents[1] / "docs"
COMMAND = re.compile(r"^    (emu3 .*)$", re.MULTILINE)
ON_THE_HUB = "BAAI/"


def pieces(page: Path) -> list[tuple[str, str]]:
    """("python" or "command", text) in the order of the page."""
    found = []
    for block in re.split(r"(^```python\n.*?^```$)", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        if block.startswith("```python"):
            found.append(("python", block.removeprefix("```python\n").removesuffix("```")))
        else:
            found += [("command", line) for line in COMMAND.findall(block)]
    return found


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_page(page: Path, tmp_path: Path) -> None:
    """In a process of its own: a page may change what holds for its process, such as by `register()`."""
    script = ["from typer.testing import CliRunner", "from emu3 import cli"]
    for kind, text in pieces(page):
        if kind == "python":
            script.append(text)
        elif ON_THE_HUB not in text:
            script.append(f"done = CliRunner().invoke(cli.app, {shlex.split(text)[1:]!r})")
            script.append("assert done.exit_code == 0, done.output")
    assert len(script) > 3
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent / "src")}
    command = [sys.executable, "-c", "\n".join(script)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_page_of_drawing_names_what_nano_knows() -> None:
    known = (DOCS / "draw.md").read_text().split("## What nano draws")[1]
    nouns, colors = re.search(r"of these: (.*); in (.*)\. It", " ".join(known.split())).groups()
    assert nouns.split(", ") == list(NOUNS)
    assert re.split(", | or ", colors) == list(COLORS)
