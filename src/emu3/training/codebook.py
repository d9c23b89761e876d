"""A codebook (codes, dimensions) that is learned: k-means starts it, moving averages or gradients train it."""

from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_SCORES = 2**24
"""Scores, latents times codes, that are in memory at once: 64 MiB in float32."""


class CodeUse(NamedTuple):
    """How a codebook is used; three scalars.

    Attributes:
        used: codes that are used at all.
        share: the same as a share of the codebook.
        perplexity: how many codes, all used equally often, would carry as much information.
    """

    used: Tensor
    share: Tensor
    perplexity: Tensor

    @classmethod
    def of(cls, uses: Tensor, least: Tensor | float = 0.0) -> "CodeUse":
        """Of how often each code is used (codes,). A code counts that is used more often than `least`."""
        odds, used = uses / uses.sum().clamp_min(1e-12), (uses > least).sum().float()
        return cls(used, used / len(uses), torch.special.entr(odds).sum().exp())


class CodebookAverages(nn.Module):
    """Moving averages, over steps, of how often each code is used, and of the sum of the latents that use it.

    A step may have several batches, on several processes: `count` collects them, and `move` ends the step. Then every
    process has the same averages.
    """

    def __init__(self, codes: int, dimensions: int) -> None:
        super().__init__()
        self.uses = nn.Buffer(torch.ones(codes))
        self.sums = nn.Buffer(torch.zeros(codes, dimensions))
        self.new_uses = nn.Buffer(torch.zeros(codes))
        self.new_sums = nn.Buffer(torch.zeros(codes, dimensions))

    @torch.no_grad()
    def start(self, codebook: Tensor, latents: float) -> None:
        """Starts as if so many latents a step had used the codes equally often, each latent equal to its code."""
        self.uses.fill_(latents / len(codebook))
        self.sums.copy_(codebook * self.uses[:, None])
        self.new_uses.zero_()
        self.new_sums.zero_()

    @torch.no_grad()
    def count(self, latents: Tensor, codes: Tensor) -> None:
        """Counts the latents (vectors, dimensions) of a batch, with their codes (vectors,)."""
        uses = torch.zeros_like(self.uses).index_add_(0, codes, torch.ones_like(codes, dtype=self.uses.dtype))
        sums = torch.zeros_like(self.sums).index_add_(0, codes, latents)
        for new, total in ((uses, self.new_uses), (sums, self.new_sums)):
            if has_other_processes():
                torch.distributed.all_reduce(new)
            total.add_(new)

    @torch.no_grad()
    def move(self, codebook: Tensor | None, decay: float) -> None:
        """Ends a step: what was counted enters the averages. Moves `codebook`, if given, in place, to their means."""
        if not self.new_uses.any():
            return
        self.uses.lerp_(self.new_uses, 1 - decay)
        self.sums.lerp_(self.new_sums, 1 - decay)
        self.new_uses.zero_()
        self.new_sums.zero_()
        if codebook is not None:
            codebook.copy_(self.sums / self.uses.clamp_min(1e-8)[:, None])

    def has_dead(self, below: float) -> bool:
        """Whether a code is used less often than `below` times the mean."""
        return bool(self.uses.min() < below * self.uses.mean())

    @torch.no_grad()
    def restart(self, codebook: Tensor, latents: Tensor, codes: Tensor, below: float) -> None:
        """Moves, in place, each code used less than `below` times the mean to a latent far from its own code.

        Latents are (vectors, dimensions), with their codes (vectors,).
        """
        mean = self.uses.mean()
        dead = (self.uses < below * mean).nonzero().flatten()
        if len(dead):
            chosen = sample_far(latents, codebook[codes], len(dead))
            share_first(chosen)
            codebook[dead] = chosen
            self.uses[dead] = mean
            self.sums[dead] = mean * chosen


def has_other_processes() -> bool:
    """Whether training runs on several processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def share_first(tensor: Tensor) -> None:
    """Gives every process, in place, the first one's values."""
    if has_other_processes():
        torch.distributed.broadcast(tensor, 0)


def straight_through_scores(latents: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """The codebook's vectors (vectors, dimensions) at `codes` (vectors,), with gradients through all scores.

    This is index backpropagation (arXiv 2412.02692): forward, a latent's one code; backward, as if the softmax of the
    scores of all codes had mixed them. Gradients reach the latents and every code.

    There, a score is the inner product z c. Here it is z c - |c|^2 / 2, because this tokenizer takes the nearest code:
    |z - c|^2 = |z|^2 - 2 (z c - |c|^2 / 2), so that the highest score is the nearest code, exactly. For codes of equal
    length both are the same. Scores are divided by the mean squared distance, a dimension, of latents to their codes:
    then the softmax reaches over the next few codes, however far apart the codebook lies, and the gradient passes
    to the latents at about its own length.

    `codes` are the nearest ones. Scores of all codes are made again in the backward pass, to save memory.
    """
    with torch.no_grad():
        scale = (latents - codebook[codes]).square().mean().clamp_min(1e-12)
    size = max(1, MAX_SCORES // len(codebook))
    parts = zip(latents.split(size), codes.split(size), strict=True)
    return torch.cat([checkpoint(_mix, part, codebook, chosen, scale, use_reentrant=False) for part, chosen in parts])


def _mix(latents: Tensor, codebook: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    shares = ((latents @ codebook.T - 0.5 * codebook.square().sum(1)) / scale).softmax(1)
    # Forward the chosen codes alone: shares - shares is zero.
    return codebook[codes] + (shares - shares.detach()) @ codebook


def sample_far(vectors: Tensor, centres: Tensor, count: int) -> Tensor:
    """`count` of the vectors, drawn with odds that grow with the squared distance to their centre; one centre each."""
    odds = (vectors - centres).square().sum(1) + 1e-12
    return vectors[odds.multinomial(count, replacement=True)]


@torch.no_grad()
def k_means(vectors: Tensor, clusters: int, rounds: int = 20) -> Tensor:
    """Centres (clusters, dimensions) of `vectors` (vectors, dimensions); empty clusters restart at far vectors.

    The first centres are those of k-means++ (Arthur & Vassilvitskii, 2007). Most latents are plain background, so most
    vectors chosen at random would show nothing else.
    """
    chosen, distances = [vectors[torch.randint(len(vectors), (1,))]], vectors.new_full((len(vectors),), torch.inf)
    for _ in range(clusters - 1):
        distances = torch.minimum(distances, (vectors - chosen[-1]).square().sum(1))
        chosen.append(vectors[(distances + 1e-12).multinomial(1)])
    centres = torch.cat(chosen)
    for _ in range(rounds):
        nearest = torch.cat(
            [torch.cdist(part, centres).argmin(1) for part in vectors.split(max(1, MAX_SCORES // clusters))]
        )
        counts = torch.bincount(nearest, minlength=clusters)
        centres = torch.zeros_like(centres).index_add_(0, nearest, vectors) / counts.clamp_min(1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            centres[empty] = sample_far(vectors, centres[nearest], len(empty))
    return centres
