"""Recipe files: what is wrong with one is said in one line, before anything is written."""

from pathlib import Path

import pytest

from emu3.training import run_recipe
from emu3.training.language import LanguageRecipe
from emu3.training.recipe import build, read_recipe
from emu3.training.vision import VisionRecipe

RECIPES = Path(__file__).parents[2] / "recipes" / "nano"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('output = "out"', r"kind is None; choose one of vision, language, checkpoint"),
        ('kind = "sculpture"\noutput = "out"', r"kind is 'sculpture'; choose one of vision, language, checkpoint"),
        ('kind = "vision', r"is not valid TOML"),
        ('kind = "vision"\noutput = "out"\n[model]\n[colour]', r"recipe\.toml: .*unexpected keyword argument 'colour'"),
        ('kind = "language"\noutput = "out"\nvision = "v"', r"recipe\.toml: .*missing .* 'model'"),
    ],
    ids=["no kind", "unknown kind", "no TOML", "unknown field", "missing field"],
)
def test_mistakes(tmp_path, content, message):
    (tmp_path / "recipe.toml").write_text(content)
    with pytest.raises(ValueError, match=message):
        run_recipe(tmp_path / "recipe.toml")
    assert not (tmp_path / "out").exists()


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe at .*absent\.toml; see recipes/nano"):
        run_recipe(tmp_path / "absent.toml")


@pytest.mark.xfail(raises=KeyError, strict=True, reason="run_recipe pops the output without looking")
def test_missing_output(tmp_path):
    (tmp_path / "recipe.toml").write_text('kind = "vision"\n[model]')
    with pytest.raises(ValueError, match="output"):
        run_recipe(tmp_path / "recipe.toml")


@pytest.mark.parametrize(("name", "kind"), [("vision", VisionRecipe), ("language", LanguageRecipe)])
def test_nanos_recipes_fit_their_kinds(name, kind):
    content = read_recipe(RECIPES / f"{name}.toml")
    assert content.pop("kind") == name
    del content["output"]
    assert build(kind, content, RECIPES).steps == content["steps"] >= 1000
