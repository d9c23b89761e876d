"""Samples of nano for each suite, found and opened in the way in which the suite's own scripts do it.

The functions `found_by_...` are written from those scripts as they were published, not from `emu3.evaluation`.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emu3.clips import read_clip
from emu3.evaluation.samples import Written, write_samples
from emu3.icons.judge import read_picture
from emu3.icons.scenes import Scene, SceneObject, render
from emu3.pipeline import Emu3Pipeline

PROMPT = "a photo of a red car and a blue cat"
DOG = "a photo of a dog"
CLIP = "a clip of a red dog moving left"


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    load = cache(Emu3Pipeline.from_pretrained)
    monkeypatch.setattr(Emu3Pipeline, "from_pretrained", lambda name, **options: load(name, **options))


def seen(picture: Image.Image) -> set[tuple[str, str]]:
    """Nouns and colours of what a picture shows."""
    return {(thing.noun, thing.color) for thing in read_picture(np.asarray(picture.convert("RGB")))}


def opened(path: str) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        return picture


def found_by_geneval(folder: str) -> dict[str, list[Image.Image]]:
    """As `evaluation/evaluate_images.py`: folders of digits, one JSON text each, and samples with numbers for names."""
    found: dict[str, list[Image.Image]] = {}
    for name in os.listdir(folder):
        inside = os.path.join(folder, name)
        if not os.path.isdir(inside) or not name.isdigit():
            continue
        with open(os.path.join(inside, "metadata.jsonl")) as file:
            metadata = json.load(file)
        assert {"tag", "prompt", "include"} <= set(metadata)
        for sample in sorted(os.listdir(os.path.join(inside, "samples"))):
            path = os.path.join(inside, "samples", sample)
            assert os.path.isfile(path)
            assert re.match(r"\d+\.png", sample)
            found.setdefault(metadata["prompt"], []).append(opened(path))
    return found


def test_geneval(tmp_path: Path) -> None:
    lines = [
        {"tag": "color_attr", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": PROMPT},
        {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": DOG},
    ]
    prompts = tmp_path / "evaluation_metadata.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = write_samples("geneval", prompts, tmp_path / "out")
    found = found_by_geneval(str(tmp_path / "out"))
    assert {prompt: len(pictures) for prompt, pictures in found.items()} == {PROMPT: 4, DOG: 4}
    assert all(picture.size == (48, 48) for pictures in found.values() for picture in pictures)
    assert sum(seen(picture) == {("car", "red"), ("cat", "blue")} for picture in found[PROMPT]) >= 3
    assert sum({noun for noun, _ in seen(picture)} == {"dog"} for picture in found[DOG]) >= 3
    assert len({picture.tobytes() for picture in found[DOG]}) == 4
    check_manifest(written, "geneval", 8)
    assert written.manifest["settings"]["guidance_scale"] == 2.5  # nano's own


def found_by_dpg_bench(folder: str, resolution: int, count: int) -> dict[str, list[Image.Image]]:
    """As `dpg_bench/compute_dpg_bench.py`: every file of the folder, named as its prompt, cut into squares."""
    found = {}
    for name in os.listdir(folder):
        grid = opened(os.path.join(folder, name))
        corners = [(0, 0), (resolution, 0), (0, resolution), (resolution, resolution)][:count]
        assert grid.size == (2 * resolution, 2 * resolution)
        found[name.split(".")[0]] = [grid.crop((x, y, x + resolution, y + resolution)) for x, y in corners]
    return found


def test_dpg_bench(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    for name, words in (("12", PROMPT), ("partiprompts7", DOG)):
        (tmp_path / "prompts" / f"{name}.txt").write_text(words)
    written = write_samples("dpg-bench", tmp_path / "prompts", tmp_path / "out")
    found = found_by_dpg_bench(str(tmp_path / "out"), 48, 4)
    assert set(found) == {"12", "partiprompts7"}
    assert sum(seen(picture) == {("car", "red"), ("cat", "blue")} for picture in found["12"]) >= 3
    assert len({picture.tobytes() for picture in found["partiprompts7"]}) == 4
    check_manifest(written, "dpg-bench", 8)
    assert written.file == tmp_path / "out.manifest.json"  # the script takes every file of the folder for a grid
    with pytest.raises(ValueError, match="cuts its grids into squares, and pictures of 56x40 pixels are asked for"):
        write_samples("dpg-bench", tmp_path / "prompts", tmp_path / "wide", ratio="4:3")
    assert not (tmp_path / "wide").exists()


def found_by_t2i_compbench(folder: str) -> list[tuple[str, int, Image.Image]]:
    """As `BLIPvqa_eval/BLIP_vqa.py` and the other scripts: sorted by number, with the prompt in the name."""
    samples = os.path.join(folder, "samples")
    names = os.listdir(samples)
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    return [
        (name.split("_")[0], int(name.split(".png")[0].split("_")[1]), opened(os.path.join(samples, name)))
        for name in names
    ]


def test_t2i_compbench(tmp_path: Path) -> None:
    prompts = tmp_path / "color_val.txt"
    prompts.write_text(f"{PROMPT}\n{DOG}")
    written = write_samples("t2i-compbench", prompts, tmp_path / "out", per_prompt=3)
    found = found_by_t2i_compbench(str(tmp_path / "out"))
    assert [(prompt, number) for prompt, number, _ in found] == [
        (words, number) for number, words in enumerate([PROMPT] * 3 + [DOG] * 3)
    ]
    assert sum(seen(picture) == {("car", "red"), ("cat", "blue")} for _, _, picture in found[:3]) >= 2
    check_manifest(written, "t2i-compbench", 6)


def found_by_vbench(folder: str, full_info: str, dimensions: set[str]) -> dict[str, list[str]]:
    """As `vbench/__init__.py` in its standard mode: any file's suffix, and five names for each prompt."""
    names = os.listdir(folder)
    suffix = Path(names[0]).suffix
    found = {}
    with open(full_info) as file:
        for entry in json.load(file):
            if dimensions & set(entry["dimension"]):
                intended = [f"{entry['prompt_en']}-{number}{suffix}" for number in range(5)]
                found[entry["prompt_en"]] = [os.path.join(folder, name) for name in intended if name in names]
    return found


