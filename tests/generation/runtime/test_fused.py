"""All layers in one function, against the same layers one by one."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from emu3 import kernels
from emu3.generation.runtime.cache import SlotCache
from emu3.generation.runtime.forward import Forward
from emu3.generation.runtime.fused import FusedLayers
from emu3.matrices import Scheme
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.modeling.text import RMSNorm
from emu3.quantization import QuantizedLinear, quantize_int8

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no kernels for this machine")


def quantized(tiny_config, scheme, **text):
    """Random layers whose norms are no ones; a group of query heads for each key-value head."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 32, "rms_norm_eps": 0.03}
    torch.manual_seed(scheme.bits)
    config = tiny_config({"initializer_range": 0.2, **shape, **text}, {"channel_multiplier": [1, 1]})
    text_model = Emu3ForConditionalGeneration(config).eval().model.text_model
    for layer in text_model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            nn.init.normal_(norm.weight, 1.0, 0.2)
        for parent in (layer.self_attn, layer.mlp):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(parent, name, QuantizedLinear.quantize(module, scheme))
    return text_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, 32), Scheme(4, 128)], ids=str)
@torch.inference_mode()
def test_it_computes_what_the_layers_do_one_by_one(tiny_config, scheme, dtype):
    text_model = quantized(tiny_config, scheme)
    fused = Forward.pack(text_model, 64)
    assert fused.fused is not None
    lanes, starts = torch.tensor([1, 0]), torch.tensor([0, 5, 7])
    results, caches = [], []
    for forward in (fused, replace(fused, fused=None)):
        cache = SlotCache.allocate(layers=3, lanes=2, heads=2, slots=64, width=32, dtype=dtype)
        torch.manual_seed(0)
        for at in (0, 5, 10):
            slots = torch.cat([torch.arange(at, at + 5), torch.arange(at, at + 2)])
            tokens = torch.randint(0, 40, (7,)), slots, torch.zeros_like(slots), lanes, starts
            hidden_TE = forward.run_packed(cache, *tokens, prompts=False)
        results.append(hidden_TE)
        caches.append(cache)
    # Rounding to 8 bits turns small differences into steps, so a few numbers are a little further apart.
    assert float((results[0] - results[1]).norm() / results[1].norm()) < (0.003 if dtype == torch.float32 else 0.03)
    for ours, expected in zip(caches[0].values, caches[1].values, strict=True):
        assert float((ours - expected).norm() / expected.norm()) < (0.003 if dtype == torch.float32 else 0.03)


class Double(RMSNorm):
    """Twice what it was made from."""

    def __init__(self, norm):
        super().__init__(len(norm.weight), norm.variance_epsilon)

    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_more_than_plain_is_run_by_itself(tiny_config):
    plain = quantized(tiny_config, Scheme(8))
    assert FusedLayers.of(plain) is not None
    changes = {
        "a hook": lambda layer: layer.mlp.act_fn.register_forward_hook(lambda *arguments: None),
        "a hook of a matrix": lambda layer: layer.mlp.up_proj.register_forward_pre_hook(lambda *arguments: None),
        "a forward of its own": lambda layer: setattr(layer.input_layernorm, "forward", layer.input_layernorm.forward),
        "a bias": lambda layer: setattr(layer.mlp.up_proj, "bias", torch.zeros(256)),
        "another activation": lambda layer: setattr(layer.mlp, "act_fn", nn.GELU()),
        "a norm of another kind": lambda layer: setattr(layer, "input_layernorm", Double(layer.input_layernorm)),
        "scales of another dtype": lambda layer: setattr(
            layer.self_attn.q_proj, "scales", layer.self_attn.q_proj.scales.half()
        ),
        "two schemes for one input": lambda layer: setattr(
            layer.self_attn, "k_proj", QuantizedLinear.quantize(nn.Linear(128, 64, bias=False), Scheme(4, 32))
        ),
        "another layer": lambda layer: setattr(layer.mlp, "up_proj", nn.Linear(128, 256, bias=False)),
    }
    for name, change in changes.items():
        model = copy.deepcopy(plain)
        change(model.layers[1])
        assert FusedLayers.of(model) is None, name
    assert FusedLayers.of(quantized(tiny_config, Scheme(8), hidden_act="gelu")) is None
    assert FusedLayers.of(quantized(tiny_config, Scheme(8), attention_bias=True)) is None


def test_int8_is_fused_too(tiny_config):
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    text_model = Emu3ForConditionalGeneration(tiny_config(shape)).eval().model.text_model
    assert FusedLayers.of(text_model) is None
    quantize_int8(text_model)
    assert FusedLayers.of(text_model) is not None
