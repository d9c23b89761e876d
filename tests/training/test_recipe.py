"""Recipe files: what is wrong with one is said in one line, before anything is written."""

from pathlib import Path

import pytest

from emu3.training import run_recipe
from emu3.training.checkpoint import CheckpointRecipe
from emu3.training.language import LanguageRecipe, split_source
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


def test_missing_output(tmp_path):
    (tmp_path / "recipe.toml").write_text('kind = "vision"\n[model]')
    with pytest.raises(ValueError, match="output"):
        run_recipe(tmp_path / "recipe.toml")


def test_a_recipe_before_the_one_it_needs(tmp_path):
    (tmp_path / "recipe.toml").write_text(
        'kind = "checkpoint"\noutput = "out"\nvision = "made/vision"\nlanguage = "made"\nimage_area = 64'
    )
    with pytest.raises(ValueError, match=r"no model in '.*made/vision'; run the recipe that makes it first"):
        run_recipe(tmp_path / "recipe.toml")
    assert not (tmp_path / "out").exists()


KINDS = {"vision": VisionRecipe, "language": LanguageRecipe, "checkpoint": CheckpointRecipe}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_nanos_recipes_fit_their_kinds(path):
    content = read_recipe(path)
    kind = KINDS[content.pop("kind")]
    del content["output"]
    assert isinstance(build(kind, content, path), kind)
    for entry in content.get("sources", []):
        source, use = split_source(entry)
        assert source.count > 0
        assert 0 < use.share <= 1
        assert use.full_captions + use.colored_captions <= 1
