"""Recipe files: what is wrong with one is said in one line, before anything is written."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from emu3.configuration import Emu3TextConfig
from emu3.training.recipe import Arguments, Checked, Kind, RunSettings, build, read_recipe, run_recipe


@dataclass(frozen=True)
class Part(Checked):
    share: float
    span: tuple[int, int] | None = None
    colors: tuple[Literal["red", "blue"], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe(RunSettings):
    model: Annotated[dict[str, Any], Arguments(Emu3TextConfig)]
    pieces: tuple[Part, ...] = ()
    weights: Part = field(default_factory=lambda: Part(1.0))
    names: list[str] = field(default_factory=list)
    compile: bool = False
    beside: Path | None = None


KINDS = {"thing": Kind(Recipe, lambda recipe, output: output.mkdir()), "other": Kind(Part, print)}


def test_values_become_those_of_the_fields():
    content = {
        "model": {"hidden_size": 16, "eos_token_id": [1, 2], "attention_dropout": 0},
        "pieces": [{"share": 1, "span": [0, 3], "colors": ["red"]}, {"share": 0.5}],
        "weights": {"share": 2.0},
        "names": ["a"],
        "steps": 7,
    }
    recipe = build(Recipe, content)
    assert recipe == Recipe(
        model=content["model"],
        pieces=(Part(1, (0, 3), ("red",)), Part(0.5)),
        weights=Part(2.0),
        names=["a"],
        steps=7,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "colour = 1: no such field"),
        ({"steps": "6000"}, "steps is '6000': input should be a valid integer"),
        ({"steps": 1.5}, "steps is 1.5: input should be a valid integer"),
        ({"steps": True}, "steps is True: input should be a valid integer"),
        ({"steps": 0}, "steps is 0; give 1 or more"),
        ({"average": 1.0}, "average is 1.0; give a share from 0 to below 1"),
        ({"compile": 1}, "compile is 1: input should be a valid boolean"),
        ({"names": "a"}, "names is 'a': input should be a valid array"),
        ({"names": ["a", 2]}, r"names\[1\] is 2: input should be a valid string"),
        ({"model": 3}, "model is 3: input should be an object"),
        ({"model": {"hiden_size": 3}}, "model.hiden_size = 3: no such field"),
        ({"model": {"hidden_size": 2.5}}, "model.hidden_size is 2.5: input should be a valid integer"),
        ({"model": {"eos_token_id": "x"}}, "model.eos_token_id.* is 'x': input should be"),
        ({"model": {"model_type": "x"}}, "model.model_type = 'x': no such field"),
        ({"pieces": [{"share": 1.0}, {}]}, r"pieces\[1\].share is missing"),
        ({"pieces": [{"share": "1"}]}, r"pieces\[0\].share is '1': input should be a valid number"),
        ({"pieces": [{"share": 1, "shares": 2}]}, r"pieces\[0\].shares = 2: no such field"),
        ({"pieces": [{"share": 1, "span": [0]}]}, r"pieces\[0\].span\[1\] is missing"),
        ({"pieces": [{"share": 1, "colors": ["grey"]}]}, r"pieces\[0\].colors\[0\] is 'grey': .* 'red' or 'blue'"),
        ({"weights": [1]}, r"weights is \[1\]: input should be an object"),
    ],
)
def test_wrong_fields_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(Recipe, {"model": {}} | changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('output = "out"', "kind is None; choose one of thing, other"),
        ('kind = "sculpture"\noutput = "out"', "kind is 'sculpture'; choose one of thing, other"),
        ('kind = ["thing"]\noutput = "out"', r"kind is \['thing'\]; choose one of thing, other"),
        ('kind = "thing', "is not valid TOML"),
        ('kind = "thing"\n[model]', "output is None; name a folder"),
        ('kind = "thing"\noutput = "out"', r"recipe\.toml: model is missing"),
        (
            'kind = "thing"\noutput = "out"\nsteps = "1"\n[model]',
            r"recipe\.toml: steps is '1': input should be",
        ),
    ],
)
def test_mistakes(tmp_path, content, message):
    (tmp_path / "recipe.toml").write_text(content)
    with pytest.raises(ValueError, match=message):
        run_recipe(tmp_path / "recipe.toml", KINDS)
    assert not (tmp_path / "out").exists()


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.toml is no file; give a recipe"):
        run_recipe(tmp_path / "absent.toml", KINDS)


def test_paths_are_relative_to_the_recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('kind = "thing"\noutput = "out"\nbeside = "made"\n[model]')
    assert read_recipe(path, KINDS) == ("thing", Recipe(model={}, beside=tmp_path / "made"), tmp_path / "out")
    assert run_recipe(path, KINDS) == tmp_path / "out"
    assert (tmp_path / "out").is_dir()
