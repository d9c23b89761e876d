"""The attention functions of transformers, chosen by a config, and a plain one. Letters as in CONTRIBUTING.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def get_attention(config: PreTrainedConfig) -> AttentionFunction:
    """The attention function that `config` names: "sdpa", "flash_attention_2" ...; `eager_attention` for "eager".

    It takes the module, query (B, N, S, D), key and value (B, K, L, D), a mask, `scaling`, `dropout` and more. It
    returns the mixed values (B, S, N, D) and the weights (B, N, S, L), or None in place of the weights.
    """
    return cast(AttentionFunction, ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention))


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention step by step: an attention function as `get_attention` describes it, with weights.

    A boolean mask is True where a query may look; any other mask is added to the scores. Without a mask, a query sees
    itself and earlier keys if `is_causal`, else all keys. The default is the module's own `is_causal`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is None and (module.is_causal if is_causal is None else is_causal):
        past = scores.shape[3] - scores.shape[2]
        attention_mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril(past)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
