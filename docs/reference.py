"""Builds the reference of all modules from their docstrings: `python docs/reference.py [FOLDER]` (`make docs`)."""

import sys
from pathlib import Path
from pkgutil import walk_packages

import pdoc

import emu3


def build(folder: Path) -> list[str]:
    """Writes a page for each module and an index; returns the modules' names."""
    modules = ["emu3", *(module.name for module in walk_packages(emu3.__path__, "emu3."))]
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*modules, output_directory=folder)
    return modules


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/reference")
    print(f"{len(build(folder))} modules: {folder / 'index.html'}")
