"""Speculative Jacobi decoding: guess a window of tokens, verify all of it in one forward, keep what passes.

A draft x, drawn from q, is kept with probability min(1, p(x) / q(x)), else replaced by a draw from the normalised
max(0, p - q); what comes out is distributed as p (Leviathan et al., arXiv 2211.17192). The drafts are the model's own
of the forward before (SJD, arXiv 2410.01699). Every position of the window is verified, not only those up to the first
replaced one, and goes on as a draft of its new p (SCD, arXiv 2510.24211), which is the p just computed for kept drafts
too, as in SJD-PAC (arXiv 2603.18599); with their old q the tokens drift. So drafts rarely change, and long runs of them
pass at once.

Lossless: the tokens have the distribution of raster decoding with the same guidance and sampling, but a seed gives
another picture. At temperature 0 it is the same picture.

N positions of the window, V legal ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import cast

import torch
from torch import Tensor

from emu3.generation.decoders import UNDECIDED, Batch, Plan, Running, next_in_order
from emu3.generation.sampling import probabilities


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


@dataclass(eq=False)
class Drafts:
    """What a picture keeps between steps: for its next undecided positions, indices (N,) among the legal ids, and
    their q (N, V). Positions before `cached` are in the cache as they were decided."""

    random: torch.Generator
    drafts_N: Tensor
    proposals_NV: Tensor
    cached: int = -1


@dataclass(frozen=True)
class JacobiDecoder:
    """Decides as many tokens as pass verification, at least one a forward.

    Args:
        window: most tokens that are guessed at once.

    Raises:
        ValueError: a window below 1.
    """

    window: int = 16

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")

    @torch.inference_mode()
    def step(self, batch: Batch) -> None:
        """Run one forward and verify the drafts of every picture; texts go on by one token."""
        plans = [self._plan(sequence, batch.device) for sequence in batch.sequences]
        hidden_BSE = batch.run(plans)
        texts = []
        for sequence, plan, places in zip(batch.sequences, plans, batch.places(plans), strict=True):
            if sequence.request.grammar is None:
                texts.append((sequence, plan, places))
            else:
                self._verify(batch, sequence, plan, hidden_BSE, places)
        batch.choose(hidden_BSE, texts)

    def _plan(self, sequence: Running, device: torch.device) -> Plan:
        grammar = sequence.request.grammar
        if grammar is None:
            return next_in_order(sequence)
        lo, hi = grammar.vocabulary.visual_span
        if sequence.memory is None:
            random = torch.Generator().manual_seed(sequence.request.seed)
            drafts = Drafts(random, torch.empty(0, dtype=torch.long), torch.empty(0, hi - lo, device=device))
        else:
            drafts = cast(Drafts, sequence.memory)
        positions = (sequence.ids_K[sequence.emitted :] == UNDECIDED).nonzero()[0][: self.window] + sequence.emitted
        fresh = len(positions) - len(drafts.drafts_N)
        drafts_N = torch.cat((drafts.drafts_N, torch.randint(hi - lo, (fresh,), generator=drafts.random)))
        uniform_NV = drafts.proposals_NV.new_full((fresh, hi - lo), 1 / (hi - lo))
        sequence.memory = replace(drafts, drafts_N=drafts_N, proposals_NV=torch.cat((drafts.proposals_NV, uniform_NV)))
        return Plan(
            feeds=range(drafts.cached, int(positions[-1])),
            wants=[(int(k) - 1 - drafts.cached, int(k)) for k in positions],
            guesses=dict(zip(positions.tolist(), (drafts_N + lo).tolist(), strict=True)),
        )

    def _verify(
        self, batch: Batch, sequence: Running, plan: Plan, hidden_BSE: Tensor, places: list[tuple[int, int]]
    ) -> None:
        request, drafts = sequence.request, cast(Drafts, sequence.memory)
        span = batch.span(request, plan.wants[0][1])
        logits_NV = torch.cat(
            [
                batch.logits(hidden_BSE, [place for place, _ in group], span, scale)
                for scale, group in groupby(
                    zip(places, plan.wants, strict=True), lambda pair: request.scale(pair[1][1])
                )
            ]
        )
        probabilities_NV = probabilities(logits_NV, request.sampling)
        accept_N, redraw_N = torch.rand(2, len(logits_NV), generator=drafts.random).to(logits_NV.device)
        tokens_N, kept_N = couple(
            probabilities_NV, drafts.drafts_N.to(logits_NV.device), drafts.proposals_NV, accept_N, redraw_N
        )
        tokens_N, kept = tokens_N.cpu(), kept_N.tolist()
        replaced = kept.index(False) if False in kept else len(kept)
        decided = min(replaced + 1, len(kept))
        for (_, k), index in zip(plan.wants, tokens_N[:decided].tolist(), strict=False):
            sequence.decide(k, index + span[0])
        sequence.memory = Drafts(
            drafts.random,
            tokens_N[decided:],
            probabilities_NV[decided:],
            cached=plan.wants[decided - 1][1],
        )
