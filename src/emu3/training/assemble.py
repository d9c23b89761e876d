"""Assembles a checkpoint from a trained vision tokenizer, a trained language model and its text tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from transformers import AutoTokenizer, GenerationConfig

from emu3.configuration import Emu3Config, Emu3TextConfig, Emu3VQVAEConfig
from emu3.image_processing import Emu3ImageProcessor
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.modeling.text import Emu3ForCausalLM
from emu3.modeling.vision import Emu3VQVAE
from emu3.processing import Emu3Processor
from emu3.tokenization import vocabulary_map
from emu3.training.state import require_output


@dataclass(frozen=True, kw_only=True)
class AssembleRecipe:
    """The parts of a checkpoint.

    Attributes:
        vision: folder of the trained vision tokenizer.
        language: output folder of the language model's recipe.
        image_area: size of drawn pictures in pixels, unless a request names another.
        words: a text file of words that the checkpoint knows, which a page offers to complete.
        image_processor: `min_pixels` and `max_pixels` of `Emu3ImageProcessor`.
    """

    vision: Path
    language: Path
    image_area: int
    words: Path | None = None
    image_processor: Annotated[dict[str, Any], {"min_pixels": int, "max_pixels": int}] = field(default_factory=dict)


def assemble(recipe: AssembleRecipe, folder: Path) -> None:
    """Writes the checkpoint in the documented layout: weights stored in float16, to be loaded as float32."""
    vision = Emu3VQVAE.from_pretrained(require_output(recipe.vision))
    language = Emu3ForCausalLM.from_pretrained(require_output(recipe.language / "language"))
    tokenizer = AutoTokenizer.from_pretrained((recipe.language / "tokenizer").resolve())
    config = Emu3Config(vq_config=vision.config, text_config=language.config, vocabulary_map=vocabulary_map(tokenizer))
    config.abilities = ["draw", "read"]
    model = Emu3ForConditionalGeneration(config)
    model.model.vqmodel.load_state_dict(vision.state_dict())
    model.model.text_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    ids = {name: getattr(language.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(folder)
    # A loader that follows the configuration computes in float32: float16 only saves space in the file.
    for part in (config, cast(Emu3TextConfig, config.text_config), cast(Emu3VQVAEConfig, config.vq_config)):
        part.dtype = torch.float32
        part.name_or_path = ""  # it would name a folder of the machine that trained
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    image_processor = Emu3ImageProcessor(
        spatial_factor=vision.spatial_scale_factor, image_mean=[0.5] * 3, image_std=[0.5] * 3, **recipe.image_processor
    )
    Emu3Processor(image_processor, tokenizer, image_area=recipe.image_area).save_pretrained(folder)
    if recipe.words is not None:
        (folder / "words.txt").write_text(recipe.words.read_text())
