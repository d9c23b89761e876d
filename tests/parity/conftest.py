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
from emu3.vocabulary import Vocabulary

FACTOR = 4


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
            module.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[: module.config.codebook_size]])


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
def config_of(tiny_config) -> Callable[..., Emu3Config]:
    """As `tiny_config`, with two heads of attention in the vision tokenizer."""
    return lambda text=None, vision=None, **whole: tiny_config(
        text, {"num_attention_heads": 2} | (vision or {}), **whole
    )


@pytest.fixture(scope="session")
def build(config_of) -> Callable[..., Pair]:
    """Builds a pair from arguments of the text, vision and whole configurations."""

    def build(*parts: Any, **whole: Any) -> Pair:
        torch.manual_seed(0)
        config = config_of(*parts, **whole)
        ours = Emu3ForConditionalGeneration(config).eval()
        shake(ours)
        theirs = ReferenceModel(ReferenceConfig(**config.to_dict())).eval()
        theirs.load_state_dict(ours.state_dict(), strict=True)
        return Pair(ours, theirs)

    return build


@pytest.fixture(scope="session")
def pair(build: Callable[..., Pair]) -> Pair:
    return build()
