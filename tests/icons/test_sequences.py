"""Sequences of scenes: the prompts are those of the processor, and the weights lie on the right tokens."""

import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from emu3.icons.captions import caption, full_caption, questions
from emu3.icons.scenes import TASKS, Scene, SceneObject, render, sample_scene
from emu3.icons.sequences import IconLanguageRecipe, SceneSequences, SceneSource, Weights
from emu3.processing import Emu3Processor
from emu3.tokenization import vocabulary_map
from emu3.training.sequences import SequenceBuilder
from emu3.vocabulary import Vocabulary

WEIGHTS = Weights(visual=1.0, answer=3.0, read_visual=0.5)
CODES = np.random.default_rng(0).integers(0, 16, (12, 12)).astype(np.int16)


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return Emu3Processor.from_pretrained(tiny_checkpoint)


RECIPE = IconLanguageRecipe(model={}, vision="", weights=WEIGHTS, batch_size=1, draw_share=1.0, null_prompt=0.0)


@pytest.fixture
def builder(processor):
    return SequenceBuilder(processor.tokenizer, Vocabulary.from_map(vocabulary_map(processor.tokenizer)))


@pytest.fixture
def sequences(builder):
    """Never drops a caption."""
    return SceneSequences(RECIPE, builder, codes=[])


@pytest.fixture(params=TASKS)
def drawn(request):
    return sample_scene(request.param, np.random.default_rng(3), "train"), request.param


@pytest.fixture
def scene():
    return sample_scene("position", np.random.default_rng(4), "train")


def grouped(ids, weights):
    """The sequence as runs of equal weight."""
    groups = []
    for identifier, weight in zip(ids, weights, strict=True):
        if not groups or groups[-1][0] != weight:
            groups.append((weight, []))
        groups[-1][1].append(identifier)
    return groups


def rows_of(vocabulary, codes):
    """Visual tokens and end-of-row tokens, written out one by one."""
    return [i for row in codes for i in [*(vocabulary.visual_base + int(code) for code in row), vocabulary.eol]]


def test_drawing_is_the_processors_prompt_and_the_picture(sequences, processor, drawn):
    scene, task = drawn
    ids, weights = sequences.draw(scene, caption(scene, task), CODES, np.random.default_rng(0))
    prompt = processor(text=caption(scene, task), return_for_image_generation=True, image_area=48 * 48)["input_ids"][0]
    v = sequences.builder.vocabulary
    assert ids == [*prompt, *rows_of(v, CODES), v.eof, v.eoi, v.eos]
    assert grouped(ids, weights) == [(0.0, list(prompt)), (1.0, ids[len(prompt) :])]


@pytest.mark.parametrize("ratio", ["1:2", "3:1"])
def test_drawing_of_another_shape(sequences, processor, scene, ratio):
    width, height = (4 * int(side) for side in ratio.split(":"))
    codes = np.zeros((height, width), np.int16)
    ids, weights = sequences.draw(scene, caption(scene, "position"), codes, np.random.default_rng(0))
    prompt = processor(
        text=caption(scene, "position"),
        return_for_image_generation=True,
        ratio=ratio,
        image_area=height * width * 16,
    )["input_ids"][0]
    assert ids[: len(prompt)] == list(prompt)
    assert weights.count(1.0) == height * (width + 1) + 3


def test_drawing_without_a_prompt(sequences, processor, scene):
    sequences = replace(sequences, recipe=replace(RECIPE, null_prompt=1.0))
    ids, weights = sequences.draw(scene, "words to drop", CODES, np.random.default_rng(0))
    prompt = processor(text="", return_for_image_generation=True, image_area=48 * 48)["input_ids"][0]
    assert ids[: len(prompt)] == list(prompt)
    assert weights.count(0.0) == len(prompt)


def test_share_of_dropped_captions(sequences, scene):
    sequences = replace(sequences, recipe=replace(RECIPE, null_prompt=0.3))
    rng = np.random.default_rng(0)
    lengths = [sequences.draw(scene, "a photo", CODES, rng)[1].count(0.0) for _ in range(400)]
    assert abs(lengths.count(min(lengths)) - 120) < 40


