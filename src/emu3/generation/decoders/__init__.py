"""Decoders: values with one method, which take a batch through one forward.

A token's position k counts from 0 behind the prompt, so that the tokens of a prompt have negative ones. A decoder says
which tokens a step feeds and which positions it decides from what comes out:

    prompt  a photo of a cat <img>   v  v  v EOL  v  v  v EOL EOF ...
    k                  -3 -2 -1      0  1  2  3   4  5  6  7   8

B rows of a forward, S tokens a row, E model width, N positions to decide, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emu3.generation.broken import cause_of_broken_logits
from emu3.generation.cache import SlotCache
from emu3.generation.forward import Forward, product
from emu3.generation.graphs import RecordedForward
from emu3.generation.request import Request
from emu3.generation.sampling import Sampling, choose, guide, uniform_noise, unless_broken

if TYPE_CHECKING:
    from emu3.modeling.multimodal import Emu3ForConditionalGeneration

UNDECIDED = -1


@dataclass(eq=False)
class Running:
    """A request on its way. Changes in place, since a step decides a few of thousands of tokens.

    Attributes:
        request: what was asked for.
        number: its name in events.
        budget: the most tokens that it emits.
        noise_K: one number in [0, 1) for each of them.
        ids_K: the tokens; those that the grammar forces are known from the start.
        prefilled: tokens of the prompt that are in the cache, for each row; all but the last will be.
        emitted: how many tokens have been reported.
        new: what the last step decided: positions, each with its id and the forced ones behind it.
        memory: what the decoder keeps between steps.
    """

    request: Request
    number: int
    budget: int
    noise_K: NDArray[np.float32]
    ids_K: NDArray[np.int64]
    prefilled: list[int]
    emitted: int = 0
    new: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    memory: object = None

    @classmethod
    def begin(cls, request: Request, number: int, context: int) -> Running:
        """A request with nothing decided yet, for a model with a context of so many tokens.

        Raises:
            ValueError: it does not fit.
        """
        budget = request.budget(context)
        ids_K = np.full(budget, UNDECIDED)
        if request.grammar is not None:
            lo_K, hi_K = request.grammar.span(np.arange(budget))
            ids_K = np.where(hi_K == lo_K + 1, lo_K, UNDECIDED)
        noise_K = uniform_noise(request.seed, budget).numpy()
        return cls(request, number, budget, noise_K, ids_K, prefilled=[0] * len(request.rows))

    def decide(self, k: int, id_: int) -> None:
        """Take the id at position k; the forced ones behind it are reported with it."""
        self.ids_K[k] = id_
        end = k + 1
        if self.request.grammar is not None:
            while end < self.budget and self.request.grammar.is_forced(end):
                end += 1
        ids = tuple(self.ids_K[k:end].tolist())
        self.new.append((k, ids))
        self.emitted += len(ids)


class Plan(NamedTuple):
    """What one step does for a sequence.

    Attributes:
        feeds: positions whose tokens go in.
        wants: positions to decide, each behind the index among `feeds` of the token before it.
        guesses: ids at positions that are fed though they are not decided.
        turns: see `SlotCache.fill`, for each of the feeds; None: they see all that is before them.
    """

    feeds: Sequence[int]
    wants: Sequence[tuple[int, int]]
    guesses: Mapping[int, int] = {}
    turns: Sequence[int] | None = None


class Fed(NamedTuple):
    """Tokens of one row: their ids, their slots, and in what turn they go in; see `SlotCache.fill`."""

    ids: Sequence[int]
    slots: Sequence[int]
    turns: Sequence[int]


class Wanted(NamedTuple):
    """A position to decide: of a sequence, and where in the hidden states (B, S) the token before it is, in its
    conditional row."""

    sequence: Running
    k: int
    place: tuple[int, int]


def next_in_order(sequence: Running) -> Plan:
    """Feeds what was emitted last, forced tokens included, and decides the position behind it."""
    first = sequence.new[-1][0] if sequence.new else -1
    return Plan(range(first, sequence.emitted), [(sequence.emitted - 1 - first, sequence.emitted)])


@dataclass(eq=False)
class Batch:
    """Sequences that step together. Rows of the cache are the rows of the sequences, in order."""

    model: Emu3ForConditionalGeneration
    cache: SlotCache
    forward: Forward | RecordedForward
    sequences: list[Running]

    def feed(self, tokens: Sequence[Fed], rows: Sequence[int] | None = None) -> Tensor:
        """Run tokens, given for each of the rows (None: the first): hidden states (B, S, E)."""
        longest = max(len(ids) for ids, _, _ in tokens)
        # A shorter row repeats its last token, which writes the same again.
        ids, slots, turns = (
            torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in each])
            for each in zip(*tokens, strict=True)
        )
        return self.forward(self.cache, ids, slots, turns, rows, end=1 + int(slots.max()))

    def run(self, plans: Sequence[Plan]) -> Tensor:
        """Feed what the plans of all sequences say: hidden states (B, S, E)."""
        tokens = []
        for sequence, plan in zip(self.sequences, plans, strict=True):
            ids = [plan.guesses.get(k, int(sequence.ids_K[k])) for k in plan.feeds if k >= 0]
            for prompt in sequence.request.rows:
                before = [prompt[k] for k in plan.feeds if k < 0]
                slots = [len(prompt) + k for k in plan.feeds]
                tokens.append(Fed(before + ids, slots, plan.turns or [0] * len(slots)))
            sequence.new = []
        return self.feed(tokens)

    def wanted(self, plans: Sequence[Plan]) -> list[Wanted]:
        """The positions that the plans of all sequences decide."""
        found, row = [], 0
        for sequence, plan in zip(self.sequences, plans, strict=True):
            found += [Wanted(sequence, k, (row, index)) for index, k in plan.wants]
            row += len(sequence.request.rows)
        return found

    def logits(
        self, hidden_BSE: Tensor, places: Sequence[tuple[int, int]], span: tuple[int, int], scale: float | None
    ) -> Tensor:
        """Logits (N, V) in float32 of the ids lo..hi-1 only, guided by the row behind each if there is a scale."""
        rows, indices = (list(each) for each in zip(*places, strict=True))
        if scale is not None:
            rows, indices = rows + [row + 1 for row in rows], indices * 2
        head_VE: Tensor = self.model.lm_head.weight[slice(*span)]  # a view
        logits_NV = product(hidden_BSE[rows, indices], head_VE).float()
        if scale is None:
            return logits_NV
        conditional_NV, unconditional_NV = logits_NV.chunk(2)
        return guide(conditional_NV, unconditional_NV, scale)

    def decide(self, plans: Sequence[Plan]) -> None:
        """Run the plans, and choose an id for every position that they want."""
        wanted = self.wanted(plans)
        for (sequence, k, _), id_ in zip(wanted, self.chosen(self.run(plans), wanted), strict=True):
            sequence.decide(k, id_)

    def chosen(self, hidden_BSE: Tensor, wanted: Sequence[Wanted]) -> list[int]:
        """An id for every position, in their order."""
        # Positions that choose alike, from the same ids, share the head, the sorting and the draw.
        groups: defaultdict[tuple[tuple[int, int], float | None, Sampling], list[int]] = defaultdict(list)
        for n, (sequence, k, _) in enumerate(wanted):
            groups[self.span(sequence.request, k), sequence.request.scale(k), sequence.request.sampling].append(n)
        chosen = []
        for (span, scale, sampling), members in groups.items():
            logits_NV = self.logits(hidden_BSE, [wanted[n].place for n in members], span, scale)
            noise = [wanted[n].sequence.noise_K[wanted[n].k] for n in members]
            index_N = choose(logits_NV, sampling, torch.tensor(noise, device=logits_NV.device))
            chosen.append(unless_broken(index_N + span[0], logits_NV))
        if not chosen:
            return []
        # The one wait for the device in a step.
        ids = torch.cat(chosen).tolist()
        order = [n for members in groups.values() for n in members]
        in_order = [id_ for _, id_ in sorted(zip(order, ids, strict=True))]
        self.check(wanted, in_order)
        return in_order

    def check(self, wanted: Sequence[Wanted], ids: Sequence[int]) -> None:
        """ValueError, saying why, where logits were not finite and an id is none; see `unless_broken`."""
        for (sequence, k, _), id_ in zip(wanted, ids, strict=True):
            if id_ < 0:
                why = cause_of_broken_logits(self.model, sequence.request.prompt_ids)
                raise ValueError(f"the model gives no finite logits for token {k} of request {sequence.number}: {why}")

    def span(self, request: Request, k: int) -> tuple[int, int]:
        """The ids lo..hi-1 that may stand at position k."""
        return (0, len(self.model.lm_head.weight)) if request.grammar is None else request.grammar.span(k)


class Decoder(Protocol):
    """A way to decode."""

    def step(self, batch: Batch) -> None:
        """Run one forward; fills `new` of every sequence, in order of position."""
        ...