def test_vbench(tmp_path: Path) -> None:
    pytest.importorskip("av")
    prompts = tmp_path / "VBench_full_info.json"
    prompts.write_text(json.dumps([{"prompt_en": CLIP, "dimension": ["color"]}]))
    written = write_samples("vbench", prompts, tmp_path / "out")
    found = found_by_vbench(str(tmp_path / "out"), str(prompts), {"color"})
    assert len(found[CLIP]) == 5
    clips = [read_clip(path) for path in found[CLIP]]
    assert {(clip.frames_THWC.shape, clip.frames_per_second) for clip in clips} == {((12, 48, 48, 3), 8.0)}
    assert sum(seen(clip.pictures[0]) == {("dog", "red")} for clip in clips) >= 4
    assert len({clip.frames_THWC.tobytes() for clip in clips}) >= 3  # dogs of few places and backgrounds
    check_manifest(written, "vbench", 5)
    assert written.file == tmp_path / "out.manifest.json"  # the suffix of one file is that of all
    assert (written.manifest["settings"]["frames"], written.manifest["settings"]["fps"]) == (12, 8.0)


def found_by_imgedit(folder: str, edit_json: str, origin: str) -> dict[str, tuple[Image.Image, Image.Image]]:
    """As `Benchmark/Basic/basic_bench.py`: KEY.png beside the picture that "id" names under its root."""
    found = {}
    with open(edit_json) as file:
        for key, item in json.load(file).items():
            assert {"prompt", "edit_type"} <= set(item)
            before, after = os.path.join(origin, item["id"]), os.path.join(folder, f"{key}.png")
            found[key] = (opened(before), opened(after))
    return found


def test_imgedit(tmp_path: Path) -> None:
    folder = tmp_path / "original" / "animal"
    folder.mkdir(parents=True)
    cat, car = SceneObject("cat", "red", 0, 0), SceneObject("car", "green", 28, 28)
    Image.fromarray(render(Scene((cat, car), "white"))).save(folder / "both.png")
    Image.fromarray(render(Scene((cat,), "white"))).save(folder / "cat.png")
    edits = {
        "1082": {"id": "animal/both.png", "prompt": "make the cat blue", "edit_type": "adjust"},
        "7": {"id": "animal/both.png", "prompt": "remove the car", "edit_type": "remove"},
        "673": {"id": "animal/cat.png", "prompt": "add a green tree", "edit_type": "add"},
    }
    prompts = tmp_path / "basic_edit.json"
    prompts.write_text(json.dumps(edits))
    written = write_samples("imgedit", prompts, tmp_path / "out", pictures=tmp_path / "original")
    found = found_by_imgedit(str(tmp_path / "out"), str(prompts), str(tmp_path / "original"))
    assert {key: after.size for key, (_, after) in found.items()} == dict.fromkeys(edits, (48, 48))
    shown = {key: seen(after) for key, (_, after) in found.items()}
    right = {
        "1082": {("cat", "blue"), ("car", "green")},
        "7": {("cat", "red")},
        "673": {("cat", "red"), ("tree", "green")},
    }
    assert sum(shown[key] == right[key] for key in right) >= 2
    check_manifest(written, "imgedit", 3)


def check_manifest(written: Written, suite: str, count: int) -> None:
    """The manifest tells what is there and how it was drawn."""
    there: dict[str, Any] = json.loads(written.file.read_text())
    assert there == written.manifest
    assert (there["suite"], there["model"], there["count"], there["finished"]) == (suite, "nano", count, True)
    assert set(there["versions"]) == {"emu3", "torch", "transformers"}
    assert len(there["weights"]) == len(there["prompts"]) == 64
    seeds = [seed for sample in there["samples"] for seed in sample["seeds"]]
    assert len(set(seeds)) == len(seeds) == written.drawn == count
    inside = written.file.parent if written.file.name == "manifest.json" else written.file.parent / "out"
    assert all((inside / sample["file"]).is_file() for sample in there["samples"])
