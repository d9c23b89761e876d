"""Training a vision tokenizer: reconstruction, commitment, and a codebook that is learned or given.

Learned: first an autoencoder without quantization, then k-means of its latents as the first codebook, then vector
quantization with straight-through gradients (arXiv 1711.00937). The codebook follows the latents by moving averages.

Given: every picture comes with its codes. The encoder is trained towards these codes and the decoder from them. The
trained model has the same form as one with a learned codebook.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emu3.configuration import Emu3VQVAEConfig
from emu3.modeling.vision import Emu3VQVAE
from emu3.training.codebook import CodebookAverages, k_means
from emu3.training.loop import StepResult, run_loop
from emu3.training.machine import autocast, training_device
from emu3.training.recipe import Arguments, RunSettings
from emu3.training.state import write_log

PictureSource = Callable[[int, int, int], "tuple[Tensor, Tensor | None]"]
"""(count, seed, number) -> pictures (B, C, H, W) in [-1, 1] of one size, and their codes (B, H, W) where the codebook
is given; a pure function, picklable."""

WARMUP_STEPS = 100
CODEBOOK_BATCHES = 64  # whose latents give k-means the first codebook
EVALUATION_PICTURES = 256


@dataclass(frozen=True, kw_only=True)
class VisionRecipe(RunSettings):
    """One run of a vision tokenizer. Steps count batches.

    Attributes:
        model: arguments of `Emu3VQVAEConfig`.
        batch_size: pictures of a part.
        continuous_steps: steps without quantization at the start, where the codebook is learned.
        learning_rate: the highest; it rises over 100 steps, then falls as a cosine to a twentieth.
        commitment: weight of the pull of latents towards their codes.
        codebook_decay: of the moving averages, where the codebook is learned.
        restart_below: a code whose average use a batch falls below this is restarted, where the codebook is learned.
    """

    model: Annotated[dict[str, Any], Arguments(Emu3VQVAEConfig)]
    batch_size: int = 32
    continuous_steps: int = 1500
    learning_rate: float = 1e-3
    commitment: float = 0.25
    codebook_decay: float = 0.99
    restart_below: float = 0.02


class PictureBatch(NamedTuple):
    """Pictures of one size, and what training knows of them.

    Attributes:
        pixels_BCHW: in [-1, 1].
        codes_BHW: where the codebook is given.
        step: of the run.
    """

    pixels_BCHW: Tensor
    codes_BHW: Tensor | None
    step: int


class VQTrainer(nn.Module):
    """A vision tokenizer with the averages of its codebook: what a state file holds."""

    def __init__(self, config: Emu3VQVAEConfig) -> None:
        super().__init__()
        self.tokenizer = Emu3VQVAE(config)
        self.tokenizer.frozen = False
        self.averages = CodebookAverages(config.codebook_size, config.embed_dim)

    @property
    def codebook(self) -> Tensor:
        """(codes, dimensions)."""
        return self.tokenizer.quantize.embedding.weight

    def set_codebook(self, codebook: Tensor) -> None:
        """Replaces the codebook (codes, dimensions). `ValueError` where it does not fit the configuration."""
        if self.codebook.shape != codebook.shape:
            size, dimensions = codebook.shape
            raise ValueError(
                f"the codebook has {size} codes of {dimensions} dimensions; set codebook_size to {size}, embed_dim and "
                f"latent_channels to {dimensions}"
            )
        self.codebook.data.copy_(codebook)

    @torch.no_grad()
    def start_codebook(self, pictures: Callable[[int], tuple[Tensor, Tensor | None]]) -> None:
        """Replaces the codebook by k-means of the latents of the first batches of `pictures`."""
        found = []
        for index in range(CODEBOOK_BATCHES):
            with autocast():
                latents = self.tokenizer.latents(pictures(index)[0].to(self.codebook.device))[1]
            found.append(latents.float().movedim(2, -1).flatten(0, -2)[::4])
        self.codebook.data.copy_(k_means(torch.cat(found), len(self.codebook)))
        self.averages.start(self.codebook.data)

    def reconstruct(
        self, pixels_BCHW: Tensor, recipe: VisionRecipe, quantized: bool, codes_BHW: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and reconstruction (B, C, H, W) of a batch.

        The decoder gets the given codes. Without them it gets the nearest codes if `quantized`, and training moves the
        codebook; otherwise it gets the latents themselves.
        """
        commitment = pixels_BCHW.new_zeros(())
        with autocast():
            latents_BTCHW = self.tokenizer.latents(pixels_BCHW)[1].float()
        decoded = latents_BTCHW
        if codes_BHW is not None:
            decoded = self.codebook.detach()[codes_BHW].movedim(-1, 1)[:, None]
            commitment = F.mse_loss(latents_BTCHW, decoded)
        elif quantized:
            codes = self.tokenizer.quantize(latents_BTCHW.detach())
            vectors = self.codebook.detach()[codes].movedim(-1, 2)
            commitment = F.mse_loss(latents_BTCHW, vectors)
            decoded = latents_BTCHW + (vectors - latents_BTCHW).detach()  # gradients pass as if nothing were rounded
            if self.training:
                flat = latents_BTCHW.detach().movedim(2, -1).flatten(0, -2)
                settings = recipe.codebook_decay, recipe.restart_below
                self.averages.update(self.codebook.data, flat, codes.flatten(), *settings)
        with autocast():
            output_BCHW = self.tokenizer.pixels(decoded, single=True).float()
        reconstruction = F.mse_loss(output_BCHW, pixels_BCHW) + 0.2 * F.l1_loss(output_BCHW, pixels_BCHW)
        return reconstruction + recipe.commitment * commitment, output_BCHW


