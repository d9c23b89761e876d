"""The sides of benchmarks/llama_cpp.py compute the same model. llama.cpp itself does not run here."""

import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from emu3.checkpoints.files import read_headers
from emu3.checkpoints.load import load_model
from emu3.checkpoints.quantize import quantize
from emu3.matrices import Scheme
from emu3.quantization import QuantizedLinear, dequantize_head

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def llama_cpp_model(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import llama_cpp_model

    return llama_cpp_model


def halves(packed: Tensor, start: int, stop: int) -> Tensor:
    """Numbers in 16 bits among the bytes of blocks, as float32."""
    return packed[..., start:stop].contiguous().view(torch.float16).float()


@pytest.mark.parametrize("group", [32, 128])
def test_four_bits_keep_their_numbers(llama_cpp_model, group):
    layer = QuantizedLinear.quantize(nn.Linear(256, 48, bias=False), Scheme(4, group))
    blocks = llama_cpp_model._q4_0(layer.weight, layer.scales).view(48, 8, 18)
    weights = torch.cat([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1).float() - 8
    assert torch.equal((weights * halves(blocks, 0, 2)).view(48, 256), layer.dequantized())


def test_eight_bits_keep_their_numbers_but_for_the_scales(llama_cpp_model):
    layer = QuantizedLinear.quantize(nn.Linear(256, 48, bias=False), Scheme(8))
    blocks = llama_cpp_model._q8_0(layer.weight, layer.scales).view(48, 8, 34)
    weights = blocks[..., 2:].view(torch.int8).float().view(48, 256)
    assert torch.equal(weights * layer.scales[:, None], layer.dequantized())
    assert torch.equal(halves(blocks, 0, 2)[..., 0], layer.scales.half().float()[:, None].expand(-1, 8))


def test_heads_are_rounded_to_the_nearest_step(llama_cpp_model):
    torch.manual_seed(0)
    rows = torch.randn(6, 512) * 0.02
    rows[3] = 0
    blocks = llama_cpp_model.to_q8_0(rows).view(6, 16, 34)
    found = (blocks[..., 2:].view(torch.int8).float() * halves(blocks, 0, 2)).view(6, 512)
    assert float((found - rows).norm() / rows.norm()) < 0.006 and (found[3] == 0).all()
    # 6 bits: low halves of 256 weights, upper two bits, 16 scales, a scale of these.
    blocks = llama_cpp_model.to_q6_k(rows).view(6, 2, 210)
    found = torch.empty(6, 2, 2, 4, 32)
    scales = blocks[..., 192:208].view(torch.int8).float().view(6, 2, 2, 8)
    for part in range(4):
        low = blocks[..., :128].view(6, 2, 2, 2, 32)[..., part % 2, :] >> 4 * (part // 2) & 15
        high = blocks[..., 128:192].view(6, 2, 2, 32) >> 2 * part & 3
        found[..., part, :] = (low | high << 4).float() - 32
        found[..., part, :] *= scales[..., 2 * part : 2 * part + 2].repeat_interleave(16, -1)
    found = found.view(6, 2, 256) * halves(blocks, 208, 210)
    assert float((found.view(6, 512) - rows).norm() / rows.norm()) < 0.025 and (found[3] == 0).all()


def test_the_file_holds_every_tensor_where_it_says(llama_cpp_model, tiny_checkpoint, tmp_path):
    quantize(tiny_checkpoint, tmp_path / "eight", bits=8)
    with pytest.raises(ValueError, match="is not quantized; make one that is by `emu3 quantize`"):
        llama_cpp_model.write_gguf(tiny_checkpoint, tmp_path / "model.gguf")
    entry = llama_cpp_model.Entry("a", (3,), "F32", lambda: iter([torch.arange(3.0)]))
    with (tmp_path / "one.gguf").open("wb") as stream:
        llama_cpp_model._write_header(stream, {"n": 7, "s": "word", "f": 0.5}, [entry, entry])
        header = stream.tell()
    data = (tmp_path / "one.gguf").read_bytes()
    assert header % 32 == 0 and struct.unpack_from("<4sIQQ", data) == (b"GGUF", 3, 2, 3)
    # Both are padded to 32 bytes, so the second begins there.
    assert data.rstrip(b"\0")[-13:] == struct.pack("<QIQ", 3, 0, 32).rstrip(b"\0")


def test_the_head_is_given_as_the_numbers_that_it_has_here(llama_cpp_model, tiny_checkpoint, tmp_path):
    quantize(tiny_checkpoint, tmp_path / "eight", bits=8)
    head, headers = load_model(tmp_path / "eight").lm_head, read_headers(tmp_path / "eight")
    (found,) = llama_cpp_model._converted(headers, "lm_head.weight", "F32", 3, 20)
    assert torch.equal(found, dequantize_head(head, slice(3, 20)))
    assert float((found - load_model(tiny_checkpoint).lm_head.weight.detach()[3:20]).norm() / found.norm()) < 0.01


def test_our_side_computes_the_logits_of_the_model(monkeypatch, tiny_checkpoint, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import llama_cpp

    folder = tmp_path / "eight"
    quantize(tiny_checkpoint, folder, bits=8)
    model, context = load_model(folder), list(range(5, 35))
    ours, size = llama_cpp.Ours(folder, context), model.lm_head.out_features
    lo, hi = model.model.vocabulary.visual_span
    for rows, sequences in llama_cpp.ROWS.items():
        ids = list(range(40, 40 + rows))
        assert len(ours.call(ids, 2, (0, size))) == 2
        logits = ours.logits
        with torch.inference_mode():
            expected = torch.cat(
                [
                    model(torch.tensor([context + ids[lane::sequences]])).logits[0, len(context) :]
                    for lane in range(sequences)
                ]
            )
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        ours.call(ids, 1, (lo, hi))
        torch.testing.assert_close(ours.logits, logits[:, lo:hi])
