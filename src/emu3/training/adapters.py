"""Adapters of low rank (LoRA, Hu et al., 2021) in a model that is trained: added, merged for a while, switched off.

They are PEFT's. Loading and writing them is the work of `emu3.checkpoints.adapters`.
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All of a layer."""


def add_adapters(model: nn.Module, rank: int, alpha: float, modules: Sequence[str], dropout: float = 0.0) -> Any:
    """Puts adapters beside matrices of the text model's layers, in place; only they get gradients.

    Returns PEFT's model. ValueError where PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("adapters need PEFT; pip install -e '.[train]' in the clone") from error
    targets = rf".*text_model\.layers\..*\.({'|'.join(modules)})"
    config = LoraConfig(r=rank, lora_alpha=cast(int, alpha), lora_dropout=dropout, target_modules=targets)
    model.requires_grad_(False)
    with warnings.catch_warnings():  # PEFT asks for a property that transformers has renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(cast(Any, model), config)


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """With the model's adapters, if there are any, added to its weights: so the engine reads them, after `refresh`."""
    layers = _adapted(model)
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer in layers:
            layer.unmerge()


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The checkpoint as it was, without dropout. ValueError for a model without adapters, which no longer has it."""
    layers = _adapted(model)
    if not layers:
        raise ValueError(
            "the model has no adapters to switch off; train adapters, or compare with a copy of its first weights"
        )
    trains = model.training
    model.eval()
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        model.train(trains)


def _adapted(model: nn.Module) -> list[Any]:
    """The layers with adapters of PEFT. Without PEFT there are none."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
