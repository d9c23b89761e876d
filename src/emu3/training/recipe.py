"""Recipes: TOML files that say what to train. `kind` names the dataclass whose fields the rest of the file gives."""

import inspect
import json
import os
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar, cast

from typing_extensions import TypedDict

if TYPE_CHECKING:
    from pydantic import ValidationError

Recipe = TypeVar("Recipe")

_WRONG_NAMES = ("unexpected_keyword_argument", "extra_forbidden")


class Checked:
    """Base of the dataclasses that recipes are read into: a field that is not theirs is refused."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class RunSettings(Checked):
    """What every training run has.

    Attributes:
        seed: of the first weights and of the data.
        steps: updates of the weights.
        parts: batches of each step, whose gradients are added up. Several processes share them out, so their number
            divides this one; the result is the same for any number of processes.
        precision: of products. "auto": bfloat16 where it is fast, beside weights in float32.
        recompute_layers: whether the backward pass computes the layers again, which takes less memory and more time.
        compile_layers: whether PyTorch compiles the layers, which pays in a long run on a GPU.
        gradient_norm: longer gradients are cut to this length.
        average: of the weights over the run, at each step `average` old and the rest new; 0: the last weights count.
        report_every: steps between two lines of the log.
        save_every: steps between two saved states; the last step is always saved.
        keep_states: how many saved states are kept.
        trackers: names of what else gets the log, as accelerate knows them: "tensorboard", "wandb".
    """

    seed: int = 0
    steps: int = 6000
    parts: int = 1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    recompute_layers: bool = False
    compile_layers: bool = False
    gradient_norm: float = 1.0
    average: float = 0.0
    report_every: int = 50
    save_every: int = 500
    keep_states: int = 1
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "parts", "report_every", "save_every", "keep_states"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if not 0 <= self.average < 1:
            raise ValueError(f"average is {self.average}; give a share from 0 to below 1, such as 0.999")


class Arguments:
    """Marks a table that holds arguments of a configuration class: those that the class itself declares."""

    def __init__(self, config: type, **others: Any) -> None:
        types = inspect.get_annotations(config, eval_str=True)
        self.types = {each.name: types[each.name] for each in fields(cast(Any, config)) if each.name in types} | others

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        make = cast(Callable[..., Any], TypedDict)
        table = make("Arguments", self.types, total=False)
        table.__pydantic_config__ = {"extra": "forbid", "arbitrary_types_allowed": True}
        return handler(table)


class Kind(NamedTuple):
    """One kind of recipe: its dataclass, and the function that runs it and writes to the output folder."""

    recipe: type[Any]
    run: Callable[[Any, Path], None]


def run_recipe(path: str | Path, kinds: Mapping[str, Kind]) -> Path:
    """Runs a recipe; returns the folder with the result. A run that was cut off goes on from its last saved state."""
    kind, recipe, output = read_recipe(Path(path), kinds)
    kinds[kind].run(recipe, output)
    leave_processes()
    return output


def leave_processes() -> None:
    """Leaves the group of processes, if there is one, when all of them are done."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def exit_at_once() -> None:
    """Ends one of several processes at once, and any other not at all.

    Threads that gloo leaves behind may abort a process while Python shuts down, though its work is done: "terminate
    called without an active exception". Its launcher would call the whole run a failure.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def read_recipe(path: Path, kinds: Mapping[str, Kind]) -> tuple[str, Any, Path]:
    """The kind, the recipe as an object of its kind's dataclass, and the output folder.

    `output` and fields of the type `Path` are relative to the recipe's folder. `ValueError` names the file, the field
    that is unknown, missing or of the wrong type, and its value.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file; give a recipe in TOML, such as recipes/nano/vision.toml")
    try:
        content = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    kind, output = content.pop("kind", None), content.pop("output", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{path}: kind is {kind!r}; choose one of {', '.join(kinds)}")
    if not isinstance(output, str):
        raise ValueError(f"{path}: output is {output!r}; name a folder, relative to the recipe")
    try:
        recipe = build(kinds[kind].recipe, content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return kind, _resolve(recipe, path.parent), path.parent / output


def _resolve(value: Any, folder: Path) -> Any:
    """The dataclass with its paths, and those of dataclasses in it, seen from the folder."""
    if isinstance(value, Path):
        return folder / value
    if isinstance(value, tuple):
        return tuple(_resolve(each, folder) for each in value)
    if isinstance(value, Checked):
        return replace(cast(Any, value), **{name: _resolve(each, folder) for name, each in vars(value).items()})
    return value


def build(recipe: type[Recipe], content: Mapping[str, Any]) -> Recipe:
    """A dataclass from a table of TOML, its values checked against the types of the fields.

    `ValueError` names the first field that is unknown, missing or wrong by its path, such as "sources[2].share".
    """
    try:
        from pydantic import TypeAdapter, ValidationError
    except ImportError as error:
        raise ValueError("recipes need pydantic; pip install -e '.[train]' in the clone") from error
    try:
        # As JSON, strictly: a list becomes a tuple and a text a path, but "3" is no number.
        return TypeAdapter(recipe).validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        raise ValueError(_explain(error, recipe)) from None


def _explain(error: "ValidationError", recipe: type[Any]) -> str:
    """One mistake in one line: where it is, what stands there, what to give. Wrong names come first."""
    mistakes = error.errors(include_url=False)
    mistakes.sort(key=lambda mistake: mistake["type"] not in _WRONG_NAMES)
    first = mistakes[0]
    # Where a union takes none of its types, the path ends with the name of one of them.
    place = [each for each in first["loc"] if isinstance(each, int) or each.isidentifier()]
    path = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in place).removeprefix(".")
    match first["type"]:
        case "missing":
            return f"{path} is missing"
        case name if name in _WRONG_NAMES:
            names = [each.name for each in fields(recipe)] if len(place) == 1 else []
            near = get_close_matches(path, names, 1)
            meant = f"; did you mean {near[0]}?" if near else f"; python -m pydoc {recipe.__module__} tells the fields"
            return f"{path} = {first['input']!r}: no such field{meant}"
        case "value_error":
            return f"{path}: {first['ctx']['error']}".removeprefix(": ")
        case _:
            return f"{path} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
