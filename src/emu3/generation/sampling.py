"""How one id is chosen from logits. The order is guidance, legal ids, temperature, top-k, top-p, as in `generate`.

Logits come sliced to the legal ids. The slice changes the normaliser of their log-probabilities, by a constant a row.
So guidance gives the distribution that it gives on the whole vocabulary, followed by the constraint.

B rows, V legal ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from emu3.options import MOST_TOP_K, check_probability, check_temperature, check_whole


@dataclass(frozen=True)
class Sampling:
    """How to choose: from the most likely ids, at a temperature.

    Args:
        temperature: logits are divided by it; 0 takes the most likely id.
        top_k: keep the k most likely ids, and those as likely as the last of them; 0 keeps all.
        top_p: keep the most likely ids that together reach this probability; 1 keeps all.

    Raises:
        ValueError: temperature or top_k that is no number or below 0, a temperature too small to divide by, or top_p
            outside (0, 1].
    """

    temperature: float = 1.0
    top_k: int = 2048
    top_p: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", check_temperature("temperature", self.temperature))
        object.__setattr__(self, "top_k", check_whole("top_k", self.top_k, 0, MOST_TOP_K))
        object.__setattr__(self, "top_p", check_probability("top_p", self.top_p))


GREEDY = Sampling(temperature=0.0)


def guide(conditional_BV: Tensor, unconditional_BV: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: logits (B, V). A scale, or one a row (B, 1), of 1 is the conditional distribution.

    On logits rather than log-probabilities, which differ by a constant a row that no choice depends on.
    """
    return torch.lerp(unconditional_BV, conditional_BV, scale)


class Guide(NamedTuple):
    """How one guides: at a scale, a number or one a row (B, 1), and above 1 within two limits.

    Attributes:
        scale: see `guide`.
        floor: ids are left out that are less likely, by conditional logits, than this share of the likeliest one.
            Guidance multiplies ratios of probabilities, and where both are tiny, ratios are noise: an id that neither
            branch would write can win. Source: the plausibility constraint of Li et al., arXiv 2210.15097. 0: none.
        agreement: nats. Where both branches have the same likeliest id, with more than half of the probability, and
            its odds differ by less, it stays as likely as by the conditional logits, and guidance chooses among the
            others only; so does the floor. Such an id goes on with what is there, a background say. Without this,
            guidance, which makes what begins likelier, would begin everything too early. 0: nowhere.
    """

    scale: float | Tensor
    floor: float = 0.0
    agreement: float = 0.0

    def logits(self, conditional_BV: Tensor, unconditional_BV: Tensor) -> tuple[Tensor, Tensor | None]:
        """Guided logits (B, V), and which ids are left out (B, V), if any are."""
        guided_BV = guide(conditional_BV, unconditional_BV, self.scale)
        leads = self.scale > 1
        if not (self.floor or self.agreement) or leads is False:
            return guided_BV, None
        # Choices among ids, which no gradient goes through.
        likely_BV = conditional_BV.detach()
        top_B1 = likely_BV.argmax(-1, keepdim=True)
        left_out_BV = torch.zeros_like(likely_BV, dtype=torch.bool)
        if self.floor:
            left_out_BV = (likely_BV < likely_BV.amax(-1, keepdim=True) + math.log(self.floor)) & leads
        if not self.agreement:
            return guided_BV, left_out_BV
        is_top_BV = torch.zeros_like(left_out_BV).scatter(-1, top_B1, True)
        own_B1, other_B1 = (_odds(each, top_B1, is_top_BV) for each in (conditional_BV, unconditional_BV))
        agree_B1 = (unconditional_BV.argmax(-1, keepdim=True) == top_B1) & (own_B1 > 0) & (other_B1 > 0)
        agree_B1 = agree_B1 & ((own_B1 - other_B1).abs() < self.agreement) & leads
        if self.floor:
            others_BV = likely_BV.masked_fill(is_top_BV, -torch.inf)
            low_BV = others_BV < others_BV.amax(-1, keepdim=True) + math.log(self.floor)
            left_out_BV = left_out_BV.where(~agree_B1, low_BV & ~is_top_BV)
        rest_B1 = guided_BV.masked_fill(is_top_BV | left_out_BV, -torch.inf).logsumexp(-1, keepdim=True)
        kept_BV = guided_BV.scatter(-1, top_B1, rest_B1 + own_B1)
        return torch.where(agree_B1, kept_BV, guided_BV), left_out_BV


def _odds(logits_BV: Tensor, index_B1: Tensor, is_index_BV: Tensor) -> Tensor:
    """The logarithm of the odds (B, 1) of one id a row."""
    return logits_BV.gather(-1, index_B1) - logits_BV.masked_fill(is_index_BV, -torch.inf).logsumexp(-1, keepdim=True)


def restrict(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, top-k and top-p: logits (B, V) of the distribution to sample from, -inf where nothing is left."""
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if sampling.top_p < 1:
        ascending_BV, order_BV = logits_BV.sort(-1)
        unlikely_BV = ascending_BV.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        unlikely_BV[:, -1] = False
        logits_BV = logits_BV.masked_fill(unlikely_BV.scatter(-1, order_BV, unlikely_BV), -torch.inf)
    return logits_BV


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution (B, V) to choose from; at temperature 0 all of it on the most likely id."""
    if sampling.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(-1, logits_BV.argmax(-1, keepdim=True), 1.0)
    return restrict(logits_BV, sampling).softmax(-1)


def log_probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The logarithm (B, V) of `probabilities`; -inf where an id cannot be chosen."""
    if sampling.temperature == 0:
        return probabilities(logits_BV, sampling).log()
    return restrict(logits_BV, sampling).log_softmax(-1)


def choose(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """Choose one index (B,) of each row of logits (B, V), with one number from [0, 1) a row (unused at temperature 0).

    The index is where the cumulative probability passes that number: one number a token, whatever V is, so a row's
    draw depends neither on its neighbours nor on the device's generator.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    cumulative_BV = probabilities(logits_BV, sampling).cumsum(-1)
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1)


def uniform_noise(seed: int, length: int) -> Tensor:
    """Numbers in [0, 1), shape (length,), on the CPU: one for each position, in whichever order these are filled."""
    return torch.rand(length, generator=torch.Generator().manual_seed(seed))
