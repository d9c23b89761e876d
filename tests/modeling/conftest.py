"""A tiny random model whose pictures have many codes, and inputs for it."""

import pytest
import torch
from torch import nn

from emu3.configuration import Emu3Config
from emu3.modeling.multimodal import Emu3ForConditionalGeneration

FACTOR = 4


@pytest.fixture(scope="session")
def config(tiny_config) -> Emu3Config:
    return tiny_config({"initializer_range": 0.3})


@pytest.fixture
@torch.no_grad()
def model(config: Emu3Config) -> Emu3ForConditionalGeneration:
    torch.manual_seed(0)
    model = Emu3ForConditionalGeneration(config).eval()
    vqmodel = model.model.vqmodel
    for module in vqmodel.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    latents = vqmodel.latents(torch.randn(8, 3, 32, 32))[1].movedim(2, -1).flatten(0, -2)
    vqmodel.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[: config.vq_config.codebook_size]])
    return model


@pytest.fixture
def vqmodel(model):
    return model.model.vqmodel


@pytest.fixture
def vocabulary(model):
    return model.model.vocabulary


@pytest.fixture
def shown(vocabulary):
    """A prompt with one picture of 4x3 tokens."""
    v = vocabulary
    ids = torch.tensor([[2, v.boi, 1, v.img, *[v.image_placeholder] * 16, v.eof, v.eoi, 5, 6]])
    pixels = torch.randn(1, 3, 4 * FACTOR, 3 * FACTOR, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor([[4, 3]]) * FACTOR}
