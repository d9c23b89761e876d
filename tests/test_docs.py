"""Every page of docs/ does what it says: its Python runs, and so do its commands, in the order of the page."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from emu3 import cli

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


# PEFT asks transformers by an old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    ran = 0
    for kind, text in pieces(page):
        if kind == "python":
            exec(compile(text, f"{page.name}", "exec"), namespace)
        elif ON_THE_HUB not in text:
            result = CliRunner().invoke(cli.app, shlex.split(text)[1:])
            assert result.exit_code == 0, (text, result.output, result.exception)
        else:
            continue
        ran += 1
    assert ran >= 2
