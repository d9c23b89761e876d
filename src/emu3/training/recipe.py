"""Recipes: TOML files that say what to train. `kind` names the dataclass whose fields the rest of the file gives."""

import inspect
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Recipe = TypeVar("Recipe")

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every training run has. Steps count batches.

    Attributes:
        seed: of the first weights and of the data.
        steps: length of the run.
        batch_size: pictures or sequences of a batch.
        report_every: steps between two lines of the log.
        save_every: steps between two saved states; the last step is always saved.
    """

    seed: int = 0
    steps: int = 6000
    batch_size: int = 32
    report_every: int = 50
    save_every: int = 500


class Kind(NamedTuple):
    """One kind of recipe: its dataclass, and the function that runs it and writes to the output folder."""

    recipe: type[Any]
    run: Callable[[Any, Path], None]


def run_recipe(path: str | Path, kinds: Mapping[str, Kind]) -> Path:
    """Runs a recipe; returns the folder with the result. A run that was cut off goes on from its last saved state."""
    kind, recipe, output = read_recipe(Path(path), kinds)
    kinds[kind].run(recipe, output)
    return output


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
    paths = {name: path.parent / value for name, value in vars(recipe).items() if isinstance(value, Path)}
    return kind, replace(recipe, **paths), path.parent / output


def build(recipe: type[Recipe], content: Mapping[str, Any], within: str = "") -> Recipe:
    """A dataclass from a table of TOML, its values checked against the types of the fields.

    A field may be a dataclass or a list of them. `within` stands before a field's name in messages: "sources[2].".
    """
    types = get_type_hints(recipe, include_extras=True)
    values = _convert_table(types, content, within)
    for field in fields(cast(Any, recipe)):
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{within}{field.name} is missing; give {_describe(types[field.name])}")
    return recipe(**values)


def arguments_of(config: type) -> dict[str, Any]:
    """Name -> type of the arguments that the class of a configuration declares, those of its bases left out."""
    types = inspect.get_annotations(config, eval_str=True)
    return {field.name: types[field.name] for field in fields(cast(Any, config)) if field.name in types}


def _convert_table(types: Mapping[str, Any], table: Mapping[str, Any], within: str) -> dict[str, Any]:
    for name, value in table.items():
        if name not in types:
            raise ValueError(f"{within}{name} = {value!r}: no such field; the fields are {', '.join(types)}")
    return {name: _convert(types[name], value, within + name) for name, value in table.items()}


def _convert(kind: Any, value: Any, name: str) -> Any:
    """The value of a field of type `kind`; a list becomes a tuple where the type says so."""
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        return build(cast(Any, kind), value, f"{name}.")
    if origin is Annotated and isinstance(value, dict):
        return _convert_table(inner[1], value, f"{name}.")
    if origin in (Union, UnionType):
        options = [option for option in inner if option is not type(None)]  # TOML has no None
        if len(options) == 1:
            return _convert(options[0], value, name)
        for option in options:
            with suppress(ValueError):
                return _convert(option, value, name)
    elif origin in (list, tuple) and isinstance(value, list):
        if origin is not tuple or inner[-1] is ... or len(inner) == len(value):
            items = [_convert(inner[0], each, f"{name}[{index}]") for index, each in enumerate(value)]
            return tuple(items) if origin is tuple else items
    elif origin is dict and isinstance(value, dict):
        return {key: _convert(inner[1], each, f"{name}.{key}") for key, each in value.items()}
    elif origin is Literal and value in inner:
        return value
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif kind is Any or type(value) is kind or (kind is float and type(value) is int):
        return value
    raise ValueError(f"{name} is {value!r}; give {_describe(kind)}")


def _describe(kind: Any) -> str:
    """What a value of the type is, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_describe(option) for option in inner if option is not type(None)))
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin in (list, tuple):
        return f"a list of {len(inner)}" if origin is tuple and inner[-1] is not ... else "a list"
    return _WORDS.get(origin or kind, "a table")
