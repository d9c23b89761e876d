"""Speculative Jacobi decoding: draft a window of tokens, verify all of it in one forward, keep what passes.

1. Draft the next tokens: first those that step 4 left, then each new position like its neighbour. The latter was not
   drawn: its q is 1 for that token.
2. One forward gives the model's distribution p of every position in the window.
3. A draft x that was drawn from q is kept with probability min(1, p(x) / q(x)). Else it is replaced by a draw from what
   p has more than q: max(0, p - q), normalised. Either way the token is distributed as p.
4. The tokens up to the first replaced one are decided, that one included. Those behind it saw a draft that is gone:
   they are not decided, but are the drafts of the next step. After step 3 they are distributed as p, kept or replaced.
   So the next step takes that p as their q. With their old q, the picture's distribution would drift.

Where the model has a draft head, step 4 leaves nothing: the head drafts all of the window anew. It knows the token
that was decided last, which those drafts did not see. Each is drawn from the head's q by a fresh random number, and q
depends on no fresh numbers but those of the drafts before it. So given those, a draft is distributed as its q, which is
what step 3 needs.

Without one, step 3 replaces few drafts. So the next step starts from nearly the same window, and usually many pass.

Lossless: the tokens have the distribution of raster decoding with the same guidance and sampling, but a seed gives
another picture. At temperature 0 it is the same picture.

Sources: the rule of step 3 is Leviathan et al., arXiv 2211.17192; drafts of the forward before are SJD, arXiv
2410.01699; verifying the whole window is SCD, arXiv 2510.24211; the new q for kept drafts is SJD-PAC, arXiv 2603.18599.

Shapes: S positions of the window, V legal ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emu3.generation.decoders.guesses import grid_of, guess_from_neighbour, known_or_guessed
from emu3.generation.decoders.protocol import UNDECIDED, Decoder, Step, Wanted
from emu3.generation.decoders.protocol import Drafts as Drafted
from emu3.generation.grammar import Grammar, Grid
from emu3.generation.sampling import Sampling, probabilities
from emu3.options import check_whole


def couple(
    probabilities_SV: Tensor, drafts_S: Tensor, proposals_SV: Tensor, accept_S: Tensor, redraw_S: Tensor
) -> tuple[Tensor, Tensor]:
    """Keep or replace drafts, so that the results are distributed as new probabilities.

    Args:
        probabilities_SV: p.
        drafts_S: indices below V.
        proposals_SV: the q from which each draft was drawn.
        accept_S, redraw_S: independent numbers in [0, 1).

    Returns:
        Indices (S,) distributed as p, and whether each is its draft.
    """
    at_draft = drafts_S[:, None]
    p_S, q_S = (each.gather(1, at_draft)[:, 0] for each in (probabilities_SV, proposals_SV))
    kept_S = accept_S * q_S < p_S
    cumulative_SV = (probabilities_SV - proposals_SV).clamp_min_(0).cumsum_(-1)
    redrawn_S = torch.searchsorted(cumulative_SV, redraw_S[:, None] * cumulative_SV[:, -1:], right=True)[:, 0]
    # p equal to q leaves nothing to draw from, but then every draft is kept. The clamp is for what rounding leaves.
    return torch.where(kept_S, drafts_S, redrawn_S.clamp_max(probabilities_SV.shape[1] - 1)), kept_S


@dataclass(eq=False)
class Drafts:
    """What a picture keeps between steps.

    Attributes:
        grid: of the picture.
        random: numbers for step 3.
        next_input: the first position that is not in the cache for good.
        ids: drafts for the first undecided positions, in order.
        proposals_SV: the q of each.
    """

    grid: Grid
    random: torch.Generator
    next_input: int = -1
    ids: list[int] = field(default_factory=list)
    proposals_SV: Tensor | None = None


@dataclass(frozen=True)
class JacobiDecoder(Decoder[Drafts]):
    """Decides as many tokens as pass verification, at least one a forward.

    Args:
        window: most tokens that are drafted at once.

    Raises:
        ValueError: a window that is no whole number from 1.
    """

    window: int = 16

    def __post_init__(self) -> None:
        check_whole("window", self.window)

    def begin(self, grammar: Grammar, seed: int) -> Drafts:
        return Drafts(grid_of(grammar), torch.Generator().manual_seed(seed))

    def propose(self, state: Drafts, ids: NDArray[np.int64], most: int) -> Step:
        """Step 1: drafts for the next `window` undecided positions, all of which are targets.

        `most` is not used, because the tokens would depend on it.
        """
        start = max(0, state.next_input)
        targets: list[int] = ((ids[start:] == UNDECIDED).nonzero()[0][: self.window] + start).tolist()
        drafts = dict(zip(targets, state.ids, strict=False))
        for k in targets[len(drafts) :]:
            drafts[k] = guess_from_neighbour(state.grid, k, ids, drafts)
        return Step(range(state.next_input, targets[-1]), targets, drafts)

    @staticmethod
    def draw(logits_BV: Tensor, sampling: Sampling, noise_B: Tensor) -> Tensor:
        """Step 2: p, (B, V)."""
        return probabilities(logits_BV, sampling)

    def accept(self, state: Drafts, step: Step, drawn: Tensor, lo: int) -> list[tuple[int, int]]:
        """Steps 3 and 4."""
        device = drawn.device
        drafts_S = torch.tensor([step.drafts[k] - lo for k in step.targets], device=device)  # as columns of `drawn`
        carried_over = len(state.ids)
        proposals_SV = torch.zeros_like(drawn)
        if state.proposals_SV is not None:
            proposals_SV[:carried_over] = state.proposals_SV
        # A position new to the window was guessed: its q has all its weight on the guess.
        proposals_SV[carried_over:].scatter_(1, drafts_S[carried_over:, None], 1.0)
        accept_S, redraw_S = torch.rand(2, len(step.targets), generator=state.random).to(device)
        tokens_S, kept_S = couple(drawn, drafts_S, proposals_SV, accept_S, redraw_S)
        ids, kept = [lo + token for token in tokens_S.tolist()], kept_S.tolist()
        passed = kept.index(False) + 1 if False in kept else len(kept)
        state.next_input = step.targets[passed - 1]  # a replacement, or the window's last; neither is in the cache
        state.ids, state.proposals_SV = ids[passed:], drawn[passed:]
        return list(zip(step.targets[:passed], ids[:passed], strict=True))

    def wanted_drafts(self, state: Drafts, ids: NDArray[np.int64], most: int) -> Wanted | None:
        positions = (ids == UNDECIDED).nonzero()[0][: self.window]
        if not len(positions):
            return None
        guesses = np.full(len(ids), UNDECIDED)
        guesses[positions[: len(state.ids)]] = state.ids
        noise = torch.rand(len(positions), generator=state.random).numpy()
        return Wanted(positions, known_or_guessed(state.grid, positions, ids, guesses), noise)

    def take_drafts(self, state: Drafts, wanted: Wanted, drafts: Drafted) -> None:
        state.ids, state.proposals_SV = drafts.ids, drafts.proposals_SV
