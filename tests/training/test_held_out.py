"""Figures and sheets of what is held out."""

import numpy as np
import pytest
import torch

from emu3.configuration import Emu3VQVAEConfig
from emu3.modeling.vision import Emu3VQVAE
from emu3.training.held_out import COLUMNS, HeldOut, compare, reconstruct, stack_rows
from emu3.training.reconstruction import psnr, ssim
from emu3.training.vision import VisionObjective, VisionSettings

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def objective():
    torch.manual_seed(0)
    config = Emu3VQVAEConfig(
        codebook_size=16,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        attn_resolutions=[],
        hidden_size=32,
    )
    objective = VisionObjective(Emu3VQVAE(config), VisionSettings(), fresh=False).train()
    objective.set_codebook(torch.randn(16, 4) * 0.3)
    return objective


@pytest.fixture(scope="module")
def held_out():
    generator = torch.Generator().manual_seed(0)
    return HeldOut(
        torch.rand(10, 3, 16, 16, generator=generator) * 2 - 1, torch.rand(3, 8, 3, 16, 16, generator=generator) * 2 - 1
    )


def test_figures(objective, held_out):
    figures = held_out.measure(objective)
    assert objective.training
    tokenizer = objective.tokenizer.eval()
    codes = [
        torch.stack(tokenizer.encode(each, [[16, 16]] * len(each)).image_tokens)
        for each in (held_out.pictures, held_out.clips)
    ]
    with torch.no_grad():
        pictures, clips = (tokenizer.decode(each).clamp(-1, 1) for each in codes)
    assert figures["psnr"] == pytest.approx(float(psnr(pictures, held_out.pictures).mean()), rel=1e-4)
    frames = clips.flatten(0, 1), held_out.clips.flatten(0, 1)
    assert figures["clip_psnr"] == pytest.approx(float(psnr(*frames).mean()), rel=1e-4)
    assert figures["clip_ssim"] == pytest.approx(float(ssim(*frames).mean()), rel=1e-3)
    used = len(torch.cat([each.flatten() for each in codes]).unique())
    assert figures["codes_used"] == used
    assert figures["codes_share"] == used / 16
    assert 1 <= figures["codes_perplexity"] <= used
    objective.train()
    assert held_out.measure(objective) == figures


def test_clips_three_ways(objective, held_out):
    table = held_out.compare_clips(objective)
    # 8 frames of 8x8 codes: a quarter of the frames, all frames, and all frames at half height and width.
    assert {name: row["tokens"] for name, row in table.items()} == {
        "through time": 2 * 64,
        "by frame": 8 * 64,
        "same tokens": 8 * 16,
    }
    assert table["through time"]["psnr"] == pytest.approx(held_out.measure(objective)["clip_psnr"])
    frames = held_out.clips.flatten(0, 1)
    assert table["by frame"]["psnr"] == pytest.approx(compare(reconstruct(objective, frames)[0], frames)["psnr"])


def test_nothing_is_held_out(objective):
    assert HeldOut(None).measure(objective) == {}


def test_a_sheet_shows_originals_above_reconstructions(objective, held_out, tmp_path):
    path = held_out.write_sheet(objective, tmp_path, 500)
    assert path == tmp_path / "sheets" / "step-000500.png"
    sheet = np.asarray(held_out.sheet(objective))
    scale, gap = 8, 4
    assert sheet.shape == (8 * (16 * scale + gap), COLUMNS * (16 * scale + gap), 3)  # 10 pictures, 2 clips: 4 pairs
    original = ((held_out.pictures[1].movedim(0, -1) + 1) * 127.5).round().byte().numpy()
    left = 16 * scale + gap
    shown = sheet[gap : gap + 16 * scale, left : left + 16 * scale]
    assert np.array_equal(shown[::scale, ::scale], original)
    assert np.array_equal(shown[scale - 1 :: scale, scale - 1 :: scale], original)
    made = reconstruct(objective, held_out.pictures[:COLUMNS])[0][1]
    below = sheet[16 * scale + gap : 2 * 16 * scale + gap, left : left + 16 * scale][::scale, ::scale]
    assert np.array_equal(below, ((made.movedim(0, -1) + 1) * 127.5).round().byte().numpy())


def test_large_pictures_are_not_enlarged():
    assert stack_rows([torch.zeros(2, 3, 130, 140)] * 2).size == (2 * 144, 2 * 134)
