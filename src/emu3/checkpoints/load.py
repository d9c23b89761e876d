"""Models and processors from a checkpoint's folder. A checkpoint that does not fit is refused, never patched up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging

from emu3.checkpoints.inspect import check_tensors, read_config
from emu3.configuration import Emu3Config
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.processing import Emu3Processor

LONG_LOAD = 1e9
"""Bytes from which loading shows a progress bar."""


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Emu3ForConditionalGeneration:
    """The model of a checkpoint folder, in eval mode.

    Raises:
        ValueError: the folder is no checkpoint, a file is damaged, or its tensors are not exactly those of config.json.
    """
    folder = Path(path)
    config = Emu3Config.from_dict(read_config(folder))
    # transformers fills missing tensors with random values and drops extra ones, with a warning; so look first.
    with torch.device("meta"):
        tensors = Emu3ForConditionalGeneration(config).state_dict()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    check_tensors(folder, {name: tensor.shape for name, tensor in tensors.items()}, optional=tied)
    with _progress_bar(shown=sum(file.stat().st_size for file in folder.glob("*.safetensors")) > LONG_LOAD):
        model = Emu3ForConditionalGeneration.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    return model.to(device).eval()


def load_processor(path: str | Path) -> Emu3Processor:
    """The processor of a checkpoint folder. Raises ValueError where its files are missing or damaged."""
    folder = Path(path)
    read_config(folder)
    try:
        return Emu3Processor.from_pretrained(folder, local_files_only=True)
    # What transformers raises depends on which file is missing or broken, and where.
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} holds no complete processor and tokenizer: {error}") from error


@contextmanager
def _progress_bar(shown: bool) -> Iterator[None]:
    """Hide the bar of transformers unless `shown`; afterwards it is as it was."""
    enabled = logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
