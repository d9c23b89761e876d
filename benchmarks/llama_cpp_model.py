"""A quantized checkpoint as a GGUF file of the same weights, for llama.cpp.

The layers keep their numbers: 4 bits are llama.cpp's Q4_0 in another order, bit for bit, and 8 bits are its Q8_0 but
for the scales, which are rounded to 16 bits there. The embedding stays in bfloat16. The numbers of
the head are quantized as `llama-quantize` would do it: to Q6_K for Q4_0, to Q8_0 for Q8_0. Takes about a gigabyte of
memory, whatever the size.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from emu3.checkpoints.files import TensorHeader, read_headers

ALIGNMENT = 32
# Of llama.cpp: number of the type, weights of a block, bytes of a block.
TYPES = {"F32": (0, 1, 4), "BF16": (30, 1, 2), "Q4_0": (2, 32, 18), "Q8_0": (8, 32, 34), "Q6_K": (14, 256, 210)}
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7}
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Rows of a large matrix that are converted at a time.
ROWS = 2048


@dataclass(frozen=True)
class Written:
    """What is in a file: types of layers and head, and the bytes of weights that a forward reads."""

    layers: str
    head: str
    layer_bytes: int
    head_bytes: int


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its shape (outputs, inputs), its type, and its bytes in pieces."""

    name: str
    shape: tuple[int, ...]
    type: str
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def bytes(self) -> int:
        _, weights, size = TYPES[self.type]
        return torch.Size(self.shape).numel() // weights * size


def write_gguf(folder: Path, file: Path, ids: tuple[int, int] | None = None) -> Written:
    """Write the language model of a quantized checkpoint, with these ids only; None: all.

    ValueError where llama.cpp has no such layers.
    """
    config = json.loads((folder / "config.json").read_text())
    text, scheme = config["text_config"], config.get("quantization_config")
    if scheme is None:
        raise ValueError(f"{folder} is not quantized; make one that is by `emu3 quantize`")
    layers, head = ("Q4_0", "Q6_K") if scheme["bits"] == 4 else ("Q8_0", "Q8_0")
    headers = read_headers(folder)
    lo, hi = ids or (0, text["vocab_size"])
    text = text | {"vocab_size": hi - lo}
    entries = list(_entries(headers, text, layers, head, lo))
    with file.open("wb") as stream:
        _write_header(stream, _settings(text, layers), entries)
        for entry in entries:
            begin = stream.tell()
            for piece in entry.pieces():
                stream.write(piece.contiguous().view(torch.uint8).numpy().data)
            assert stream.tell() - begin == entry.bytes, (entry.name, stream.tell() - begin, entry.bytes)
            _pad(stream)
    sizes = {entry.name: entry.bytes for entry in entries}
    in_layers = sum(size for name, size in sizes.items() if name.startswith("blk."))
    return Written(layers, head, in_layers, sizes["output.weight"])


