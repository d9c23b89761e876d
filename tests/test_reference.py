"""The reference that `make docs` builds. That all classes and functions say what they are is ruff's to check."""

import runpy
from pathlib import Path

import pytest

import emu3


@pytest.mark.filterwarnings("ignore")
def test_the_reference_is_built(tmp_path):
    script = Path(__file__).parents[1] / "docs" / "reference.py"
    modules = runpy.run_path(str(script))["build"](tmp_path)
    assert {"emu3.pipeline", "emu3.generation.grammar", "emu3.training.codebook"} < set(modules)
    for name in modules:
        assert (tmp_path / f"{name.replace('.', '/')}.html").exists(), name
    page = (tmp_path / "emu3.html").read_text()
    assert [name for name in emu3.__all__ if f'id="{name}"' not in page] == []
    assert "picture i has seed + i" in (tmp_path / "emu3" / "pipeline.html").read_text()
