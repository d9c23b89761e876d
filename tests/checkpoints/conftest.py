import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from safetensors.torch import save_file as torch_save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from emu3.tokenization import visual_token

CONFIG = {
    "model_type": "emu3",
    "text_config": {"max_position_embeddings": 32, "vocab_size": 6},
    "vq_config": {"codebook_size": 3, "channel_multiplier": [1, 2]},
}

MakeCheckpoint = Callable[[Mapping[str, tuple[int, ...]]], Path]


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """A function that writes a checkpoint folder with zeros of the given shapes."""

    def make(shapes: Mapping[str, tuple[int, ...]]) -> Path:
        save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        return tmp_path

    return make


class Norm(nn.Module):
    """Group normalisation, in the decoder scaled and shifted by the codes (`conv_y`, `conv_b`)."""

    def __init__(self, channels: int, spatial: bool) -> None:
        super().__init__()
        groups = nn.GroupNorm(32, channels, eps=1e-6)
        if spatial:
            self.norm_layer = groups
            self.conv_y, self.conv_b = nn.Conv2d(4, channels, 1), nn.Conv2d(4, channels, 1)
        else:
            self.weight, self.bias = groups.weight, groups.bias

    def forward(self, x: Tensor, codes: Tensor | None) -> Tensor:
        if codes is None:
            return F.group_norm(x, 32, self.weight, self.bias, eps=1e-6)
        codes = F.interpolate(codes, size=x.shape[-2:], mode="nearest")
        return self.norm_layer(x) * self.conv_y(codes) + self.conv_b(codes)


