"""The commands that train: `emu3 train`, `emu3 finetune`."""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from emu3.cli.common import JsonOption, need_packages, print_out, progress

PACKAGES = ("accelerate", "peft", "pyarrow", "pydantic")


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
    need_packages("training", "train", *PACKAGES)
    if plan:
        numbers = _numbers(devices)
        print_out(_plan(recipe, numbers, teraflops, as_json))
        return
    from emu3.icons.recipes import run_recipe
    from emu3.training.recipe import exit_at_once

    typer.echo(str(run_recipe(recipe)))
    exit_at_once()


def finetune(
    model: Annotated[str, typer.Argument(help="Checkpoint to start from.", show_default=False)],
    data: Annotated[str, typer.Option(help="Pictures with captions, or conversations: see `emu3 data`.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the result and all about the run.")],
    lora: Annotated[
        bool, typer.Option("--lora", help="Train adapters, which take less memory and a small file.")
    ] = False,
    task: Annotated[str, typer.Option(help="What to learn of the data: draw, chat or both.")] = "both",
    steps: Annotated[int | None, typer.Option(min=1, help="Updates.", show_default="by the data")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="The highest.", show_default="by the model")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of adapters.", show_default="16")] = None,
    replay: Annotated[
        int | None,
        typer.Option(min=0, help="Pictures that MODEL draws itself, to stay as it is.", show_default="by the model"),
    ] = None,
    move: Annotated[
        bool, typer.Option("--move/--no-move", help="Whether a thing on a plain ground is learned at every place.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Teach a checkpoint your own pictures or conversations. The same command goes on after a stop."""
    if task not in ("draw", "chat", "both"):
        raise ValueError(f"--task {task!r} is unknown; give draw, chat or both")
    if learning_rate == 0:
        raise ValueError("--learning-rate is 0, with which nothing is learned; give one above 0, such as 1e-4")
    if not lora and (rank is not None or replay):
        raise ValueError(f"{'--rank' if rank else '--replay'} is of adapters; add --lora, or leave it out")
    need_packages("training", "train", *PACKAGES)
    from emu3.checkpoints import resolve
    from emu3.data.sources import open_source

    resolve(model)
    open_source(data)
    from emu3.training.finetune import Wishes, run

    wishes = Wishes(
        with_adapters=lora,
        task=cast(Literal["draw", "chat", "both"], task),
        steps=steps,
        learning_rate=learning_rate,
        rank=rank,
        replay=replay,
        move=move,
        seed=seed,
    )
    run(model, data, output, wishes, typer.echo, progress)
    typer.echo(f'{output}: emu3 image "..." --model {output}; how it went: {output / "report.html"}')


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
