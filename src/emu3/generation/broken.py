"""Why a model gives logits that are not finite: what to tell whoever asked, after the fact."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from emu3.modeling.text import Emu3TextModel


@torch.inference_mode()
def cause_of_broken_logits(text_model: Emu3TextModel, head: nn.Module, prompt_ids: tuple[int, ...]) -> str:
    """Say which weight, setting or layer makes the logits behind this prompt NaN or infinite."""
    own = [*head.named_parameters(), *head.named_buffers()]
    for name, weight in [*text_model.named_parameters(prefix="model.text_model"), *own]:
        if weight.device.type != "meta" and weight.is_floating_point() and not weight.isfinite().all():
            name = name if "." in name else f"lm_head.{name}"
            return f"{name} holds NaN or infinite values; get the checkpoint again"
    eps = text_model.config.rms_norm_eps
    if not math.isfinite(eps) or eps < 0:
        return f"rms_norm_eps={eps}; set it to a small positive number, such as 1e-5"
    ids = torch.tensor([prompt_ids], device=text_model.embed_tokens.weight.device)
    states = text_model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    for index, state in enumerate(states):
        if not state.isfinite().all():
            where = f"the output of layers.{index - 1}" if index else "the embeddings"
            return f"{where} overflows in {state.dtype}; load the model with dtype=torch.float32"
    return "no weight and no layer alone explains it; load the model with dtype=torch.float32"
