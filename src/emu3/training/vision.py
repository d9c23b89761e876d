"""Training the vision tokenizer: reconstruction, commitment, and a codebook that is found or designed.

Found: first an autoencoder without quantization, then k-means of its latents as the first codebook, then vector
quantization with straight-through gradients (arXiv 1711.00937), the codebook following its members by exponential
moving averages, codes that nobody uses restarted at latents that lie far from their code.

Designed: the code of every cell is given (`Design`), the encoder is trained towards these codes and the decoder from
them. To the model that comes out it is a codebook like any other.

Shapes: B batch, C channels, H W pixels, h w code rows and columns, T = 1, E code dimensions, N vectors, K codes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emu3.configuration import Emu3VQVAEConfig
from emu3.icons.scenes import (
    BACKGROUNDS,
    COLORS,
    LATTICE,
    TASKS,
    Scene,
    SceneObject,
    contains_held_out,
    render,
    sample_scene,
)
from emu3.icons.sprites import ICON, NOUNS
from emu3.modeling.vision import Emu3VQVAE
from emu3.training.ahead import made_ahead
from emu3.training.codebook import CodebookAverages, Design, k_means
from emu3.training.precision import autocast, training_device
from emu3.training.state import Log, load_state, save_state

# Height and width of a batch: mostly the square, sometimes another ratio of the same area.
SIZES = ((48, 48),) * 6 + ((40, 56), (56, 40), (36, 64), (64, 36))


@dataclass(frozen=True)
class VisionRecipe:
    """One run. Steps count batches; sizes are pixels.

    Attributes:
        model: arguments of `Emu3VQVAEConfig`.
        seed: of weights and data.
        steps, batch_size: length of the run.
        sizes: height and width of the pictures of a batch are one of these.
        continuous_steps: steps without quantization at the start, where the codebook is found.
        learning_rate: peak; warm-up over 100 steps, then cosine to a twentieth.
        commitment: weight of the pull of latents towards their codes.
        codebook_decay: of the moving averages that find a codebook.
        restart_below: a code whose average use a batch falls below this is restarted, where the codebook is found.
        shapes: of a designed codebook; None: it is found.
        report_every, save_every: steps.
    """

    model: dict[str, Any]
    seed: int = 0
    steps: int = 6000
    batch_size: int = 32
    sizes: Sequence[Sequence[int]] = SIZES
    continuous_steps: int = 1500
    learning_rate: float = 1e-3
    commitment: float = 0.25
    codebook_decay: float = 0.99
    restart_below: float = 0.02
    shapes: int | None = None
    report_every: int = 50
    save_every: int = 500


def crowd(rng: np.random.Generator, height: int, width: int) -> Scene:
    """A scene as full as eight tries make it, nothing held out: more glyphs a pixel than the tasks' scenes have."""
    scene = Scene((), list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))], height, width)
    for _ in range(8):
        thing = SceneObject(
            NOUNS[rng.integers(len(NOUNS))],
            list(COLORS)[rng.integers(len(COLORS))],
            LATTICE * int(rng.integers((width - ICON) // LATTICE + 1)),
            LATTICE * int(rng.integers((height - ICON) // LATTICE + 1)),
        )
        if all(max(abs(thing.x - other.x), abs(thing.y - other.y)) >= ICON for other in scene.objects):
            fuller = replace(scene, objects=(*scene.objects, thing))
            scene = scene if contains_held_out(fuller) else fuller
    return scene


def training_scenes(sizes: Sequence[Sequence[int]], seed: int, step: int, count: int) -> list[Scene]:
    """The scenes of one step, all of one of the sizes, nothing held out."""
    rng = np.random.default_rng([seed, step])
    height, width = sizes[int(rng.integers(len(sizes)))]
    tasks = [TASKS[index] for index in rng.integers(len(TASKS), size=count)]
    return [
        crowd(rng, height, width) if index % 2 else sample_scene(task, rng, "train", height, width)
        for index, task in enumerate(tasks)
    ]


def batch(recipe: VisionRecipe, design: Design | None, step: int) -> tuple[Tensor, Tensor | None]:
    """The pictures (B, C, H, W) of a step, and their codes (B, h, w) by the design."""
    scenes = training_scenes(recipe.sizes, recipe.seed, step, recipe.batch_size)
    codes = None if design is None else torch.from_numpy(np.stack([design.codes(scene) for scene in scenes]))
    return pixels_of(scenes), codes


def pixels_of(scenes: list[Scene]) -> Tensor:
    """Rendered scenes, float (B, C, H, W) in [-1, 1]."""
    pictures = np.stack([render(scene) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def psnr(pixels: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], mean over pictures."""
    error_B = (pixels.clamp(-1, 1) - target).square().flatten(1).mean(1).clamp_min(1e-10)
    return float((10 * torch.log10(4.0 / error_B)).mean())


class Trainee(nn.Module):
    """The tokenizer with its codebook averages: what a state file holds."""

    def __init__(self, config: Emu3VQVAEConfig) -> None:
        super().__init__()
        self.tokenizer = Emu3VQVAE(config)
        self.tokenizer.frozen = False
        self.averages = CodebookAverages(config.codebook_size, config.embed_dim)

    def start_codebook(self, recipe: VisionRecipe) -> None:
        """k-means of the latents of 64 batches."""
        found = []
        codebook = self.tokenizer.quantize.embedding.weight
        with torch.no_grad(), autocast():
            for index in range(64):
                pixels = pixels_of(training_scenes(recipe.sizes, recipe.seed + 1, index, recipe.batch_size))
                latents = self.tokenizer.latents(pixels.to(codebook.device))[1]
                found.append(latents.float().movedim(2, -1).flatten(0, -2)[::4])
        codebook.data.copy_(k_means(torch.cat(found), len(codebook)))
        self.averages.start(codebook.data)

    def losses(
        self, pixels_BCHW: Tensor, recipe: VisionRecipe, quantized: bool, codes_Bhw: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and reconstruction of a batch, towards codes if some are given.

        Without, the codebook moves when `quantized` and training.
        """
        codebook = self.tokenizer.quantize.embedding.weight
        commitment = pixels_BCHW.new_zeros(())
        with autocast():
            latents = self.tokenizer.latents(pixels_BCHW)[1].float()
        passed = latents
        if codes_Bhw is not None:
            passed = codebook.detach()[codes_Bhw].movedim(-1, 1)[:, None]
            commitment = F.mse_loss(latents, passed)
        elif quantized:
            codes = self.tokenizer.quantize(latents.detach())
            vectors = codebook.detach()[codes].movedim(-1, 2)
            commitment = F.mse_loss(latents, vectors)
            passed = latents + (vectors - latents).detach()
            if self.training:
                flat_NE = latents.detach().movedim(2, -1).flatten(0, -2)
                self.averages.update(
                    codebook.data, flat_NE, codes.flatten(), recipe.codebook_decay, recipe.restart_below
                )
        with autocast():
            pixels = self.tokenizer.pixels(passed, single=True).float()
        reconstruction = F.mse_loss(pixels, pixels_BCHW) + 0.2 * F.l1_loss(pixels, pixels_BCHW)
        return reconstruction + recipe.commitment * commitment, pixels


def learning_rate(recipe: VisionRecipe, step: int) -> float:
    """The rate of a step: rising, then falling as a cosine."""
    warm = min(1.0, (step + 1) / 100)
    return recipe.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))


def train(recipe: VisionRecipe, folder: Path) -> None:
    """Runs the recipe to its end, from its last saved state if any; leaves the tokenizer in `folder/vision`."""
    torch.manual_seed(recipe.seed)
    config = Emu3VQVAEConfig(**recipe.model)
    trainee = Trainee(config)
    tokenizer = trainee.tokenizer
    design = None if recipe.shapes is None else Design.of(recipe.shapes)
    if design is not None:
        size, dimensions = design.codebook_KE.shape
        if (config.codebook_size, config.embed_dim) != (size, dimensions):
            raise ValueError(
                f"shapes={recipe.shapes} makes {size} codes of {dimensions} dimensions; set codebook_size to {size}, "
                f"embed_dim and latent_channels to {dimensions}"
            )
        tokenizer.quantize.embedding.weight.data.copy_(design.codebook_KE)
    device = training_device()
    trainee.to(device)
    learned = [parameter for name, parameter in tokenizer.named_parameters() if not name.startswith("quantize.")]
    optimizer = torch.optim.AdamW(learned, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    step = load_state(folder, trainee, [optimizer])
    log = Log(folder)
    log.begin(step, recipe.steps, recipe.report_every)
    began, seen = time.monotonic(), step
    trainee.train()
    for pixels, codes in made_ahead(partial(batch, recipe, design), range(step, recipe.steps)):
        # What is drawn at random depends on the step alone, so that a resumed run goes on bit for bit.
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        if design is None and step == recipe.continuous_steps:
            trainee.start_codebook(recipe)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        pixels = pixels.to(device)
        codes = None if codes is None else codes.to(device)
        loss, output = trainee.losses(pixels, recipe, step >= recipe.continuous_steps, codes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        step += 1
        if step % recipe.report_every == 0:
            in_use = {} if design else {"codes_in_use": int((trainee.averages.uses > recipe.restart_below).sum())}
            log.write(
                step=step,
                loss=float(loss.detach()),
                psnr=psnr(output.detach(), pixels),
                **in_use,
                pictures_per_second=(step - seen) * recipe.batch_size / (time.monotonic() - began),
            )
        if step % recipe.save_every == 0 or step == recipe.steps:
            save_state(folder, step, trainee, [optimizer])
    trainee.eval()
    tokenizer.save_pretrained(folder / "vision")
    with torch.no_grad():
        pixels = pixels_of(training_scenes(recipe.sizes, recipe.seed + 2, 0, 256)).to(device)
        _, output = trainee.losses(pixels, recipe, True)
        log.write(step=step, evaluation_psnr=psnr(output, pixels))