def _settings(text: dict[str, object], layers: str) -> dict[str, object]:
    heads = text["num_attention_heads"]
    rope = text["rope_parameters"]
    assert isinstance(heads, int) and isinstance(text["hidden_size"], int) and isinstance(rope, dict)
    return {
        "general.architecture": "llama",
        "general.file_type": FILE_TYPES[layers],
        "tokenizer.ggml.model": "no_vocab",
        "llama.vocab_size": text["vocab_size"],
        "llama.context_length": text["max_position_embeddings"],
        "llama.embedding_length": text["hidden_size"],
        "llama.block_count": text["num_hidden_layers"],
        "llama.feed_forward_length": text["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": text["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": text["rms_norm_eps"],
        "llama.rope.dimension_count": text["hidden_size"] // heads,
        "llama.rope.freq_base": rope["rope_theta"],
    }


def _entries(
    headers: dict[str, TensorHeader], text: dict[str, int], layers: str, head: str, lo: int
) -> Iterator[Entry]:
    def one(name: str, source: str, as_: str, rows: tuple[int, int] | None = None) -> Entry:
        shape = headers[source].shape
        start, stop = rows or (0, shape[0])
        return Entry(name, (stop - start, *shape[1:]), as_, lambda: _converted(headers, source, as_, start, stop))

    ids = lo, lo + text["vocab_size"]
    yield one("token_embd.weight", "model.text_model.embed_tokens.weight", "BF16", ids)
    yield one("output_norm.weight", "model.text_model.norm.weight", "F32")
    yield one("output.weight", "lm_head.weight", head, ids)
    for number in range(text["num_hidden_layers"]):
        ours, theirs = f"model.text_model.layers.{number}", f"blk.{number}"
        yield one(f"{theirs}.attn_norm.weight", f"{ours}.input_layernorm.weight", "F32")
        yield one(f"{theirs}.ffn_norm.weight", f"{ours}.post_attention_layernorm.weight", "F32")
        for part, name in PARTS.items():
            heads = {"attn_q": text["num_attention_heads"], "attn_k": text["num_key_value_heads"]}.get(name)
            yield _layer(f"{theirs}.{name}.weight", f"{ours}.{part}", headers, layers, heads)


def _layer(name: str, source: str, headers: dict[str, TensorHeader], as_: str, heads: int | None) -> Entry:
    weight, scales = headers[f"{source}.weight"], headers.get(f"{source}.scales")
    if scales is None:
        raise ValueError(f"{source} is not quantized, so llama.cpp cannot be given the same")
    blocks, size, _ = weight.shape
    shape = 16 * blocks, size * (8 if as_ == "Q4_0" else 4)

    def pieces() -> Iterator[Tensor]:
        packed = (_q4_0 if as_ == "Q4_0" else _q8_0)(_read(weight), _read(scales))
        if heads is not None:
            # llama.cpp turns neighbours by an angle, in place of number d and d + D / 2 of a head.
            packed = packed.view(heads, 2, -1, packed.shape[-1]).transpose(1, 2)
        yield packed

    return Entry(name, shape, as_, pieces)


def _q4_0(weight: Tensor, scales: Tensor) -> Tensor:
    """Rows of blocks: a scale in 16 bits, then 32 weights, of which k and k + 16 share a byte, as they do here."""
    blocks, size, _ = weight.shape
    groups = size // 4
    halves = weight.view(blocks, groups, 4, 16, 4).permute(0, 3, 1, 2, 4).reshape(blocks, 16, groups, 16)
    each = scales.transpose(1, 2).repeat_interleave(groups // scales.shape[1], 2)[..., None]
    return torch.cat([each.contiguous().view(torch.uint8), halves], -1).view(16 * blocks, -1)


def _q8_0(weight: Tensor, scales: Tensor) -> Tensor:
    """Rows of blocks: a scale in 16 bits, then 32 weights."""
    blocks, size, _ = weight.shape
    whole = weight.view(blocks, size, 16, 4).transpose(1, 2).reshape(16 * blocks, size // 8, 32) ^ 128  # less 128
    each = scales.half()[:, None, None].expand(-1, size // 8, -1)
    return torch.cat([each.contiguous().view(torch.uint8), whole], -1).view(16 * blocks, -1)


def _read(header: TensorHeader) -> Tensor:
    with safe_open(header.file, framework="pt") as opened:
        return opened.get_tensor(header.name)


def _converted(headers: dict[str, TensorHeader], name: str, as_: str, begin: int, end: int) -> Iterator[Tensor]:
    header, scales = headers[name], headers.get(name.removesuffix("weight") + "scales")  # a head in 8 bits has such
    convert = {
        "F32": lambda rows: rows.float(),
        "BF16": lambda rows: rows.bfloat16(),
        "Q8_0": to_q8_0,
        "Q6_K": to_q6_k,
    }[as_]
    with safe_open(header.file, framework="pt") as opened:
        part = opened.get_slice(header.name)
        for start in range(begin, end, ROWS):
            rows = part[start : min(start + ROWS, end)]
            yield convert(rows if scales is None else rows * _read(scales)[start : start + len(rows), None])


def to_q8_0(rows: Tensor) -> Tensor:
    """Quantize (outputs, inputs) to blocks of 34 bytes: a scale for each 32 weights."""
    groups = rows.float().unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    whole = (groups / scale.clamp_min(1e-30)).round_().to(torch.int8)
    return torch.cat([scale.half().view(torch.uint8), whole.view(torch.uint8)], -1)


def to_q6_k(rows: Tensor) -> Tensor:
    """Quantize (outputs, inputs) to blocks of 210 bytes: 256 weights, a scale for each 16, a scale of the scales."""
    groups = rows.float().view(len(rows), -1, 16, 16)
    largest = groups.gather(3, groups.abs().argmax(3, keepdim=True))[..., 0] / -32
    outer = (largest.abs().amax(2, keepdim=True) / 127).half()
    inner = (largest / outer.float().clamp_min(1e-30)).round_().clamp_(-127, 127)
    step = (inner * outer.float())[..., None]
    whole = torch.where(step == 0, 0.0, groups / step).round_().clamp_(-32, 31).add_(32).to(torch.uint8)
    # Of each 128 weights, number l, l + 32, l + 64 and l + 96 are in the same bytes: low halves, then upper two bits.
    a, b, c, d = whole.reshape(len(rows), -1, 2, 4, 32).unbind(3)
    low = torch.stack([a & 15 | (c & 15) << 4, b & 15 | (d & 15) << 4], 3).flatten(2)
    high = (a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6).flatten(2)
    return torch.cat([low, high, inner.to(torch.int8).view(torch.uint8), outer.view(torch.uint8)], -1)


def _write_header(stream: BinaryIO, settings: dict[str, object], entries: list[Entry]) -> None:
    """Magic, counts, settings, then for each tensor its name, shape, type and place behind the header."""
    stream.write(b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(settings)))
    for name, value in settings.items():
        stream.write(_string(name))
        if isinstance(value, str):
            stream.write(struct.pack("<I", 8) + _string(value))
        elif isinstance(value, float):
            stream.write(struct.pack("<If", 6, value))
        else:
            stream.write(struct.pack("<II", 4, value))
    place = 0
    for entry in entries:
        stream.write(_string(entry.name))
        stream.write(struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *reversed(entry.shape)))
        stream.write(struct.pack("<IQ", TYPES[entry.type][0], place))
        place += -(-entry.bytes // ALIGNMENT) * ALIGNMENT
    _pad(stream)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _pad(stream: BinaryIO) -> None:
    stream.write(bytes(-stream.tell() % ALIGNMENT))
