"""The language model by itself; equality with transformers is in tests/parity."""

import pytest
import torch
from transformers import StaticCache

from emu3.modeling.text import RMSNorm


@pytest.fixture
def text_model(model):
    return model.model.text_model


@pytest.fixture
def embeddings():
    return torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_run_layers_without_a_mask_is_causal(model, text_model, embeddings, attention):
    model.set_attn_implementation(attention)
    hidden = text_model.run_layers(embeddings, None, torch.arange(9)[None])
    torch.testing.assert_close(hidden, text_model(inputs_embeds=embeddings).last_hidden_state)
    changed = embeddings.clone()
    changed[:, 5:] += 1
    after = text_model.run_layers(changed, None, torch.arange(9)[None])
    torch.testing.assert_close(after[:, :5], hidden[:, :5])
    assert (after - hidden)[:, 5:].abs().min(-1).values.max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_run_layers_looks_where_the_mask_says(model, text_model, embeddings, attention):
    """The second row's first four tokens are hidden: the rest is as if they were not there."""
    model.set_attn_implementation(attention)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    mask[1, :, :, :4] = False
    positions = torch.stack((torch.arange(9), (torch.arange(9) - 4).clamp_min(0)))
    hidden = text_model.run_layers(embeddings, mask, positions)
    torch.testing.assert_close(hidden[0], text_model(inputs_embeds=embeddings[:1]).last_hidden_state[0])
    torch.testing.assert_close(hidden[1, 4:], text_model(inputs_embeds=embeddings[1:, 4:]).last_hidden_state[0])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padding_changes_nothing(model, vocabulary, attention):
    model.set_attn_implementation(attention)
    prompt = [1, 2, 3, 4, 5]
    ids = torch.tensor([[vocabulary.pad] * 3 + prompt, [6, 7, 8, *prompt]])
    mask = torch.tensor([[0] * 3 + [1] * 5, [1] * 8])
    logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    torch.testing.assert_close(logits[0, 3:], model(torch.tensor([prompt])).logits[0])
    torch.testing.assert_close(logits[1], model(ids[1:]).logits[0])


@torch.no_grad()
def test_positions_are_relative(model):
    """Rotary positions: shifting all of them leaves the logits as they are."""
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    shifted = model(ids, position_ids=torch.arange(5)[None] + 100).logits
    torch.testing.assert_close(shifted, model(ids).logits, atol=1e-4, rtol=0)
    stretched = model(ids, position_ids=torch.arange(5)[None] * 3).logits
    assert (stretched - shifted).abs().max() > 0.01


@torch.no_grad()
def test_a_static_cache_gives_the_same(model, text_model, embeddings):
    cache = StaticCache(config=model.config.text_config, max_cache_len=16)
    parts = [
        text_model(inputs_embeds=part, past_key_values=cache, use_cache=True).last_hidden_state
        for part in embeddings.split([6, 1, 1, 1], dim=1)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), text_model(inputs_embeds=embeddings).last_hidden_state)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # newer releases of transformers call it otherwise
def test_gradient_checkpointing_gives_the_same_gradients(model):
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        torch.manual_seed(0)  # the same dropout
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.model.text_model.layers[0].mlp.up_proj.weight.grad.clone())
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_dropout_is_on_both_branches_and_only_in_training(config, model, text_model, embeddings):
    layer = text_model.layers[0]
    assert layer.dropout.p == config.text_config.attention_dropout == 0.1
    hidden = text_model(inputs_embeds=embeddings).last_hidden_state
    assert torch.equal(hidden, text_model(inputs_embeds=embeddings).last_hidden_state)
    layer.dropout.p = 1.0
    text_model.layers[1].dropout.p = 1.0
    model.train()
    all_dropped = text_model(inputs_embeds=embeddings).last_hidden_state
    torch.testing.assert_close(all_dropped, text_model.norm(embeddings))


def test_rms_norm():
    norm = RMSNorm(4, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 2.0, 1.0, 1.0])
    assert torch.allclose(norm(torch.tensor([3.0, 4.0, 0.0, 0.0])), torch.tensor([1.2, 3.2, 0.0, 0.0]))
    # The squares overflow in half precision.
    half = norm.half()(torch.tensor([300.0, 400.0, 0.0, 0.0], dtype=torch.float16))
    assert half.dtype == torch.float16
    assert torch.allclose(half.float(), torch.tensor([1.2, 3.2, 0.0, 0.0]), atol=1e-2)


@pytest.mark.parametrize("given", [(), ("input_ids", "inputs_embeds")], ids=["neither", "both"])
def test_ids_or_embeddings(model, text_model, given):
    inputs = {"input_ids": torch.tensor([[1]]), "inputs_embeds": torch.zeros(1, 1, 32)}
    for callee in (text_model, model.model, model):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            callee(**{name: inputs[name] for name in given})
