"""The parts of the vision tokenizer: norms, convolutions and attention, and the encoder and decoder built from them.

Without gradients, each block keeps its memory low: large pictures pass in bands (see `bands.py`), and sums are written
in place. A block of the encoder has no quantized latents; one of the decoder is conditioned on them (MoVQ).

Letters: B, C, T, H, W, see CONTRIBUTING.md. H and W are those of the tensor that has the name: `x_BCHW` may have more
rows and columns than the `quantized_BCHW` beside it, which has one position for each code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from emu3.configuration import Emu3VQVAEConfig
from emu3.modeling.attention import get_attention
from emu3.modeling.bands import BAND_ELEMENTS, apply_affine_silu, run_in_bands

NORM_GROUPS = 32


class GroupNorm(nn.GroupNorm):
    """Group normalisation as everywhere in the tokenizer: 32 groups.

    It also takes one value per group, as a small model's picture of one token has. It is called like `SpatialNorm`, and
    ignores the quantized latents.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels, eps=1e-6)

    def forward(self, x_BCHW: Tensor, quantized_BCHW: Tensor | None = None) -> Tensor:
        return torch.group_norm(x_BCHW, self.num_groups, self.weight, self.bias, self.eps)

    def fold(self, x_BCHW: Tensor, quantized_BCHW: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A factor and an offset, (B, C, 1, 1) each: `norm(x)` is `x * factor + offset`.

        In float32, or in the dtype of x if that is wider. A mean rounded to 16 bits would shift every pixel.
        """
        wide = torch.promote_types(x_BCHW.dtype, torch.float32)
        grouped = x_BCHW.reshape(len(x_BCHW), self.num_groups, -1).to(wide)
        variance, mean = torch.var_mean(grouped, -1, correction=0)
        channels = x_BCHW.shape[1] // self.num_groups
        factor_BC = (variance + self.eps).rsqrt().repeat_interleave(channels, 1) * self.weight
        offset_BC = self.bias - mean.repeat_interleave(channels, 1) * factor_BC
        return factor_BC[..., None, None], offset_BC[..., None, None]


class SpatialNorm(nn.Module):
    """Group normalisation with a scale and a shift for each position, computed from the quantized latents (MoVQ)."""

    def __init__(self, latent_channels: int, channels: int) -> None:
        super().__init__()
        self.norm_layer = GroupNorm(channels)
        self.conv_y = nn.Conv2d(latent_channels, channels, 1)
        self.conv_b = nn.Conv2d(latent_channels, channels, 1)

    def forward(self, x_BCHW: Tensor, quantized_BCHW: Tensor) -> Tensor:
        # A 1x1 convolution may come before or after nearest upsampling; before, it is cheaper.
        scale, shift = (
            F.interpolate(conv(quantized_BCHW), size=x_BCHW.shape[-2:], mode="nearest")
            for conv in (self.conv_y, self.conv_b)
        )
        return cast(Tensor, self.norm_layer(x_BCHW) * scale + shift)

    def fold(self, x_BCHW: Tensor, quantized_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The factor and the offset of `GroupNorm.fold`, with this norm's scale and shift in them.

        Both have the channels and the width of x, but only the height of the quantized latents: `apply_affine_silu`
        picks the rows of each band.
        """
        factor, offset = self.norm_layer.fold(x_BCHW)
        scale, shift = self.conv_y(quantized_BCHW), self.conv_b(quantized_BCHW)
        columns = x_BCHW.shape[3] // scale.shape[3]
        factor, offset = factor * scale, offset * scale + shift
        return factor.repeat_interleave(columns, 3), offset.repeat_interleave(columns, 3)


def make_norm(channels: int, latent_channels: int | None) -> nn.Module:
    """Plain group normalisation for the encoder; `SpatialNorm` for the decoder, where `latent_channels` are given."""
    return GroupNorm(channels) if latent_channels is None else SpatialNorm(latent_channels, channels)


def norm_silu_conv(norm: nn.Module, conv: nn.Module, x_BCHW: Tensor, quantized_BCHW: Tensor | None = None) -> Tensor:
    """Apply a norm, SiLU and a 3x3 convolution; in bands where no gradients are recorded."""
    # An offloaded weight cannot be folded: accelerate brings it back only while its own module's forward runs.
    if torch.is_grad_enabled() or next(norm.parameters()).device.type == "meta":
        return cast(Tensor, conv(F.silu(norm(x_BCHW, quantized_BCHW))))
    # What fits into one band gains nothing by folding, and torch's own norm is twice as fast.
    if isinstance(norm, GroupNorm) and x_BCHW.dtype == torch.float32 and x_BCHW.numel() <= BAND_ELEMENTS:
        return cast(Tensor, conv(F.silu(norm(x_BCHW), inplace=True)))
    factor, offset = cast(Any, norm).fold(x_BCHW, quantized_BCHW)
    height = x_BCHW.shape[2]
    return run_in_bands(lambda part, first: conv(apply_affine_silu(factor, offset, part, first, height)), x_BCHW, 1)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each behind a norm and SiLU, and a residual."""

    def __init__(self, in_channels: int, out_channels: int, latent_channels: int | None = None) -> None:
        super().__init__()
        self.norm1 = make_norm(in_channels, latent_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = make_norm(out_channels, latent_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x_BCHW: Tensor, quantized_BCHW: Tensor | None = None) -> Tensor:
        hidden = norm_silu_conv(self.norm1, self.conv1, x_BCHW, quantized_BCHW)
        hidden = norm_silu_conv(self.norm2, self.conv2, hidden, quantized_BCHW)
        if (conv := self.nin_shortcut) is not None:
            x_BCHW = run_in_bands(lambda part, _: conv(part), x_BCHW, reach=0)
        return x_BCHW + hidden if torch.is_grad_enabled() else hidden.add_(x_BCHW)


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
        # The attention functions of transformers read these two from a module.
        self.is_causal = False
        self.num_key_value_groups = 1
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mixed positions (B, C, H, W), and the weights (B, heads, H * W, H * W) or None: see `get_attention`."""
        batch, channels, height, width = x_BCHW.shape
        positions = x_BCHW.flatten(2).transpose(1, 2)
        query, key, value = (
            projection(positions).view(batch, height * width, self.heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = get_attention(self.config)
        if "flash" in str(self.config._attn_implementation) and query.dtype == torch.float32:
            # Flash kernels take 16 bits only. The tokenizer stays in float32 beside a language model that uses them.
            attend = sdpa_attention_forward
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=dropout, is_causal=False)
        mixed = self.out_proj(mixed.reshape(batch, height * width, channels))
        return mixed.transpose(1, 2).reshape(batch, channels, height, width), weights


def attend(norm: nn.Module, attention: nn.Module, x_BCHW: Tensor, quantized_BCHW: Tensor | None) -> Tensor:
    """Apply an `AttentionBlock` behind a norm, with a residual."""
    mixed_BCHW, _ = attention(norm(x_BCHW, quantized_BCHW))
    return cast(Tensor, x_BCHW + mixed_BCHW)


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, config: Emu3VQVAEConfig, channels: int, latent_channels: int | None = None) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, latent_channels)
        self.attn_norm = make_norm(channels, latent_channels)
        self.attn_1 = AttentionBlock(config)
        self.block_2 = ResnetBlock(channels, channels, latent_channels)

    def forward(self, x_BCHW: Tensor, quantized_BCHW: Tensor | None = None) -> Tensor:
        x_BCHW = self.block_1(x_BCHW, quantized_BCHW)
        x_BCHW = attend(self.attn_norm, self.attn_1, x_BCHW, quantized_BCHW)
        return cast(Tensor, self.block_2(x_BCHW, quantized_BCHW))


