"""Sources of scenes and the batches of a draft head."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from emu3.checkpoints.load import load_processor
from emu3.icons.scenes import Scene, SceneObject, render
from emu3.icons.sequences import IconDraftRecipe, SceneDrafts, SceneSource
from emu3.tokenization import vocabulary_map
from emu3.training.sequences import SequenceBuilder
from emu3.vocabulary import Vocabulary


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


def test_batches_of_a_draft_head(tiny_checkpoint, tmp_path):
    """Of the sources of their step; the second half is without words; other processes can make them."""
    processor = load_processor(tiny_checkpoint)
    builder = SequenceBuilder(processor, Vocabulary.from_map(vocabulary_map(processor.tokenizer)))
    sources = (
        SceneSource(seed=0, count=5, steps=(0, 3)),
        SceneSource(seed=1, count=5, height=32, width=32, steps=(3, 5)),
    )
    codes = [np.zeros((5, side, side), np.int16) for side in (12, 8)]
    drafts = SceneDrafts(IconDraftRecipe(checkpoint=tmp_path, sources=sources, batch_size=2), builder, codes)
    for step, side in ((0, 12), (1, 8)):  # each batch is for three steps
        batch = drafts.batch(step)
        assert (batch.height, batch.width, batch.number) == (side, side, step)
        assert ((batch.ids_BS == builder.vocabulary.eol).sum(1) == side).all()
        starts = (batch.ids_BS == builder.vocabulary.boi).int().argmax(1)
        assert (starts[:2] > 1).all() and (starts[2:] == 1).all()
    copy = pickle.loads(pickle.dumps(drafts.batch))
    assert torch.equal(copy(1).ids_BS, drafts.batch(1).ids_BS)
