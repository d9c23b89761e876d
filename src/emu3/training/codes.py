"""Scenes encoded once: the vision tokenizer is frozen, so a language model need not run it again each epoch.

Only the codes are stored, one safetensors file a source; scenes are drawn again from their seed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from safetensors.numpy import load_file, save_file
from torch import Tensor

from emu3.icons.scenes import TASKS, Scene, Task, render, sample_scene
from emu3.modeling.vision import Emu3VQVAE
from emu3.training.ahead import made_ahead

BATCH = 64


@dataclass(frozen=True)
class SceneSource:
    """Scenes of one picture size, each a pure function of its index.

    Attributes:
        seed: of all its scenes.
        count: how many different ones there are.
        height, width: in pixels.
        tasks: which of `TASKS` they are sampled for, in equal shares.
    """

    seed: int
    count: int
    height: int = 48
    width: int = 48
    tasks: tuple[Task, ...] = TASKS

    def scene(self, index: int) -> tuple[Task, Scene]:
        """Scene `index`, and the task that it was sampled for."""
        rng = np.random.default_rng([self.seed, self.height, self.width, index])
        task = self.tasks[rng.integers(len(self.tasks))]
        return task, sample_scene(task, rng, "train", self.height, self.width)

    @property
    def name(self) -> str:
        """Names the file of its codes."""
        tasks = "all" if self.tasks == TASKS else "-".join(self.tasks)
        return f"{self.height}x{self.width}-{tasks}-{self.count}-{self.seed}"


def pictures(source: SceneSource, start: int) -> Tensor:
    """Up to 64 pictures of a source from index `start` on, uint8 (B, H, W, 3)."""
    indices = range(start, min(start + BATCH, source.count))
    return torch.from_numpy(np.stack([render(source.scene(index)[1]) for index in indices]))


@torch.no_grad()
def encoded(tokenizer: Emu3VQVAE, source: SceneSource, folder: Path) -> NDArray[np.int16]:
    """Codes (count, h, w) of a source, from `folder` where an earlier call with the same tokenizer stored them."""
    digest = hashlib.sha256()
    for tensor in tokenizer.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    path = folder / f"codes-{source.name}-{digest.hexdigest()[:8]}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        parts = []
        device = tokenizer.quantize.embedding.weight.device
        starts = range(0, source.count, BATCH)
        drawn = made_ahead(partial(pictures, source), starts)
        for pictures_BHWC in track(drawn, total=len(starts), description=f"encoding {source.name}"):
            pixels = pictures_BHWC.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            codes = tokenizer.quantize(tokenizer.latents(pixels)[1])[:, 0]
            parts.append(codes.cpu().numpy().astype(np.int16))
        save_file({"codes": np.concatenate(parts)}, path)
    return load_file(path)["codes"]
