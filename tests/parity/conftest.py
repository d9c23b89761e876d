"""Our models and transformers' own, of one tiny configuration and with the same random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Emu3Config as ReferenceConfig
from transformers import Emu3ForConditionalGeneration as ReferenceModel

from emu3.configuration import Emu3Config
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.modeling.vision import Emu3VQVAE
from emu3.vocabulary import SURFACES, Vocabulary

TEXT_IDS = 40
CODES = 64
FACTOR = 4
VOCABULARY_MAP = {surface: TEXT_IDS + n for n, surface in enumerate(SURFACES.values())}
VOCABULARY_MAP |= {f"<|visual token {code:06d}|>": TEXT_IDS + len(SURFACES) + code for code in range(CODES)}


def tiny_config(text: dict[str, Any], vision: dict[str, Any], **whole: Any) -> Emu3Config:
    base = {
        "vocab_size": TEXT_IDS + len(VOCABULARY_MAP),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": VOCABULARY_MAP["<|endoftext|>"],
        "bos_token_id": VOCABULARY_MAP["<|extra_203|>"],
        "eos_token_id": VOCABULARY_MAP["<|extra_204|>"],
    }
    picture = {
        "codebook_size": CODES,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [2],
        "hidden_size": 64,
        "num_attention_heads": 2,
    }
    vocabulary_map = whole.pop("vocabulary_map", VOCABULARY_MAP)
    return Emu3Config(text_config=base | text, vq_config=picture | vision, vocabulary_map=vocabulary_map, **whole)


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Random values of order one for all that is learned, also where fresh weights are 0 or 1 and hide a difference."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            module.weight.normal_(0, module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                module.bias.normal_(0, 0.2)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0, 0.5)
        elif isinstance(getattr(module, "weight", None), nn.Parameter):  # all kinds of normalisation
            module.weight.uniform_(0.5, 1.5)
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(0, 0.2)
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    for module in model.modules():
        if isinstance(module, Emu3VQVAE):  # a codebook among the latents, so that pictures have many codes
            latents = module.latents(torch.randn(8, 3, 8 * FACTOR, 8 * FACTOR))[1].movedim(2, -1).flatten(0, -2)
            module.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[:CODES]])


@dataclass(frozen=True)
class Pair:
    """The two models, and inputs for them."""

    ours: Emu3ForConditionalGeneration
    theirs: ReferenceModel

    @property
    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.ours, self.theirs

    @property
    def vocabulary(self) -> Vocabulary:
        return self.ours.model.vocabulary

    def pixels(self, *sizes: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
        """Random smooth pictures of some sizes in tokens, padded at the bottom and right like the processor does."""
        noise = torch.Generator().manual_seed(seed)
        height, width = (FACTOR * max(side) for side in zip(*sizes, strict=True))
        pixel_values = torch.zeros(len(sizes), 3, height, width)
        for picture, (rows, columns) in zip(pixel_values, sizes, strict=True):
            coarse = torch.randn(1, 3, rows, columns, generator=noise)
            picture[:, : rows * FACTOR, : columns * FACTOR] = nn.functional.interpolate(coarse, scale_factor=FACTOR)[0]
        return {"pixel_values": pixel_values, "image_sizes": torch.tensor(sizes) * FACTOR}

    def shown(self, rows: int, columns: int) -> list[int]:
        """A picture's part of a prompt."""
        v = self.vocabulary
        return [v.boi, 1, v.img, *[v.image_placeholder] * (rows * (columns + 1)), v.eof, v.eoi]

    def prompts(self, *prompts: list[int]) -> dict[str, Tensor]:
        """Left-padded ids and their mask."""
        longest = max(map(len, prompts))
        pad = self.vocabulary.pad
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="session")
def config_of() -> Callable[..., Emu3Config]:
    return tiny_config


@pytest.fixture(scope="session")
def build() -> Callable[..., Pair]:
    """Builds a pair from arguments of the text, vision and whole configurations."""

    def build(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **whole: Any) -> Pair:
        torch.manual_seed(0)
        config = tiny_config(text or {}, vision or {}, **whole)
        ours = Emu3ForConditionalGeneration(config).eval()
        shake(ours)
        theirs = ReferenceModel(ReferenceConfig(**config.to_dict())).eval()
        theirs.load_state_dict(ours.state_dict(), strict=True)
        return Pair(ours, theirs)

    return build


@pytest.fixture(scope="session")
def pair(build: Callable[..., Pair]) -> Pair:
    return build()
