"""Training the vision tokenizer: reconstruction, commitment, and a codebook kept by moving averages.

Two things make codes easy to predict for a language model. They are local: each picture is encoded a second time with
one side replaced by another picture's, and latents on the kept side are pulled together, so that a glyph has the same
codes wherever it stands and plain background needs a handful of codes. And the codebook goes where the error is:
unused codes restart at latents that lie far from their code.

First an autoencoder without quantization, then k-means of its latents as the first codebook, then vector quantization
with straight-through gradients (arXiv 1711.00937), the codebook following its members by exponential moving averages,
codes that nobody uses restarted.

Shapes: B batch, C channels, H W pixels, h w code rows and columns, T = 1, E code dimensions, N vectors, K codes.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emu3.configuration import Emu3VQVAEConfig
from emu3.data.scenes import (
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
from emu3.data.sprites import ICON, NOUNS
from emu3.modeling.vision import Emu3VQVAE
from emu3.training.precision import autocast
from emu3.training.state import Log, load_state, save_state


@dataclass(frozen=True)
class VisionRecipe:
    """One run. Steps count batches; sizes are pixels.

    Attributes:
        model: arguments of `Emu3VQVAEConfig`.
        seed: of weights and data.
        steps, batch_size: length of the run.
        continuous_steps: steps without quantization at the start.
        learning_rate: peak; warm-up over 100 steps, then cosine to a twentieth.
        commitment: weight of the pull of latents towards their codes.
        codebook_decay: of the moving averages.
        restart_below: a code whose average use a batch falls below this is restarted.
        locality: weight of the pull between latents of a picture and of its half-replaced twin.
        start_from: folder with a trained tokenizer, relative to the output folder, whose weights but not whose
            codebook to start from; None: from scratch.
        report_every, save_every: steps.
    """

    model: dict[str, Any]
    seed: int = 0
    steps: int = 6000
    batch_size: int = 32
    continuous_steps: int = 1500
    learning_rate: float = 1e-3
    commitment: float = 0.25
    codebook_decay: float = 0.99
    restart_below: float = 0.02
    locality: float = 0.0
    start_from: str | None = None
    report_every: int = 50
    save_every: int = 500


# Height and width of a batch: mostly the square, sometimes another ratio of the same area.
SIZES = ((48, 48),) * 6 + ((40, 56), (56, 40), (36, 64), (64, 36))


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


def scene_batch(seed: int, step: int, size: int) -> Tensor:
    """Rendered training scenes of one step, float (B, C, H, W) in [-1, 1]."""
    rng = np.random.default_rng([seed, step])
    height, width = SIZES[rng.integers(len(SIZES))]
    tasks = [TASKS[index] for index in rng.integers(len(TASKS), size=size)]
    scenes = [
        crowd(rng, height, width) if index % 2 else sample_scene(task, rng, "train", height, width)
        for index, task in enumerate(tasks)
    ]
    pictures = np.stack([render(scene) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def psnr(pixels: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], mean over pictures."""
    error_B = (pixels.clamp(-1, 1) - target).square().flatten(1).mean(1).clamp_min(1e-10)
    return float((10 * torch.log10(4.0 / error_B)).mean())


class CodebookAverages(nn.Module):
    """Moving averages of how often each code is used, and of the sum of its members."""

    def __init__(self, codes: int, dimensions: int) -> None:
        super().__init__()
        self.uses = nn.Buffer(torch.ones(codes))
        self.sums = nn.Buffer(torch.zeros(codes, dimensions))

    @torch.no_grad()
    def start(self, codebook_KE: Tensor) -> None:
        self.uses.fill_(1.0)
        self.sums.copy_(codebook_KE)

    @torch.no_grad()
    def update(
        self, codebook_KE: Tensor, latents_NE: Tensor, codes_N: Tensor, decay: float, restart_below: float
    ) -> None:
        uses = torch.zeros_like(self.uses).index_add_(0, codes_N, torch.ones_like(codes_N, dtype=self.uses.dtype))
        self.uses.lerp_(uses, 1 - decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, codes_N, latents_NE), 1 - decay)
        codebook_KE.copy_(self.sums / self.uses.clamp_min(1e-5)[:, None])
        dead = (self.uses < restart_below).nonzero().flatten()
        if len(dead):
            codebook_KE[dead] = far_members(latents_NE, codebook_KE[codes_N], len(dead))
            self.uses[dead] = 1.0
            self.sums[dead] = codebook_KE[dead]


def far_members(vectors_NE: Tensor, centres_NE: Tensor, count: int) -> Tensor:
    """`count` of the vectors, drawn with odds that grow with the squared distance from their centre (k-means++)."""
    odds = (vectors_NE - centres_NE).square().sum(1) + 1e-12
    return vectors_NE[odds.multinomial(count, replacement=True)]


