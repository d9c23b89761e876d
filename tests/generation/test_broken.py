"""Logits that are not finite: settings that cause them are refused, a model that does is named; no noise is drawn."""

import copy

import pytest
import torch

from emu3.generation.decoders.named import decoder_named
from emu3.generation.engine import Engine
from emu3.generation.grammar import GridGrammar
from emu3.generation.request import Guidance, Request
from emu3.generation.sampling import Sampling

DECODERS = ["raster", "predictive", "jacobi", "zipar:2"]


def requests(vocabulary, sampling):
    prompt = (vocabulary.bos, 5, vocabulary.boi, 1, vocabulary.img)
    grammar = GridGrammar(2, 3, vocabulary=vocabulary)
    picture = Request(prompt, grammar, sampling, Guidance(prompt, 3.0))
    return {"picture": picture, "text": Request(prompt[:2], sampling=sampling, max_new_tokens=4)}


def poison(model, name, value):
    """A copy of the model with one number changed."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    return model


@pytest.mark.parametrize("kind", ["picture", "text"])
@pytest.mark.parametrize("decoding", DECODERS)
@pytest.mark.parametrize(
    "name",
    ["model.text_model.layers.1.mlp.up_proj.weight", "model.text_model.norm.weight", "lm_head.weight"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_weight_that_is_no_number_is_named(model, vocabulary, decoding, kind, name, temperature):
    if name == "lm_head.weight":  # a number of it counts only where its token is legal
        broken = copy.deepcopy(model)
        broken.lm_head.weight.data[:] = torch.inf
    else:
        broken = poison(model, name, torch.nan)
    request = requests(vocabulary, Sampling(temperature))[kind]
    with pytest.raises(ValueError, match=rf"no finite logits for token 0 of request 0: {name} holds NaN or infinite"):
        list(Engine(broken, decoder_named(decoding)).stream([request]))


@pytest.mark.parametrize("eps", [float("nan"), -1.0])
def test_a_setting_of_the_model_is_named(model, vocabulary, eps):
    broken = copy.deepcopy(model)
    broken.config.text_config.rms_norm_eps = eps
    for module in broken.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = eps
    with pytest.raises(ValueError, match=rf"rms_norm_eps={eps}; set it to a small positive number"):
        list(Engine(broken).stream([requests(vocabulary, Sampling())["picture"]]))


def test_a_layer_that_overflows_is_named(model, vocabulary):
    broken = copy.deepcopy(model)
    broken.model.text_model.layers[1].mlp.down_proj.weight.data *= 1e38
    with pytest.raises(ValueError, match=r"the output of layers\.1 overflows in torch\.float32"):
        list(Engine(broken).stream([requests(vocabulary, Sampling())["text"]]))


@pytest.mark.parametrize("temperature", [1e-37, 1e-7])
def test_a_temperature_too_small_to_divide_by(temperature):
    with pytest.raises(ValueError, match=r"0 or at least 1e-06, got .*; 0 takes the most likely"):
        Sampling(temperature)
    assert Sampling(1e-6).temperature == 1e-6


@pytest.mark.parametrize("scale", [1e38, -1e7])
def test_guidance_so_large_that_logits_could_overflow(model, vocabulary, scale):
    with pytest.raises(ValueError, match=r"guidance scale must be from -1e\+06 to 1e\+06"):
        Guidance((1,), scale)
    prompt = (vocabulary.bos, vocabulary.boi, 1, vocabulary.img)
    request = Request(
        prompt, GridGrammar(1, 2, vocabulary=vocabulary), guidance=Guidance(prompt, lambda progress: scale)
    )
    with pytest.raises(ValueError, match="at token 0"):
        list(Engine(model).stream([request]))


@pytest.mark.parametrize("decoding", DECODERS)
def test_the_extremes_that_are_allowed(model, vocabulary, decoding):
    """The smallest temperature and the largest guidance choose like greedy decoding, without a number that is none."""
    prompt = (vocabulary.bos, 5, vocabulary.boi, 1, vocabulary.img)
    for scale in (1.0, 1e6):
        grammar = GridGrammar(2, 3, vocabulary=vocabulary)
        ids = [
            list(Engine(model, decoder_named(decoding)).stream(
                [Request(prompt, grammar, sampling, Guidance((vocabulary.bos, *prompt[2:]), scale))]
            ))[-1].ids
            for sampling in (Sampling(0.0), Sampling(1e-6, top_k=0))
        ]  # fmt: skip
        assert ids[0] == ids[1]
