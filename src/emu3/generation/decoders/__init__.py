"""Decoders: values with one method, which take a batch from one forward to the next.

B rows of a forward, S tokens a row, E model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from emu3.generation.cache import SlotCache
from emu3.generation.request import Request
from emu3.generation.sampling import uniform_noise

if TYPE_CHECKING:
    from emu3.modeling.multimodal import Emu3ForConditionalGeneration


@dataclass(frozen=True, eq=False)
class Sequence:
    """A request on its way.

    Args:
        request: what was asked for.
        number: its place in the caller's list.
        budget: the most tokens that it emits.
        noise: one number in [0, 1) for each of them, on the CPU.
        cached: tokens in the cache, for each of the request's rows.
        pending: tokens that the cache still lacks, for each of the request's rows.
        emitted: number of tokens emitted so far; the position of the next one.
        new: the tokens that the last step emitted.
    """

    request: Request
    number: int
    budget: int
    noise: Tensor
    cached: tuple[int, ...]
    pending: tuple[tuple[int, ...], ...]
    emitted: int = 0
    new: tuple[int, ...] = ()

    @classmethod
    def begin(cls, request: Request, number: int, context: int) -> Sequence:
        """A sequence with nothing emitted yet, for a model with a context of so many tokens."""
        budget = request.budget(context)
        noise = uniform_noise(request.seed, budget)
        return cls(request, number, budget, noise, cached=(0,) * len(request.rows), pending=request.rows)

    def span(self, vocab_size: int) -> tuple[int, int]:
        """The ids lo..hi-1 that may come next."""
        return (0, vocab_size) if self.request.grammar is None else self.request.grammar.span(self.emitted)

    def emit(self, id_: int) -> Sequence:
        """Take the chosen id, and the forced ones that follow it: they need no forward of their own."""
        ids, grammar = [id_], self.request.grammar
        while grammar is not None and (k := self.emitted + len(ids)) < self.budget and grammar.is_forced(k):
            ids.append(grammar.span(k)[0])
        return replace(
            self,
            cached=tuple(done + len(fed) for done, fed in zip(self.cached, self.pending, strict=True)),
            pending=(tuple(ids),) * len(self.pending),
            emitted=self.emitted + len(ids),
            new=tuple(ids),
        )


@dataclass(frozen=True, eq=False)
class State:
    """A batch between two forwards. Rows of the cache are the rows of the sequences, in order."""

    model: Emu3ForConditionalGeneration
    cache: SlotCache
    sequences: tuple[Sequence, ...]

    @classmethod
    def begin(cls, model: Emu3ForConditionalGeneration, requests: list[Request]) -> State:
        """A batch with nothing in the cache yet.

        Raises:
            ValueError: a request does not fit the model's context.
        """
        config, head = model.model.text_model.config, model.lm_head.weight
        context = config.max_position_embeddings
        sequences = tuple(Sequence.begin(request, number, context) for number, request in enumerate(requests))
        cache = SlotCache.allocate(
            layers=config.num_hidden_layers,
            rows=sum(len(s.pending) for s in sequences),
            heads=config.num_key_value_heads or config.num_attention_heads,
            slots=max((len(prompt) + s.budget for s in sequences for prompt in s.pending), default=0),
            width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=head.dtype,
            device=head.device,
        )
        return cls(model, cache, sequences)

    def forward(self) -> Tensor:
        """Run the pending tokens of all rows: hidden states (B, E) after the last of each."""
        pending = [ids for sequence in self.sequences for ids in sequence.pending]
        cached = [count for sequence in self.sequences for count in sequence.cached]
        longest = max(map(len, pending))
        # Shorter rows are padded behind their last token, where nothing sees them; any id will do. A sequence's last
        # token is never fed, so the last slot of the cache is free for padding that would go beyond it.
        ids_BS = torch.tensor([ids + (0,) * (longest - len(ids)) for ids in pending], device=self.device)
        last_B = torch.tensor([len(ids) - 1 for ids in pending], device=self.device)
        positions_BS = torch.tensor(cached, device=self.device)[:, None] + torch.arange(longest, device=self.device)
        positions_BS = positions_BS.clamp(max=self.cache.slots - 1)
        text_model = self.model.model.text_model
        view = self.cache.at(positions_BS, end=min(max(cached) + longest, self.cache.slots))
        hidden_BSE: Tensor = text_model.run_layers(text_model.embed_tokens(ids_BS), view.mask(), positions_BS, view)
        return hidden_BSE[torch.arange(len(pending), device=self.device), last_B]

    def logits(self, hidden_BE: Tensor, lo: int, hi: int) -> Tensor:
        """Logits (B, hi - lo) in float32 of the ids lo..hi-1 only: a slice of the head's weight is a view."""
        head_VE: Tensor = self.model.lm_head.weight
        return (hidden_BE @ head_VE[lo:hi].T).float()

    def keep(self, sequences: list[Sequence]) -> State:
        """The batch reduced to some of its sequences."""
        numbers = {sequence.number for sequence in sequences}
        rows = [sequence.number for sequence in self.sequences for _ in sequence.pending]
        kept = [row for row, number in enumerate(rows) if number in numbers]
        return replace(self, cache=self.cache.keep(kept), sequences=tuple(sequences))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.cache.keys_LBKCD.device


class Decoder(Protocol):
    """A way to decode."""

    def step(self, state: State) -> State:
        """Run one forward; every sequence of the new state has at least one token in `new`, in order of position."""
        ...
