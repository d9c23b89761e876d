"""Logits that are not finite: settings that cause them are refused, a model that does is named; no noise is drawn."""

import copy

import pytest
import torch

from emu3.generation.decoders.named import decoder_named
from emu3.generation.engine import Engine
from emu3.generation.events import Failed
from emu3.generation.grammar import GridGrammar
from emu3.generation.request import Guidance, Request
from emu3.generation.sampling import Sampling
from emu3.quantization import QuantizedHead

DECODERS = ["raster", "predictive", "jacobi", "zipar:2"]


def requests(vocabulary, text, sampling, decoding="raster"):
    prompt = (vocabulary.bos, 5, vocabulary.boi, 1, vocabulary.img)
    grammar = GridGrammar(2, 3, vocabulary=vocabulary)
    picture = Request(prompt, grammar, sampling, Guidance(prompt, 3.0), decoder=decoder_named(decoding))
    return {"picture": picture, "text": Request(prompt[:2], text, sampling, max_new_tokens=4)}


def error_of(model, request):
    """Why the engine ends a request."""
    (failed,) = [event for event in Engine(model).stream([request]) if isinstance(event, Failed)]
    assert failed.request == 0
    return failed.error


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
def test_a_weight_that_is_no_number_is_named(model, vocabulary, text, decoding, kind, name, temperature):
    if name == "lm_head.weight":  # a number of it counts only where its token is legal
        broken = copy.deepcopy(model)
        broken.lm_head.weight.data[:] = torch.inf
    else:
        broken = poison(model, name, torch.nan)
    request = requests(vocabulary, text, Sampling(temperature), decoding)[kind]
    expected = f"the model gives no finite logits for token 0: {name} holds NaN or infinite values"
    assert error_of(broken, request).startswith(expected)


def test_a_scale_of_a_quantized_head_is_named(model, vocabulary, text):
    broken = copy.deepcopy(model)
    broken.lm_head = QuantizedHead.quantize(broken.lm_head)
    broken.lm_head.scales[:] = torch.inf
    error = error_of(broken, requests(vocabulary, text, Sampling())["picture"])
    assert "lm_head.scales holds NaN or infinite values" in error


@pytest.mark.parametrize("eps", [float("nan"), -1.0])
def test_a_setting_of_the_model_is_named(model, vocabulary, text, eps):
    broken = copy.deepcopy(model)
    broken.config.text_config.rms_norm_eps = eps
    for module in broken.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = eps
    error = error_of(broken, requests(vocabulary, text, Sampling())["picture"])
    assert f"rms_norm_eps={eps}; set it to a small positive number" in error


def test_a_layer_that_overflows_is_named(model, vocabulary, text):
    broken = copy.deepcopy(model)
    broken.model.text_model.layers[1].mlp.down_proj.weight.data *= 1e38
    error = error_of(broken, requests(vocabulary, text, Sampling())["text"])
    assert "the output of layers.1 overflows in torch.float32" in error


@pytest.mark.parametrize("temperature", [1e-37, 1e-7])
def test_a_temperature_too_small_to_divide_by(temperature):
    with pytest.raises(ValueError, match=r"0 or at least 1e-06, got .*; 0 takes the likeliest token"):
        Sampling(temperature)
    assert Sampling(1e-6).temperature == 1e-6


@pytest.mark.parametrize("scale", [1e38, -1e7])
def test_guidance_so_large_that_logits_could_overflow(model, vocabulary, scale):
    with pytest.raises(ValueError, match=r"guidance scale must be a finite number from -1e\+06 to 1e\+06"):
        Guidance((1,), scale)
    prompt = (vocabulary.bos, vocabulary.boi, 1, vocabulary.img)
    request = Request(
        prompt, GridGrammar(1, 2, vocabulary=vocabulary), guidance=Guidance(prompt, lambda progress: scale)
    )
    assert "guidance scale at token 0 must be a finite number" in error_of(model, request)


@pytest.mark.parametrize("decoding", DECODERS)
def test_the_extremes_that_are_allowed(model, vocabulary, decoding):
    """The smallest temperature and the largest guidance choose like greedy decoding, without a number that is none."""
    prompt = (vocabulary.bos, 5, vocabulary.boi, 1, vocabulary.img)
    for scale in (1.0, 1e6):
        grammar = GridGrammar(2, 3, vocabulary=vocabulary)
        ids = [
            list(Engine(model).stream(
                [Request(prompt, grammar, sampling, Guidance((vocabulary.bos, *prompt[2:]), scale),
                         decoder=decoder_named(decoding))]
            ))[-1].ids
            for sampling in (Sampling(0.0), Sampling(1e-6, top_k=0))
        ]  # fmt: skip
        assert ids[0] == ids[1]
