"""The vision tokenizer: pictures and clips to integer codes and back.

A MoVQ-style VQ-VAE (arXiv 2209.09002) with a temporal part (arXiv 2409.18869, section 2.2). Frames pass one by one
through a 2-D encoder; a few causal 3-D convolutions on the narrow latents join each group of
`temporal_downsample_factor` frames; the nearest codebook vector gives the code. The decoder mirrors this.

A single picture is, by definition, a clip that repeats it. The 2-D parts treat frames independently, so they run once:
encoding repeats the latents instead of the pixels, decoding drops all frames but the first before the 2-D part.

Longer than most files, because encoder and decoder are built from the same blocks and read best side by side.

Shapes: B batch, T latent frames, F frames, C channels, H W pixels, h w code rows and columns, Z latent channels, N
positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from emu3.configuration import Emu3VQVAEConfig
from emu3.modeling.attention import attention_function
from emu3.modeling.bands import affine_of, by_bands, silu_of_affine
from emu3.modeling.pretrained import AnyLayoutModel

NORM_GROUPS = 32
NORM_EPSILON = 1e-6
# A distance matrix of positions x codes larger than this is computed in pieces: 2**24 floats are 64 MiB.
MAX_DISTANCES = 2**24


@dataclass
class Emu3VQVAEModelOutput(BaseModelOutputWithPooling):
    """What `Emu3VQVAE.encode` returns.

    Attributes:
        last_hidden_state: encoder output before quantization, (B, T, Z, h, w).
        image_tokens: codes of each sample, (h, w) for a picture, (T, h, w) for a clip, cropped to its own size.
        pooler_output: embeddings of the codes, set by `Emu3Model.get_image_features`.
    """

    image_tokens: list[Tensor] | None = None


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation as everywhere in the tokenizer: 32 groups."""
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPSILON)


