"""The vision tokenizer: pictures and clips to integer codes, and back.

A VQ-VAE in the style of MoVQ (arXiv 2209.09002) with a temporal part (arXiv 2409.18869, section 2.2):

    frames -> 2-D encoder, frame by frame -> 3-D convolutions over time, on the narrow latents -> nearest code

The temporal part turns each group of `temporal_downsample_factor` frames into one. The decoder mirrors all this.

A single picture is, by definition, a clip that repeats it. The 2-D parts treat frames independently, so they run once:
encoding repeats the latents and not the pixels, and decoding keeps only the first frame for the 2-D part.

Letters: B, C, T, H, W, see CONTRIBUTING.md. H and W count pixels for pictures, and codes for codes and latents. Codes
and their latents are fewer: in H and W by `spatial_scale_factor`, in T by `temporal_downsample_factor`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from emu3.configuration import Emu3VQVAEConfig
from emu3.modeling.pretrained import AnyLayoutModel
from emu3.modeling.vision_blocks import (
    AttentionBlock,
    CausalConv3d,
    Decoder,
    Encoder,
    Past,
    ResnetBlock,
    TemporalResnetBlock,
)

MAX_DISTANCES = {"cpu": 2**18, "other": 2**24}
"""Distances, positions times codes, that are computed at once: 1 MiB in float32 stays in a CPU's cache."""


@dataclass
class Emu3VQVAEModelOutput(BaseModelOutputWithPooling):
    """What `Emu3VQVAE.encode` returns.

    Attributes:
        last_hidden_state: encoder output before quantization, (B, T, C, H, W).
        image_tokens: codes of each sample, (H, W) for a picture, (T, H, W) for a clip, cropped to its own size.
        pooler_output: embeddings of the codes, set by `Emu3Model.get_image_features`.
    """

    image_tokens: list[Tensor] | None = None