@torch.no_grad()
def k_means(vectors_NE: Tensor, clusters: int, rounds: int = 20) -> Tensor:
    """Centres (K, E) of `vectors_NE`; empty clusters restart at far members.

    Started by k-means++ (Arthur & Vassilvitskii, 2007): most latents are plain background, so random members would
    spend most of the codebook on it.
    """
    first = vectors_NE[torch.randint(len(vectors_NE), (1,))]
    chosen, distances_N = [first], (vectors_NE - first).square().sum(1)
    for _ in range(clusters - 1):
        chosen.append(vectors_NE[(distances_N + 1e-12).multinomial(1)])
        distances_N = torch.minimum(distances_N, (vectors_NE - chosen[-1]).square().sum(1))
    centres = torch.cat(chosen)
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in vectors_NE.split(4096)])
        counts = torch.bincount(nearest, minlength=clusters)
        centres = torch.zeros_like(centres).index_add_(0, nearest, vectors_NE) / counts.clamp_min(1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            centres[empty] = far_members(vectors_NE, centres[nearest], len(empty))
    return centres


def half_replaced(pixels_BCHW: Tensor, rng: np.random.Generator) -> tuple[Tensor, tuple[slice, slice]]:
    """Each picture with its top or left part replaced by another's, and the rows and columns of codes that are kept.

    The kept part begins one code behind the seam, where pixels of both sides meet in one code's neighbourhood.
    """
    axis = int(rng.integers(2))
    cells = pixels_BCHW.shape[2 + axis] // LATTICE
    seam = int(rng.integers(cells // 4, cells * 3 // 4))
    pieces = [slice(None)] * 4
    pieces[2 + axis] = slice(0, seam * LATTICE)
    twins = pixels_BCHW.clone()
    twins[tuple(pieces)] = pixels_BCHW.roll(1, 0)[tuple(pieces)]
    kept = [slice(None), slice(None)]
    kept[axis] = slice(seam + 1, None)
    return twins, (kept[0], kept[1])


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
        with torch.no_grad(), autocast():
            for index in range(64):
                latents = self.tokenizer.latents(scene_batch(recipe.seed + 1, index, recipe.batch_size))[1]
                found.append(latents.float().movedim(2, -1).flatten(0, -2)[::4])
        codebook = self.tokenizer.quantize.embedding.weight
        codebook.data.copy_(k_means(torch.cat(found), len(codebook)))
        self.averages.start(codebook.data)

    def losses(
        self, pixels_BCHW: Tensor, recipe: VisionRecipe, quantized: bool, rng: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and reconstruction of a batch; moves the codebook when `quantized` and training. `rng` places seams."""
        commitment = locality = pixels_BCHW.new_zeros(())
        with autocast():
            if recipe.locality and rng is not None:
                twins, (rows, columns) = half_replaced(pixels_BCHW, rng)
                both = self.tokenizer.latents(torch.cat((pixels_BCHW, twins)))[1].float()
                latents, twin_latents = both.chunk(2)
                apart = (latents - twin_latents)[..., rows, columns]
                locality = apart.square().mean() / latents.detach().var()
            else:
                latents = self.tokenizer.latents(pixels_BCHW)[1].float()
        passed = latents
        if quantized:
            codes = self.tokenizer.quantize(latents.detach())
            codebook = self.tokenizer.quantize.embedding.weight
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
        return reconstruction + recipe.commitment * commitment + recipe.locality * locality, pixels


def learning_rate(recipe: VisionRecipe, step: int) -> float:
    warm = min(1.0, (step + 1) / 100)
    return recipe.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))


def train(recipe: VisionRecipe, folder: Path) -> None:
    """Runs the recipe to its end, from its last saved state if any; leaves the tokenizer in `folder/vision`."""
    torch.manual_seed(recipe.seed)
    trainee = Trainee(Emu3VQVAEConfig(**recipe.model))
    tokenizer = trainee.tokenizer
    if recipe.start_from is not None:
        start = Emu3VQVAE.from_pretrained((folder / recipe.start_from).resolve()).state_dict()
        learned_before = {name: tensor for name, tensor in start.items() if not name.startswith("quantize.")}
        tokenizer.load_state_dict({**tokenizer.state_dict(), **learned_before})
    learned = [parameter for name, parameter in tokenizer.named_parameters() if not name.startswith("quantize.")]
    optimizer = torch.optim.AdamW(learned, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    step = load_state(folder, trainee, [optimizer])
    log = Log(folder)
    began, seen = time.monotonic(), step
    trainee.train()
    while step < recipe.steps:
        # What is drawn at random depends on the step alone, so that a resumed run goes on bit for bit.
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        if step == recipe.continuous_steps:
            trainee.start_codebook(recipe)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        pixels = scene_batch(recipe.seed, step, recipe.batch_size)
        seams = np.random.default_rng([recipe.seed, step, 1])
        loss, output = trainee.losses(pixels, recipe, step >= recipe.continuous_steps, seams)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        step += 1
        if step % recipe.report_every == 0:
            log.write(
                step=step,
                loss=float(loss.detach()),
                psnr=psnr(output.detach(), pixels),
                codes_in_use=int((trainee.averages.uses > recipe.restart_below).sum()),
                pictures_per_second=(step - seen) * recipe.batch_size / (time.monotonic() - began),
            )
        if step % recipe.save_every == 0 or step == recipe.steps:
            save_state(folder, step, trainee, [optimizer])
    trainee.eval()
    tokenizer.save_pretrained(folder / "vision")
    with torch.no_grad():
        pixels = scene_batch(recipe.seed + 2, 0, 256)
        log.write(step=step, evaluation_psnr=psnr(trainee.losses(pixels, recipe, True)[1], pixels))
