"""What a run takes, before it starts."""

import json

import pytest
import torch
from typer.testing import CliRunner

from emu3.cli import app
from emu3.configuration import Emu3TextConfig
from emu3.modeling.text import Emu3DecoderLayer, RotaryEmbedding
from emu3.training.language import FinetuneRecipe, LoraRecipe
from emu3.training.objective import PackedAttention
from emu3.training.plan import _kept_by_layer, make_plan

WHOLE = Emu3TextConfig()
RUN = {"data": (), "checkpoint": "x", "length": 9216, "parts": 8, "steps": 10}


def test_the_documented_model():
    """8.49 G weights; AdamW in float32 is 16 bytes a weight; devices share it, and hold a layer and the head whole."""
    plan = make_plan(FinetuneRecipe(**RUN, recompute_layers=True), WHOLE, [1, 8], 4e14)
    assert plan.weights == plan.trained == 8_492_011_520
    one, eight = plan.needs
    assert one.state_bytes == 16 * plan.weights
    layer, outer = 218_112_000, 2 * 184_622 * 4096 + 4096
    assert eight.state_bytes == 2 * plan.weights + 2 * (2 * layer + outer)
    assert one.seconds_per_step == pytest.approx(8 * eight.seconds_per_step)
    tokens = 8 * 9216
    attention = 2 * 4096 * 32 * 9216**2 * 8
    assert plan.flops_per_step == pytest.approx(4 * (2 * plan.weights * tokens + attention))


def test_adapters_need_no_optimizer_for_the_rest():
    plan = make_plan(LoraRecipe(**RUN, rank=16), WHOLE, [1], 4e14)
    attention, feed_forward = 2 * (4096 + 4096) + 2 * (4096 + 1024), 3 * (4096 + 14336)
    assert plan.trained == 32 * 16 * (attention + feed_forward)
    assert plan.needs[0].state_bytes == 2 * plan.weights + 16 * plan.trained


def test_recomputing_takes_less_memory_and_more_time():
    few, all_ = (make_plan(FinetuneRecipe(**RUN, recompute_layers=on), WHOLE, [1], 4e14) for on in (True, False))
    assert few.needs[0].activation_bytes < 0.2 * all_.needs[0].activation_bytes
    assert few.flops_per_step == pytest.approx(all_.flops_per_step * 4 / 3)


def test_what_a_layer_keeps_is_what_the_backward_pass_of_a_real_one_keeps():
    """Less what attention on a CPU keeps beyond its inputs and its result."""
    config = Emu3TextConfig(
        hidden_size=32,
        intermediate_size=80,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        num_hidden_layers=1,
        pad_token_id=0,
        attention_dropout=0.0,
    )
    layer, length = Emu3DecoderLayer(config, 0), 50
    own = {each.untyped_storage().data_ptr() for each in layer.parameters()}
    kept, within = {}, []
    packed = PackedAttention([length], length, torch.device("cpu"))

    def keep(tensor):
        storage = tensor.untyped_storage()
        if not within and tensor.ndim > 1 and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    def attend(module, query, key, value, mask, scaling, **kwargs):
        within.append(1)
        mixed, _ = packed(module, query, key, value, mask, scaling=scaling)
        within.clear()
        for each in (query, key, value, mixed):
            keep(each)
        return mixed, None

    held = []
    hidden = torch.randn(1, length, 32, requires_grad=True)
    places = RotaryEmbedding(config)(hidden, torch.arange(length)[None])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden, position_embeddings=places, attend=attend)
    assert _kept_by_layer(config, length, torch.float32) == pytest.approx(sum(kept.values()), rel=0.1)


def test_the_command(tmp_path, tiny_checkpoint):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'kind = "lora"\noutput = "out"\ncheckpoint = "{tiny_checkpoint}"\n[[data]]\npath = "nowhere"\n')
    arguments = ["train", str(recipe), "--plan", "--devices", "1,2", "--teraflops", "1"]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0
    assert "assumed: 1 T operations a second" in told.output
    numbers = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert [need["devices"] for need in numbers["needs"]] == [1, 2]
    assert not (tmp_path / "out").exists()
    wrong = CliRunner().invoke(app, ["train", str(recipe), "--plan", "--devices", "1,x"])
    assert "'1,x' are no numbers of devices" in str(wrong.exception)