class Downsample(nn.Module):
    """Halves height and width. Its padding is one row at the bottom and one column on the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.pad(x_BCHW, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """Doubles height and width by nearest neighbours, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return run_in_bands(lambda part, _: self.conv(F.interpolate(part, scale_factor=2.0)), x_BCHW, reach=1, grows=2)


class Stage(nn.Module):
    """Residual blocks of one resolution, each with attention behind it where the configuration asks for it."""

    def __init__(
        self, config: Emu3VQVAEConfig, level: int, in_channels: int, blocks: int, latent_channels: int | None = None
    ) -> None:
        super().__init__()
        self.channels = config.base_channels * config.channel_multiplier[level]
        attentions = blocks if level in config.attn_resolutions else 0
        self.block = nn.ModuleList(
            ResnetBlock(self.channels if index else in_channels, self.channels, latent_channels)
            for index in range(blocks)
        )
        self.attn = nn.ModuleList(AttentionBlock(config) for _ in range(attentions))
        self.attn_norms = nn.ModuleList(make_norm(self.channels, latent_channels) for _ in range(attentions))


def run_stages(
    stages: Iterable[nn.Module], resample: str, x_BCHW: Tensor, quantized_BCHW: Tensor | None = None
) -> Tensor:
    """Run stages one after the other. Behind each runs its module with the name `resample`, if it has one.

    This is one loop because a `forward` of each stage would keep the stage's input in memory until its end.
    """
    for stage in cast(Iterable[Stage], stages):
        for index, block in enumerate(stage.block):
            x_BCHW = block(x_BCHW, quantized_BCHW)
            if len(stage.attn):
                x_BCHW = attend(stage.attn_norms[index], stage.attn[index], x_BCHW, quantized_BCHW)
        if hasattr(stage, resample):
            x_BCHW = getattr(stage, resample)(x_BCHW)
    return x_BCHW


