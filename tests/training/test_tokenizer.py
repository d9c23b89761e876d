"""The kind "vision": from a folder to a tokenizer, figures and sheets."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emu3.modeling.vision import Emu3VQVAE
from emu3.training import loop
from emu3.training.kinds import KINDS
from emu3.training.recipe import read_recipe
from emu3.training.state import read_log
from emu3.training.tokenizer import VisionRecipe, check_sizes, train_vision

pytestmark = pytest.mark.usefixtures("float32")

MODEL = {
    "codebook_size": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "hidden_size": 32,
    "temporal_downsample_factor": 2,
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        picture = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
        picture.resize((40, 32), Image.Resampling.BICUBIC).save(folder / f"picture-{number}.png")
    for number in range(2):
        frames = [Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)) for _ in range(4)]
        frames[0].save(folder / f"clip-{number}.webp", save_all=True, append_images=frames[1:], lossless=True)
    return folder


def test_from_a_folder_to_a_tokenizer_and_its_fine_tuned_decoder(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "MAX_WORKERS", 0)
    recipe = VisionRecipe(
        model=MODEL,
        source=str(folder),
        crop=16,
        frames=2,
        batch_size=4,
        steps=6,
        continuous_steps=2,
        report_every=3,
        sheet_every=3,
        held_out_crops=4,
    )
    with pytest.raises(ValueError, match="lies within the data"):
        train_vision(recipe, folder / "out")
    train_vision(recipe, tmp_path / "out")
    log = read_log(tmp_path / "out")
    assert [line["step"] for line in log] == [3, 6]
    assert all(line["psnr"] > 0 for line in log)  # of the training pictures, beside the held-out ones
    assert {name.removeprefix("held_out_") for name in log[0] if name.startswith("held_out")} == {
        *("psnr", "ssim", "clip_psnr", "clip_ssim", "codes_used", "codes_share", "codes_perplexity")
    }
    assert [log[1][f"{way}_tokens"] for way in ("through_time", "by_frame", "same_tokens")] == [64, 128, 72]
    assert log[1]["held_out_clip_psnr"] == log[1]["through_time_psnr"]
    sheets = sorted(path.name for path in (tmp_path / "out" / "sheets").iterdir())
    assert sheets == ["step-000003.png", "step-000006.png"]
    made = Emu3VQVAE.from_pretrained(tmp_path / "out" / "vision")
    assert not made.training

    settings = {
        "start": str(tmp_path / "out" / "vision"),
        "decoder_only": True,
        "crop": 16,
        "clip_share": 0.0,
        "steps": 3,
    }
    train_vision(VisionRecipe(source=str(folder), batch_size=4, held_out_crops=4, **settings), tmp_path / "tuned")
    tuned = Emu3VQVAE.from_pretrained(tmp_path / "tuned" / "vision")
    pixels = torch.rand(3, 3, 32, 16) * 2 - 1
    codes = [torch.stack(each.encode(pixels, [[32, 16]] * 3).image_tokens) for each in (made, tuned)]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(made.decode(codes[0]), tuned.decode(codes[0]))
    assert "held_out_clip_psnr" not in read_log(tmp_path / "tuned")[-1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop": 60}, "crop is 60; give a multiple of 8, the pixels of a code, and at least 16"),
        ({"crop": 8}, "crop is 8; give a multiple of 8, the pixels of a code, and at least 16"),
        ({"frames": 6}, "frames is 6; give a multiple of 4, the frames that share a code"),
        ({"crop": 24, "discriminator": 0.1}, "crop is 24; the discriminator needs at least 32"),
        ({"zoom": 0.5}, "zoom is 0.5; give at least 1"),
        ({"stride": 0}, "stride is 0; give at least 1"),
        ({"held_out": 1.5}, "held_out is 1.5; give a share from 0 to 1"),
    ],
)
def test_settings_that_do_not_fit(settings, words):
    with pytest.raises(ValueError, match=words):
        check_sizes(VisionRecipe(source="data", **settings), space=8, time=4)
    check_sizes(VisionRecipe(source="data", frames=6, clip_share=0.0), space=8, time=4)


def test_several_processes_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = VisionRecipe(model=MODEL, source=str(folder), crop=16, frames=2, held_out_crops=2)
    with pytest.raises(ValueError, match="is trained by one process; start one, and set parts for larger batches"):
        train_vision(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_recipe_for_photographs_fits():
    kind, recipe, _ = read_recipe(Path(__file__).parents[2] / "recipes" / "photos" / "vision.toml", KINDS)
    assert kind == "vision"
    check_sizes(recipe, space=8, time=4)
    assert recipe.source == "runs/photos"
