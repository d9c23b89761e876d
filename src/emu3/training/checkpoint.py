"""Putting a checkpoint together: a trained vision tokenizer, a trained language model and its text tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, GenerationConfig

from emu3.configuration import Emu3Config, Emu3TextConfig, Emu3VQVAEConfig
from emu3.image_processing import Emu3ImageProcessor
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.modeling.text import Emu3ForCausalLM
from emu3.modeling.vision import Emu3VQVAE
from emu3.processing import Emu3Processor
from emu3.tokenization import vocabulary_map
from emu3.training.recipe import made_before


@dataclass(frozen=True)
class CheckpointRecipe:
    """What goes into a checkpoint.

    Attributes:
        vision: folder of the trained vision tokenizer, relative to the recipe.
        language: output folder of the language recipe, relative to the recipe.
        image_area: pixels of a picture to draw where none are asked for.
        image_processor: arguments of `Emu3ImageProcessor`.
    """

    vision: str
    language: str
    image_area: int
    image_processor: dict[str, Any] = field(default_factory=dict)


def assemble(recipe: CheckpointRecipe, beside: Path, folder: Path) -> None:
    """Writes the checkpoint in the documented layout to `folder`; weights in float16, to be loaded as float32."""
    vision = Emu3VQVAE.from_pretrained(made_before(beside / recipe.vision))
    language = Emu3ForCausalLM.from_pretrained(made_before(beside / recipe.language / "language"))
    tokenizer = AutoTokenizer.from_pretrained((beside / recipe.language / "tokenizer").resolve())
    config = Emu3Config(vq_config=vision.config, text_config=language.config, vocabulary_map=vocabulary_map(tokenizer))
    config.abilities = ["draw", "read"]
    model = Emu3ForConditionalGeneration(config)
    model.model.vqmodel.load_state_dict(vision.state_dict())
    model.model.text_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=language.config.bos_token_id,
        eos_token_id=language.config.eos_token_id,
        pad_token_id=language.config.pad_token_id,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(folder)
    # A loader that follows the configuration computes in float32: float16 is how the weights travel.
    for part in (config, cast(Emu3TextConfig, config.text_config), cast(Emu3VQVAEConfig, config.vq_config)):
        part.dtype = torch.float32
        part.name_or_path = ""  # where it was on the machine that trained it
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    image_processor = Emu3ImageProcessor(
        spatial_factor=vision.spatial_scale_factor, image_mean=[0.5] * 3, image_std=[0.5] * 3, **recipe.image_processor
    )
    Emu3Processor(image_processor, tokenizer, image_area=recipe.image_area).save_pretrained(folder)