class DownBlock(nn.Module):
    """The stages of the encoder, from the highest resolution to the lowest."""

    def __init__(self, config: Emu3VQVAEConfig) -> None:
        super().__init__()
        self.down = nn.ModuleList()
        channels, last = config.base_channels, len(config.channel_multiplier) - 1
        for level in range(last + 1):
            stage = Stage(config, level, channels, config.num_res_blocks)
            channels = stage.channels
            if level < last:
                stage.downsample = Downsample(channels)
            self.down.append(stage)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return run_stages(self.down, "downsample", x_BCHW)


class UpBlock(nn.Module):
    """The stages of the decoder, from the lowest resolution to the highest. They are stored in reverse, by level."""

    def __init__(self, config: Emu3VQVAEConfig) -> None:
        super().__init__()
        self.up = nn.ModuleList()
        channels = config.base_channels * config.channel_multiplier[-1]
        for level in reversed(range(len(config.channel_multiplier))):
            stage = Stage(config, level, channels, config.num_res_blocks + 1, config.embed_dim)
            channels = stage.channels
            if level > 0:
                stage.upsample = Upsample(channels)
            self.up.insert(0, stage)

    def forward(self, x_BCHW: Tensor, quantized_BCHW: Tensor) -> Tensor:
        return run_stages(reversed(self.up), "upsample", x_BCHW, quantized_BCHW)


Past = dict[nn.Module, Tensor]
"""The last two frames (B, C, 2, H, W) that each `CausalConv3d` has seen, where a clip comes in pieces."""


class CausalConv3d(nn.Module):
    """3-D convolution that sees no later frame: its padding is two frames before the first, and even in space.

    The kernel has `time` frames and `space` rows and columns; `stride` is that in time. With a `past`, the frames go on
    from those that it holds, and it is brought up to date.
    """

    def __init__(self, in_channels: int, out_channels: int, time: int = 3, space: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, (time, space, space), (stride, 1, 1))
        self.padding = (space // 2, space // 2, space // 2, space // 2)

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        if past is None or self not in past:
            x_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, 2, 0))
        else:
            x_BCTHW = torch.cat((past[self], x_BCTHW), 2)
        if past is not None:
            past[self] = x_BCTHW[:, :, -2:]
        return cast(Tensor, self.conv(F.pad(x_BCTHW, self.padding)))


class TemporalResnetBlock(nn.Module):
    """Two causal 3-D convolutions, each behind a batch norm and SiLU, and a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = CausalConv3d(channels, channels)
        self.norm2 = nn.BatchNorm3d(channels)
        self.conv2 = CausalConv3d(channels, channels)

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x_BCTHW)), past)
        return cast(Tensor, x_BCTHW + self.conv2(F.silu(self.norm2(hidden)), past))


class TemporalDownsample(nn.Module):
    """Halves the number of frames: a convolution and SiLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, time=4, stride=2)

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        return F.silu(self.conv(x_BCTHW, past))


