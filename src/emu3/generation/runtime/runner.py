"""The model as the engine runs it: its layers packed, its cache, and the draw of ids from its logits.

Shapes: B lanes, or targets drawn together; S tokens of a lane; E model width; V vocabulary, or its legal ids.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import accumulate, chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from emu3.generation.runtime.cache import SlotCache
from emu3.generation.runtime.drafts import Drafter
from emu3.generation.runtime.forward import Forward, can_pack, working_dtype
from emu3.generation.runtime.graphs import RecordedForward
from emu3.generation.runtime.head import Head
from emu3.generation.sampling import Guide, Sampling, log_probabilities
from emu3.generation.sequence import Draw, Hidden, Inputs, Plan, Sequence
from emu3.modeling.parallel import processes_of
from emu3.quantization import QuantizedLinear

if TYPE_CHECKING:
    from emu3.modeling.draft import DraftHead
    from emu3.modeling.multimodal import Emu3ForConditionalGeneration

# The cache grows to a multiple of so many slots.
_SLOT_STEP = 64


class Drawn(NamedTuple):
    """What a decoder drew for the targets of a sequence.

    Attributes:
        outcomes: for each target its row, or how the draw failed.
        finite: whether its logits are.
        log_probabilities: for each target a row (V,) of its legal ids, if the request asks for them.
    """

    outcomes: list[Tensor | Exception]
    finite: list[bool]
    log_probabilities: list[Tensor] | None = None

    def rows(self) -> list[Tensor]:
        """The rows of all targets. Raises what the draw raised."""
        for outcome in self.outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return cast("list[Tensor]", self.outcomes)


class ModelRunner:
    """Runs a model on a cache that grows as needed.

    Args:
        model: in evaluation mode.
        compiled, draft: see `Engine`.

    Attributes:
        head: the output layer.
    """

    def __init__(self, model: Emu3ForConditionalGeneration, compiled: bool, draft: DraftHead | None = None) -> None:
        self.model, self.compiled = model, compiled
        self.head = Head(model.lm_head)
        self.drafter = None if draft is None else Drafter(model, draft, self.head)
        self.cache: SlotCache | None = None
        self._packs = can_pack(self.text_model)
        self._forward: Forward | None = None
        self._run: Forward | RecordedForward | None = None  # a recording belongs to one cache

    @property
    def text_model(self) -> Any:
        """The decoder layers."""
        return self.model.model.text_model

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer."""
        return int(self.text_model.config.max_position_embeddings)

    @property
    def _shape(self) -> dict[str, int]:
        """What a lane's slot holds: layers, this process's key-value heads, and the width of a head."""
        config = self.text_model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = config.num_key_value_heads or config.num_attention_heads
        heads //= processes_of(self.text_model.layers[0].self_attn.k_proj)
        return {"layers": config.num_hidden_layers, "heads": heads, "width": width}

    @property
    def bytes_per_token(self) -> int:
        """What a slot of the cache takes: keys and values of all layers."""
        shape = self._shape
        return 2 * shape["layers"] * shape["heads"] * shape["width"] * self._cache_dtype.itemsize

    @property
    def _cache_dtype(self) -> torch.dtype:
        """Of keys and values. Beside weights of 16 bits or less the kernel reads them in 16 bits."""
        quantized = any(isinstance(module, QuantizedLinear) for module in self.text_model.layers.modules())
        weight = self.text_model.embed_tokens.weight
        if self._packs and (quantized or weight.dtype == torch.bfloat16):
            return torch.bfloat16
        return working_dtype(weight)

    def make_room(self, lanes: int, slots: int, kept: int, most_lanes: int, most_tokens: int | None) -> None:
        """Give the cache at least so many lanes of so many slots.

        Args:
            lanes, slots: needed.
            kept: lanes in use, whose content stays.
            most_lanes, most_tokens: limits of the engine.
        """
        if self.cache is not None and lanes <= self.cache.lanes and slots <= self.cache.slots:
            return
        if most_tokens is None:  # under a limit, exactly what is needed, because rounding up could exceed it
            slots = min(self.context, -(-slots // _SLOT_STEP) * _SLOT_STEP)
        if self.cache is None:
            dtype, device = self._cache_dtype, self.head.device
            cache = SlotCache.allocate(lanes=lanes, slots=slots, dtype=dtype, device=device, **self._shape)
            forward = Forward.pack(self.text_model, slots, self.compiled)
        else:
            old = self.cache
            # Lanes by doubling, so that many small requests that come one by one copy little.
            wanted = min(most_lanes, max(lanes, 2 * old.lanes)) if lanes > old.lanes else old.lanes
            size = wanted, max(slots, old.slots)  # lanes, slots
            if most_tokens is not None and size[0] * size[1] > most_tokens:
                size = lanes, slots  # what is needed and no more, even if lanes get shorter
            assert self._forward is not None
            cache, forward = old.resized(*size, kept=kept), self._forward.for_slots(size[1])
        recorded = self.compiled and self.head.device.type == "cuda"
        # Together and last: where memory runs out before, all is as it was.
        self.cache, self._forward, self._run = cache, forward, RecordedForward(forward) if recorded else forward

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """See `SlotCache.copy_prefix`."""
        assert self.cache is not None, "something was admitted"
        self.cache.copy_prefix(source, target, length)

    def compact(self, kept: list[int], used: int) -> None:
        """See `SlotCache.compact`."""
        assert self.cache is not None, "something was admitted"
        self.cache.compact(kept, used)

    def feed(self, inputs: list[Inputs], lanes: list[int] | None = None) -> Hidden:
        """Run one entry of `inputs` for each lane. `lanes` None: lanes 0, 1, ..., which decode; else prompts."""
        assert self._forward is not None and self._run is not None and self.cache is not None, "something was admitted"
        lengths = [len(each.ids) for each in inputs]
        if self._packs:
            starts = list(accumulate(lengths, initial=0))
            # `zip` gives the ids of all lanes, then their slots, then their turns.
            ids_T, slots_T, turns_T = (torch.tensor(list(chain(*rows))) for rows in zip(*inputs, strict=True))
            lanes_B = torch.arange(len(inputs)) if lanes is None else torch.tensor(lanes)
            tokens = ids_T, slots_T, turns_T, lanes_B, torch.tensor(starts)
            return Hidden(self._forward.run_packed(self.cache, *tokens, prompts=lanes is not None), starts)
        longest = max(lengths)
        # A shorter lane repeats its last token, which writes the same again.
        ids_BS, slots_BS, turns_BS = (
            torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
            for rows in zip(*inputs, strict=True)
        )
        hidden_BSE = self._run(self.cache, ids_BS, slots_BS, turns_BS, lanes, end=1 + int(slots_BS.max()))
        return Hidden(hidden_BSE.flatten(0, 1), [lane * longest for lane in range(len(inputs))])

    def draw(self, hidden: Hidden, planned: list[tuple[Sequence, Plan]]) -> list[Drawn]:
        """For each sequence, what its decoder drew.

        The planned sequences have the first lanes of the cache, which are those of `hidden`.
        """
        targets = [target for _, plan in planned for target in plan.targets]
        lanes = [sequence.lanes[0].index for sequence, plan in planned for _ in plan.targets]
        guides = [sequence.request.guide_of(target.scale) for sequence, plan in planned for target in plan.targets]
        asking = [sequence.request.log_probabilities for sequence, plan in planned for _ in plan.targets]
        # Targets that choose alike share the head, the sorting and the draw. Each is named by its index in `targets`.
        alike: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
        for n, target in enumerate(targets):
            alike[target.draw, target.span, guides[n], target.sampling].append(n)
        outcomes: dict[int, Tensor | Exception] = {}
        finite: dict[int, bool] = {}
        chances: dict[int, Tensor] = {}
        for (draw, span, guide, sampling), members in alike.items():
            places = [targets[n].place for n in members]
            logits_BV, left_out_BV = self._logits(hidden, [lanes[n] for n in members], places, span, guide)
            noise_B = torch.tensor([targets[n].noise for n in members], device=logits_BV.device)
            finite.update(zip(members, logits_BV.sum(-1).isfinite().tolist(), strict=True))
            if left_out_BV is not None:
                logits_BV = logits_BV.masked_fill(left_out_BV, -torch.inf)
            outcomes.update(zip(members, _rows(draw, logits_BV, sampling, noise_B), strict=True))
            if rows := [row for row, n in enumerate(members) if asking[n]]:
                found = log_probabilities(logits_BV[rows], sampling)
                chances.update(zip((members[row] for row in rows), found, strict=True))
        numbers = iter(range(len(targets)))
        by_sequence = [list(islice(numbers, len(plan.targets))) for _, plan in planned]
        return [
            Drawn(
                [outcomes[n] for n in own],
                [finite[n] for n in own],
                [chances[n] for n in own] if sequence.request.log_probabilities else None,
            )
            for own, (sequence, _) in zip(by_sequence, planned, strict=True)
        ]

    def _logits(
        self,
        hidden: Hidden,
        lanes: list[int],
        places: list[int],
        span: tuple[int, int],
        guide: Guide | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, V) in float32 of the legal ids only, and which of these guidance leaves out.

        With a guide, each is guided by the next lane, which holds the negative prompt.
        """
        if guide is not None:
            lanes, places = lanes + [lane + 1 for lane in lanes], places * 2
        logits_BV = self.head.logits(hidden.at(lanes, places), span)
        if guide is None:
            return logits_BV, None
        conditional_BV, unconditional_BV = logits_BV.chunk(2)
        return guide.logits(conditional_BV, unconditional_BV)


def _rows(draw: Draw, logits_BV: Tensor, sampling: Sampling, noise_B: Tensor) -> list[Tensor | Exception]:
    """A row for each target; or, as a decoder may be anyone's, how its draw failed. Then the others are drawn alone."""
    try:
        drawn = draw(logits_BV, sampling, noise_B)
        if len(drawn) != len(logits_BV):
            raise ValueError(f"{len(drawn)} rows were drawn for {len(logits_BV)} targets")
        # One copy to the CPU for all, not one for each sequence.
        return list(drawn.cpu() if drawn.ndim == 1 else drawn)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if len(logits_BV) == 1:
            return [error]
        alone = zip(logits_BV.split(1), noise_B.split(1), strict=True)
        return [outcome for logits_1V, noise_1 in alone for outcome in _rows(draw, logits_1V, sampling, noise_1)]
