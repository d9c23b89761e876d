"""Encodes pictures once: the vision tokenizer is frozen, so the training of a language model need not run it again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from safetensors.numpy import load_file, save_file
from torch import Tensor

from emu3.data.tokenize import tokenizer_hash
from emu3.modeling.vision import Emu3VQVAE
from emu3.training.loop import prefetch
from emu3.whole import write_whole


@torch.no_grad()
def encode(
    tokenizer: Emu3VQVAE, read_pictures: Callable[[int], Tensor], starts: range, name: str, folder: Path
) -> NDArray[np.signedinteger[Any]]:
    """Codes (pictures, H, W) of pictures of one size, stored in a safetensors file in `folder`.

    A later call with the same name and the same tokenizer reads that file.

    Args:
        tokenizer: the vision tokenizer.
        read_pictures: (start) -> pictures from an index on, uint8 (B, height, width, 3); picklable.
        starts: the indices to call it with.
        name: of the pictures, part of the file's name.
        folder: for the file.
    """
    path = folder / f"codes-{name}-{tokenizer_hash(tokenizer)[:8]}.safetensors"
    if not path.exists():
        dtype = smallest_dtype(tokenizer.config.codebook_size)
        device = tokenizer.quantize.embedding.weight.device
        parts = []
        batches = prefetch(read_pictures, [(start,) for start in starts])
        for pictures_BHWC in track(batches, total=len(starts), description=f"encoding {name}"):
            codes_BHW = tokenizer.quantize(tokenizer.latents(to_pixels(pictures_BHWC.to(device)))[1])[:, 0]
            parts.append(codes_BHW.cpu().numpy().astype(dtype))
        write_whole(path, lambda fresh: save_file({"codes": np.concatenate(parts)}, fresh))
    return load_file(path)["codes"]


def to_pixels(pictures_BHWC: Tensor) -> Tensor:
    """uint8 pictures as a network's input: float (B, C, H, W) in [-1, 1]."""
    return pictures_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def smallest_dtype(codebook_size: int) -> type[np.signedinteger[Any]]:
    """int16, or int32 where the codebook has more than 32,768 codes."""
    return np.int16 if codebook_size <= 2**15 else np.int32