class TemporalUpsample(nn.Module):
    """Doubles the number of frames: each twice, then a convolution and SiLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        return F.silu(self.conv(x_BCTHW.repeat_interleave(2, dim=2), past))


def count_temporal_stages(config: Emu3VQVAEConfig) -> int:
    """How often the number of frames is halved."""
    stages = config.temporal_downsample_factor.bit_length() - 1
    if 2**stages != config.temporal_downsample_factor:
        raise ValueError(f"temporal_downsample_factor must be a power of two, got {config.temporal_downsample_factor}")
    return stages


class Encoder(nn.Module):
    """Pixels to latents before quantization: a 2-D part for each frame, then a temporal one."""

    def __init__(self, config: Emu3VQVAEConfig) -> None:
        super().__init__()
        channels = config.base_channels * config.channel_multiplier[-1]
        latent_channels = config.latent_channels * (2 if config.double_latent else 1)
        stages, blocks = count_temporal_stages(config), config.num_res_blocks
        self.conv_in = nn.Conv2d(config.in_channels, config.base_channels, 3, padding=1)
        self.down_block = DownBlock(config)
        self.middle_block = MiddleBlock(config, channels)
        self.norm_out = GroupNorm(channels)
        self.conv_out = nn.Conv2d(channels, latent_channels, 3, padding=1)
        self.time_conv = nn.Sequential(*(TemporalDownsample(latent_channels) for _ in range(stages)))
        self.time_res_stack = nn.Sequential(*(TemporalResnetBlock(latent_channels) for _ in range(blocks)))

    def encode_frames(self, pixels_BCHW: Tensor) -> Tensor:
        """The 2-D part: frames of a batch to their latents (B, C, H, W)."""
        hidden = self.middle_block(self.down_block(self.conv_in(pixels_BCHW)))
        return norm_silu_conv(self.norm_out, self.conv_out, hidden)

    def join_frames(self, latents_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        """The temporal part: latents of frames to fewer in T, by `temporal_downsample_factor`."""
        for block in (*self.time_conv, *self.time_res_stack):
            latents_BCTHW = block(latents_BCTHW, past)
        return latents_BCTHW


class Decoder(nn.Module):
    """Latents to pixels: a temporal part, then a 2-D one for each frame."""

    def __init__(self, config: Emu3VQVAEConfig) -> None:
        super().__init__()
        channels = [config.base_channels * multiplier for multiplier in config.channel_multiplier]
        latent_channels, stages, blocks = config.latent_channels, count_temporal_stages(config), config.num_res_blocks
        self.time_res_stack = nn.Sequential(*(TemporalResnetBlock(latent_channels) for _ in range(blocks)))
        self.time_conv = nn.Sequential(*(TemporalUpsample(latent_channels) for _ in range(stages)))
        self.conv_in = nn.Conv2d(latent_channels, channels[-1], 3, padding=1)
        self.middle_block = MiddleBlock(config, channels[-1], config.embed_dim)
        self.up_block = UpBlock(config)
        self.norm_out = SpatialNorm(config.embed_dim, channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def split_frames(self, latents_BCTHW: Tensor, past: Past | None = None) -> Tensor:
        """The temporal part: latents to those of frames, more in T by `temporal_downsample_factor`."""
        for block in (*self.time_res_stack, *self.time_conv):
            latents_BCTHW = block(latents_BCTHW, past)
        return latents_BCTHW

    def decode_frames(self, latents_BCHW: Tensor, quantized_BCHW: Tensor) -> Tensor:
        """The 2-D part: latents and conditioning of frames to their pixels (B, C, H, W)."""
        hidden = self.middle_block(self.conv_in(latents_BCHW), quantized_BCHW)
        hidden = self.up_block(hidden, quantized_BCHW)
        return norm_silu_conv(self.norm_out, self.conv_out, hidden, quantized_BCHW)
