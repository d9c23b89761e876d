"""The objective of a vision tokenizer: reconstruction, commitment, and a codebook that is learned, kept or given.

Learned: first an autoencoder without quantization, then k-means of its latents as the first codebook, then vector
quantization with straight-through gradients (arXiv 1711.00937). The codebook follows the latents by moving averages,
or is trained by gradients through the scores of all codes (arXiv 2412.02692).

Kept: only the decoder is trained. Pictures keep their codes.

Given: every picture comes with its codes. The encoder is trained towards these codes and the decoder from them. The
trained model has the same form as one with a learned codebook.

Letters: B, C, T, H, W, see CONTRIBUTING.md.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from emu3.checkpoints import resolve
from emu3.configuration import Emu3VQVAEConfig
from emu3.modeling.vision import Emu3VQVAE
from emu3.modeling.vision_blocks import SpatialNorm, TemporalDownsample, TemporalResnetBlock, TemporalUpsample
from emu3.training.codebook import CodebookAverages, CodeUse, k_means, share_first, straight_through_scores
from emu3.training.discriminator import PatchDiscriminator, balance, discriminator_loss, fooling_loss
from emu3.training.loop import StepResult
from emu3.training.machine import autocast
from emu3.training.recipe import Arguments, RunSettings
from emu3.training.reconstruction import edge_loss, psnr, structure_loss

LATENTS_A_CODE = 4  # that k-means gets for the first codebook


@dataclass(frozen=True, kw_only=True)
class VisionSettings(RunSettings):
    """How a vision tokenizer is trained, whatever the pictures. Steps count batches.

    Attributes:
        batch_size: pictures of a part.
        model: arguments of `Emu3VQVAEConfig`, where training starts from nothing.
        start: a checkpoint, or the folder of a vision tokenizer alone, to go on from; named as on the command line.
        decoder_only: trains the decoder only. Pictures keep their codes, so shards of them stay valid.
        learning_rate: the highest; it rises over `warmup` steps, then falls as a cosine to a twentieth.
        warmup: steps of rising rate.
        squares: weight of the mean squared error of pixels.
        absolutes: weight of their mean absolute error.
        edges: weight of the mean absolute error of the differences between neighbours, at four scales.
        structure: weight of 1 - SSIM, at three scales.
        batch_statistics: whether batch norms, which are in the temporal layers only, use and learn the statistics of
            batches. Else they keep those that they have, so that a picture has the same codes in training as later.
        commitment: weight of the pull of latents towards their codes.
        codebook: how it is learned: by moving "averages" of the latents, or by gradients, see
            `straight_through_scores`, as "inner_product".
        continuous_steps: steps without quantization at the start, where a codebook is learned from nothing.
        codebook_decay: of the moving averages.
        restart_below: a code used less often than this share of the mean is restarted.
        discriminator: weight of fooling a patch discriminator, relative to the reconstruction; 0: there is none.
        discriminator_start: its first step.
        discriminator_channels: of its first layer.
    """

    batch_size: int = 32
    model: Annotated[dict[str, Any], Arguments(Emu3VQVAEConfig)] = field(default_factory=dict)
    start: str | None = None
    decoder_only: bool = False
    learning_rate: float = 1e-3
    warmup: int = 100
    squares: float = 1.0
    absolutes: float = 0.2
    edges: float = 0.0
    structure: float = 0.0
    batch_statistics: bool = False
    commitment: float = 0.25
    codebook: Literal["averages", "inner_product"] = "averages"
    continuous_steps: int = 1500
    codebook_decay: float = 0.99
    restart_below: float = 0.02
    discriminator: float = 0.0
    discriminator_start: int = 3000
    discriminator_channels: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_only and self.start is None:
            raise ValueError("decoder_only = true needs a tokenizer to keep; name it by start = FOLDER")
        if self.start is not None and self.model:
            raise ValueError(f"model and start = {self.start!r} exclude each other; the checkpoint has its model")


class PictureBatch(NamedTuple):
    """Pictures or clips of one size.

    Attributes:
        pixels: in [-1, 1], of pictures (B, C, H, W) or of clips (B, T, C, H, W).
        codes: theirs (B, T, H, W), where the codebook is given; T is 1 for pictures.
        step: the number of the training step. Several batches may make one.
    """

    pixels: Tensor
    codes: Tensor | None = None
    step: int = 0


class VisionObjective(nn.Module):
    """A vision tokenizer with all that its training needs and changes: averages, and a discriminator where asked for.

    The loss of a batch is a sum over pictures; a clip counts as its frames.
    """

    def __init__(self, tokenizer: Emu3VQVAE, settings: VisionSettings, fresh: bool = True) -> None:
        """`fresh` says that the codebook is not learned yet."""
        super().__init__()
        self.settings = settings
        self.tokenizer = tokenizer
        codes, dimensions = self.codebook.shape
        self.averages = CodebookAverages(codes, dimensions)
        # The newest latents, for k-means; how many were ever written; and whether there is a codebook.
        self.recent = nn.Buffer(torch.zeros(LATENTS_A_CODE * codes if fresh else 0, dimensions))
        self.written = nn.Buffer(torch.zeros((), dtype=torch.long))
        self.quantizes = nn.Buffer(torch.tensor(not fresh))
        if not fresh:
            self.averages.start(self.codebook.detach(), codes)
        self.discriminator: PatchDiscriminator | None = None
        if settings.discriminator:
            self.discriminator = PatchDiscriminator(tokenizer.config.out_channels, settings.discriminator_channels)
        tokenizer.frozen = False
        self.codebook.requires_grad_(settings.codebook == "inner_product" and not settings.decoder_only)
        if settings.decoder_only:
            tokenizer.encoder.requires_grad_(False)
            tokenizer.quant_conv.requires_grad_(False)
        self._counted = -1
        # A codebook that moves without gradients is no part of a state, as frozen weights are not; its copy is.
        self.kept_codebook = nn.Buffer(self.codebook.detach().clone())
        self.register_state_dict_pre_hook(_keep_codebook)
        self.register_load_state_dict_post_hook(_restore_codebook)

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
        self.quantizes.fill_(True)

    def train(self, mode: bool = True) -> "VisionObjective":
        super().train(mode)
        for module in self.tokenizer.modules():
            if isinstance(module, nn.BatchNorm3d) and not self.settings.batch_statistics:
                module.eval()
        if self.settings.decoder_only:  # norms that moved would change the codes
            self.tokenizer.encoder.eval()
        return self

    def parameter_groups(self, weight_decay: float = 0.01) -> list[dict[str, Any]]:
        """What an optimizer trains. The codebook, where gradients train it, does not decay."""
        codebook = [self.codebook] if self.codebook.requires_grad else []
        others = [each for each in self.parameters() if each.requires_grad and each is not self.codebook]
        groups = [{"params": others, "weight_decay": weight_decay}, {"params": codebook, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def forward(self, batch: PictureBatch) -> StepResult:
        """Loss and metrics of a batch. In training mode the codebook moves too."""
        settings, pixels = self.settings, batch.pixels.to(self.codebook.device)
        codes = None if batch.codes is None else batch.codes.to(pixels.device)
        output, commitment_B = self.reconstruct(pixels, codes, batch.step)
        with without_autocast(pixels.device):
            target_BCHW, output_BCHW = (each.flatten(0, -4) for each in (pixels, output))
            count = len(target_BCHW)
            rebuilt = self.reconstruction_losses(output_BCHW, target_BCHW).mean()
            loss = rebuilt + settings.commitment * commitment_B.mean()
            metrics = {
                "reconstruction": rebuilt.detach() * count,
                "psnr": psnr(output_BCHW.detach(), target_BCHW).sum(),
            }
            if self.discriminator is not None:
                if not self.training or batch.step < settings.discriminator_start:
                    # No gradients, but zeros: processes that wait for each other's gradients wait for all of them.
                    loss = loss + sum(0.0 * each.sum() for each in self.discriminator.parameters())
                else:
                    fooling = fooling_loss(self.discriminator, output_BCHW).mean()
                    factor = balance(rebuilt, fooling, self.tokenizer.decoder.conv_out.weight)
                    apart = discriminator_loss(self.discriminator, output_BCHW, target_BCHW).mean()
                    loss = loss + settings.discriminator * factor * fooling + apart
                    metrics |= {"fooling": fooling.detach() * count, "discriminator": apart.detach() * count}
        size = torch.tensor(float(count), device=pixels.device)
        means = {name: (value, size) for name, value in metrics.items()}
        if batch.codes is None and not settings.decoder_only and self.quantizes:
            one = torch.ones_like(size)
            means |= {f"codes_{name}": (value, one) for name, value in self.code_use()._asdict().items()}
        return StepResult(loss * count, size, means, count)

    def reconstruction_losses(self, pixels_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """The weighted sum of the losses of each picture (B,)."""
        settings, error_BCHW = self.settings, pixels_BCHW - target_BCHW
        losses_B = settings.squares * error_BCHW.square().flatten(1).mean(1)
        losses_B = losses_B + settings.absolutes * error_BCHW.abs().flatten(1).mean(1)
        if settings.edges:
            losses_B = losses_B + settings.edges * edge_loss(pixels_BCHW, target_BCHW)
        if settings.structure:
            losses_B = losses_B + settings.structure * structure_loss(pixels_BCHW, target_BCHW)
        return losses_B

    def reconstruct(self, pixels: Tensor, codes_BTHW: Tensor | None = None, step: int = 0) -> tuple[Tensor, Tensor]:
        """Reconstructions, of the shape of `pixels`, and the distance of latents to their codes (B,).

        The decoder gets the given codes. Without them it gets the nearest codes, as soon as there is a codebook, and
        training moves the codebook; before, it gets the latents themselves.
        """
        single = pixels.ndim == 4
        with (
            autocast(self.settings),
            torch.set_grad_enabled(torch.is_grad_enabled() and not self.settings.decoder_only),
        ):
            latents_BTCHW = self.tokenizer.latents(pixels)[1].float()
        with without_autocast(pixels.device):
            decoded, vectors = self.decoder_input(latents_BTCHW, codes_BTHW, step)
            distance_B = (latents_BTCHW - vectors.detach()).square().flatten(1).mean(1)
            if vectors.requires_grad:  # the codes are pulled to the latents as well
                distance_B = distance_B + (latents_BTCHW.detach() - vectors).square().flatten(1).mean(1)
        with autocast(self.settings):
            return self.tokenizer.pixels(decoded, single).float(), distance_B

    @torch.no_grad()
    def codes(self, pixels: Tensor) -> Tensor:
        """Codes (B, T, H, W) of pictures or clips; T is 1 for pictures."""
        with autocast(self.settings):
            latents_BTCHW = self.tokenizer.latents(pixels)[1].float()
        with without_autocast(pixels.device):
            return self.tokenizer.quantize(latents_BTCHW)

    def decoder_input(
        self, latents_BTCHW: Tensor, codes_BTHW: Tensor | None = None, step: int = 0
    ) -> tuple[Tensor, Tensor]:
        """What the decoder gets, and the vectors of the codes; both are the latents while there is no codebook."""
        if codes_BTHW is not None:
            vectors = self.codebook.detach()[codes_BTHW].movedim(-1, 2)
            return vectors, vectors
        learns, flat = self.training and not self.settings.decoder_only, latents_BTCHW.movedim(2, -1).flatten(0, -2)
        if learns and not self.quantizes:
            self.remember(flat.detach())
            if step >= self.settings.continuous_steps:
                self.start_codebook(len(flat))
        if not self.quantizes:
            return latents_BTCHW, latents_BTCHW.detach()
        if learns:
            self.move_codebook(latents_BTCHW.detach(), step)
        codes = self.tokenizer.quantize(latents_BTCHW.detach())
        if learns:
            self.averages.count(flat.detach(), codes.flatten())
        vectors = self.codebook[codes].movedim(-1, 2)
        if not self.codebook.requires_grad:
            # Gradients pass as if nothing were rounded.
            return latents_BTCHW + (vectors - latents_BTCHW).detach(), vectors
        mixed = straight_through_scores(flat, self.codebook, codes.flatten())
        return mixed.unflatten(0, codes.shape).movedim(-1, 2), vectors

    @torch.no_grad()
    def move_codebook(self, latents_BTCHW: Tensor, step: int) -> None:
        """At the first batch of a step: the averages of the steps before move the codebook, and dead codes restart."""
        if step == self._counted:
            return
        self._counted, settings, codebook = step, self.settings, self.codebook.data
        self.averages.move(codebook if settings.codebook == "averages" else None, settings.codebook_decay)
        if self.averages.has_dead(settings.restart_below):
            codes, flat = self.tokenizer.quantize(latents_BTCHW), latents_BTCHW.movedim(2, -1).flatten(0, -2)
            self.averages.restart(codebook, flat, codes.flatten(), settings.restart_below)

    @torch.no_grad()
    def remember(self, latents: Tensor) -> None:
        """Keeps every fourth of the latents (vectors, dimensions) for k-means; neighbours are alike. The oldest go."""
        kept = latents[::4][: len(self.recent)]
        places = (self.written + torch.arange(len(kept), device=kept.device)) % len(self.recent)
        self.recent[places] = kept
        self.written.add_(len(kept))

    @torch.no_grad()
    def start_codebook(self, latents: int) -> None:
        """Replaces the codebook by k-means of the newest latents. `latents` is how many a batch has."""
        found = k_means(self.recent[: int(self.written)], len(self.codebook))
        share_first(found)
        self.codebook.data.copy_(found)
        self.averages.start(self.codebook.data, latents)
        self.quantizes.fill_(True)

    def code_use(self) -> CodeUse:
        """How the codebook is used, on average over the last steps."""
        return CodeUse.of(self.averages.uses, self.settings.restart_below * self.averages.uses.mean())


def without_autocast(device: torch.device) -> torch.autocast:
    """A context of full precision, whatever is around it."""
    return torch.autocast(device.type, enabled=False)


@torch.no_grad()
def _keep_codebook(objective: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Before a state is taken."""
    assert isinstance(objective, VisionObjective)
    objective.kept_codebook.copy_(objective.codebook)


