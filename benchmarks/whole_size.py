"""Writes a checkpoint of the released size with random weights: `python benchmarks/whole_size.py FOLDER`.

8.76 billion parameters in bfloat16 in the documented layout, 17.5 GB, with a tokenizer of the released size. Nothing of
it is trained: it is for measuring what loading and drawing cost. Takes about a minute and 4 GB of memory. With
`--layers 2` it has two decoder layers in place of 32, and 3.9 GB.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedTokenizerBase

from emu3 import Emu3Config, Emu3ForConditionalGeneration, Emu3ImageProcessor, Emu3Processor
from emu3.tokenization import RELEASED_TOKENS, read_tiktoken, visual_token, vocabulary_map

RANKS = 151_643
CODES = 32_768
# Numbers of one random block, which large tensors repeat; prime, so that no two rows of a matrix are alike.
BLOCK = 4_000_037


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32, help="decoder layers")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True)
    tokenizer = write_tokenizer()
    config = Emu3Config(
        text_config={"num_hidden_layers": arguments.layers},
        vocabulary_map=vocabulary_map(tokenizer),
        architectures=["Emu3ForConditionalGeneration"],
        dtype="bfloat16",
    )
    pictures = Emu3ImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    Emu3Processor(pictures, tokenizer, image_area=720 * 720).save_pretrained(folder)
    write_weights(config, folder)
    config.save_pretrained(folder)


def write_tokenizer() -> PreTrainedTokenizerBase:
    """The released layout: all bytes, all pairs of bytes, as many of three as there is room for, then the others."""
    pieces = itertools.chain.from_iterable(itertools.product(range(256), repeat=length) for length in (1, 2, 3))
    tokens = map(bytes, itertools.islice(pieces, RANKS))
    lines = (base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens))
    with TemporaryDirectory() as folder:
        ranks, visual = Path(folder) / "emu3.tiktoken", Path(folder) / "emu3_vision_tokens.txt"
        ranks.write_bytes(b"".join(lines))
        surfaces = ("<|image token|>", "<|image start|>", "<|image end|>", *map(visual_token, range(CODES)))
        visual.write_text("\n".join(surfaces), encoding="utf-8")
        tokenizer = read_tiktoken(ranks, visual)
    assert len(tokenizer) == RANKS + len(RELEASED_TOKENS) + len(surfaces)
    return tokenizer


def write_weights(config: Emu3Config, folder: Path) -> None:
    """Shard by shard; tensors of one shape have the same numbers, so that each is made once."""
    with torch.device("meta"):
        tensors = Emu3ForConditionalGeneration(config).to(torch.bfloat16).state_dict()
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=2 * 10**9
    )
    generator = torch.Generator().manual_seed(0)
    for file, names in split.filename_to_tensors.items():
        # Wide elements first, so that each tensor begins at a multiple of its element's size.
        names = sorted(names, key=lambda name: -tensors[name].itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # 8 bytes: n | n bytes of JSON: name -> dtype, shape, span of bytes | the tensors, without gaps.
        for name in names:
            start, end = end, end + tensors[name].nbytes
            dtype = "BF16" if tensors[name].is_floating_point() else "I64"
            header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        made: dict[tuple[object, ...], memoryview] = {}
        with (folder / file).open("wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            for name in names:
                ones = name.endswith(("weight", "running_var"))
                key = (tensors[name].dtype, tensors[name].shape, ones)
                if key not in made:
                    made[key] = numbers(tensors[name], ones, generator)
                stream.write(made[key])
        print(folder / file, flush=True)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def numbers(tensor: torch.Tensor, ones: bool, generator: torch.Generator) -> memoryview:
    """Ones for the weights of norms, zeros for biases and counters, else about normal with a deviation of 0.02."""
    if tensor.ndim < 2:
        whole = torch.full(tensor.shape, float(ones)).to(tensor.dtype)
    else:
        block = (torch.randn(min(BLOCK, tensor.numel()), generator=generator) * 0.02).to(tensor.dtype)
        whole = block.repeat(-(-tensor.numel() // len(block)))[: tensor.numel()]
    return whole.reshape(-1).view(torch.uint8).numpy().data


if __name__ == "__main__":
    main()
