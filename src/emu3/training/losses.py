"""Losses, and measures of what is lost."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3.modeling.text import Emu3ForCausalLM
from emu3.training.precision import autocast


def next_token_loss(
    model: Emu3ForCausalLM, run_layers: Callable[..., Tensor], ids_BS: Tensor, weights_BS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of predicting each token from those before it; tokens of weight 0 do not count.

    Args:
        model: its embedding and head are used.
        run_layers: its layers, perhaps compiled.
        ids_BS: token ids.
        weights_BS: the weight of each token as a target.

    Returns:
        The mean by weight, the loss (targets,) and the id (targets,) of every target that counts.
    """
    with autocast():
        positions = torch.arange(ids_BS.shape[1] - 1, device=ids_BS.device)[None]
        hidden_BSE = run_layers(model.model.embed_tokens(ids_BS[:, :-1]), None, positions)
        counts_BS = weights_BS[:, 1:] > 0
        logits = model.lm_head(hidden_BSE[counts_BS])
    targets, weights = ids_BS[:, 1:][counts_BS], weights_BS[:, 1:][counts_BS]
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weights).sum() / weights.sum(), losses.detach(), targets


def psnr(pixels_BCHW: Tensor, target_BCHW: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], mean over pictures."""
    error_B = (pixels_BCHW.clamp(-1, 1) - target_BCHW).square().flatten(1).mean(1).clamp_min(1e-10)
    return float((10 * torch.log10(4.0 / error_B)).mean())