def conversation(turns, answered):
    """Messages: the picture and the first question, answers, further questions."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        content = [{"type": "text", "text": question}]
        if number == 0:
            content.insert(0, {"type": "image", "image": Image.new("RGB", (48, 48))})
        messages.append({"role": "user", "content": content})
        if number < answered:
            messages.append({"role": "assistant", "content": answer})
    return messages


@pytest.mark.parametrize("seed", range(6))
def test_reading_is_the_processors_conversation(sequences, processor, drawn, seed):
    """What the model answers after, turn by turn, is what the chat template makes of the same conversation."""
    scene, _ = drawn
    ids, weights = sequences.read(scene, CODES, np.random.default_rng(seed))
    v = sequences.builder.vocabulary
    groups = grouped(ids, weights)
    first, picture, *talk = groups
    assert first[0] == 0.0
    assert picture == (0.5, [*rows_of(v, CODES), v.eof, v.eoi])
    spoken = [(weight, processor.tokenizer.decode(part, skip_special_tokens=False)) for weight, part in talk]
    known = {question.text: question.answer for question in questions(scene)}
    known["Describe the picture."] = full_caption(scene)
    turns = []
    for (silent, asked), (loud, answer) in zip(spoken[::2], spoken[1::2], strict=True):
        assert (silent, loud) == (0.0, 3.0)
        question = asked.removeprefix(" USER: ").removesuffix(". ASSISTANT:")
        assert answer == f" {known.pop(question)}<|extra_204|>"
        turns.append((question, answer.removeprefix(" ").removesuffix("<|extra_204|>")))
    assert len(turns) == min(RECIPE.turns, len(questions(scene)) + 1)

    for answered in range(len(turns)):
        prompt = processor.apply_chat_template(
            conversation(turns[: answered + 1], answered), add_generation_prompt=True, tokenize=True
        )[0]
        rows = iter(rows_of(v, CODES))
        prompt = [next(rows) if i == v.image_placeholder else int(i) for i in prompt]
        assert next(rows, None) is None
        assert ids[: len(prompt)] == prompt
        assert weights[len(prompt)] == 3.0


def test_objects_weigh_more(sequences):
    sequences = replace(sequences, recipe=replace(RECIPE, weights=Weights(object=4.0)))
    scene = Scene((SceneObject("cat", "red", 8, 16),), "white")
    _, weights = sequences.draw(scene, "a cat", CODES, np.random.default_rng(0))
    rows = np.array(weights[-12 * 13 - 3 : -3]).reshape(12, 13)
    assert (rows[4:8, 2:6] == 4).all()
    assert (rows == 4).sum() == 16
    assert set(rows.flatten()) == {1.0, 4.0}


def test_a_source_is_numbered():
    source = SceneSource(share=1.0, seed=1, count=70, width=64, tasks=("colors",))
    assert source.pictures(64).shape == (6, 48, 64, 3)
    task, scene = source.scene(65)
    assert task == "colors"
    assert np.array_equal(source.pictures(64)[1], render(scene))
    assert source.name == "48x64-colors-70-1"


def test_shares_of_captions():
    scene = Scene((SceneObject("chair", "blue", 0, 0), SceneObject("apple", "orange", 32, 0)), "white")
    source = SceneSource(share=1.0, seed=0, count=1, full_captions=0.5, colored_captions=0.3)
    rng = np.random.default_rng(0)
    words = Counter(source.prompt(scene, "two_object", rng) for _ in range(500))
    assert words.keys() == {
        "a photo of a blue chair left of an orange apple",
        "a photo of a blue chair and an orange apple",
        "a photo of a chair and an apple",
    }
    assert [count / 500 for _, count in words.most_common()] == pytest.approx([0.5, 0.3, 0.2], abs=0.06)


def test_batches_are_of_the_sources_of_their_step(builder):
    sources = (
        SceneSource(share=1.0, seed=0, count=5, steps=(0, 3)),
        SceneSource(share=1.0, seed=1, count=5, height=32, width=32, steps=(2, 5)),
    )
    codes = [np.zeros((5, side, side), np.int16) for side in (12, 8)]
    rows = []
    for seed in range(20):
        sequences = SceneSequences(replace(RECIPE, sources=sources, seed=seed), builder, codes)
        run = [sequences.batch(step) for step in range(5)]
        assert {batch.task for batch in run} == {"draw"}
        rows.append([int((batch.ids_BS == builder.vocabulary.eol).sum()) for batch in run])
    assert {tuple(counts[:2]) for counts in rows} == {(12, 12)}
    assert {counts[2] for counts in rows} == {12, 8}
    assert {tuple(counts[3:]) for counts in rows} == {(8, 8)}


def test_batches_can_be_made_by_other_processes(builder):
    recipe = replace(RECIPE, sources=(SceneSource(share=1.0, seed=0, count=5),))
    sequences = SceneSequences(recipe, builder, [np.zeros((5, 12, 12), np.int16)])
    copy = pickle.loads(pickle.dumps(sequences.batch))
    assert torch.equal(copy(3).ids_BS, sequences.batch(3).ids_BS)
