"""Logits of words, within 1e-5 in float32."""

import pytest
import torch
from transformers import Emu3ForCausalLM as ReferenceTextModel
from transformers import Emu3TextConfig as ReferenceTextConfig

from emu3.modeling.pretrained import CACHE
from emu3.modeling.text import Emu3ForCausalLM

TOLERANCE = {"atol": 1e-5, "rtol": 0}
KINDS = {
    "grouped-query": {},
    "multi-query": {"num_key_value_heads": 1},
    "multi-head": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied head": {"tie_word_embeddings": True},
    "another activation and epsilon": {"hidden_act": "gelu", "rms_norm_eps": 0.1},
    "rope_theta": {"rope_theta": 100.0},
    "linear rope_scaling": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "dynamic rope_scaling": {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 8},
    "yarn rope_scaling": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "llama3 rope_scaling": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}


def assert_close(ours, theirs):
    assert theirs.std() > 0.1, "logits too small for their difference to mean something"
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


def words(*shape):
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_prompts(build, arguments):
    pair = build(arguments, tie_word_embeddings=arguments.get("tie_word_embeddings", False))
    ours, theirs = (model(words(2, 17)) for model in pair.both)
    assert_close(ours.logits, theirs.logits)
    tied = pair.ours.lm_head.weight is pair.ours.get_input_embeddings().weight
    assert tied == arguments.get("tie_word_embeddings", False)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padded_batch(build, attention):
    pair = build()
    for model in pair.both:
        model.set_attn_implementation(attention)
    inputs = pair.prompts([1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13])
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    real = inputs["attention_mask"].bool()
    ours, theirs = (model(**inputs).logits[real] for model in pair.both)
    assert_close(ours, theirs)


@torch.no_grad()
def test_cache_step_by_step(pair):
    ids = words(2, 14)
    caches = [None, None]
    for start, end in [(0, 6), (6, 7), (7, 8), (8, 11), (11, 14)]:
        outputs = [
            model(ids[:, start:end], **{CACHE: cache}, use_cache=True)
            for model, cache in zip(pair.both, caches, strict=True)
        ]
        caches = [output[CACHE] for output in outputs]
        assert_close(outputs[0].logits, outputs[1].logits)
        torch.testing.assert_close(outputs[0].logits, pair.ours(ids).logits[:, start:end], **TOLERANCE)


@torch.no_grad()
def test_inputs_embeds(pair):
    embeddings = torch.randn(2, 9, 32)
    ours, theirs = (model(inputs_embeds=embeddings).logits for model in pair.both)
    assert_close(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([0, 4, 5])], ids=str)
def test_logits_to_keep(pair, keep):
    ours, theirs = (model(words(2, 9), logits_to_keep=keep).logits for model in pair.both)
    assert ours.shape[1] == {0: 9, 1: 1, 3: 3}[keep] if isinstance(keep, int) else 3
    assert_close(ours, theirs)


@torch.no_grad()
def test_hidden_states_and_attentions(build):
    pair = build()
    for model in pair.both:
        model.set_attn_implementation("eager")
    ours, theirs = (model(words(2, 9), output_hidden_states=True, output_attentions=True) for model in pair.both)
    assert len(ours.hidden_states) == 3
    assert len(ours.attentions) == 2
    for kind in ("hidden_states", "attentions"):
        for a, b in zip(getattr(ours, kind), getattr(theirs, kind), strict=True):
            assert_close(a, b)


@torch.no_grad()
def test_tuples(pair):
    ours, theirs = (model(words(2, 9), return_dict=False, use_cache=False) for model in pair.both)
    assert len(ours) == len(theirs) == 1
    assert_close(ours[0], theirs[0])


def test_loss_and_its_gradients(pair):
    labels = words(2, 9).clone()
    labels[0, :4] = -100
    losses = []
    for model in pair.both:
        model.zero_grad()
        losses.append(model(words(2, 9), labels=labels).loss)
        losses[-1].backward()
    assert losses[1] > 1
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=0)
    theirs = {name: parameter.grad for name, parameter in pair.theirs.named_parameters()}
    for name, parameter in pair.ours.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name], **TOLERANCE)
    assert pair.ours.model.text_model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 1e-3


@torch.no_grad()
def test_language_model_alone(pair):
    config = pair.ours.config.text_config
    ours = Emu3ForCausalLM(config).eval()
    weights = {
        name.replace("text_model.", "").replace("model.model.", "model."): tensor
        for name, tensor in pair.ours.state_dict().items()
        if ".vqmodel." not in name
    }
    ours.load_state_dict(weights)
    theirs = ReferenceTextModel(ReferenceTextConfig(**config.to_dict())).eval()
    theirs.load_state_dict(weights)
    labels = words(2, 9)
    a, b = (model(words(2, 9), labels=labels) for model in (ours, theirs))
    assert_close(a.logits, b.logits)
    torch.testing.assert_close(a.loss, b.loss, atol=1e-6, rtol=0)
    assert_close(a.logits, pair.theirs(words(2, 9)).logits)
