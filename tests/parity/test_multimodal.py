"""Prompts with pictures: logits within 1e-5, ids identical."""

import random

import pytest
import torch

from emu3.modeling.pretrained import CACHE

TOLERANCE = {"atol": 1e-5, "rtol": 0}


def assert_close(ours, theirs):
    assert theirs.std() > 0.1, "logits too small for their difference to mean something"
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.fixture
def one(pair):
    """A prompt with one picture."""
    return pair.prompts([2, *pair.shown(4, 3), 5, 6]) | pair.pixels((4, 3))


@pytest.fixture
def several(pair):
    """Three prompts of different lengths with one, two and no pictures, left-padded, as the processor makes them."""
    inputs = pair.prompts([2, *pair.shown(4, 3), 5, 6], [3, *pair.shown(2, 5), 7, *pair.shown(3, 3), 8], [9, 10, 11])
    return inputs | pair.pixels((4, 3), (2, 5), (3, 3))


@torch.no_grad()
def test_one_picture(pair, one):
    ours, theirs = (model(**one).logits for model in pair.both)
    assert_close(ours, theirs)


@torch.no_grad()
def test_several_pictures_in_a_padded_batch(pair, several):
    several["position_ids"] = (several["attention_mask"].cumsum(1) - 1).clamp_min(0)
    real = several["attention_mask"].bool()
    ours, theirs = (model(**several).logits[real] for model in pair.both)
    assert_close(ours, theirs)


@torch.no_grad()
def test_another_picture_gives_other_logits(pair, one):
    other = one | pair.pixels((4, 3), seed=1)
    before, after = (pair.ours(**inputs).logits for inputs in (one, other))
    assert (before - after)[:, -1].abs().max() > 0.01
    assert_close(after, pair.theirs(**other).logits)


@torch.no_grad()
def test_cache_behind_a_picture(pair, one):
    caches = [None, None]
    ids = one["input_ids"]
    steps = [(one | {"input_ids": ids[:, :-2], "attention_mask": None})]
    steps += [{"input_ids": ids[:, position : position + 1]} for position in (-2, -1 + ids.shape[1])]
    for step in steps:
        outputs = [
            model(**step, **{CACHE: cache}, use_cache=True) for model, cache in zip(pair.both, caches, strict=True)
        ]
        caches = [output[CACHE] for output in outputs]
        assert_close(outputs[0].logits, outputs[1].logits)
    torch.testing.assert_close(outputs[0].logits[:, -1], pair.ours(**one).logits[:, -1], **TOLERANCE)


@torch.no_grad()
def test_inputs_embeds_with_a_picture(pair, one):
    ids = one.pop("input_ids")
    logits = [model(inputs_embeds=model.get_input_embeddings()(ids), **one).logits for model in pair.both]
    assert_close(*logits)
    torch.testing.assert_close(logits[0], pair.ours(input_ids=ids, **one).logits, **TOLERANCE)


def test_loss_behind_pictures(pair, several):
    labels = several["input_ids"].masked_fill(several["attention_mask"] == 0, -100)
    ours, theirs = (model(**several, labels=labels).loss for model in pair.both)
    assert theirs > 1
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@torch.no_grad()
def test_tokens_and_features_of_pictures(pair):
    pictures = pair.pixels((4, 3), (2, 5))
    ours, theirs = (model.model.get_image_tokens(**pictures) for model in pair.both)
    assert ours.tolist() == theirs.tolist()
    assert (ours == pair.vocabulary.eol).sum() == 4 + 2
    a, b = (model.model.get_image_features(**pictures) for model in pair.both)
    assert [len(features) for features in a.pooler_output] == [4 * 4, 2 * 6]
    for ours, theirs in zip(a.pooler_output, b.pooler_output, strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_placeholder_mask(pair, one):
    features = torch.zeros(16, 32)
    masks = []
    for model in pair.both:
        embeddings = model.get_input_embeddings()(one["input_ids"])
        masks += [model.model.get_placeholder_mask(ids, embeddings, features) for ids in (one["input_ids"], None)]
    assert masks[0].sum() == 16
    assert all(torch.equal(mask, masks[0]) for mask in masks)


@torch.no_grad()
def test_decoded_image_tokens(pair):
    v = pair.vocabulary
    rows = torch.cat((v.ids_of(torch.randint(0, 64, (2, 4, 3))), torch.full((2, 4, 1), v.eol)), dim=-1)
    ids = torch.cat((rows.flatten(1), torch.tensor([[v.eof, v.eoi, v.eos]] * 2)), dim=-1)
    ours, theirs = (model.decode_image_tokens(image_tokens=ids, height=4, width=3) for model in pair.both)
    assert ours.shape == (2, 3, 16, 12)
    scale = theirs.std()
    torch.testing.assert_close(ours / scale, theirs / scale, **TOLERANCE)


def test_vocabulary_mapping(pair):
    ours, theirs = (model.vocabulary_mapping for model in pair.both)
    for name in ("image_tokens", "img2bpe", "bpe2img", "eol_token_id", "image_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_greedy_text_from_pictures(pair, one, several):
    texts = []
    for inputs in (one, one | pair.pixels((4, 3), seed=1), several):
        ours, theirs = (model.generate(**inputs, do_sample=False, max_new_tokens=24).tolist() for model in pair.both)
        assert ours == theirs
        texts.append(ours[0])
    assert texts[0] != texts[1], "the picture says nothing"


@torch.no_grad()
def test_visual_tokens_in_any_order(build, config_of):
    """A vocabulary whose visual tokens do not ascend with their codes."""
    vocabulary_map = dict(config_of({}, {}).vocabulary_map)
    visual = [surface for surface in vocabulary_map if "visual" in surface]
    ids = [vocabulary_map[surface] for surface in visual]
    random.Random(0).shuffle(ids)
    pair = build(vocabulary_map=vocabulary_map | dict(zip(visual, ids, strict=True)))
    pictures = pair.pixels((4, 3), (2, 5))
    ours, theirs = (model.model.get_image_tokens(**pictures).tolist() for model in pair.both)
    assert ours == theirs
    inputs = pair.prompts([2, *pair.shown(4, 3), 5]) | pair.pixels((4, 3))
    ours, theirs = (model(**inputs).logits for model in pair.both)
    assert_close(ours, theirs)
