"""The draft head's training."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from emu3.checkpoints.load import load_model, load_processor
from emu3.data.samples import Part, Sample
from emu3.generation.sampling import Guide
from emu3.modeling.draft import load_draft
from emu3.segments import Text, Visual
from emu3.training import draft
from emu3.training.draft import DraftBatch, DraftRecipe, Pairs, draft_loss, read
from emu3.training.sequences import SequenceBuilder

pytestmark = pytest.mark.usefixtures("float32")


def make_batch(builder, step):
    rng = np.random.default_rng(step)
    samples = [
        Sample(str(at), (Part("prompt", Text("a photo of a red car")), Part("draw", Visual(codes[None]))))
        for at, codes in enumerate(rng.integers(16, size=(4, 3, 5)))
    ]
    ids = [builder.build(sample, without_prompt=alone).ids for alone in (False, True) for sample in samples]
    rows = pad_sequence(list(map(torch.from_numpy, ids)), batch_first=True, padding_value=builder.vocabulary.pad)
    return DraftBatch(rows, 3, 5, step)


def test_pairs_are_of_codes_with_room_between():
    torch.manual_seed(0)
    batch = DraftBatch(torch.empty(4, 0), 3, 5, 0)
    newest, ahead = Pairs.sample(batch, 2, 4000, ahead=4)
    assert newest.shape == ahead.shape == (2, 4000)
    pairs = set(zip(newest.flatten().tolist(), ahead.flatten().tolist(), strict=True))
    codes = [k for k in range(17) if k % 6 < 5]
    assert pairs == {(d, k) for d in codes for k in codes if 1 <= k - d <= 4}


def test_a_head_learns_what_the_model_says(tiny_checkpoint, tmp_path):
    model = load_model(tiny_checkpoint)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    builder = SequenceBuilder(load_processor(tiny_checkpoint), model.model.vocabulary)
    (tmp_path / "checkpoint").mkdir()
    recipe = DraftRecipe(
        checkpoint=tmp_path / "checkpoint",
        width=16,
        reuse=3,
        guidance_floor=0.3,
        learning_rate=0.02,
        rows=60,
        steps=60,
        warmup=2,
        report_every=1,
    )
    draft.train(recipe, tmp_path / "run", model, partial(make_batch, builder))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 60
    before_it, after = np.mean(losses[:3]), np.mean(losses[-10:])
    assert after < 0.85 * before_it
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    head = load_draft(tmp_path / "checkpoint", model)
    torch.manual_seed(0)
    batch = make_batch(builder, 999)
    pairs = Pairs.sample(batch, 4, 60, recipe.ahead)
    loss, covered = draft_loss(
        model, head, read(model, batch), 5, pairs, Guide(recipe.guidance_scale, recipe.guidance_floor)
    )
    assert float(loss) < 1.2 * after
    assert 0 < float(covered) <= 1
