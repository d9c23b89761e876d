"""Speculative Jacobi decoding: guess a window of tokens, verify all of it in one forward, keep what passes.

A draft x, drawn from q, is kept with probability min(1, p(x) / q(x)), else replaced by a draw from the normalised
max(0, p - q); what comes out is distributed as p (Leviathan et al., arXiv 2211.17192). The drafts are the model's own
of the forward before (SJD, arXiv 2410.01699). Every position of the window is verified, not only those up to the first
replaced one. What stands there then is a draft of the p just computed (SCD, arXiv 2510.24211). That holds for kept
drafts too, as in SJD-PAC (arXiv 2603.18599); with their old q the tokens drift. So drafts rarely change, and long runs
of them pass at once. A position new to the window is guessed from its neighbour, a draft of a q with all its weight
there.

Lossless: the tokens have the distribution of raster decoding with the same guidance and sampling, but a seed gives
another picture. At temperature 0 it is the same picture.

N positions of the window, V legal ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3.generation.decoders import UNDECIDED, Batch, Plan, Running, Wanted, next_in_order
from emu3.generation.decoders.guesses import guess_from_neighbour
from emu3.generation.sampling import probabilities, unless_broken


def couple(
    probabilities_NV: Tensor, drafts_N: Tensor, proposals_NV: Tensor, accept_N: Tensor, redraw_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Maximal coupling of drafts with new probabilities.

    Args:
        probabilities_NV, proposals_NV: p, and the q that each draft is from.
        drafts_N: indices below V.
        accept_N, redraw_N: independent numbers in [0, 1).

    Returns:
        Indices (N,) distributed as p, and which of them are the drafts.
    """
    at_draft = drafts_N[:, None]
    p_N, q_N = (each.gather(1, at_draft)[:, 0] for each in (probabilities_NV, proposals_NV))
    kept_N = accept_N * q_N < p_N
    rest_NV = (probabilities_NV - proposals_NV).clamp_min_(0).cumsum_(-1)
    redrawn_N = torch.searchsorted(rest_NV, redraw_N[:, None] * rest_NV[:, -1:], right=True)[:, 0]
    # p equal to q leaves nothing to draw from; then every draft is kept.
    return torch.where(kept_N, drafts_N, redrawn_N.clamp_max(probabilities_NV.shape[1] - 1)), kept_N


@dataclass(frozen=True, eq=False)
class Drafts:
    """What a picture keeps between steps: drafts at positions to come, and their q (N, V). Those before `cached` are in
    the cache as they were decided."""

    random: torch.Generator
    known: dict[int, int] = field(default_factory=dict)
    proposals_NV: Tensor | None = None
    cached: int = -1


def _plan_drafts(sequence: Running, drafts: Drafts, window: int) -> Plan:
    """Feeds the next `window` undecided positions as drafted, and decides all of them."""
    grammar = sequence.request.grammar
    assert grammar is not None, "texts have no drafts"
    positions: list[int] = (
        (sequence.ids_K[sequence.emitted :] == UNDECIDED).nonzero()[0][:window] + sequence.emitted
    ).tolist()
    guesses: dict[int, int] = {}
    for k in positions:
        guesses[k] = drafts.known[k] if k in drafts.known else guess_from_neighbour(grammar, k, sequence.ids_K, guesses)
    return Plan(range(drafts.cached, positions[-1]), [(k - 1 - drafts.cached, k) for k in positions], guesses)


@dataclass(frozen=True)
class JacobiDecoder:
    """Decides as many tokens as pass verification, at least one a forward.

    Args:
        window: most tokens that are guessed at once.

    Raises:
        ValueError: a window that is no whole number from 1.
    """

    window: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window!r}")

    @torch.inference_mode()
    def step(self, batch: Batch) -> None:
        """Run one forward and verify the drafts of every picture; texts go on by one token."""
        plans = [self._plan(sequence) for sequence in batch.sequences]
        hidden_BSE, wanted = batch.run(plans), batch.wanted(plans)
        for plan, (sequence, members) in zip(plans, groupby(wanted, lambda each: each.sequence), strict=True):
            if sequence.request.grammar is not None:
                self._verify(batch, sequence, plan, hidden_BSE, list(members))
        texts = [each for each in wanted if each.sequence.request.grammar is None]
        for (sequence, k, _), id_ in zip(texts, batch.chosen(hidden_BSE, texts), strict=True):
            sequence.decide(k, id_)

    def _plan(self, sequence: Running) -> Plan:
        if sequence.request.grammar is None:
            return next_in_order(sequence)
        if sequence.memory is None:
            sequence.memory = Drafts(torch.Generator().manual_seed(sequence.request.seed))
        return _plan_drafts(sequence, cast(Drafts, sequence.memory), self.window)

    def _verify(
        self, batch: Batch, sequence: Running, plan: Plan, hidden_BSE: Tensor, wanted: Sequence[Wanted]
    ) -> None:
        request, drafts = sequence.request, cast(Drafts, sequence.memory)
        lo, hi = batch.span(request, wanted[0].k)
        logits_NV = torch.cat(
            [
                batch.logits(hidden_BSE, [each.place for each in group], (lo, hi), scale)
                for scale, group in groupby(wanted, lambda each: request.scale(each.k))
            ]
        )
        probabilities_NV = probabilities(logits_NV, request.sampling)
        drafts_N = torch.tensor([plan.guesses[k] - lo for _, k, _ in wanted], device=logits_NV.device)
        proposals_NV = F.one_hot(drafts_N[len(drafts.known) :], hi - lo).to(logits_NV.dtype)
        if drafts.proposals_NV is not None:
            proposals_NV = torch.cat((drafts.proposals_NV, proposals_NV))
        accept_N, redraw_N = torch.rand(2, len(wanted), generator=drafts.random).to(logits_NV.device)
        tokens_N, kept_N = couple(probabilities_NV, drafts_N, proposals_NV, accept_N, redraw_N)
        ids, kept = unless_broken(tokens_N + lo, logits_NV).tolist(), kept_N.tolist()
        batch.check(wanted, ids)
        passed = kept.index(False) + 1 if False in kept else len(kept)
        decided = [(each.k, id_) for each, id_ in zip(wanted, ids, strict=True)]
        for k, id_ in decided[:passed]:
            sequence.decide(k, id_)
        sequence.memory = Drafts(
            drafts.random, dict(decided[passed:]), probabilities_NV[passed:], cached=decided[passed - 1][0]
        )
