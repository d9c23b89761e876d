"""Runs a draft head for the sequences of a step: drafts of the tokens that the next step verifies.

Shapes: R positions of all sequences, N tokens around each, E model width, M width of the head, V codes.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from emu3 import kernels
from emu3.generation.decoders.protocol import Drafts, Wanted
from emu3.generation.events import Failed
from emu3.generation.grammar import Grid
from emu3.generation.runtime.forward import SMALL_MATRIX, Linear, fuse_linears, working_dtype
from emu3.generation.runtime.head import Head
from emu3.generation.sampling import Sampling, probabilities
from emu3.generation.sequence import Hidden, Plan, Sequence
from emu3.matrices import Scheme
from emu3.modeling.draft import DraftHead, around
from emu3.modeling.parallel import whole
from emu3.quantization import QuantizedLinear

if TYPE_CHECKING:
    from emu3.modeling.multimodal import Emu3ForConditionalGeneration

# A pass corrects what the pass before guessed around a position. Most is right after so many.
_PASSES = 3


class Asked(NamedTuple):
    """What a sequence wants drafts of.

    Attributes:
        sequence: whose decoder wants them.
        wanted: its positions, and the number by which each is drawn.
        newest: the position that was decided last.
        hidden: that decided it, (E,).
    """

    sequence: Sequence
    wanted: Wanted
    newest: int
    hidden: Tensor


class Drafter:
    """A draft head beside the model that it drafts for.

    Args:
        model: whose embeddings it shares.
        draft: of this model.
        head: the model's own, which it shares, too.
    """

    def __init__(self, model: Emu3ForConditionalGeneration, draft: DraftHead, head: Head) -> None:
        self.lo, self.hi = model.model.vocabulary.visual_span
        embeddings = whole(model.model.text_model.embed_tokens.weight.detach())
        self.dtype = working_dtype(embeddings)
        self.head = _packed(draft)
        self.to_logits = _to_logits(head, (self.lo, self.hi))
        self.table = draft.table(embeddings[self.lo : self.hi])

    def serve(self, hidden: Hidden, planned: list[tuple[Sequence, Plan]], most: int) -> list[Failed]:
        """Give drafts to the decoders that want them, after they decided; a decoder that fails ends its sequence.

        Args:
            hidden: of the step; the first lane of each sequence is read.
            planned: what goes on, and what the step was.
            most: see `Decoder.propose`.
        """
        failed: list[Failed] = []
        alike: defaultdict[tuple[int, Sampling], list[Asked]] = defaultdict(list)
        for sequence, plan in planned:
            part, newest = sequence.part, sequence.newest - sequence.part.start
            # Where a new part has begun, the newest position is not one of it.
            if not isinstance(part.grammar, Grid) or newest not in plan.step.targets:
                continue
            try:
                wanted = sequence.wanted_drafts(most)
            except Exception as error:  # a decoder may be anyone's
                failed.append(Failed(sequence.number, f"its decoder fails: {error!r}"))
                continue
            if wanted is not None:
                target = plan.targets[plan.step.targets.index(newest)]
                (hidden_E,) = hidden.at([sequence.lanes[0].index], [target.place])
                alike[part.grammar.width, target.sampling].append(Asked(sequence, wanted, newest, hidden_E))
        for (width, sampling), asked in alike.items():
            for each, drafts in zip(asked, self._draw(asked, width, sampling), strict=True):
                try:
                    each.sequence.part.decoder.take_drafts(each.sequence.part.state, each.wanted, drafts)
                except Exception as error:
                    failed.append(Failed(each.sequence.number, f"its decoder fails: {error!r}"))
        return failed

    def _draw(self, asked: list[Asked], width: int, sampling: Sampling) -> list[Drafts]:
        """Drafts of sequences that draw alike."""
        device, edge = self.table.device, self.hi - self.lo
        counts = [len(each.wanted.positions) for each in asked]
        own_R = np.repeat(np.arange(len(asked)), counts)
        positions_R = np.concatenate([each.wanted.positions for each in asked])
        newest_R = np.array([each.newest for each in asked])[own_R]
        places_RN = around(width, torch.from_numpy(positions_R), torch.from_numpy(newest_R)).numpy()
        distance_R = torch.from_numpy(positions_R - newest_R).to(device)
        # The codes of all sequences one behind the other; in front an edge, for what is before the first position.
        codes = np.concatenate([[self.hi], *(each.wanted.ids for each in asked)]) - self.lo
        codes[(codes < 0) | (codes > edge)] = edge
        starts_R = np.cumsum([1, *(len(each.wanted.ids) for each in asked[:-1])])[own_R]
        places_RN = np.where(places_RN < 0, 0, starts_R[:, None] + places_RN)
        positions_R = starts_R + positions_R
        noise_R1 = torch.from_numpy(np.concatenate([each.wanted.noise for each in asked]))[:, None].to(device)
        hidden_RE = torch.stack([each.hidden for each in asked]).to(device)[torch.from_numpy(own_R).to(device)]
        prepared_RM = self.head.prepare(hidden_RE, distance_R)
        proposals_RV = torch.empty(len(positions_R), edge, device=device)
        before_RN = np.full_like(places_RN, -1)
        for _ in range(_PASSES):
            around_RN = codes[places_RN]
            # The others would be drawn as before. Once nothing changes, it is as if all passes were run.
            changed = (around_RN != before_RN).any(1).nonzero()[0]
            if not len(changed):
                break
            before_RN, rows = around_RN, torch.from_numpy(changed).to(device)
            codes_RN = torch.from_numpy(around_RN[changed]).to(device)
            vectors_RE = self.head(prepared_RM[rows], codes_RN, self.table).to(self.dtype)
            drawn_RV = probabilities(self.to_logits(vectors_RE), sampling)
            # As `choose` draws.
            cumulative_RV = drawn_RV.cumsum(-1)
            drawn_R1 = torch.searchsorted(cumulative_RV, noise_R1[rows] * cumulative_RV[:, -1:], right=True)
            proposals_RV[rows] = drawn_RV
            codes[positions_R[changed]] = drawn_R1[:, 0].clamp_max_(edge - 1).cpu().numpy()
        ids = np.split(self.lo + codes[positions_R], np.cumsum(counts)[:-1])
        return [Drafts(own.tolist(), q_SV) for own, q_SV in zip(ids, proposals_RV.split(counts), strict=True)]


class _Function(nn.Module):
    """A function in the place of a module."""

    def __init__(self, function: Linear) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _packed(head: DraftHead) -> DraftHead:
    """A copy whose modules are fast for a few rows."""
    packed = copy.deepcopy(head)
    for name in ("hidden", "middle", "output"):
        setattr(packed, name, _Function(_fast(cast(nn.Linear, packed.get_submodule(name)))))
    return packed


def _fast(module: nn.Linear) -> Linear:
    """In 8 bits on a CPU, as drafts need not be exact; else as `fuse_linears` makes it."""
    scheme = Scheme(8)
    small = module.weight.numel() <= SMALL_MATRIX and scheme.fits(module.in_features, module.out_features)
    if small and module.weight.device.type == "cpu" and kernels.library() is not None:
        return QuantizedLinear.quantize(module, scheme)
    return fuse_linears([module], module.weight.dtype, compiled=False)


def _to_logits(head: Head, span: tuple[int, int]) -> Linear:
    weight_VE = head.weight[slice(*span)].detach()
    if head.scales is not None or weight_VE.numel() > SMALL_MATRIX:
        return head.of_span(span)
    part = nn.Linear(weight_VE.shape[1], len(weight_VE), bias=False, device="meta")
    part.weight = nn.Parameter(weight_VE, requires_grad=False)
    return _fast(part)