def psnr(pixels_BCHW: Tensor, target_BCHW: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], mean over pictures."""
    error_B = (pixels_BCHW.clamp(-1, 1) - target_BCHW).square().flatten(1).mean(1).clamp_min(1e-10)
    return float((10 * torch.log10(4.0 / error_B)).mean())


def learning_rates(recipe: VisionRecipe, step: int) -> list[float]:
    """The rate of a step, of the one optimizer: rising, then falling as a cosine."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return [recipe.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))]


def train(recipe: VisionRecipe, folder: Path, trainer: VQTrainer, source: PictureSource) -> None:
    """Runs the recipe to its end, from its last saved state if any; leaves the tokenizer in `folder/vision`.

    `trainer` has its first weights and, where the source gives codes, their codebook.
    """
    objective = VisionLoss(recipe, trainer, source)
    rates = partial(learning_rates, recipe)
    make = partial(_make_batch, recipe, source)
    run_loop(recipe, folder, objective, _make_optimizers, rates, make, unit="pictures", report_means=False)
    trainer.tokenizer.save_pretrained(folder / "vision")
    with torch.no_grad():
        pixels = source(EVALUATION_PICTURES, recipe.seed + 2, 0)[0].to(training_device())
        _, output = trainer.reconstruct(pixels, recipe, True)
        print(write_log(folder, step=recipe.steps, evaluation_psnr=psnr(output, pixels)))


class VisionLoss(nn.Module):
    """The objective of a vision tokenizer."""

    def __init__(self, recipe: VisionRecipe, trainer: VQTrainer, source: PictureSource) -> None:
        super().__init__()
        self.recipe, self.trainer, self.source = recipe, trainer, source

    def forward(self, batch: PictureBatch) -> StepResult:
        """The mean loss of the pictures, which counts as one."""
        recipe, device = self.recipe, self.trainer.codebook.device
        pixels = batch.pixels_BCHW.to(device)
        codes = None if batch.codes_BHW is None else batch.codes_BHW.to(device)
        if codes is None and batch.step == recipe.continuous_steps:
            self.trainer.start_codebook(partial(self.source, recipe.batch_size, recipe.seed + 1))
        loss, output = self.trainer.reconstruct(pixels, recipe, batch.step >= recipe.continuous_steps, codes)
        one = torch.ones((), device=device)
        metrics = {"psnr": (torch.tensor(psnr(output.detach(), pixels)), one)}
        if codes is None:
            metrics["codes_in_use"] = ((self.trainer.averages.uses > recipe.restart_below).sum(), one)
        return StepResult(loss, one, metrics, len(pixels))


def _make_batch(recipe: VisionRecipe, source: PictureSource, step: int, part: int) -> PictureBatch:
    return PictureBatch(*source(recipe.batch_size, recipe.seed, step * recipe.parts + part), step)


def _make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    learned = [parameter for name, parameter in model.named_parameters() if ".quantize." not in name]
    return [torch.optim.AdamW(learned, betas=(0.9, 0.95), weight_decay=0.01, fused=True)]
