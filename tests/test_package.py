import ast
import importlib
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

import emu3

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": "src"}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, emu3; print(sorted(sys.modules.keys() & {'torch', 'transformers', 'numpy', 'PIL', 'typer'}))"
    assert run_python(code).strip() == "[]"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom emu3.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print(sorted(sys.modules.keys() & {'torch', 'transformers', 'numpy', 'PIL', 'huggingface_hub'}))"
    )
    assert run_python(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", sorted(set(emu3.__all__) - {"__version__"}))
def test_every_public_name_loads(name: str) -> None:
    assert getattr(emu3, name).__name__ == name


def test_imports_say_nothing_and_leave_the_loggers_as_they_are() -> None:
    code = "import logging\nfrom emu3 import Emu3Pipeline\nprint(logging.getLogger('torchao').level)"
    command = [sys.executable, "-W", "default", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": "src"}, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_public_names_are_one_list() -> None:
    assert set(emu3._MODULES) | {"__version__"} == set(emu3.__all__)
    assert dir(emu3) == sorted(emu3.__all__)


def test_unknown_name_lists_the_public_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Emu4Pipeline'.*Emu3Pipeline"):
        _ = emu3.Emu4Pipeline


def test_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert emu3.__version__ == project["version"]


def test_package_is_marked_as_typed() -> None:
    assert (files("emu3") / "py.typed").is_file()


def imported_modules(source: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(source.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    members = {
        f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    return plain | members


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(ROOT / "src")))
def test_source_keeps_clear_of_the_oracle_pickle_and_torchvision(source: Path) -> None:
    banned = ("transformers.models.emu3", "transformers.Emu3", "pickle", "torchvision")
    found = [name for name in imported_modules(source) if name.startswith(banned)]
    assert found == []
    assert "trust_remote_code=True" not in source.read_text()


def test_constraints_pin_every_dependency_of_the_core() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(each for extra in extras.values() for each in extra)]
    names = {re.split(r"\[|>=", each)[0].lower().replace("_", "-") for each in wanted} - {"emu3"}
    assert names <= pinned


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_scripts_import_what_is_there(script: Path) -> None:
    """Nothing else runs the benchmarks, some of which need a GPU or a large checkpoint."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("emu3"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
