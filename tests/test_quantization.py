"""Weights and activations in 8 bits."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from emu3 import kernels, quantization
from emu3.checkpoints import NANO
from emu3.checkpoints.load import load_model
from emu3.quantization import Int8Linear, QuantizedLinear, quantize_int8, quantize_layer


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_product_of_whole_numbers_is_exact(bias):
    """Weights and activations that are whole 127ths of the largest of their row."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 9, bias=bias)
    linear.weight.data = torch.randint(-127, 128, (9, 32)).float()
    linear.weight.data[:, 0] = 127.0
    x = torch.randint(-127, 128, (3, 5, 32)) * torch.tensor([0.01, 1.0, 30.0])[:, None, None]
    x[..., 1] = torch.tensor([1.27, -127.0, 3810.0])[:, None]
    torch.testing.assert_close(Int8Linear(linear)(x), linear(x), rtol=1e-5, atol=1e-2)


def test_a_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    low, x = Int8Linear(nn.Linear(64, 16)), torch.randn(5, 64)
    assert torch.equal(low(x)[2], low(torch.cat((1e4 * x[:2], x[2:])))[2])


def test_joined_modules_give_what_each_gives():
    torch.manual_seed(0)
    modules, x = [Int8Linear(nn.Linear(32, size, bias=False)) for size in (5, 9)], torch.randn(3, 32)
    assert torch.equal(Int8Linear.fuse(modules)(x), torch.cat([module(x) for module in modules], -1))
    assert Int8Linear.fuse([modules[0], Int8Linear(nn.Linear(32, 5))]) is None


def test_large_and_small_matrices_give_the_same(monkeypatch):
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 16), torch.randn(5, 64)
    small = Int8Linear(linear)
    monkeypatch.setattr(quantization, "_LARGEST_UNPACKED", 0)
    large = Int8Linear(linear)
    assert large.packed == quantization._VNNI and not small.packed
    assert Int8Linear.fuse([large]) is None
    torch.testing.assert_close(large(x), small(x), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(kernels.library() is None, reason="no kernels for this machine")
@torch.no_grad()
def test_matrices_use_the_kernels_where_these_can_be_had(monkeypatch):
    """And give the same as oneDNN, bit for bit; sizes that the kernels do not take stay with it."""
    torch.manual_seed(0)
    layer, x = (
        nn.Sequential(nn.ModuleList([nn.Linear(64, 32), nn.Linear(64, 40), nn.Linear(64, 16)])),
        torch.randn(5, 64),
    )
    monkeypatch.setattr(quantization, "_LARGEST_UNPACKED", 64 * 15)
    theirs = copy.deepcopy(layer)
    quantize_layer(layer)
    with monkeypatch.context() as without:
        without.setattr(kernels, "library", lambda: None)
        quantize_layer(theirs)
    assert [isinstance(each, QuantizedLinear) for each in layer[0]] == [True, False, True]
    assert all(isinstance(each, Int8Linear) and each.packed == quantization._VNNI for each in theirs[0])
    for ours, expected in zip(layer[0], theirs[0], strict=True):
        assert torch.equal(ours(x), expected(x)) and ours.bits == 8
        assert ours.parameters_in_all == expected.parameters_in_all
        assert sum(each.nbytes for each in ours.buffers()) == sum(each.nbytes for each in expected.buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_error_is_that_of_eight_bits(dtype):
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 64).to(dtype), torch.randn(7, 256).to(dtype)
    exact, found = linear(x), Int8Linear(linear)(x)
    assert found.dtype == dtype
    assert 1e-4 < float((found - exact).norm() / exact.norm()) < 0.03


@torch.no_grad()
def test_nano_says_nearly_the_same_in_eight_bits():
    """How far the probabilities of the next token move, and how often the best one stays."""
    model = load_model(NANO)
    low = copy.deepcopy(model)
    quantize_int8(low.model.text_model)
    layer = low.model.text_model.layers[0]
    assert isinstance(layer.self_attn.q_proj, Int8Linear | QuantizedLinear)
    assert isinstance(layer.mlp.down_proj, Int8Linear | QuantizedLinear)
    assert type(low.lm_head) is nn.Linear
    generator = torch.Generator().manual_seed(0)
    lo, hi = model.model.vocabulary.visual_span
    ids = torch.randint(lo, hi, (4, 60), generator=generator)
    exact, found = (each(input_ids=ids).logits[..., lo:hi].softmax(-1) for each in (model, low))
    assert float((exact - found).abs().sum(-1).mean()) / 2 < 0.1
    assert float((exact.argmax(-1) == found.argmax(-1)).float().mean()) > 0.9


@pytest.mark.parametrize("packed", [False, True])
def test_its_tensors_are_buffers_that_a_change_of_dtype_leaves_exact(monkeypatch, packed):
    torch.manual_seed(0)
    monkeypatch.setattr(quantization, "_LARGEST_UNPACKED", 0 if packed else 2**20)
    layer, x = Int8Linear(nn.Linear(64, 16)), torch.randn(5, 64)
    expected = layer(x)
    assert [name for name, _ in layer.named_buffers()] == ["weight", "scales", "bias"]
    assert sum(buffer.nbytes for buffer in layer.buffers()) == 64 * 16 + 2 * 16 * 4
    assert torch.equal(layer.to("cpu", torch.bfloat16)(x), expected)


def test_the_compiler_is_not_imported_before_something_is_compiled():
    """It takes about a second."""
    program = """
import sys, torch
from emu3 import quantization
for quantization._LARGEST_UNPACKED in (2**20, 0):
    quantization.Int8Linear(torch.nn.Linear(64, 16))(torch.ones(3, 64))
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("largest", [0, 2**20])
def test_it_is_not_saved_half(monkeypatch, tmp_path, largest):
    """Its config.json would not say what its tensors are."""
    monkeypatch.setattr(quantization, "_LARGEST_UNPACKED", largest)
    with pytest.raises(ValueError, match="layers in 8 bits cannot be saved"):
        load_model(NANO, int8=True).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="layers in 8 bits cannot be saved"):
        Int8Linear(nn.Linear(4, 4)).state_dict()


@torch.no_grad()
def test_processors_without_vnni_give_the_same(monkeypatch):
    """The largest products of all: what oneDNN has on such a processor would overflow."""
    torch.manual_seed(0)
    linear, x = nn.Linear(512, 65), torch.randn(3, 512)
    linear.weight.data[:2], x[0] = 1.0, 1.0
    monkeypatch.setattr(quantization, "_LARGEST_UNPACKED", 0)
    expected = Int8Linear(linear)(x)
    monkeypatch.setattr(quantization, "_VNNI", False)
    monkeypatch.setattr(quantization, "CHUNK", 512 * 10)
    found = Int8Linear(linear)
    assert not found.packed and torch.equal(found(x), expected)
    torch.testing.assert_close(found(x)[0, :2], linear.bias[:2] + 512, rtol=1e-6, atol=1e-3)


def test_it_is_for_cpus():
    with torch.device("meta"):
        model = nn.Module()
        model.embed_tokens = nn.Embedding(2, 2)
    with pytest.raises(ValueError, match="int8 is for CPUs, and the model is on meta"):
        quantize_int8(model)
