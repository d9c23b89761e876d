"""The command that trains: `emu3 train`."""

import tomllib
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (TOML); recipes/nano has examples.", show_default=False)],
) -> None:
    """Train by a recipe. A run that was cut off goes on from its last checkpoint."""
    if not recipe.is_file():
        raise ValueError(
            f"{recipe} is no file of the folder {Path.cwd()}; give a recipe in TOML, such as recipes/nano/vision.toml"
        )
    try:
        tomllib.loads(recipe.read_text())
    except ValueError as error:
        raise ValueError(f"{recipe} is not valid TOML: {error}") from error
    from emu3.icons.recipes import run_recipe

    typer.echo(str(run_recipe(recipe)))
