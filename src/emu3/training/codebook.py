"""A codebook (codes, dimensions) that is learned: k-means starts it, moving averages train it."""

import torch
from torch import Tensor, nn


class CodebookAverages(nn.Module):
    """Moving averages of how often a batch uses each code, and of the sum of the latents that use it."""

    def __init__(self, codes: int, dimensions: int) -> None:
        super().__init__()
        self.uses = nn.Buffer(torch.ones(codes))
        self.sums = nn.Buffer(torch.zeros(codes, dimensions))

    @torch.no_grad()
    def start(self, codebook: Tensor) -> None:
        """Starts as if one latent, equal to the code, had used each code."""
        self.uses.fill_(1.0)
        self.sums.copy_(codebook)

    @torch.no_grad()
    def update(self, codebook: Tensor, latents: Tensor, codes: Tensor, decay: float, restart_below: float) -> None:
        """Moves the codebook, in place, towards latents (vectors, dimensions) and their codes (vectors,).

        A code whose average use falls below `restart_below` restarts at a latent that is far from its own code.
        """
        uses = torch.zeros_like(self.uses).index_add_(0, codes, torch.ones_like(codes, dtype=self.uses.dtype))
        self.uses.lerp_(uses, 1 - decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, codes, latents), 1 - decay)
        codebook.copy_(self.sums / self.uses.clamp_min(1e-5)[:, None])
        dead = (self.uses < restart_below).nonzero().flatten()
        if len(dead):
            codebook[dead] = sample_far(latents, codebook[codes], len(dead))
            self.uses[dead] = 1.0
            self.sums[dead] = codebook[dead]


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
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in vectors.split(4096)])
        counts = torch.bincount(nearest, minlength=clusters)
        centres = torch.zeros_like(centres).index_add_(0, nearest, vectors) / counts.clamp_min(1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            centres[empty] = sample_far(vectors, centres[nearest], len(empty))
    return centres