class CausalConv3d(nn.Module):
    """3-D convolution that sees no later frame: two frames of padding on the left in time, even padding in space."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride)
        rows, columns = kernel[1] - stride[1], kernel[2] - stride[2]
        self.padding = (columns - columns // 2, columns // 2, rows - rows // 2, rows // 2, 2, 0)

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.pad(x_BCFHW, self.padding)))


class SpatialNorm(nn.Module):
    """Group normalisation whose scale and shift come, position by position, from the quantized latents (MoVQ)."""

    def __init__(self, latent_channels: int, channels: int) -> None:
        super().__init__()
        self.norm_layer = group_norm(channels)
        self.conv_y = nn.Conv2d(latent_channels, channels, 1)
        self.conv_b = nn.Conv2d(latent_channels, channels, 1)

    def forward(self, x_BCHW: Tensor, quantized_BZhw: Tensor) -> Tensor:
        # 1x1 convolutions commute with nearest upsampling, and cost less before it.
        scale, shift = (
            F.interpolate(conv(quantized_BZhw), size=x_BCHW.shape[-2:], mode="nearest")
            for conv in (self.conv_y, self.conv_b)
        )
        return cast(Tensor, self.norm_layer(x_BCHW) * scale + shift)

    def affine(self, x_BCHW: Tensor, quantized_BZhw: Tensor) -> tuple[Tensor, Tensor]:
        """The factor and offset (B, C, h, W) that do the same to x."""
        factor_BC11, offset_BC11 = affine_of(self.norm_layer, x_BCHW)
        scale, shift = self.conv_y(quantized_BZhw), self.conv_b(quantized_BZhw)
        wide = x_BCHW.shape[3] // scale.shape[3]
        factor, offset = factor_BC11 * scale, offset_BC11 * scale + shift
        return factor.repeat_interleave(wide, 3), offset.repeat_interleave(wide, 3)


def norm_for(channels: int, latent_channels: int | None) -> nn.Module:
    """Plain group normalisation in the encoder, `SpatialNorm` in the decoder (`latent_channels` given)."""
    return group_norm(channels) if latent_channels is None else SpatialNorm(latent_channels, channels)


def apply_norm(norm: nn.Module, x_BCHW: Tensor, quantized_BZhw: Tensor | None) -> Tensor:
    """A norm of `norm_for`, with the quantized latents where it takes them."""
    return cast(Tensor, norm(x_BCHW) if quantized_BZhw is None else norm(x_BCHW, quantized_BZhw))


def activated(norm: nn.Module, conv: nn.Module, x_BCHW: Tensor, quantized_BZhw: Tensor | None) -> Tensor:
    """A norm, SiLU and a 3x3 convolution."""
    weight = cast(nn.GroupNorm, norm.norm_layer if isinstance(norm, SpatialNorm) else norm).weight
    # What is offloaded is there in its own module's forward only.
    if torch.is_grad_enabled() or weight.device.type == "meta":
        return cast(Tensor, conv(F.silu(apply_norm(norm, x_BCHW, quantized_BZhw))))
    if isinstance(norm, SpatialNorm):
        assert quantized_BZhw is not None
        factor, offset = norm.affine(x_BCHW, quantized_BZhw)
    else:
        factor, offset = affine_of(cast(nn.GroupNorm, norm), x_BCHW)
    height = x_BCHW.shape[2]
    return by_bands(lambda part, first: conv(silu_of_affine(factor, offset, part, first, height)), x_BCHW, reach=1)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions behind norms, and a residual; conditioned on the quantized latents in the decoder."""

    def __init__(self, in_channels: int, out_channels: int, latent_channels: int | None = None) -> None:
        super().__init__()
        self.norm1 = norm_for(in_channels, latent_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm_for(out_channels, latent_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x_BCHW: Tensor, quantized_BZhw: Tensor | None = None) -> Tensor:
        hidden = activated(self.norm1, self.conv1, x_BCHW, quantized_BZhw)
        hidden = activated(self.norm2, self.conv2, hidden, quantized_BZhw)
        if torch.is_grad_enabled():
            shortcut = x_BCHW if self.nin_shortcut is None else self.nin_shortcut(x_BCHW)
            return cast(Tensor, shortcut + hidden)
        if self.nin_shortcut is None:
            return hidden.add_(x_BCHW)
        shortcut = self.nin_shortcut
        return hidden.add_(by_bands(lambda part, _: shortcut(part), x_BCHW, reach=0))


class TemporalResnetBlock(nn.Module):
    """Two causal 3-D convolutions behind batch norms, and a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = CausalConv3d(channels, channels, (3, 3, 3))
        self.norm2 = nn.BatchNorm3d(channels)
        self.conv2 = CausalConv3d(channels, channels, (3, 3, 3))

    def forward(self, x_BZThw: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x_BZThw)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return cast(Tensor, x_BZThw + hidden)


class AttentionBlock(nn.Module):
    """Self-attention over all positions of one frame."""

    def __init__(self, config: Emu3VQVAEConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        if width % heads:
            raise ValueError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
        self.config = config
        self.heads = heads
        self.scaling = (width // heads) ** -0.5
        self.dropout = config.attention_dropout
        # What the attention functions of transformers ask of a module.
        self.is_causal = False
        self.num_key_value_groups = 1
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """What each position attends to, mixed (B, C, H, W), and the weights (B, heads, N, N) if they were computed."""
        batch, channels, height, width = x_BCHW.shape
        x_BNC = x_BCHW.flatten(2).transpose(1, 2)
        query, key, value = (
            projection(x_BNC).view(batch, height * width, self.heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = attention_function(self.config)
        if "flash" in str(self.config._attn_implementation) and query.dtype == torch.float32:
            # Those kernels take 16 bits only, and the tokenizer stays in float32 beside a model that uses them.
            attend = sdpa_attention_forward
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=dropout, is_causal=False)
        mixed_BNC = self.out_proj(mixed.reshape(batch, height * width, channels))
        return mixed_BNC.transpose(1, 2).reshape(batch, channels, height, width), weights


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, config: Emu3VQVAEConfig, channels: int, latent_channels: int | None = None) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, latent_channels)
        self.attn_norm = norm_for(channels, latent_channels)
        self.attn_1 = AttentionBlock(config)
        self.block_2 = ResnetBlock(channels, channels, latent_channels)

    def forward(self, x_BCHW: Tensor, quantized_BZhw: Tensor | None = None) -> Tensor:
        x_BCHW = self.block_1(x_BCHW, quantized_BZhw)
        mixed_BCHW, _ = self.attn_1(apply_norm(self.attn_norm, x_BCHW, quantized_BZhw))
        x_BCHW = x_BCHW + mixed_BCHW
        return cast(Tensor, self.block_2(x_BCHW, quantized_BZhw))


class Downsample(nn.Module):
    """Halves height and width. The one row and column of padding lie at the bottom and on the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.pad(x_BCHW, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        def larger(part: Tensor, _: int = 0) -> Tensor:
            return cast(Tensor, self.conv(F.interpolate(part, scale_factor=2.0, mode="nearest")))

        return larger(x_BCHW) if torch.is_grad_enabled() else by_bands(larger, x_BCHW, reach=1, grows=2)


class Stage(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the configuration asks for it."""

    def __init__(
        self, config: Emu3VQVAEConfig, level: int, in_channels: int, blocks: int, latent_channels: int | None = None
    ) -> None:
        super().__init__()
        channels = config.base_channels * config.channel_multiplier[level]
        attends = level in config.attn_resolutions
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if index == 0 else channels, channels, latent_channels) for index in range(blocks)
        )
        self.attn = nn.ModuleList(AttentionBlock(config) for _ in range(blocks if attends else 0))
        self.attn_norms = nn.ModuleList(norm_for(channels, latent_channels) for _ in range(blocks if attends else 0))

    def steps(self) -> Iterator[Callable[[Tensor, Tensor | None], Tensor]]:
        """One after the other, and not in one call, which would keep its argument as long as it runs."""
        for index, block in enumerate(self.block):
            yield block
            if len(self.attn):
                yield partial(self._attend, index)

    def _attend(self, index: int, x_BCHW: Tensor, quantized_BZhw: Tensor | None) -> Tensor:
        mixed_BCHW, _ = self.attn[index](apply_norm(self.attn_norms[index], x_BCHW, quantized_BZhw))
        return cast(Tensor, x_BCHW + mixed_BCHW)


class DownBlock(nn.Module):
    """The stages of the encoder, from the highest resolution to the lowest."""

    def __init__(self, config: Emu3VQVAEConfig) -> None:
        super().__init__()
        self.down = nn.ModuleList()
        in_channels = config.base_channels
        for level, multiplier in enumerate(config.channel_multiplier):
            stage = Stage(config, level, in_channels, config.num_res_blocks)
            in_channels = config.base_channels * multiplier
            if level < len(config.channel_multiplier) - 1:
                stage.downsample = Downsample(in_channels)
            self.down.append(stage)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for level, stage in enumerate(self.down):
            for step in cast(Stage, stage).steps():
                x_BCHW = step(x_BCHW, None)
            if level < len(self.down) - 1:
                x_BCHW = cast(nn.Module, stage.downsample)(x_BCHW)
        return x_BCHW


class UpBlock(nn.Module):
    """The stages of the decoder, from the lowest resolution to the highest."""

    def __init__(self, config: Emu3VQVAEConfig) -> None:
        super().__init__()
        stages = []
        in_channels = config.base_channels * config.channel_multiplier[-1]
        for level in reversed(range(len(config.channel_multiplier))):
            stage = Stage(config, level, in_channels, config.num_res_blocks + 1, config.embed_dim)
            in_channels = config.base_channels * config.channel_multiplier[level]
            if level > 0:
                stage.upsample = Upsample(in_channels)
            stages.append(stage)
        self.up = nn.ModuleList(reversed(stages))  # index = level, as in saved weights; run from the last to the first

    def forward(self, x_BCHW: Tensor, quantized_BZhw: Tensor) -> Tensor:
        for level in reversed(range(len(self.up))):
            for step in cast(Stage, self.up[level]).steps():
                x_BCHW = step(x_BCHW, quantized_BZhw)
            if level > 0:
                x_BCHW = cast(nn.Module, self.up[level].upsample)(x_BCHW)
        return x_BCHW


def temporal_stages(config: Emu3VQVAEConfig) -> int:
    """How often the number of frames is halved. ValueError where the factor is no power of two."""
    stages = int(math.log2(config.temporal_downsample_factor))
    if 2**stages != config.temporal_downsample_factor:
        raise ValueError(f"temporal_downsample_factor must be a power of two, got {config.temporal_downsample_factor}")
    return stages


class TemporalDownsample(nn.Module):
    """Halves the number of frames."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (4, 3, 3), (2, 1, 1))

    def forward(self, x_BZFhw: Tensor) -> Tensor:
        return cast(Tensor, self.conv(x_BZFhw))


class TemporalUpsample(nn.Module):
    """Doubles the number of frames."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (3, 3, 3))

    def forward(self, x_BZThw: Tensor) -> Tensor:
        return cast(Tensor, self.conv(x_BZThw.repeat_interleave(2, dim=2)))


class Encoder(nn.Module):
    """Pictures to latents before quantization: a 2-D part for each frame, then a temporal one."""

    def __init__(self, config: Emu3VQVAEConfig) -> None:
        super().__init__()
        channels = config.base_channels * config.channel_multiplier[-1]
        latent_channels = config.latent_channels * (2 if config.double_latent else 1)
        self.conv_in = nn.Conv2d(config.in_channels, config.base_channels, 3, padding=1)
        self.down_block = DownBlock(config)
        self.middle_block = MiddleBlock(config, channels)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, latent_channels, 3, padding=1)
        self.time_conv = nn.ModuleList(TemporalDownsample(latent_channels) for _ in range(temporal_stages(config)))
        self.time_res_stack = nn.ModuleList(TemporalResnetBlock(latent_channels) for _ in range(config.num_res_blocks))

    def frames(self, pixels_BCHW: Tensor) -> Tensor:
        """The 2-D part: each picture of a batch to its latents, (B, Z, h, w)."""
        hidden = self.middle_block(self.down_block(self.conv_in(pixels_BCHW)))
        return activated(self.norm_out, self.conv_out, hidden, None)

    def join(self, latents_BZFhw: Tensor) -> Tensor:
        """The temporal part: (B, Z, F, h, w) to (B, Z, T, h, w)."""
        for conv in self.time_conv:
            latents_BZFhw = F.silu(conv(latents_BZFhw))
        for block in self.time_res_stack:
            latents_BZFhw = block(latents_BZFhw)
        return latents_BZFhw


class Decoder(nn.Module):
    """Codebook vectors to pictures: a temporal part, then a 2-D one for each frame."""

    def __init__(self, config: Emu3VQVAEConfig) -> None:
        super().__init__()
        channels = config.base_channels * config.channel_multiplier[-1]
        latent_channels = config.latent_channels
        self.time_res_stack = nn.ModuleList(TemporalResnetBlock(latent_channels) for _ in range(config.num_res_blocks))
        self.time_conv = nn.ModuleList(TemporalUpsample(latent_channels) for _ in range(temporal_stages(config)))
        self.conv_in = nn.Conv2d(latent_channels, channels, 3, padding=1)
        self.middle_block = MiddleBlock(config, channels, config.embed_dim)
        self.up_block = UpBlock(config)
        self.norm_out = SpatialNorm(config.embed_dim, config.base_channels * config.channel_multiplier[0])
        self.conv_out = nn.Conv2d(
            config.base_channels * config.channel_multiplier[0], config.out_channels, 3, padding=1
        )

    def split(self, latents_BZThw: Tensor) -> Tensor:
        """The temporal part: (B, Z, T, h, w) to (B, Z, F, h, w)."""
        for block in self.time_res_stack:
            latents_BZThw = block(latents_BZThw)
        for conv in self.time_conv:
            latents_BZThw = F.silu(conv(latents_BZThw))
        return latents_BZThw

    def frames(self, latents_BZhw: Tensor, quantized_BZhw: Tensor) -> Tensor:
        """The 2-D part: latents of each frame of a batch to pixels, (B, C, H, W)."""
        hidden = self.middle_block(self.conv_in(latents_BZhw), quantized_BZhw)
        hidden = self.up_block(hidden, quantized_BZhw)
        return activated(self.norm_out, self.conv_out, hidden, quantized_BZhw)


class VectorQuantizer(nn.Module):
    """Nearest codebook vector. Learning the codebook is the business of `emu3.training.vision`."""

    def __init__(self, config: Emu3VQVAEConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.embed_dim)

    def forward(self, latents_BTZhw: Tensor) -> Tensor:
        """Codes (B, T, h, w) of latents (B, T, Z, h, w)."""
        flat_NZ = latents_BTZhw.movedim(2, -1).reshape(-1, latents_BTZhw.shape[2])
        # Through the module and not its weight, which is elsewhere when it is offloaded.
        codebook = self.embedding(torch.arange(self.embedding.num_embeddings, device=flat_NZ.device))
        norms = codebook.square().sum(1)
        rows = max(1, MAX_DISTANCES // codebook.shape[0])
        codes_N = torch.cat(
            [
                (part.square().sum(1, keepdim=True) + norms - 2 * part @ codebook.T).argmin(1)
                for part in flat_NZ.split(rows)
            ]
        )
        return codes_N.view(latents_BTZhw.shape[0], latents_BTZhw.shape[1], *latents_BTZhw.shape[3:])


class Emu3VQVAE(AnyLayoutModel):
    """The vision tokenizer: `encode` pictures or clips to codes, `decode` codes to pictures or clips.

    It is frozen: `train()` leaves it in evaluation mode, so that batch statistics never change the codes of a model
    that is being fine-tuned. `frozen = False` is for training the tokenizer itself.
    """

    config: Emu3VQVAEConfig
    config_class = Emu3VQVAEConfig
    base_model_prefix = "emuvideovq"
    # In whole models. The replacement is the prefix that a base model's names lose on loading.
    renamed_weights: ClassVar[dict[str, str]] = {
        r"^model\.vqmodel\.": "emuvideovq.",
        r"^vqmodel\.": "emuvideovq.",
    }
    # What a whole model has beside it.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(?:^|\.)text_model\.", r"(?:^|\.)lm_head\."]
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": [ResnetBlock, TemporalResnetBlock],
        "attentions": AttentionBlock,
    }
    _no_split_modules: ClassVar[list[str]] = ["TemporalResnetBlock", "AttentionBlock", "ResnetBlock", "VectorQuantizer"]

    def __init__(self, config: Emu3VQVAEConfig) -> None:
        super().__init__(config)
        self.frozen = True
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config)
        self.quant_conv = CausalConv3d(config.latent_channels, config.embed_dim, (3, 1, 1))
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.latent_channels, (3, 1, 1))
        self.spatial_scale_factor = 2 ** (len(config.channel_multiplier) - 1)
        self.eval()
        self.post_init()

    @property
    def vision_spatial_factor(self) -> int:
        """Pixels per code along height and along width."""
        return self.spatial_scale_factor

    def train(self, mode: bool = True) -> Emu3VQVAE:
        super().train(mode and not self.frozen)
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            # PyTorch's own initialisation; the base class would set a fixed standard deviation.
            module.reset_parameters()
        elif isinstance(module, VectorQuantizer):
            bound = 1.0 / self.config.codebook_size
            module.embedding.weight.uniform_(-bound, bound)

    def latents(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Latents before quantization, differentiable.

        Args:
            pixel_values: picture (B, C, H, W) or clip (B, F, C, H, W), normalised as by the image processor.

        Returns:
            Encoder output (B, T, Z, h, w), and the same after `quant_conv` (B, T, E, h, w), E = `embed_dim`.

        Raises:
            ValueError: F is no multiple of `temporal_downsample_factor`.
        """
        factor = self.config.temporal_downsample_factor
        if pixel_values.ndim == 4:
            latents_BZFhw = self.encoder.frames(pixel_values)[:, :, None].expand(-1, -1, factor, -1, -1)
        else:
            batch, frames = pixel_values.shape[:2]
            if frames % factor:
                raise ValueError(f"a clip needs a multiple of {factor} frames, got {frames}: repeat or drop some")
            latents_BZFhw = (
                self.encoder.frames(pixel_values.flatten(0, 1)).unflatten(0, (batch, frames)).transpose(1, 2)
            )
        joined = self.encoder.join(latents_BZFhw)
        return joined.transpose(1, 2), self.quant_conv(joined).transpose(1, 2)

    def pixels(self, quantized_BTZhw: Tensor, single: bool) -> Tensor:
        """Pixels from codebook vectors, differentiable.

        Args:
            quantized_BTZhw: codebook vectors (B, T, E, h, w).
            single: T is 1 and only the first frame is wanted.

        Returns:
            (B, C, H, W) if `single`, else (B, F, C, H, W).
        """
        quantized_BZThw = quantized_BTZhw.transpose(1, 2)
        # One batch, as in the original: latents and conditioning share the temporal layers.
        both = self.decoder.split(torch.cat((self.post_quant_conv(quantized_BZThw), quantized_BZThw)))
        if single:
            both = both[:, :, :1]
        frames = both.shape[2]
        latents, conditioning = both.transpose(1, 2).chunk(2)
        pixels = self.decoder.frames(latents.flatten(0, 1), conditioning.flatten(0, 1))
        return pixels if single else pixels.unflatten(0, (-1, frames))

    @merge_with_config_defaults
    @capture_outputs
    def encode(
        self, pixel_values: Tensor, image_sizes: Tensor | list[list[int]], **kwargs: Any
    ) -> Emu3VQVAEModelOutput:
        """Codes of pictures or clips.

        Args:
            pixel_values: (B, C, H, W) or (B, F, C, H, W); samples smaller than H x W are padded at the bottom and
                right.
            image_sizes: (B, 2), height and width in pixels of each sample without its padding.
            **kwargs: `output_hidden_states` gives the output of every residual block, and the input of the first;
                `output_attentions` the weights of every attention, if it is eager. Both are of each frame, and so four
                times those of a picture by default. `return_dict=False` gives a tuple.

        Returns:
            `Emu3VQVAEModelOutput`.
        """
        single = pixel_values.ndim == 4
        pixel_values = pixel_values.to(self.dtype)
        if single and any(
            kwargs.get(name, getattr(self.config, name)) for name in ("output_hidden_states", "output_attentions")
        ):
            # What is recorded has the shapes of a clip that repeats the picture, as in transformers.
            pixel_values = pixel_values[:, None].expand(-1, self.config.temporal_downsample_factor, -1, -1, -1)
        encoded, latents = self.latents(pixel_values)
        codes_BThw = self.quantize(latents)
        codes = codes_BThw.squeeze(1) if single else codes_BThw
        factor = self.spatial_scale_factor
        return Emu3VQVAEModelOutput(
            last_hidden_state=cast(Any, encoded),
            image_tokens=[
                sample[..., : int(height) // factor, : int(width) // factor]
                for sample, (height, width) in zip(codes, image_sizes, strict=True)
            ],
        )

    def decode(self, hidden_states: Tensor) -> Tensor:
        """Pixels of codes.

        Args:
            hidden_states: codes of pictures (B, h, w) or clips (B, T, h, w).

        Returns:
            (B, C, H, W) or (B, F, C, H, W), in the image processor's normalised space.
        """
        single = hidden_states.ndim == 3
        codes_BThw = hidden_states[:, None] if single else hidden_states
        return self.pixels(self.quantize.embedding(codes_BThw).movedim(-1, 2), single)
