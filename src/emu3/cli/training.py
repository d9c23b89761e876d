"""The command that trains: `emu3 train`."""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from emu3.cli.common import JsonOption, print_out


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (TOML); recipes/nano has examples.", show_default=False)],
    plan: Annotated[bool, typer.Option("--plan", help="Only say what memory and time it takes.")] = False,
    devices: Annotated[str, typer.Option(help="Of --plan: how many share the run, by commas.")] = "1,2,4,8,16,32,64",
    teraflops: Annotated[
        float | None, typer.Option(min=0.001, help="Of --plan: that training reaches on one; else measured here.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train by a recipe. A run that was cut off goes on from its last saved state."""
    if not recipe.is_file():
        raise ValueError(
            f"{recipe} is no file of the folder {Path.cwd()}; give a recipe in TOML, such as recipes/nano/vision.toml"
        )
    try:
        tomllib.loads(recipe.read_text())
    except ValueError as error:
        raise ValueError(f"{recipe} is not valid TOML: {error}") from error
    if plan:
        numbers = _numbers(devices)
        print_out(_plan(recipe, numbers, teraflops, as_json))
        return
    from emu3.icons.recipes import run_recipe

    typer.echo(str(run_recipe(recipe)))


def _numbers(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text.replace(" ", "")):
        raise ValueError(f"--devices {text!r} are no numbers of devices; give whole numbers by commas, such as 1,8,64")
    return [int(each) for each in text.split(",")]


def _plan(path: Path, devices: list[int], teraflops: float | None, as_json: bool) -> Any:
    from emu3.icons.recipes import KINDS
    from emu3.training.language import LanguageRecipe
    from emu3.training.plan import make_plan, text_config_of
    from emu3.training.recipe import read_recipe

    _, recipe, _ = read_recipe(path, KINDS)
    if not isinstance(recipe, LanguageRecipe):
        raise ValueError(f"{path} trains no language model; --plan is for pretrain, finetune and lora")
    rate = None if teraflops is None else teraflops * 1e12
    plan = make_plan(recipe, text_config_of(recipe), devices, rate, half=recipe.precision != "float32")
    return plan.to_dict() if as_json else plan.to_table()
