"""nano's recipes: they fit their kinds, and a run that was killed goes on bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from emu3.checkpoints import NANO as NANO_CHECKPOINT
from emu3.checkpoints.vision import load_vision_tokenizer
from emu3.configuration import Emu3VQVAEConfig
from emu3.data.shards import Shard, open_shards
from emu3.data.tokenize import tokenizer_hash
from emu3.icons import recipes
from emu3.icons.captions import DESCRIBE, full_caption, questions
from emu3.icons.recipes import (
    KINDS,
    IconVisionRecipe,
    export_shards,
    export_tales,
    make_picture_batch,
    run_recipe,
    sample_batch,
    train_draft,
    train_vision,
)
from emu3.icons.scenes import contains_held_out, render
from emu3.icons.sequences import IconDraftRecipe, IconShardsRecipe, IconTalesRecipe, SceneSource
from emu3.modeling.vision import Emu3VQVAE
from emu3.training import loop
from emu3.training.recipe import read_recipe
from emu3.training.state import read_log

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


@pytest.mark.parametrize("path", sorted(NANO.glob("*.toml")), ids=lambda path: path.stem)
def test_nanos_recipes_fit_their_kinds(path):
    kind, recipe, _ = read_recipe(path, KINDS)
    kinds = {"vision": "icon_vision", "shards": "icon_shards", "draft": "icon_draft", "language": "pretrain"}
    kinds |= {"preference": "icon_preference", "pairs": "preference", "clips": "icon_vision", "tales": "icon_tales"}
    assert kind == kinds.get(path.stem, path.stem)
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
    pixels, codes, step = make_picture_batch([(32, 40)], None, 3, 0, 0.0, 7)
    pictures = torch.from_numpy(np.stack([render(scene) for scene in sample_batch([(32, 40)], 3, 0, 7)]))
    torch.testing.assert_close(pixels, pictures.movedim(-1, 1) / 127.5 - 1)
    assert codes is None  # without a design
    assert step == 7
    other = make_picture_batch([(32, 40)], None, 3, 0, 0.0, 7, part=1)
    assert not torch.equal(other.pixels, pixels)


def test_a_recipe_before_the_one_it_needs(tmp_path):
    (tmp_path / "recipe.toml").write_text('kind = "checkpoint"\noutput = "out"\nlanguage = "made"')
    with pytest.raises(ValueError, match=r"no model in '.*made'; run the recipe that makes it first"):
        run_recipe(tmp_path / "recipe.toml")
    assert not (tmp_path / "out").exists()


def test_nanos_mixture_is_what_its_shards_recipe_leaves():
    """Every folder is there, for drawing and for reading; in every span of steps the shares add up."""
    names = ("shards.toml", "tales.toml", "language.toml")
    shards, tales, language = (read_recipe(NANO / name, KINDS)[1] for name in names)
    made = {f"{source.name_with_captions}-{use}" for source in shards.sources for use in ("draw", "read")}
    told = {name for name in ("clips", "edits", "stories", "watched", "compared") if getattr(tales, name)}
    assert len(told) == 5 and {each.path.name for each in language.data} == made | told
    for step in (0, 300, 600, 1100, 6599):
        used = [each for each in language.data if each.steps[0] <= step < each.steps[1]]
        assert sum(each.weight for each in used) == pytest.approx(1.0, abs=0.02)
        drawn = sum(each.weight for each in used if each.path.name.endswith("-draw"))
        assert drawn == pytest.approx(0.6 if step < 1100 else 0.43, abs=0.02)
        assert {each.path.name for each in used} >= told if step >= 1100 else not told & {e.path.name for e in used}


def test_a_design_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="54 codes of 20 dimensions; set codebook_size to 54"):
        train_vision(IconVisionRecipe(model=VISION, shapes=2), tmp_path)


def test_a_step_without_a_source_is_refused(tmp_path):
    sources = tuple(SceneSource(seed=0, count=1, steps=steps) for steps in ((0, 4), (5, 9)))
    with pytest.raises(ValueError, match="no source of scenes for step 4"):
        train_draft(IconDraftRecipe(checkpoint=tmp_path, sources=sources, steps=9), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_scenes_become_shards(tmp_path):
    """Codes are those of the tokenizer; the words are those of the scene; the same recipe makes the same bytes."""
    torch.manual_seed(0)
    tokenizer = Emu3VQVAE(Emu3VQVAEConfig(**VISION)).eval()
    tokenizer.save_pretrained(tmp_path / "vision")
    source = SceneSource(seed=3, count=5, height=32, width=40, full_captions=1.0)
    recipe = IconShardsRecipe(vision=tmp_path / "vision", sources=(source,), turns=2, visits=2)
    export_shards(recipe, tmp_path / "a")
    export_shards(recipe, tmp_path / "b")
    for use in ("draw", "read"):
        name = f"32x40-all-5-3-1-0-{use}/00000.parquet"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        shard = Shard(tmp_path / "a" / name)
        assert shard.keys == [f"{index}-{visit}" for index in range(5) for visit in range(2)]
        for at, sample in enumerate(shard):
            _, scene = source.scene(at // 2)
            pixels = torch.from_numpy(render(scene)).movedim(-1, 0)[None] / 127.5 - 1
            with torch.no_grad():
                codes = tokenizer.quantize(tokenizer.latents(pixels)[1])[0]
            (visual,) = (part.content for part in sample.parts if part.role in ("draw", "read"))
            assert np.array_equal(visual.codes_THW, codes.numpy())
            if use == "draw":
                assert sample.parts[0].content.text == full_caption(scene)
            else:
                known = {question.text: question.answer for question in questions(scene)}
                known[DESCRIBE] = full_caption(scene)
                asked = [part.content.text for part in sample.parts[1::2]]
                assert [known[each] for each in asked] == [part.content.text for part in sample.parts[2::2]]
                assert len(asked) == 2


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


def assert_same_runs(a, b):
    whole, resumed = (load_file(folder / "vision" / "model.safetensors") for folder in (a, b))
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    logs = [read_log(folder) for folder in (a, b)]
    for line in logs[0] + logs[1]:
        assert np.isfinite([*line.values()]).all()
        line.pop("pictures_per_second", None)
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
    train_vision(recipe, tmp_path / "whole")
    kill(train_vision, recipe, tmp_path / "resumed")
    train_vision(recipe, tmp_path / "resumed")
    assert_same_runs(tmp_path / "whole", tmp_path / "resumed")
    assert not Emu3VQVAE.from_pretrained(tmp_path / "resumed" / "vision").training
    made = (tmp_path / "resumed" / "vision" / "model.safetensors").read_bytes()
    train_vision(recipe, tmp_path / "resumed")  # a finished run, once more
    assert (tmp_path / "resumed" / "vision" / "model.safetensors").read_bytes() == made


@pytest.mark.slow
def test_the_vision_tokenizer_learns(tmp_path):
    recipe = IconVisionRecipe(model=VISION, steps=80, batch_size=4, continuous_steps=40, report_every=20, save_every=80)
    train_vision(recipe, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["held_out_psnr"] > log[0]["psnr"] + 2


def test_a_vision_tokenizer_learns_clips_from_where_it_is(tmp_path):
    """From nano on: pictures keep their codes, and the sheet shows both."""
    recipe = IconVisionRecipe(
        start="nano", clip_share=0.5, sizes=((32, 32), (32, 40)), steps=2, batch_size=8, report_every=1, sheet_every=2
    )
    train_vision(recipe, tmp_path)
    assert (tmp_path / "sheets" / "step-000002.png").is_file()
    (last,) = [line for line in read_log(tmp_path) if "held_out_clip_psnr" in line]
    assert last["held_out_psnr"] > 30 and last["held_out_clip_psnr"] > 25
    before, after = load_vision_tokenizer(NANO_CHECKPOINT), load_vision_tokenizer(tmp_path / "vision")
    assert torch.equal(before.quantize.embedding.weight, after.quantize.embedding.weight)


def test_tales_are_shards_with_designed_codes(tmp_path):
    export_tales(IconTalesRecipe(vision="nano", clips=3, edits=3, stories=2, watched=2, compared=2), tmp_path)
    tokenizer = load_vision_tokenizer(NANO_CHECKPOINT)
    own = tokenizer_hash(tokenizer)
    clips, edits, stories = (open_shards(tmp_path / name, own)[0] for name in ("clips", "edits", "stories"))
    assert [len(each) for each in (clips, edits, stories)] == [3, 3, 2]
    for sample in clips:
        words, clip = (part.content for part in sample.parts)
        assert words.text.startswith("a clip of ") and clip.frames_per_second == 8 and 2 <= len(clip.codes_THW) <= 4
        with torch.no_grad():
            pixels = tokenizer.decode(torch.tensor(clip.codes_THW))
            seen = tokenizer.encode(pixels, [[48, 48]] * len(pixels)).image_tokens
        assert (torch.stack(seen) == torch.tensor(clip.codes_THW)).float().mean() > 0.85
    assert [[part.role for part in sample.parts] for sample in edits] == [["read", "prompt", "draw"]] * 3
    for sample in stories:
        assert [part.role for part in sample.parts] == ["prompt", *["answer", "draw"] * (len(sample.parts) // 2)]
    (watched,), (compared,) = (open_shards(tmp_path / name, own) for name in ("watched", "compared"))
    for sample in watched:
        (clip, question, answer) = (part.content for part in sample.parts)
        assert len(clip.codes_THW) >= 2 and question.text == "Describe the clip."
        assert answer.text.startswith("a clip of ")
    for sample in compared:
        before, after, question, answer = (part.content for part in sample.parts)
        assert (before.codes_THW != after.codes_THW).any() and question.text == "What changed?"
        assert answer.text.endswith((".",)) and "None" not in answer.text
        assert [part.role for part in sample.parts] == ["read", "read", "prompt", "answer"]
