import runpy
from pathlib import Path

import pytest
from PIL import Image

from emu3 import Emu3Pipeline
from emu3.sheet import CAPTION_HEIGHT

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


def test_the_demo_draws_collects_and_describes(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = Emu3Pipeline.from_pretrained(tiny_checkpoint)
    monkeypatch.setattr(Emu3Pipeline, "from_pretrained", lambda name: {"nano": pipeline}[name])
    monkeypatch.chdir(tmp_path)
    demo = runpy.run_path(str(DEMO))
    demo["main"]()
    prompts, folder = demo["PROMPTS"], tmp_path / "out" / "demo"
    expected = pipeline.image(list(prompts), seed=0)
    printed = capsys.readouterr().out
    sheet = Image.open(folder / "contact-sheet.png")
    assert len(prompts) >= 4 and all(prompt in printed for prompt in prompts)
    for index, picture in enumerate(expected):
        with Image.open(folder / f"{index + 1}.png") as written:
            assert written.tobytes() == picture.tobytes()
        left, top = 8 + index % 3 * (4 * 48 + 8), 8 + index // 3 * (4 * 48 + CAPTION_HEIGHT + 8)
        enlarged = sheet.crop((left, top, left + 4 * 48, top + 4 * 48))
        assert enlarged.resize((48, 48), Image.Resampling.NEAREST).tobytes() == picture.tobytes()
    for request in ("Describe the picture.", "What color is the cat?"):
        assert f"{request}  ->  {pipeline.chat((request, [expected[1]]))}\n" in printed
