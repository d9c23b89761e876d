"""Scenes encoded once: the vision tokenizer is frozen, so a language model need not run it again each epoch.

A scene is a pure function of (seed, index); only its codes are stored, one safetensors file a picture size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from emu3.data.scenes import TASKS, Scene, Task, render, sample_scene
from emu3.modeling.vision import Emu3VQVAE

# Height and width: mostly the square, sometimes another ratio of about the same area.
SIZES = ((48, 48), (40, 56), (56, 40), (36, 64), (64, 36))
SQUARE_SHARE = 0.84
BATCH = 64


def training_scene(seed: int, size: int, index: int) -> tuple[Task, Scene]:
    """Scene `index` of picture size number `size`, and the task that it was sampled for."""
    rng = np.random.default_rng([seed, size, index])
    task = TASKS[rng.integers(len(TASKS))]
    return task, sample_scene(task, rng, "train", *SIZES[size])


@dataclass(frozen=True)
class EncodedScenes:
    """Codes (scenes, h, w) for each entry of `SIZES`, of the scenes that `training_scene` gives for `seed`."""

    seed: int
    codes: list[NDArray[np.int16]]

    def scene(self, size: int, index: int) -> tuple[Task, Scene, NDArray[np.int16]]:
        task, scene = training_scene(self.seed, size, index)
        return task, scene, self.codes[size][index]


@torch.no_grad()
def encode_scenes(tokenizer: Emu3VQVAE, seed: int, count: int, folder: Path) -> EncodedScenes:
    """Codes of `count` scenes, from `folder` where they were stored by an earlier call."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for size, (height, width) in enumerate(SIZES):
        scenes = int(count * (SQUARE_SHARE if size == 0 else (1 - SQUARE_SHARE) / (len(SIZES) - 1)))
        path = folder / f"codes-{height}x{width}-{scenes}-{seed}.safetensors"
        if not path.exists():
            batches = []
            for start in tqdm(range(0, scenes, BATCH), desc=f"encoding {height}x{width}"):
                indices = range(start, min(start + BATCH, scenes))
                pictures = np.stack([render(training_scene(seed, size, index)[1]) for index in indices])
                pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0
                batches.append(tokenizer.quantize(tokenizer.latents(pixels)[1])[:, 0].numpy().astype(np.int16))
            save_file({"codes": np.concatenate(batches)}, path)
        found.append(load_file(path)["codes"])
    return EncodedScenes(seed, found)
