"""Loads the vision tokenizer alone: from a whole checkpoint, whose language model stays on disk, or its own folder.

Letters: C, V, see CONTRIBUTING.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from emu3.checkpoints.config import all_finite, build_config, check_tensors, parts_of
from emu3.checkpoints.files import read_headers, read_json
from emu3.checkpoints.settings import VISION, check_fields, read_config, read_picture_settings
from emu3.configuration import Emu3VQVAEConfig
from emu3.image_processing import Emu3ImageProcessor
from emu3.modeling.legacy import documented_name
from emu3.modeling.vision import Emu3VQVAE
from emu3.vocabulary import VISUAL_PREFIX

_PREFIX = "model.vqmodel."
_PICTURE_FILES = ("processor_config.json", "preprocessor_config.json")


def is_vision_tokenizer(folder: Path) -> bool:
    """Whether a folder holds only a vision tokenizer, as `Emu3VQVAE.save_pretrained` writes it."""
    return read_json(folder / "config.json").get("model_type") == Emu3VQVAEConfig.model_type


def load_vision_tokenizer(folder: Path, device: torch.device | str = "cpu") -> Emu3VQVAE:
    """The vision tokenizer of a checkpoint folder, or of a folder of its own, in float32 and in eval mode.

    Raises:
        ValueError: a file is missing or damaged, the tensors are not those of config.json, or a weight is not finite.
    """
    config = _read_vision_config(folder)
    headers = read_headers(folder)
    if not is_vision_tokenizer(folder):
        named = {documented_name(name): header for name, header in headers.items()}
        headers = {name.removeprefix(_PREFIX): each for name, each in named.items() if name.startswith(_PREFIX)}
    # Counted before modules are built: a billion blocks would take forever, even without weights.
    blocks = len({match[1] for name in headers if (match := re.search(r"^encoder\..*down\.0\.block\.(\d+)\.", name))})
    if blocks != config.num_res_blocks:
        raise ValueError(
            f"{folder / 'config.json'} says num_res_blocks={config.num_res_blocks}, the tensors are those of {blocks}; "
            "get the checkpoint again"
        )
    try:
        with torch.device("meta"):
            tokenizer = Emu3VQVAE(config)
    except Exception as error:  # the class depends on which setting is wrong
        raise ValueError(f"{folder / 'config.json'} describes a tokenizer that cannot be built: {error}") from error
    expected = dict(tokenizer.state_dict())
    check_tensors(str(folder), expected, headers)
    tensors = {}
    for file in {header.file for header in headers.values()}:
        with safe_open(file, framework="pt") as opened:
            for name, header in headers.items():
                if header.file == file:
                    tensors[name] = opened.get_tensor(header.name).to(device, expected[name].dtype)
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise ValueError(f"{folder}: {name} holds NaN or infinite values; get the checkpoint again")
    tokenizer.load_state_dict(tensors, assign=True)
    tokenizer.name_or_path = tokenizer.config.name_or_path = str(folder)
    return tokenizer.eval()


@dataclass(frozen=True, eq=False)
class PictureSettings:
    """How a checkpoint's pictures become pixels.

    Attributes:
        spatial_factor: pixels of a code's side.
        temporal_factor: frames that share a code.
        independent_groups: whether each group of these is a clip of its own for the vision tokenizer.
        resample: PIL's number of the filter that resizes.
        levels_VC: normalised value of each byte in each channel, float32 (256, 3).
        min_pixels, max_pixels: limits of the area of a picture that is read; None where the folder does not say.
        image_area: pixels of a picture that is drawn; None where the folder does not say.
    """

    spatial_factor: int
    temporal_factor: int
    independent_groups: bool
    resample: int
    levels_VC: NDArray[np.float32]
    min_pixels: int | None
    max_pixels: int | None
    image_area: int | None


def read_picture_settings_of(folder: Path) -> PictureSettings:
    """The settings of a checkpoint folder, or of one that holds only a vision tokenizer.

    The latter may lack the image processor's file. Its pictures are then normalised to [-1, 1], for which `emu3 train`
    and BAAI make tokenizers. Raises ValueError where a setting cannot be used.
    """
    config = _read_vision_config(folder)
    factor = 2 ** (len(config.channel_multiplier) - 1)
    has_settings = any((folder / name).is_file() for name in _PICTURE_FILES)
    settings: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "spatial_factor": factor}
    if has_settings:
        settings, file = read_picture_settings(folder)
        settings = {key: value for key, value in settings.items() if key != "image_processor_type"}
        if settings.get("spatial_factor", 8) != factor:
            raise ValueError(
                f"{file} says spatial_factor={settings.get('spatial_factor', 8)}, but the vision tokenizer has "
                f"{factor} pixels per token side; give the settings that belong to it"
            )
        if not settings.get("do_resize", True):
            raise ValueError(f"{file} says do_resize=false; pictures of people have to be resized, so make it true")
    processor = Emu3ImageProcessor(**settings)
    bytes_ = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2)
    levels = processor.preprocess(
        bytes_, do_resize=False, data_format="channels_last", input_data_format="channels_last"
    )
    clips = {} if is_vision_tokenizer(folder) else read_config(folder).get("clips") or {}
    area = read_json(folder / _PICTURE_FILES[0]).get("image_area")
    return PictureSettings(
        spatial_factor=factor,
        temporal_factor=config.temporal_downsample_factor,
        independent_groups=bool(clips.get("independent_groups")),
        resample=int(processor.resample),
        levels_VC=np.asarray(levels["pixel_values"][0], np.float32)[:, 0],
        min_pixels=processor.size["min_pixels"] if has_settings else None,
        max_pixels=processor.size["max_pixels"] if has_settings else None,
        image_area=area if isinstance(area, int) else None,
    )


def _read_vision_config(folder: Path) -> Emu3VQVAEConfig:
    file = folder / "config.json"
    if not is_vision_tokenizer(folder):
        return parts_of(build_config(read_config(folder), file))[1]
    raw = read_json(file)
    check_fields(raw, VISION, file)
    # Checked as a part of a whole model, whose other fields have their defaults and whose vocabulary has one code.
    whole = {"model_type": "emu3", "vq_config": raw, "vocabulary_map": {f"{VISUAL_PREFIX} 000000|>": 0}}
    return parts_of(build_config(whole, file))[1]
