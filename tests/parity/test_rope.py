"""Rotary positions: all six documented types, each key of `rope_scaling`, against transformers."""

import pytest
import torch

from emu3.modeling.pretrained import CACHE

HALF_HEAD = 4
BASE = {"rope_theta": 100.0, "max_position_embeddings": 16}
TYPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
# Another value of each key, and whether it changes the angles: the dynamic type scales by max_position_embeddings.
CHANGES = [
    ("linear", "factor", 2.0, True),
    ("dynamic", "factor", 2.0, True),
    ("dynamic", "original_max_position_embeddings", 8, False),
    ("yarn", "factor", 2.0, True),
    ("yarn", "original_max_position_embeddings", 32, True),
    ("yarn", "attention_factor", 1.5, True),
    ("yarn", "beta_fast", 2.0, True),
    ("yarn", "beta_slow", 0.2, True),
    ("longrope", "factor", 2.0, True),
    ("longrope", "original_max_position_embeddings", 32, True),
    ("longrope", "attention_factor", 1.5, True),
    ("longrope", "short_factor", [2.0] * HALF_HEAD, True),
    ("longrope", "long_factor", [2.0] * HALF_HEAD, True),
    ("llama3", "factor", 2.0, True),
    ("llama3", "low_freq_factor", 0.5, True),
    ("llama3", "high_freq_factor", 8.0, True),
    ("llama3", "original_max_position_embeddings", 32, True),
]
WITHIN, BEYOND = 12, 24  # of the 16 positions of pretraining


def angles(model, length):
    """Cosines and sines of the first positions, (2, S, D)."""
    cosines, sines = model.model.text_model.rotary_emb(torch.zeros(1), torch.arange(length)[None])
    return torch.cat((cosines, sines))


def assert_same_angles(pair):
    """Short, long and short again: some types compute their frequencies anew as the sequence grows and shrinks."""
    seen = []
    for length in (WITHIN, BEYOND, WITHIN):
        ours, theirs = (angles(model, length) for model in pair.both)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
        seen.append(ours)
    assert torch.equal(seen[0], seen[2])
    return torch.cat(seen, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_types(build, kind, name):
    pair = build(BASE | {name: TYPES[kind] | {"rope_theta": 100.0}})
    seen = assert_same_angles(pair)
    default = assert_same_angles(build(BASE))
    assert ((seen - default).abs().max() > 0.01) == (kind != "default")
    ids = torch.arange(BEYOND)[None]
    for length in (WITHIN, BEYOND):
        ours, theirs = (model(input_ids=ids[:, :length]).logits for model in pair.both)
        assert theirs.std() > 0.1
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "key", "value", "matters"), CHANGES, ids=str)
def test_keys(build, kind, key, value, matters):
    assert TYPES[kind].get(key) != value
    before = assert_same_angles(build(BASE | {"rope_scaling": TYPES[kind]}))
    after = assert_same_angles(build(BASE | {"rope_scaling": TYPES[kind] | {key: value}}))
    assert ((after - before).abs().max() > 1e-3) == matters


@torch.no_grad()
@pytest.mark.parametrize("rope_theta", [100.0, 1e6])
def test_rope_theta(build, rope_theta):
    """The sine at position 1 is that of the frequency itself."""
    pair = build({"rope_theta": rope_theta})
    expected = (rope_theta ** -(torch.arange(HALF_HEAD) / HALF_HEAD)).sin()
    for model in pair.both:
        torch.testing.assert_close(angles(model, 2)[1, 1, :HALF_HEAD], expected, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", TYPES)
def test_cached_decoding(build, kind):
    """Token by token across the border of pretraining."""
    pair = build(BASE | {"rope_scaling": TYPES[kind]})
    ids = torch.arange(20)[None]
    caches = [None, None]
    for position in range(20):
        outputs = [
            model(input_ids=ids[:, position : position + 1], **{CACHE: cache}, use_cache=True)
            for model, cache in zip(pair.both, caches, strict=True)
        ]
        caches = [output[CACHE] for output in outputs]
        torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-5, rtol=0)
