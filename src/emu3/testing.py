"""Tiny random checkpoints that are complete in every other way, for the tests of this project and of others."""

from __future__ import annotations

from pathlib import Path

import torch

from emu3.configuration import Emu3Config
from emu3.image_processing import Emu3ImageProcessor
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.processing import Emu3Processor
from emu3.tokenization import train_tokenizer, vocabulary_map


def write_tiny_checkpoint(folder: Path, side: int = 48, codes: int = 16, context: int = 512, seed: int = 0) -> Path:
    """Write a complete checkpoint of a random model that runs in milliseconds, and return its folder.

    Args:
        folder: to write to.
        side: of its pictures, in pixels; a token is 4x4 pixels, so that 48x48 pixels are 12x12 tokens.
        codes: entries of the vision tokenizer's codebook.
        context: tokens that the model takes.
        seed: of the weights.
    """
    tokenizer = train_tokenizer(["a photo of a red car", "What color is the cat?"], 262, codes)
    pictures = Emu3ImageProcessor(
        image_mean=[0.5] * 3, image_std=[0.5] * 3, spatial_factor=4, min_pixels=side**2, max_pixels=side**2
    )
    Emu3Processor(pictures, tokenizer, image_area=side**2).save_pretrained(folder)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": 0.3,
        "attention_dropout": 0.0,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "codebook_size": codes,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [2],
        "hidden_size": 32,
    }
    config = Emu3Config(text_config=text, vq_config=vision, vocabulary_map=vocabulary_map(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Emu3ForConditionalGeneration(config)
        # Codes are as far apart as in a trained tokenizer, so that other tokens make another picture.
        torch.nn.init.normal_(model.model.vqmodel.quantize.embedding.weight)
    model.save_pretrained(folder)
    return folder
