"""The language model's training."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from emu3.configuration import Emu3TextConfig
from emu3.modeling.text import Emu3ForCausalLM
from emu3.tokenization import train_tokenizer, vocabulary_map
from emu3.training import language
from emu3.training.language import LanguageRecipe, SequenceBatch, attend_causally, learning_rates, next_token_loss
from emu3.training.sequences import SequenceBuilder, collate
from emu3.vocabulary import Vocabulary

pytestmark = pytest.mark.usefixtures("float32")

MODEL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_dropout": 0.0,
}


def test_rate():
    """Up over the warm-up, flat, down over the last part."""
    recipe = LanguageRecipe(
        model={}, steps=100, warmup=10, decay_share=0.2, learning_rate=1.0, embedding_learning_rate=2.0
    )
    expected = {0: 0.1, 4: 0.5, 9: 1.0, 50: 1.0, 80: 1.0, 90: 0.5, 95: 0.25, 99: 0.05}
    for step, rate in expected.items():
        assert learning_rates(recipe, step) == pytest.approx([rate, 2 * rate])


def test_attending_causally_is_that_of_sdpa():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mixed, _ = attend_causally(torch.nn.Module(), query, key, value, None, scaling=0.3)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(mixed, expected.transpose(1, 2))


def test_next_token_loss_is_the_weighted_mean_of_the_models_own():
    torch.manual_seed(0)
    model = Emu3ForCausalLM(Emu3TextConfig(**MODEL, vocab_size=30, pad_token_id=0, initializer_range=0.3)).eval()
    ids = torch.randint(1, 30, (2, 6))
    weights = torch.tensor([[0.0, 0.0, 2.0, 1.0, 1.0, 0.0], [0.0, 0.5, 0.5, 0.0, 0.0, 0.0]])
    loss, losses, targets = next_token_loss(model, model.model.run_layers, ids, weights)
    each = F.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(loss, (each * weights[:, 1:]).sum() / weights.sum())
    counts = weights[:, 1:] > 0
    torch.testing.assert_close(losses, each[counts])
    assert targets.tolist() == ids[:, 1:][counts].tolist()


def test_visual_ids_start_as_sums_of_their_factors():
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a photo of a red car"], 260, 24)
    vocabulary = Vocabulary.from_map(vocabulary_map(tokenizer))
    model = Emu3ForCausalLM(Emu3TextConfig(**MODEL, vocab_size=len(tokenizer), pad_token_id=vocabulary.pad))
    tables = (model.model.embed_tokens.weight.data, model.lm_head.weight.data)
    before = [table.clone() for table in tables]
    language.share_factors(model, vocabulary, [4, 3, 2])
    lo, hi = vocabulary.visual_span
    for table, old in zip(tables, before, strict=True):
        assert torch.equal(table[:lo], old[:lo])
        assert torch.equal(table[hi:], old[hi:])
        grid = table[lo:hi].unflatten(0, (4, 3, 2))
        for axis in range(3):  # a step along one factor is the same whatever the others are
            steps = grid.diff(dim=axis).movedim(axis, 0).flatten(1, 2)
            torch.testing.assert_close(steps, steps[:, :1].expand_as(steps), atol=1e-6, rtol=0)
        assert len(table[lo:hi].unique(dim=0)) == 24
        assert float(table[lo:hi].std() / old[lo:hi].std()) == pytest.approx(1.0, abs=0.25)
    with pytest.raises(ValueError, match=r"\[5, 5\] do not multiply to the 24 codes"):
        language.share_factors(model, vocabulary, [5, 5])


def test_optimizers_share_the_parameters_out():
    model = Emu3ForCausalLM(Emu3TextConfig(**MODEL, vocab_size=30, pad_token_id=0))
    muon, adam = language.make_optimizers(model, LanguageRecipe(model={}))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_muon, in_adam = ({names[id(p)] for p in o.param_groups[0]["params"]} for o in (muon, adam))
    assert in_muon | in_adam == set(names.values())
    assert not in_muon & in_adam
    assert in_adam == {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    }


def make_batch(builder, step):
    """One picture, always the same."""
    codes = np.arange(16).reshape(4, 4)
    return SequenceBatch(
        "draw", *collate([builder.drawing("a car", codes, 1.0, np.ones((4, 4)))], builder.vocabulary.pad)
    )


def test_any_source_of_sequences_is_learned(tmp_path):
    tokenizer = train_tokenizer(["a photo of a red car"], 260, 16)
    builder = SequenceBuilder(tokenizer, Vocabulary.from_map(vocabulary_map(tokenizer)))
    recipe = LanguageRecipe(
        model=MODEL, steps=40, warmup=2, learning_rate=0.02, embedding_learning_rate=0.05, report_every=10
    )
    registered = dict(ALL_ATTENTION_FUNCTIONS)
    language.train(recipe, tmp_path, tokenizer, partial(make_batch, builder))
    assert dict(ALL_ATTENTION_FUNCTIONS) == registered
    losses = [json.loads(line)["draw"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert losses[-1] < 0.5 * losses[0]
    loaded = Emu3ForCausalLM.from_pretrained(tmp_path / "language")
    assert loaded.config._attn_implementation == "sdpa"