class Block(nn.Module):
    def __init__(self, before: int, after: int, spatial: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(before, spatial), Norm(after, spatial)
        self.conv1, self.conv2 = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, codes: Tensor | None) -> Tensor:
        hidden = self.conv1(swish(self.norm1(x, codes)))
        hidden = self.conv2(swish(self.norm2(hidden, codes)))
        return hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, channels: int, spatial: bool) -> None:
        super().__init__()
        self.norm = Norm(channels, spatial)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor, codes: Tensor | None) -> Tensor:
        normed = self.norm(x, codes)
        q, k, v = (layer(normed).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q.transpose(1, 2) @ k / x.shape[1] ** 0.5, dim=2)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class Causal(nn.Module):
    def __init__(self, kernel: tuple[int, int, int], stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(4, 4, kernel, (stride, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        side = self.conv.kernel_size[1] // 2
        return self.conv(F.pad(x, (side, side, side, side, 2, 0)))


class Temporal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm3d(4), nn.BatchNorm3d(4)
        self.conv1, self.conv2 = Causal((3, 3, 3)), Causal((3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(swish(self.norm2(self.conv1(swish(self.norm1(x))))))


class Half(nn.Module):
    """Encoder or decoder for pictures whose sides are halved once: 32 channels, then 64 with attention."""

    def __init__(self, decodes: bool) -> None:
        super().__init__()
        levels = []
        for level, (before, after) in enumerate([(64, 32), (64, 64)] if decodes else [(32, 32), (32, 64)]):
            stage = nn.Module()
            stage.block = nn.ModuleList([Block(before, after, decodes)])
            if decodes:
                stage.block.append(Block(after, after, decodes))
            stage.attn = nn.ModuleList(Attention(after, decodes) for _ in stage.block) if level else nn.ModuleList()
            if level == decodes:
                resized = nn.Module()
                resized.conv = nn.Conv2d(after, after, 3, stride=1 if decodes else 2, padding=int(decodes))
                stage.add_module("upsample" if decodes else "downsample", resized)
            levels.append(stage)
        self.add_module("up" if decodes else "down", nn.ModuleList(levels))
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = Block(64, 64, decodes), Block(64, 64, decodes)
        self.mid.attn_1 = Attention(64, decodes)
        self.conv_in = nn.Conv2d(4, 64, 3, padding=1) if decodes else nn.Conv2d(3, 32, 3, padding=1)
        self.norm_out = Norm(32 if decodes else 64, decodes)
        self.conv_out = nn.Conv2d(32, 3, 3, padding=1) if decodes else nn.Conv2d(64, 4, 3, padding=1)
        self.time_res_stack = nn.Sequential(Temporal())
        self.time_conv = nn.ModuleList()
        for _ in range(2):
            resized = nn.Module()
            resized.conv = Causal((3, 3, 3)) if decodes else Causal((4, 3, 3), stride=2)
            self.time_conv.append(resized)

    def middle(self, x: Tensor, codes: Tensor | None) -> Tensor:
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(x, codes), codes), codes)

    def level(self, stage: nn.Module, x: Tensor, codes: Tensor | None) -> Tensor:
        for index, block in enumerate(stage.block):
            x = block(x, codes)
            if len(stage.attn):
                x = stage.attn[index](x, codes)
        return x


class OriginalVision(nn.Module):
    """A small vision tokenizer with the original's names, that does what the original does with a picture."""

    config: ClassVar = {
        "architectures": ["Emu3VisionVQModel"],
        "auto_map": {"AutoModel": "modeling_emu3visionvq.Emu3VisionVQModel"},
        "model_type": "Emu3VisionVQ",
        "codebook_size": 16,
        "embed_dim": 4,
        "z_channels": 4,
        "double_z": False,
        "in_channels": 3,
        "out_channels": 3,
        "temporal_downsample_factor": 4,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [1],
        "dropout": 0.0,
        "torch_dtype": "float32",
    }

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Half(decodes=False), Half(decodes=True)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(16, 4)
        self.quant_conv, self.post_quant_conv = Causal((3, 1, 1)), Causal((3, 1, 1))

    def latents(self, pixels: Tensor) -> Tensor:
        part = self.encoder
        frames = []
        for _ in range(4):
            x = part.level(part.down[0], part.conv_in(pixels), None)
            x = part.down[0].downsample.conv(F.pad(x, (0, 1, 0, 1)))
            x = part.middle(part.level(part.down[1], x, None), None)
            frames.append(part.conv_out(swish(part.norm_out(x, None))))
        clip = torch.stack(frames, dim=2)
        for resized in part.time_conv:
            clip = swish(resized.conv(clip))
        return self.quant_conv(part.time_res_stack(clip))[:, :, 0].movedim(1, -1)

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.cdist(self.latents(pixels), self.quantize.embedding.weight).argmin(-1)

    def decode(self, codes: Tensor) -> Tensor:
        part = self.decoder
        chosen = self.quantize.embedding(codes).movedim(-1, 1)[:, :, None]
        clips = part.time_res_stack(torch.cat([self.post_quant_conv(chosen), chosen]))
        for resized in part.time_conv:
            clips = swish(resized.conv(clips.repeat_interleave(2, dim=2)))
        x, zq = clips[:, :, 0].chunk(2)
        x = part.middle(part.conv_in(x), zq)
        x = part.level(part.up[1], x, zq)
        x = part.up[1].upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = part.level(part.up[0], x, zq)
        return part.conv_out(swish(part.norm_out(x, zq)))


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@dataclass(frozen=True)
class Original:
    """A checkpoint in BAAI's layout, and the models whose weights it holds."""

    folder: Path
    language: LlamaForCausalLM
    vision: OriginalVision
    pixels: Tensor

    @property
    def parts(self) -> tuple[Path, Path]:
        return self.folder / "language", self.folder / "vision"


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Nothing stays at 0 or 1, where an exchange would not show."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
            tensor.copy_(torch.rand_like(tensor) + 0.5 if tensor.ndim == 1 else torch.randn_like(tensor) / fan_in**0.5)
        else:
            tensor.fill_(7)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("original")
    language_folder, vision_folder = folder / "language", folder / "vision"
    language_folder.mkdir()
    vision_folder.mkdir()
    ranks = [bytes([byte]) for byte in reversed(range(256))] + [b"th", b"he", b"the", b" t", b" the", b"  "]
    lines = (base64.b64encode(token).decode() + f" {rank}\n" for rank, token in enumerate(ranks))
    (language_folder / "emu3.tiktoken").write_text("".join(lines))
    visual = ["<|image token|>", "<|image start|>", "<|image end|>", *map(visual_token, range(16))]
    (language_folder / "emu3_vision_tokens.txt").write_text("".join(f"{surface}\n" for surface in visual))
    first = len(ranks)  # then <|endoftext|> <|im_start|> <|im_end|> <|extra_0|> ...
    extra = first + 3
    sizes: dict[str, Any] = {
        "vocab_size": first + 208 + len(visual),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "pad_token_id": first,
        "bos_token_id": extra + 203,
        "eos_token_id": extra + 204,
    }
    language = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}))
    vision = OriginalVision()
    for model in (language.eval(), vision.eval()):
        randomise(model)
    pixels = F.interpolate(torch.randn(2, 3, 6, 8), scale_factor=2)
    latents = vision.latents(pixels).flatten(0, -2)
    vision.quantize.embedding.weight.data.copy_(latents[torch.randperm(len(latents))[:16]])
    config = sizes | {
        "architectures": ["Emu3ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_emu3.Emu3ForCausalLM"},
        "model_type": "Emu3",
        "attention_dropout": 0.1,
        "initializer_range": 0.02,
        "use_cache": True,
        "rope_theta": 5000.0,
        "rope_scaling": None,
        "img_token_id": first + 208,
        "boi_token_id": first + 209,
        "eoi_token_id": first + 210,
        "eol_token_id": extra + 200,
        "eof_token_id": extra + 201,
        "image_area": 256,
        "pretraining_tp": 1,
        "torch_dtype": "float32",
    }
    (language_folder / "config.json").write_text(json.dumps(config))
    (vision_folder / "config.json").write_text(json.dumps(vision.config))
    pictures = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "spatial_factor": 2}
    pictures |= {"min_pixels": 64, "max_pixels": 256}
    (vision_folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    for file in ("modeling_emu3.py", "configuration_emu3.py"):
        (language_folder / file).write_text("raise SystemExit('remote code was run')")
    # Two shards, as large checkpoints have.
    weights = {name: tensor.contiguous() for name, tensor in language.state_dict().items()}
    shards = {f"model-0000{n}-of-00002.safetensors": sorted(weights)[n - 1 :: 2] for n in (1, 2)}
    for file, shard in shards.items():
        torch_save_file({name: weights[name] for name in shard}, language_folder / file)
    index = {"weight_map": {name: file for file, shard in shards.items() for name in shard}}
    (language_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    torch_save_file(vision.state_dict(), vision_folder / "model.safetensors")
    return Original(folder, language, vision, pixels)
