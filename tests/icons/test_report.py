import numpy as np
import pytest
from PIL import Image

from emu3.icons.prompts import evaluation_prompts
from emu3.icons.report import QUESTION_KINDS, Report, Score, evaluate, judge_pictures, psnr
from emu3.icons.scenes import TASKS, render
from emu3.sheet import MARGIN, SIDE, contact_sheet


def test_score_counts_known_and_held_out_apart() -> None:
    score = Score.of([(False, True), (False, False), (True, True), (True, True), (True, False)])
    assert score == Score(known_right=1, known=2, held_out_right=2, held_out=3)
    assert score.share == pytest.approx(3 / 5)
    assert score + Score(1, 1, 0, 0) == Score(2, 3, 2, 3)


def test_psnr_of_a_known_error() -> None:
    target = np.full((4, 4, 3), 100, np.uint8)
    assert psnr(target + np.uint8(5), target) == pytest.approx(20 * np.log10(255 / 5))


def test_true_scenes_satisfy_their_prompts_and_exchanged_ones_do_not() -> None:
    prompts = evaluation_prompts("color_attribution", 12, seed=5)
    truth = [Image.fromarray(render(prompt.scene)) for prompt in prompts]
    assert judge_pictures(prompts, truth) == [True] * 12
    assert sum(judge_pictures(prompts, truth[1:] + truth[:1])) <= 1


def test_report_says_the_same_in_words_and_for_programs() -> None:
    half, none = Score(1, 2, 0, 0), Score(0, 0, 0, 1)
    tasks, kinds = dict.fromkeys(TASKS, half), dict.fromkeys(QUESTION_KINDS, none)
    report = Report("tiny", 2, 0, tasks, dict.fromkeys(TASKS, Score(2, 2)), kinds, half + none, 30.25)
    values = report.to_dict()
    assert values["scores"]["drawing"] == {
        "share": 0.5,
        "known_right": 6,
        "known": 12,
        "held_out_right": 0,
        "held_out": 0,
    }
    assert values["ceilings"]["drawing"] == 1.0
    table = report.to_table()
    assert "| captions | 0.33 | 0.50 (1/2) | 0.00 (0/1) | - |" in table
    assert "| draw two object | 0.50 | 0.50 (1/2) | - | 1.00 |" in table
    assert "30.2 dB" in table


def test_contact_sheet_shows_every_picture_enlarged() -> None:
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime", "black")]
    sheet = contact_sheet(pictures, ["a", "b", "c", "d"], columns=3, right=[True, False, True, False])
    assert sheet.getpixel((MARGIN + 1, MARGIN + 1)) == (255, 0, 0)
    assert sheet.getpixel((2 * MARGIN + SIDE + 1, MARGIN + 1)) == (0, 0, 255)


def test_a_long_caption_stays_under_its_picture() -> None:
    pictures = [Image.new("RGB", (48, 48), "red")] * 2
    sheet = np.asarray(contact_sheet(pictures, ["a photo of a purple backpack and an orange umbrella", ""]))
    below = sheet[MARGIN + SIDE :]
    first, second = np.split(below, [MARGIN + SIDE + MARGIN // 2], axis=1)
    inked = (first < 128).any((1, 2)).astype(int)
    assert (np.diff(inked, prepend=0) == 1).sum() == 2  # lines
    assert second.min() == 255


def test_evaluating_the_shipped_checkpoint(tmp_path) -> None:
    report = evaluate("nano", count=4, output=tmp_path)
    values = report.to_dict()
    assert values["ceilings"]["drawing"] >= 0.95
    assert values["reconstruction_psnr"] > 45
    assert values["scores"]["draw single object"]["share"] >= 0.9
    assert values["scores"]["answers"]["share"] >= 0.95
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*(f"{task}.png" for task in TASKS), "report.md"])
    assert (tmp_path / "report.md").read_text() == report.to_table() + "\n"