def _restore_codebook(objective: nn.Module, incompatible: object) -> None:
    """After a state was loaded."""
    assert isinstance(objective, VisionObjective)
    if not objective.codebook.requires_grad:
        objective.codebook.data.copy_(objective.kept_codebook)


def load_tokenizer(settings: VisionSettings) -> tuple[Emu3VQVAE, bool]:
    """The tokenizer that training starts from, in float32, and whether its codebook is still to be learned."""
    if settings.start is None:
        tokenizer = Emu3VQVAE(Emu3VQVAEConfig(**settings.model))
        begin_plainly(tokenizer)
        return tokenizer, True
    return Emu3VQVAE.from_pretrained(resolve(settings.start), dtype=torch.float32), False


@torch.no_grad()
def begin_plainly(tokenizer: Emu3VQVAE) -> None:
    """Gives a new tokenizer first weights with which pictures pass its narrow parts, in place.

    With PyTorch's own, eight or more layers between encoder and decoder each weaken the signal, and all that the first
    hundred steps learn is the mean colour. Here the temporal layers begin as means over time, their residual blocks as
    nothing, and the conditioning of the decoder's norms as norms without it. Every layer stays free to learn.
    """
    for module in tokenizer.modules():
        match module:
            case SpatialNorm():
                for conv, value in ((module.conv_y, 1.0), (module.conv_b, 0.0)):
                    assert conv.bias is not None
                    conv.bias.fill_(value)
            case TemporalResnetBlock():
                nn.init.zeros_(module.conv2.conv.weight)
            case TemporalDownsample():
                _begin_as_identity(module.conv.conv, taps=2, bias=1.0)  # where SiLU is nearly straight
            case TemporalUpsample():
                _begin_as_identity(module.conv.conv, taps=1, bias=1.0)
    _begin_as_identity(tokenizer.quant_conv.conv, taps=1, gain=4.0)
    _begin_as_identity(tokenizer.post_quant_conv.conv, taps=1)


def _begin_as_identity(conv: nn.Conv3d, taps: int, gain: float = 1.0, bias: float = 0.0) -> None:
    """The mean of so many newest frames, plus a tenth of what was there."""
    weight = conv.weight.mul_(0.1)
    row, column = weight.shape[3] // 2, weight.shape[4] // 2
    for channel in range(min(weight.shape[:2])):
        weight[channel, channel, -taps:, row, column] += gain / taps
    assert conv.bias is not None
    conv.bias.fill_(bias)


def learning_rate(settings: VisionSettings, step: int) -> float:
    """The rate of a step: rising, then falling as a cosine."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    return settings.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / settings.steps)))
