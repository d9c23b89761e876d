"""The language model's training."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from emu3.configuration import Emu3TextConfig, Emu3VQVAEConfig
from emu3.icons.scenes import Scene, SceneObject
from emu3.modeling.text import Emu3ForCausalLM
from emu3.modeling.vision import Emu3VQVAE
from emu3.tokenization import train_tokenizer, vocabulary_map
from emu3.training import language
from emu3.training.codes import SceneSource
from emu3.training.language import LanguageRecipe, Use, causal_attention, rate_factor, split_source, weighted_loss
from emu3.training.sequences import SequenceBuilder
from emu3.vocabulary import Vocabulary

VISION = {
    "codebook_size": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "hidden_size": 32,
}
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
    recipe = LanguageRecipe(model={}, vision="", steps=100, warmup=10, decay_share=0.2)
    expected = {0: 0.1, 4: 0.5, 9: 1.0, 50: 1.0, 80: 1.0, 90: 0.5, 95: 0.25, 99: 0.05}
    assert {step: rate_factor(recipe, step) for step in expected} == pytest.approx(expected)


def test_causal_attention_is_that_of_sdpa():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mixed, _ = causal_attention(torch.nn.Module(), query, key, value, None, scaling=0.3)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(mixed, expected.transpose(1, 2))


def test_weighted_loss_is_the_weighted_mean_of_the_models_own():
    torch.manual_seed(0)
    model = Emu3ForCausalLM(Emu3TextConfig(**MODEL, vocab_size=30, pad_token_id=0, initializer_range=0.3)).eval()
    ids = torch.randint(1, 30, (2, 6))
    weights = torch.tensor([[0.0, 0.0, 2.0, 1.0, 1.0, 0.0], [0.0, 0.5, 0.5, 0.0, 0.0, 0.0]])
    loss, losses, targets = weighted_loss(model, model.model.run_layers, ids, weights)
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
    muon, adam = language.optimizers_for(model, LanguageRecipe(model={}, vision=""))
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


def test_batches_draw_from_the_sources_of_their_step():
    tokenizer = train_tokenizer(["a photo of a red car"], 260, 16)
    builder = SequenceBuilder(tokenizer, Vocabulary.from_map(vocabulary_map(tokenizer)))
    stock = [
        (SceneSource(seed=0, count=5), np.zeros((5, 12, 12), np.int16), Use(share=1.0, steps=(0, 3))),
        (
            SceneSource(seed=1, count=5, height=32, width=32),
            np.zeros((5, 8, 8), np.int16),
            Use(share=1.0, steps=(2, 5)),
        ),
    ]
    recipe = LanguageRecipe(model={}, vision="", batch_size=1, draw_share=1.0)
    eols = []
    for seed in range(20):
        run = [language.batch(replace(recipe, seed=seed), stock, builder, step) for step in range(5)]
        eols.append([int((ids == builder.vocabulary.eol).sum()) for _, ids, _ in run])
    assert {tuple(lines[:2]) for lines in eols} == {(12, 12)}
    assert {lines[2] for lines in eols} == {12, 8}
    assert {tuple(lines[3:]) for lines in eols} == {(8, 8)}


def test_shares_of_captions():
    scene = Scene((SceneObject("chair", "blue", 0, 0), SceneObject("apple", "orange", 32, 0)), "white")
    use, rng = Use(share=1.0, full_captions=0.5, colored_captions=0.3), np.random.default_rng(0)
    words = Counter(use.words(scene, "two_object", rng) for _ in range(500))
    assert words.keys() == {
        "a photo of a blue chair left of an orange apple",
        "a photo of a blue chair and an orange apple",
        "a photo of a chair and an apple",
    }
    assert [count / 500 for _, count in words.most_common()] == pytest.approx([0.5, 0.3, 0.2], abs=0.06)


def test_a_source_and_its_use():
    entry = {"share": 0.5, "steps": [0, 3], "seed": 1, "count": 9, "width": 64, "tasks": ["colors"]}
    assert split_source(entry) == (SceneSource(seed=1, count=9, width=64, tasks=("colors",)), Use(0.5, [0, 3]))


@pytest.mark.parametrize(("entry", "said"), [({"seed": 0, "count": 1}, "share"), ({"share": 1, "seeds": 0}, "seeds")])
def test_a_wrong_source_is_named(entry, said):
    with pytest.raises(ValueError, match=rf"\[\[sources\]\].*{said}"):
        split_source(entry)


def test_a_step_without_a_source_is_refused(tmp_path):
    Emu3VQVAE(Emu3VQVAEConfig(**VISION)).save_pretrained(tmp_path / "vision")
    sources = [{"share": 1.0, "seed": 0, "count": 1, "steps": steps} for steps in ([0, 4], [5, 9])]
    with pytest.raises(ValueError, match="no source of scenes for step 4"):
        language.train(LanguageRecipe(model=MODEL, vision="../vision", sources=sources, steps=9), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="drawing and reading"),
        pytest.param({"draw_share": 0.0, "turns": 2, "weights": {"read_visual": 0.0}}, id="answers only"),
        pytest.param({"code_factors": [4, 4]}, id="factors"),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, changes):
    torch.manual_seed(0)
    Emu3VQVAE(Emu3VQVAEConfig(**VISION)).save_pretrained(tmp_path / "vision")
    # The recipe's own tokenizer reads thousands of captions.
    tokenizer = train_tokenizer(["a photo of a red car"], 260, 16)
    monkeypatch.setattr(language, "text_tokenizer", lambda *arguments: tokenizer)
    recipe = LanguageRecipe(
        model=MODEL,
        vision="../vision",
        sources=[
            {"share": 0.5, "seed": 0, "count": 30},
            {"share": 0.5, "seed": 1, "count": 20, "height": 32, "width": 40, "tasks": ["colors"]},
        ],
        steps=6,
        batch_size=2,
        warmup=2,
        save_every=3,
        report_every=1,
        **changes,
    )
    language.train(recipe, tmp_path / "whole")
    save = language.save_state

    def save_and_stop(folder, step, *arguments):
        save(folder, step, *arguments)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(language, "save_state", save_and_stop)
        with pytest.raises(Killed):
            language.train(recipe, tmp_path / "resumed")
    language.train(recipe, tmp_path / "resumed")
    files = [f"state/{name}.safetensors" for name in ("model", "optimizer-0", "optimizer-1")]
    for name in [*files, "language/model.safetensors"]:
        whole, resumed = (load_file(tmp_path / run / name) for run in ("whole", "resumed"))
        assert whole.keys() == resumed.keys()
        assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == [], name
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("whole", "resumed")]
    whole, resumed = ([{**json.loads(line), "tokens_per_second": 0} for line in log] for log in logs)
    assert whole == resumed
    assert all(np.isfinite([*line.values()]).all() for line in whole)
    assert [line["step"] for line in whole] == [1, 2, 3, 4, 5, 6]
    loaded = Emu3ForCausalLM.from_pretrained(tmp_path / "resumed" / "language")
    assert loaded.config._attn_implementation == "sdpa"
