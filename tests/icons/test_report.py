import numpy as np
import pytest
from PIL import Image

from emu3.clips import Clip
from emu3.icons.measures import Run, judge_pictures
from emu3.icons.prompts import evaluation_prompts
from emu3.icons.report import Report, evaluate
from emu3.icons.scenes import render
from emu3.icons.score import Example, Figure, Line, Score, Section
from emu3.icons.tale_measures import stories
from emu3.pipeline import Emu3Pipeline
from emu3.sheet import MARGIN, SIDE, contact_sheet


def test_score_counts_known_and_held_out_apart() -> None:
    score = Score.of([(False, True), (False, False), (True, True), (True, True), (True, False)])
    assert score == Score(known_right=1, known=2, held_out_right=2, held_out=3)
    assert score.share == pytest.approx(3 / 5)
    assert score + Score(1, 1, 0, 0) == Score(2, 3, 2, 3)


def test_true_scenes_satisfy_their_prompts_and_exchanged_ones_do_not() -> None:
    prompts = evaluation_prompts("color_attribution", 12, seed=5)
    truth = [Image.fromarray(render(prompt.scene)) for prompt in prompts]
    assert judge_pictures(prompts, truth) == [True] * 12
    assert sum(judge_pictures(prompts, truth[1:] + truth[:1])) <= 1


def test_intervals_are_wilsons() -> None:
    """Of 8 of 10, and of all and none of 10, as tables give them."""
    assert Score(8, 10).interval == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Score(10, 10).interval == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert Score(0, 10).interval == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_report_says_the_same_in_words_for_programs_and_on_a_page() -> None:
    lines = (Line("draw <one>", Score(1, 2), Score(2, 2)), Line("captions", Score(1, 2, 0, 1)))
    clip = Clip(np.zeros((4, 8, 8, 3), np.uint8), 8)
    examples = (Example("a <dog>", (Image.new("RGB", (8, 8)), clip), False),)
    figures = (Figure("height", 30.25, {"data": 24.0}), Figure("spread", 6.0))
    report = Report({"model": "tiny"}, (Section("parts", "About.", lines, figures, examples),), ("clips",))
    values = report.to_dict()
    low, high = Score(1, 2).interval
    assert values["scores"]["draw <one>"] == {
        "share": 0.5,
        "interval": [low, high],
        "ceiling": 1.0,
        "known_right": 1,
        "known": 2,
        "held_out_right": 0,
        "held_out": 0,
    }
    assert values["figures"] == {"parts: height": {"value": 30.25, "data": 24.0}, "parts: spread": {"value": 6.0}}
    assert values["left_out"] == ["clips"]
    table = report.to_table()
    assert "| captions | 0.33 (1/3) | 0.06-0.79 | 0.50 (1/2) | 0.00 (0/1) | - |" in table
    assert "| height | 30.2 | 24.0 |" in table and "| spread | 6.00 | - |" in table
    page = report.to_html()
    assert "<td>draw &lt;one&gt;</td>" in page and "✗ a &lt;dog&gt;" in page and "<dog>" not in page
    assert page.count("data:image/png;base64,") == page.count("data:image/webp;base64,") == 1
    assert "http" not in page


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
    """Few prompts of each part; how good it is at many, docs/results says."""
    media = tmp_path / "media"
    media.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(media / "noise.png")
    parts = [
        "drawing",
        "answers",
        "captions",
        "clips",
        "continuation",
        "watching",
        "edits",
        "stories",
        "reconstruction",
    ]
    report = evaluate("nano", 2, output=tmp_path / "out", only=parts, media=media)
    values = report.to_dict()
    shares = {name: score["share"] for name, score in values["scores"].items()}
    assert min(shares[name] for name in ("drawing", "answers", "captions", "edits")) >= 0.75
    assert min(shares[name] for name in ("clips", "stories", "clips described", "changes named")) >= 0.5
    assert all(score["ceiling"] in (None, 1.0) for score in values["scores"].values())
    next_frames = values["figures"]["continuation: PSNR of the next four frames in dB"]
    assert next_frames["last frame again"] < next_frames["value"] <= next_frames["ceiling"] + 3
    psnrs = {name: figure["value"] for name, figure in values["figures"].items() if name.endswith("PSNR in dB")}
    assert psnrs["reconstruction: icons: PSNR in dB"] > 38 and psnrs["reconstruction: clips of icons: PSNR in dB"] > 32
    assert psnrs["reconstruction: photographs: PSNR in dB"] < 25  # no picture of its world
    assert (tmp_path / "out" / "report.md").read_text() == report.to_table() + "\n"
    assert (tmp_path / "out" / "report.html").read_text() == report.to_html()


def test_what_is_not_there_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="'films' is not measured; choose among drawing, layout"):
        evaluate("nano", only=["films"])
    with pytest.raises(ValueError, match="holds neither pictures nor clips"):
        evaluate("nano", 1, only=["reconstruction"], media=tmp_path)


def test_stories_are_drawn_as_asked(monkeypatch):
    asked = []

    def tell(self, talks, **options):
        asked.append(options)
        return [[] for _ in talks]

    monkeypatch.setattr(Emu3Pipeline, "tell", tell)
    stories(Run(Emu3Pipeline.from_pretrained("nano"), count=2, decoding="zipar"))
    assert [each["drawing"].decoding for each in asked] == ["zipar"]
