"""nano's recipes: they fit their kinds, and a run that was killed goes on bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from emu3.configuration import Emu3VQVAEConfig
from emu3.icons import recipes
from emu3.icons.recipes import (
    KINDS,
    IconVisionRecipe,
    make_picture_batch,
    run_recipe,
    sample_batch,
    train_icon_vision,
    train_language,
)
from emu3.icons.scenes import contains_held_out, render
from emu3.icons.sequences import IconLanguageRecipe, SceneSource, Weights
from emu3.modeling.text import Emu3ForCausalLM
from emu3.modeling.vision import Emu3VQVAE
from emu3.tokenization import train_tokenizer
from emu3.training import loop
from emu3.training.recipe import read_recipe

pytestmark = pytest.mark.usefixtures("float32")

NANO = Path(__file__).parents[2] / "recipes" / "nano"
VISION = {
    "codebook_size": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "hidden_size": 32,
}
MODEL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_dropout": 0.0,
}


@pytest.mark.parametrize("path", sorted(NANO.glob("*.toml")), ids=lambda path: path.stem)
def test_nanos_recipes_fit_their_kinds(path):
    kind, recipe, _ = read_recipe(path, KINDS)
    assert kind.removeprefix("icon_") == path.stem
    for source in getattr(recipe, "sources", ()):
        assert source.count > 0
        assert 0 < source.share <= 1
        assert source.full_captions + source.colored_captions <= 1


def test_batches_depend_on_seed_and_step_only():
    sizes = [(48, 48), (32, 40)]
    batches = {step: sample_batch(sizes, 8, 0, step) for step in range(20)}
    assert batches == {step: sample_batch(sizes, 8, 0, step) for step in range(20)}
    assert batches[5] != sample_batch(sizes, 8, 1, 5)
    assert {(scene.height, scene.width) for scenes in batches.values() for scene in scenes} == {(48, 48), (32, 40)}
    assert not any(contains_held_out(scene) for scenes in batches.values() for scene in scenes)


def test_pictures_of_a_batch():
    pixels, codes, step = make_picture_batch([(32, 40)], None, 3, 0, 7)
    pictures = torch.from_numpy(np.stack([render(scene) for scene in sample_batch([(32, 40)], 3, 0, 7)]))
    torch.testing.assert_close(pixels, pictures.movedim(-1, 1) / 127.5 - 1)
    assert codes is None  # without a design
    assert step == 7
    other = make_picture_batch([(32, 40)], None, 3, 0, 7, part=1)
    assert not torch.equal(other.pixels, pixels)


def test_a_recipe_before_the_one_it_needs(tmp_path):
    (tmp_path / "recipe.toml").write_text(
        'kind = "checkpoint"\noutput = "out"\nvision = "made/vision"\nlanguage = "made"\nimage_area = 64'
    )
    with pytest.raises(ValueError, match=r"no model in '.*made/vision'; run the recipe that makes it first"):
        run_recipe(tmp_path / "recipe.toml")
    assert not (tmp_path / "out").exists()


def test_a_design_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="54 codes of 20 dimensions; set codebook_size to 54"):
        train_icon_vision(IconVisionRecipe(model=VISION, shapes=2), tmp_path)


def test_a_step_without_a_source_is_refused(tmp_path):
    Emu3VQVAE(Emu3VQVAEConfig(**VISION)).save_pretrained(tmp_path / "vision")
    sources = tuple(SceneSource(share=1.0, seed=0, count=1, steps=steps) for steps in ((0, 4), (5, 9)))
    with pytest.raises(ValueError, match="no source of scenes for step 4"):
        train_language(IconLanguageRecipe(model=MODEL, vision="../vision", sources=sources, steps=9), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Killed(Exception):
    pass


def kill(train, recipe, folder):
    """Ends the run right after it saved its first state, as a killed process would."""
    save = loop.save_state

    def save_and_stop(*arguments):
        save(*arguments)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_state", save_and_stop)
        with pytest.raises(Killed):
            train(recipe, folder)


def assert_same_runs(a, b, names):
    for name in names:
        whole, resumed = (load_file(folder / name) for folder in (a, b))
        assert whole.keys() == resumed.keys()
        assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == [], name
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (a, b)]
    for line in logs[0] + logs[1]:
        assert np.isfinite([*line.values()]).all()
        for name in ("pictures_per_second", "tokens_per_second"):
            line.pop(name, None)
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]][:6] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"continuous_steps": 2}, id="k-means before"),
        pytest.param({"continuous_steps": 4}, id="k-means after"),
        pytest.param(
            {"shapes": 2, "model": VISION | {"codebook_size": 54, "embed_dim": 20, "latent_channels": 20}},
            id="designed",
        ),
        pytest.param(
            {"continuous_steps": 2, "codebook_decay": 0.1, "model": VISION | {"codebook_size": 400}},
            id="codes restarted before and after",
        ),
    ],
)
def test_a_killed_run_of_the_vision_tokenizer_goes_on_bit_for_bit(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(recipes, "MEASURED_PICTURES", 16)
    settings = {"model": VISION, "steps": 6, "batch_size": 2, "save_every": 3, "report_every": 1}
    recipe = IconVisionRecipe(**settings | changes)
    train_icon_vision(recipe, tmp_path / "whole")
    kill(train_icon_vision, recipe, tmp_path / "resumed")
    train_icon_vision(recipe, tmp_path / "resumed")
    files = ("state/model.safetensors", "state/optimizer-0.safetensors", "vision/model.safetensors")
    assert_same_runs(tmp_path / "whole", tmp_path / "resumed", files)
    assert not Emu3VQVAE.from_pretrained(tmp_path / "resumed" / "vision").training


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="drawing and reading"),
        pytest.param({"draw_share": 0.0, "turns": 2, "weights": Weights(read_visual=0.0)}, id="answers only"),
        pytest.param({"code_factors": [4, 4]}, id="factors"),
    ],
)
def test_a_killed_run_of_the_language_model_goes_on_bit_for_bit(tmp_path, monkeypatch, changes):
    torch.manual_seed(0)
    Emu3VQVAE(Emu3VQVAEConfig(**VISION)).save_pretrained(tmp_path / "vision")
    # The recipe's own tokenizer reads thousands of captions.
    tokenizer = train_tokenizer(["a photo of a red car"], 260, 16)
    monkeypatch.setattr(recipes, "train_text_tokenizer", lambda *arguments: tokenizer)
    recipe = IconLanguageRecipe(
        model=MODEL,
        vision="../vision",
        sources=(
            SceneSource(share=0.5, seed=0, count=30),
            SceneSource(share=0.5, seed=1, count=20, height=32, width=40, tasks=("colors",)),
        ),
        steps=6,
        batch_size=2,
        warmup=2,
        save_every=3,
        report_every=1,
        **changes,
    )
    train_language(recipe, tmp_path / "whole")
    kill(train_language, recipe, tmp_path / "resumed")
    train_language(recipe, tmp_path / "resumed")
    files = [f"state/{name}.safetensors" for name in ("model", "optimizer-0", "optimizer-1")]
    assert_same_runs(tmp_path / "whole", tmp_path / "resumed", [*files, "language/model.safetensors"])
    loaded = Emu3ForCausalLM.from_pretrained(tmp_path / "resumed" / "language")
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_the_vision_tokenizer_learns(tmp_path):
    recipe = IconVisionRecipe(model=VISION, steps=80, batch_size=4, continuous_steps=40, report_every=20, save_every=80)
    train_icon_vision(recipe, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["held_out_psnr"] > log[0]["psnr"] + 2
