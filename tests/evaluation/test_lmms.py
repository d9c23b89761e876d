"""lmms-eval's own runner on a small task of its own format: pictures of icons, and questions with one right answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emu3.clips import Clip
from emu3.evaluation.lmms import LmmsModel, Model
from emu3.icons.captions import DESCRIBE, WATCH, full_caption, questions
from emu3.icons.motion import clip_caption, render_clip, sample_clip
from emu3.icons.scenes import TASKS, Scene, SceneObject, render, sample_scene

TASK = """\
task: icons
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function utils.judge
generation_kwargs:
  max_new_tokens: 32
  temperature: 0
  do_sample: false
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
"""
UTILS = """\
def pictures(doc):
    return [doc["film"] or doc["image"].convert("RGB")]


def judge(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""


def write_task(folder: Path, count: int) -> None:
    """A task named "icons": its YAML file, functions, and data of `count` questions, every third about a film."""
    from datasets import Dataset
    from datasets import Image as Picture

    dice = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Any]] = {"image": [], "question": [], "answer": [], "film": []}
    for number in range(count):
        scene = sample_scene(TASKS[number % len(TASKS)], dice, "train")
        asked = [(each.text, each.answer) for each in questions(scene)] + [(DESCRIBE, full_caption(scene))]
        question, answer = asked[number % len(asked)]
        film = None
        if number % 3 == 2:
            moves, film = sample_clip("single_motion", dice, "train", 3), str(folder / f"{number}.mp4")
            Clip(render_clip(moves), 8).save(film)
            question, answer = WATCH, clip_caption(moves, "single_motion")
        for name, value in zip(rows, (Image.fromarray(render(scene)), question, answer, film), strict=True):
            rows[name].append(value)
    Dataset.from_dict(rows).cast_column("image", Picture()).to_parquet(folder / "icons.parquet")
    (folder / "icons.yaml").write_text(TASK.format(data=folder / "icons.parquet"))
    (folder / "utils.py").write_text(UTILS)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="needs lmms-eval")
def test_the_runner_finishes_a_task(tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", 24)
    arguments = ["--model", "emu3", "--model_args", "pretrained=nano", "--tasks", "icons", "--limit", "20"]
    places = ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"), "--log_samples"]
    command = [sys.executable, "-m", "lmms_eval", *arguments, "--batch_size", "8", *places]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("*_results.json")
    found = json.loads(results.read_text())
    assert found["n-samples"]["icons"]["effective"] == 20
    assert found["results"]["icons"]["right,none"] >= 0.9
    assert "icons" in done.stdout


class Hook:
    """Keeps what is remembered."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def add_partial(self, kind: str, asked: Any, said: str) -> None:
        self.said.append((kind, asked[0], said))


def model_without_runner(**options: Any) -> LmmsModel:
    """As the runner makes it."""
    model = LmmsModel(pretrained="nano", **options)
    model.cache_hook = Hook()
    model.task_dict = {"icons": {"test": [{"noun": noun} for noun in ("cat", "car", "dog", "cat")]}}
    return model


def request_of(number: int, options: dict[str, Any]) -> Any:
    """As lmms-eval's tasks of messages make them."""

    def messages(document: dict[str, str]) -> list[dict[str, Any]]:
        scene = Scene((SceneObject(document["noun"], "blue", 8, 16),), "white")
        picture = {"type": "image", "url": Image.fromarray(render(scene))}
        return [{"role": "user", "content": [picture, {"type": "text", "text": DESCRIBE}]}]

    return SimpleNamespace(args=("words", messages, options, number, "icons", "test"))


def request_with(part: dict[str, Any], question: str = WATCH) -> Any:
    content = [part, {"type": "text", "text": question}]
    options = {"max_new_tokens": 32, "temperature": 0}
    return SimpleNamespace(
        args=("words", lambda _: [{"role": "user", "content": content}], options, 0, "icons", "test")
    )


def test_videos_are_watched(tmp_path: Path) -> None:
    """From files and as arrays; of long ones, as many frames as fit, over all of it."""
    model = model_without_runner(batch_size=2)
    moves = sample_clip("single_motion", np.random.default_rng(3), "train", 3)
    film, words = render_clip(moves), clip_caption(moves, "single_motion")
    Clip(film, 8).save(tmp_path / "film.webp")
    Clip(film.repeat(4, 0), 32).save(tmp_path / "many.mp4")
    sources = [str(tmp_path / "film.webp"), film, str(tmp_path / "many.mp4")]
    requests = [request_with({"type": "video", "url": each}) for each in sources]
    assert model.generate_until(requests) == [words] * 3
    part = model._part({"type": "video", "url": str(tmp_path / "many.mp4")})
    assert len(part["video"]) == 16 and part["video"].frames_per_second == pytest.approx(32 / 3, rel=0.05)
    few = model_without_runner(max_frames=4)._part({"type": "video", "url": str(tmp_path / "film.webp")})["video"]
    assert len(few) == 4 and few.frames_per_second is None


@pytest.mark.parametrize("batch", [1, "3"])
def test_requests_are_answered_in_order_each_with_its_options(batch: Any) -> None:
    model = model_without_runner(batch_size=batch)
    options: list[dict[str, Any]] = [
        {"max_new_tokens": 32, "do_sample": False, "temperature": 0.7, "num_beams": 1, "top_p": None},
        {"max_new_tokens": 32, "do_sample": False, "temperature": 0.7, "num_beams": 1, "top_p": None},
        {"max_new_tokens": 1},
        {"max_new_tokens": 32, "until": [" blue", "\n\n"]},
    ]
    requests = [request_of(number, each) for number, each in enumerate(options)]
    said = model.generate_until(requests)
    assert said[:2] == ["a photo of a blue cat", "a photo of a blue car"]
    assert said[2] != "a photo of a blue dog"
    assert "a photo of a blue dog".startswith(said[2])
    assert said[3] == "a photo of a"
    assert [each[2] for each in model.cache_hook.said] == said


def test_what_it_cannot_do_is_said() -> None:
    model = model_without_runner()
    for ask in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="choose tasks whose output_type is generate_until"):
            ask([])
    for part, reason in (
        ({"type": "audio", "url": "a.wav"}, "emu3 reads pictures and videos, and this task has audio"),
        ({"type": "video", "url": {"path": "a.mp4", "video_start": 2}}, "this task names parts of them"),
        ({"type": "video", "url": "a.mp4", "end_time": 2.0}, "this task names parts of them"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            model.generate_until([request_with(part)])
    with pytest.raises(ValueError, match="there is no file 'a"):
        model.generate_until([request_with({"type": "video", "url": "a.mp4"})])
    with pytest.raises(ValueError, match="unknown option 'length_penalty'"):
        model.generate_until([request_of(0, {"length_penalty": 2})])
    with pytest.raises(ValueError, match="batch_size must be a whole number, got 'auto'; give one, as 16"):
        LmmsModel(batch_size="auto")
    with pytest.raises(ValueError, match="unknown option 'trust_remote_code'"):
        LmmsModel(trust_remote_code=True)


def test_lmms_eval_is_optional() -> None:
    assert (Model is object) == (find_spec("lmms_eval") is None)
    code = "import sys, emu3.cli, emu3.pipeline, emu3.evaluation.samples; sys.exit('lmms_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
