"""Every argument of `Emu3TextConfig` does what the documentation says, against transformers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Emu3ForCausalLM as ReferenceForCausalLM
from transformers import Emu3TextConfig as ReferenceTextConfig

from emu3.configuration import Emu3TextConfig
from emu3.modeling.text import Emu3ForCausalLM

BASE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 57,
    "bos_token_id": 58,
    "eos_token_id": 59,
}
IDS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
# Argument -> another value and a tensor whose shape it sets.
SHAPES = {
    "vocab_size": (70, "lm_head.weight", (70, 32)),
    "hidden_size": (64, "model.norm.weight", (64,)),
    "intermediate_size": (40, "model.layers.0.mlp.gate_proj.weight", (40, 32)),
    "num_hidden_layers": (3, "model.layers.2.mlp.up_proj.weight", (48, 32)),
    "num_attention_heads": (2, "model.layers.0.self_attn.k_proj.weight", (32, 32)),
    "mlp_bias": (True, "model.layers.0.mlp.down_proj.bias", (32,)),
    "attention_bias": (True, "model.layers.0.self_attn.o_proj.bias", (32,)),
}


def models(**arguments):
    """Ours and theirs, with the same random weights of order one."""
    config = Emu3TextConfig(**BASE | arguments)
    torch.manual_seed(0)
    ours = Emu3ForCausalLM(config).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    theirs = ReferenceForCausalLM(ReferenceTextConfig(**config.to_dict())).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def logits(*pair):
    with torch.no_grad():
        ours, theirs = (model(input_ids=IDS).logits for model in pair)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    return ours


@pytest.mark.parametrize("name", SHAPES)
def test_arguments_that_set_shapes(name):
    value, tensor, shape = SHAPES[name]
    pair = models(**{name: value})
    logits(*pair)
    assert pair[0].state_dict()[tensor].shape == shape
    assert models()[0].state_dict().get(tensor, torch.empty(0)).shape != shape


@pytest.mark.parametrize(("groups", "rows"), [(1, 8), (2, 16), (4, 32), (None, 32)], ids=["MQA", "GQA", "MHA", "unset"])
def test_num_key_value_heads(groups, rows):
    pair = models(num_key_value_heads=groups)
    logits(*pair)
    for projection in ("k_proj", "v_proj"):
        assert getattr(pair[0].model.layers[0].self_attn, projection).weight.shape == (rows, 32)


def test_hidden_act():
    """A name or a function."""
    silu, named = logits(*models()), models(hidden_act="gelu")
    gelu = logits(*named)
    assert (gelu - silu).abs().max() > 0.1
    given = Emu3ForCausalLM(Emu3TextConfig(**BASE | {"hidden_act": F.gelu})).eval()
    given.load_state_dict(named[0].state_dict())
    with torch.no_grad():
        torch.testing.assert_close(given(input_ids=IDS).logits, gelu)


def test_rms_norm_eps():
    pair = models(rms_norm_eps=0.5)
    assert (logits(*pair) - logits(*models())).abs().max() > 0.1
    states = torch.full((1, 32), 2.0)
    expected = pair[0].model.norm.weight * 2 / (4 + 0.5) ** 0.5
    torch.testing.assert_close(pair[0].model.norm(states)[0], expected)


def test_max_position_embeddings():
    """It says where the dynamic rotary type begins to stretch."""
    scaling = {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "rope_theta": 100.0}
    short, long = (logits(*models(max_position_embeddings=length, **scaling)) for length in (8, 12))
    plain = logits(*models(rope_theta=100.0))
    torch.testing.assert_close(long, plain)
    assert (short - plain).abs().max() > 0.01


def test_tie_word_embeddings():
    for tied in (True, False):
        pair = models(tie_word_embeddings=tied)
        logits(*pair)
        assert all((model.lm_head.weight is model.get_input_embeddings().weight) == tied for model in pair)


def test_initializer_range():
    """The standard deviation of fresh matrices; norms start at one, the padding's embedding at zero."""
    torch.manual_seed(0)
    model = Emu3ForCausalLM(Emu3TextConfig(**BASE | {"initializer_range": 0.5, "hidden_size": 64}))
    for weight in (model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight, model.model.embed_tokens.weight):
        assert weight.mean().abs() < 0.05
        assert 0.47 < weight.std() < 0.53
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    assert model.model.embed_tokens.weight[BASE["pad_token_id"]].count_nonzero() == 0


def test_use_cache():
    for used in (True, False):
        for model in models(use_cache=used):
            assert (model(input_ids=IDS).past_key_values is not None) == used


def test_bos_token_id():
    """Generation from nothing starts with it."""
    written = [model.generate(max_new_tokens=5, do_sample=False).tolist() for model in models(bos_token_id=7)]
    assert written[0] == written[1]
    assert written[0][0][0] == 7


def test_eos_token_id_and_pad_token_id():
    """A row ends with the first, and waits for the others behind the second."""
    free = models()[0].generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, 12:]
    end = free[0, 2].item()
    assert end not in free[0, :2]
    assert end not in free[1]
    written = [
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, do_sample=False)[:, 12:].tolist()
        for model in models(eos_token_id=end, pad_token_id=55)
    ]
    assert written[0] == written[1]
    assert written[0] == [[*free[0, :3].tolist(), *[55] * 5], free[1].tolist()]


def test_padding_is_not_learned():
    for model in models(pad_token_id=3):
        model(input_ids=torch.tensor([[3, 5, 3, 6]])).logits.square().mean().backward()
        gradient = model.get_input_embeddings().weight.grad
        assert gradient[3].count_nonzero() == 0
        assert gradient[5].count_nonzero() > 0


def test_kwargs():
    """What is no argument of its own is one of every configuration, or kept."""
    config = Emu3TextConfig(**BASE, output_hidden_states=True, head_dim=4, note="kept")
    assert (config.output_hidden_states, config.head_dim, config.note) == (True, 4, "kept")
    pair = models(head_dim=4)
    logits(*pair)
    assert pair[0].model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
