"""Recipes: TOML files that say what to train. `emu3 train FILE` runs one; running it again goes on where it stopped."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

KINDS = ("vision", "language", "checkpoint")
Recipe = TypeVar("Recipe")


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe as a dict with `kind`, `output` (a folder, relative to the recipe) and the fields of its kind.

    Raises:
        ValueError: no such file, not TOML, an unknown kind, or no output.
    """
    if not path.is_file():
        raise ValueError(f"no recipe at {path}; see recipes/nano for examples")
    try:
        content = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    if content.get("kind") not in KINDS:
        raise ValueError(f"{path}: kind is {content.get('kind')!r}; choose one of {', '.join(KINDS)}")
    if not isinstance(content.get("output"), str):
        raise ValueError(f"{path}: output is {content.get('output')!r}; name a folder, relative to the recipe")
    return content


def build(kind: type[Recipe], content: dict[str, Any], path: Path) -> Recipe:
    """A recipe object of the given class from the file's content; ValueError for a field that it does not have."""
    try:
        return kind(**content)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error


def made_before(folder: Path) -> Path:
    """A folder that another recipe leaves. ValueError while it is not there."""
    if not (folder.resolve() / "config.json").is_file():
        raise ValueError(f"no model in {str(folder.resolve())!r}; run the recipe that makes it first")
    return folder.resolve()


def run_recipe(path: str | Path) -> Path:
    """Trains what the file says, resuming from its last saved state; returns the folder with the result."""
    path = Path(path)
    content = read_recipe(path)
    kind, output = content.pop("kind"), path.parent / content.pop("output")
    if kind == "vision":
        from emu3.training import vision

        vision.train(build(vision.VisionRecipe, content, path), output)
    elif kind == "language":
        from emu3.training import language

        language.train(build(language.LanguageRecipe, content, path), output)
    else:
        from emu3.training import checkpoint

        checkpoint.assemble(build(checkpoint.CheckpointRecipe, content, path), path.parent, output)
    return output