class VectorQuantizer(nn.Module):
    """Finds the nearest codebook vector. The codebook is learned in `emu3.training.vision`."""

    def __init__(self, config: Emu3VQVAEConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.embed_dim)

    def forward(self, latents_BTCHW: Tensor) -> Tensor:
        """Codes (B, T, H, W) of latents (B, T, C, H, W)."""
        latents_BTHWC = latents_BTCHW.movedim(2, -1)
        vectors = latents_BTHWC.flatten(0, 3)
        # A call, because accelerate brings an offloaded weight back only while its own module's forward runs.
        codebook = self.embedding(torch.arange(self.embedding.num_embeddings, device=vectors.device))
        norms = codebook.square().sum(1)
        at_once = MAX_DISTANCES["cpu" if vectors.device.type == "cpu" else "other"]
        codes = [
            (part.square().sum(1, keepdim=True) + norms - 2 * part @ codebook.T).argmin(1)
            for part in vectors.split(max(1, at_once // len(codebook)))
        ]
        return torch.cat(codes).view(latents_BTHWC.shape[:4])


class Emu3VQVAE(AnyLayoutModel):
    """The vision tokenizer: `encode` pictures or clips to codes, `decode` codes to pictures or clips.

    It is frozen: `train()` leaves it in evaluation mode. So its batch norms keep their statistics, and pictures keep
    their codes, while a whole model is fine-tuned. Set `frozen = False` to train the tokenizer itself.
    """

    config: Emu3VQVAEConfig
    config_class = Emu3VQVAEConfig
    base_model_prefix = "emuvideovq"
    # Names in the checkpoint of a whole model. transformers strips the base model's prefix, so the new names have it.
    renamed_weights: ClassVar[dict[str, str]] = {r"^model\.vqmodel\.": "emuvideovq.", r"^vqmodel\.": "emuvideovq."}
    # The other parts of a whole model's checkpoint.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(?:^|\.)text_model\.", r"(?:^|\.)lm_head\."]
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")
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
        self.quant_conv = CausalConv3d(config.latent_channels, config.embed_dim, space=1)
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.latent_channels, space=1)
        # Pixels per code along height and along width, under two names.
        self.spatial_scale_factor = self.vision_spatial_factor = 2 ** (len(config.channel_multiplier) - 1)
        self.eval()
        self.post_init()

    def train(self, mode: bool = True) -> Emu3VQVAE:
        return super().train(mode and not self.frozen)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            # PyTorch's own initialisation, in place of the fixed standard deviation of the base class.
            module.reset_parameters()
        elif isinstance(module, VectorQuantizer):
            bound = 1.0 / self.config.codebook_size
            module.embedding.weight.uniform_(-bound, bound)

    def latents(self, pixel_values: Tensor, past: Past | None = None) -> tuple[Tensor, Tensor]:
        """Latents before quantization, differentiable.

        `pixel_values` are pictures (B, C, H, W), or clips (B, T, C, H, W) whose frames are a multiple of
        `temporal_downsample_factor`, normalised as by the image processor. The result is the encoder's output
        (B, T, C, H, W) with `latent_channels` channels, and the same after `quant_conv`, with `embed_dim` channels.
        With a `past`, which is empty at first, a clip may come in pieces, each a multiple of frames.
        """
        factor = self.config.temporal_downsample_factor
        if pixel_values.ndim == 4:
            latents_BCTHW = self.encoder.encode_frames(pixel_values)[:, :, None].expand(-1, -1, factor, -1, -1)
        else:
            batch, frames = pixel_values.shape[:2]
            if frames % factor:
                raise ValueError(f"a clip needs a multiple of {factor} frames, got {frames}: repeat or drop some")
            latents = self.encoder.encode_frames(pixel_values.flatten(0, 1))
            latents_BCTHW = latents.unflatten(0, (batch, frames)).transpose(1, 2)
        latents_BCTHW = self.encoder.join_frames(latents_BCTHW, past)
        return latents_BCTHW.transpose(1, 2), self.quant_conv(latents_BCTHW, past).transpose(1, 2)

    def pixels(self, quantized_BTCHW: Tensor, single: bool, past: Past | None = None) -> Tensor:
        """Pixels (B, T, C, H, W) from codebook vectors, differentiable.

        `single` says that the vectors are of pictures: T is 1 and only the first frame is decoded, to (B, C, H, W).
        With a `past`, which is empty at first, a clip may come in pieces.
        """
        quantized_BCTHW = quantized_BTCHW.transpose(1, 2)
        # Latents and conditioning pass through the same temporal layers, here as one batch.
        both = torch.cat((self.post_quant_conv(quantized_BCTHW, past), quantized_BCTHW))
        both = self.decoder.split_frames(both, past)
        if single:
            both = both[:, :, :1]
        latents, conditioning = both.transpose(1, 2).chunk(2)
        pixels = self.decoder.decode_frames(latents.flatten(0, 1), conditioning.flatten(0, 1))
        return pixels if single else pixels.unflatten(0, latents.shape[:2])

    @merge_with_config_defaults
    @capture_outputs
    def encode(
        self, pixel_values: Tensor, image_sizes: Tensor | list[list[int]], **kwargs: Any
    ) -> Emu3VQVAEModelOutput:
        """Codes of pictures or clips.

        Args:
            pixel_values: pictures (B, C, H, W) or clips (B, T, C, H, W). Samples smaller than H x W come padded at
                the bottom and on the right.
            image_sizes: (B, 2), height and width in pixels of each sample without its padding.
            **kwargs: `output_hidden_states` gives the input of the first residual block and the output of each;
                `output_attentions` the weights of every attention, if it is eager. A picture then counts as a clip of
                `temporal_downsample_factor` frames. `return_dict=False` gives a tuple.
        """
        single = pixel_values.ndim == 4
        pixel_values = pixel_values.to(self.dtype)
        switches = ("output_hidden_states", "output_attentions")
        if single and any(kwargs.get(name, getattr(self.config, name)) for name in switches):
            # As in transformers, where the recorded tensors are those of a clip that repeats the picture.
            pixel_values = pixel_values[:, None].expand(-1, self.config.temporal_downsample_factor, -1, -1, -1)
        encoded, latents = self.latents(pixel_values)
        codes = self.quantize(latents)[:, 0] if single else self.quantize(latents)
        factor = self.spatial_scale_factor
        return Emu3VQVAEModelOutput(
            last_hidden_state=cast(Any, encoded),
            image_tokens=[
                sample[..., : int(height) // factor, : int(width) // factor]
                for sample, (height, width) in zip(codes, image_sizes, strict=True)
            ],
        )

    def decode(self, hidden_states: Tensor) -> Tensor:
        """Pixels of codes, in the image processor's normalised space.

        `hidden_states` are codes: of pictures (B, H, W), for pixels (B, C, H, W), or of clips (B, T, H, W), for
        (B, T, C, H, W).
        """
        single = hidden_states.ndim == 3
        codes_BTHW = hidden_states[:, None] if single else hidden_states
        return self.pixels(self.quantize.embedding(codes_BTHW).movedim(-1, 2), single)

    @torch.no_grad()
    def encode_stream(self, pieces: Iterable[Tensor], independent: bool = False) -> Iterator[Tensor]:
        """Codes (B, T, H, W) of a clip that comes in pieces, in memory that does not grow with the clip.

        They are those of the whole clip, encoded at once.

        Args:
            pieces: frames (B, any number, C, H, W), one piece after the other. What is left over at the end, fewer
                frames than share a code, has no code.
            independent: whether each group of frames that share a code is a clip of its own, which sees no earlier one.
        """
        factor, past, waiting = self.config.temporal_downsample_factor, Past(), None
        for piece in pieces:
            waiting = piece if waiting is None else torch.cat((waiting, piece), 1)
            while waiting.shape[1] >= factor:
                group, waiting = waiting[:, :factor], waiting[:, factor:]
                yield self.quantize(self.latents(group.to(self.dtype), Past() if independent else past)[1])

    @torch.no_grad()
    def decode_stream(self, pieces: Iterable[Tensor], independent: bool = False) -> Iterator[Tensor]:
        """Pixels (B, T, C, H, W) of codes (B, any number, H, W) that come in pieces, as `encode_stream` gives them.

        Each frame of codes gives `temporal_downsample_factor` frames: those of the whole clip, decoded at once.
        """
        past = Past()
        for piece in pieces:
            for codes_BHW in piece.unbind(1):
                vectors = self.quantize.embedding(codes_BHW[:, None]).movedim(-1, 2)
                yield self.pixels(vectors, False, Past() if independent else past)
