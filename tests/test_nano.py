"""The checkpoint that ships with the package."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emu3 import Emu3ForConditionalGeneration, Emu3Pipeline, Emu3Processor
from emu3.checkpoints import resolve
from emu3.icons.judge import read_picture, satisfies
from emu3.icons.prompts import evaluation_prompts
from emu3.icons.scenes import Scene, SceneObject, render

PROMPT = "a photo of a red car and a blue tree"


@pytest.fixture(scope="module")
def nano() -> Emu3Pipeline:
    return Emu3Pipeline.from_pretrained("nano")


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def test_same_seed_same_picture_alone_in_a_batch_and_in_another_process(nano: Emu3Pipeline, tmp_path: Path) -> None:
    alone = pixels(nano.image(PROMPT, seed=7)[0])
    batch = nano.image(["a photo of two cups", PROMPT, "a photo of a pink cat", PROMPT], seed=[1, 7, 2, 8])
    assert np.array_equal(pixels(batch[1]), alone)
    assert not np.array_equal(pixels(batch[3]), alone)
    path = tmp_path / "car.png"
    command = [sys.executable, "-m", "emu3", "image", PROMPT, "--seed", "7", "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True, env={"PYTHONPATH": "src"})
    assert np.array_equal(pixels(Image.open(path)), alone)


UNUSUAL = [".", "🐱🐶 ???", "<image> is a tag", "zzz qqq 12345", "\n\na", "Ünïcödé ﷽ 漢字", "dog " * 30, "photo a of"]


@pytest.mark.filterwarnings("ignore::emu3.learned.NotLearned")
@pytest.mark.parametrize("decoding", ["predictive", "zipar"])
def test_unusual_prompts_are_the_same_alone_and_in_a_batch(nano: Emu3Pipeline, decoding: str) -> None:
    """In float32, where rounding decides no token."""
    together = nano.image(UNUSUAL, seed=3, decoding=decoding)
    for number, (prompt, picture) in enumerate(zip(UNUSUAL, together, strict=True)):
        assert np.array_equal(pixels(picture), pixels(nano.image(prompt, seed=3 + number, decoding=decoding)[0])), (
            prompt
        )


def test_in_16_bits_the_same_call_gives_the_same_pictures() -> None:
    """Alone and in a batch they may differ there: products of other shapes round differently."""
    prompts = ["a photo of a cat", PROMPT, "two cups"]
    first, second = (
        Emu3Pipeline.from_pretrained("nano", dtype=torch.bfloat16).image(prompts, seed=3) for _ in range(2)
    )
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(first, second, strict=True))


def test_nano_draws_what_it_is_asked_for(nano: Emu3Pipeline) -> None:
    prompts = evaluation_prompts("single_object", 16, seed=11)
    pictures = nano.image([prompt.prompt for prompt in prompts], seed=0)
    right = [
        satisfies(read_picture(pixels(p)), prompt.requirement) for p, prompt in zip(pictures, prompts, strict=True)
    ]
    assert sum(right) >= 15


def test_nano_draws_the_same_in_every_exact_order(nano: Emu3Pipeline) -> None:
    assert np.array_equal(*(pixels(nano.image(PROMPT, seed=5, decoding=way)[0]) for way in ("raster", "predictive")))


def test_nano_draws_in_other_ratios(nano: Emu3Pipeline) -> None:
    wide, tall = (
        nano.image("a photo of a dog", ratio="4:3", seed=3),
        nano.image("a photo of a dog", ratio="3:4", seed=3),
    )
    assert wide[0].size == (56, 40)
    assert tall[0].size == (40, 56)


def test_nano_answers_about_a_picture(nano: Emu3Pipeline) -> None:
    scene = Scene((SceneObject("cat", "blue", 8, 16),), "white")
    picture = Image.fromarray(render(scene))
    assert nano.chat(("What color is the cat?", [picture])) == "blue"
    assert nano.chat(("Describe the picture.", [picture])) == "a photo of a blue cat"


@pytest.fixture(scope="module")
def documented() -> tuple[Emu3ForConditionalGeneration, Emu3Processor]:
    folder = resolve("nano")
    return Emu3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32), Emu3Processor.from_pretrained(
        folder
    )


@pytest.mark.parametrize("question", ["What is in the picture?", "What color is the {}?", "Describe the picture."])
@pytest.mark.parametrize(("noun", "color"), [("cat", "purple"), ("dog", "red"), ("car", "blue")])
def test_generate_answers_as_the_engine_does(
    nano: Emu3Pipeline,
    documented: tuple[Emu3ForConditionalGeneration, Emu3Processor],
    noun: str,
    color: str,
    question: str,
) -> None:
    """Under whichever transformers is installed; each token sees all before it, so that answers are right."""
    model, processor = documented
    picture = Image.fromarray(render(Scene((SceneObject(noun, color, 16, 16),), "white")))
    asked = question.format(noun)
    content = [{"type": "image"}, {"type": "text", "text": asked}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert answer == nano.chat((asked, [picture]), max_new_tokens=16)
    assert color in answer or noun in answer


def test_shipped_weights_are_small_safetensors_only() -> None:
    files = [file for file in resolve("nano").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files if file.suffix == ".safetensors") < 32e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja", ".txt"}
