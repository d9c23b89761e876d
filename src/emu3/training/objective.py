"""The loss of a language model: each token is predicted from those before it in its sample, with a weight for each.

Letters: S, E, N, K, D, V, see CONTRIBUTING.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emu3.data.shards import Shard
from emu3.training.adapters import without_adapters
from emu3.training.loop import StepResult
from emu3.training.moving import moved_sample
from emu3.training.packing import Schedule
from emu3.training.sequences import KINDS, SequenceBuilder, TokenSequence

LOGITS_AT_ONCE = 2**27
"""So many are held; of more, each block is computed once more for the gradients."""
PADDED = 1.15
"""Samples attend together if the longest has at most so many times the tokens of the shortest."""


LENGTHS_ALIKE = 512
"""The longest sample of a row counts as a multiple of so many tokens."""

CAUSAL: dict[str, Any] = {}
"""How FlashAttention over rows of samples is told to be causal; empty where PyTorch has none."""
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10
    pass
else:
    # PyTorch 2.10 has `is_causal`, later ones a window.
    CAUSAL |= (
        {"is_causal": True} if "is_causal" in inspect.signature(varlen_attn).parameters else {"window_size": (-1, 0)}
    )


class Row(NamedTuple):
    """Samples one after the other, and padding behind them.

    Attributes:
        ids_S: the tokens.
        weights_S: how much each counts as a target; 0 for the first of a sample, and for padding.
        kinds_S: numbers of `KINDS`.
        held_S: whether a token's target is what the checkpoint expected there, and not the token.
        lengths: tokens of each sample.
        keys: of the samples.
    """

    ids_S: Tensor
    weights_S: Tensor
    kinds_S: Tensor
    held_S: Tensor
    lengths: tuple[int, ...]
    keys: tuple[str, ...] = ()


def pack(
    sequences: Sequence[TokenSequence],
    length: int,
    pad: int,
    keys: Sequence[str] = (),
    held: Sequence[float] | None = None,
) -> Row:
    """A row of `length` tokens, which the sequences do not exceed.

    `held` is not 0 for a sequence at which the model is held to what the checkpoint expected: how much that counts.
    """
    held = [0.0] * len(sequences) if held is None else held
    lengths = tuple(map(len, sequences))
    rest = length - sum(lengths)
    assert rest >= 0, (lengths, length)
    ids, weights, kinds = (
        torch.from_numpy(np.concatenate([*(getattr(each, name) for each in sequences), np.full(rest, fill, dtype)]))
        for name, fill, dtype in (("ids", pad, np.int64), ("weights", 0, np.float32), ("kinds", 0, np.uint8))
    )
    counts = torch.repeat_interleave(torch.tensor([*held, 0.0]), torch.tensor([*lengths, rest]))
    weights = torch.where(counts > 0, weights * counts, weights)
    return Row(ids, weights, kinds, counts > 0, lengths, tuple(keys))


class Rows:
    """Makes the rows of a run: a pure function of step and row; picklable.

    `null_prompt` is the share of drawings whose prompt is left out, so that guidance has an unconditional model. `held`
    is for each source as in `pack`; its prompts stay. `moved` says of each whether `moved_sample` moves what it draws.
    """

    def __init__(
        self,
        schedule: Schedule,
        shards: Sequence[Sequence[Shard]],
        builder: SequenceBuilder,
        null_prompt: float,
        held: Sequence[float] | None = None,
        moved: Sequence[bool] | None = None,
    ) -> None:
        self.moved = [False] * len(shards) if moved is None else list(moved)
        self.schedule, self.shards, self.builder, self.null_prompt = schedule, shards, builder, null_prompt
        self.held = [0.0] * len(shards) if held is None else list(held)
        self._ends = [np.cumsum([len(shard) for shard in each]) for each in shards]

    def __call__(self, step: int, row: int) -> Row:
        rng = np.random.default_rng([self.schedule.seed, step, row])
        sequences, keys, held = [], [], []
        for number, index in self.schedule.row(step, row):
            at = int(np.searchsorted(self._ends[number], index, side="right"))
            shard = self.shards[number][at]
            sample = shard[index - int(self._ends[number][at]) + len(shard)]
            if self.moved[number]:
                sample = moved_sample(sample, rng)
            is_dropped = bool(rng.random() < self.null_prompt) and not self.held[number]
            sequences.append(self.builder.build(sample, without_prompt=is_dropped))
            keys.append(sample.key)
            held.append(self.held[number])
        return pack(sequences, self.schedule.length, self.builder.vocabulary.pad, keys, held)


class PackedAttention:
    """Causal attention of each sample of a row to itself.

    Samples of about one length are attended to together, padded on the right, where no other token sees the padding.
    """

    def __init__(self, lengths: Sequence[int], size: int, device: torch.device) -> None:
        ends = np.cumsum(lengths)
        order = sorted(range(len(lengths)), key=lambda number: lengths[number])
        groups: list[list[int]] = []
        for number in order:
            if not groups or lengths[number] > PADDED * lengths[groups[-1][0]] + 8:
                groups.append([])
            groups[-1].append(number)
        self.places: list[Tensor] = []
        back = np.zeros(size, np.int64)  # of padding: anything
        taken = 0
        for group in groups:
            longest = max(lengths[number] for number in group)
            starts = np.array([ends[number] - lengths[number] for number in group])
            own = np.array([lengths[number] for number in group])
            place = starts[:, None] + np.minimum(np.arange(longest), own[:, None] - 1)
            self.places.append(torch.from_numpy(place).to(device))
            for line, number in enumerate(group):
                first = taken + line * longest
                back[ends[number] - lengths[number] : ends[number]] = np.arange(first, first + lengths[number])
            taken += len(group) * longest
        self.back = torch.from_numpy(back).to(device)

    @torch.compiler.disable
    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """query (1, N, S, D), key and value (1, K, S, D) -> (1, S, N, D); as `get_attention`'s functions."""
        attend = attend_causally if query.device.type == "cpu" else _attend_by_sdpa
        mixed = []
        for place in self.places:
            own = [each[0][:, place].transpose(0, 1) for each in (query, key, value)]  # (samples, heads, longest, D)
            mixed.append(attend(own[0], own[1], own[2], scaling).flatten(0, 1))
        return torch.cat(mixed)[self.back][None], None


class VarlenAttention:
    """As `PackedAttention`, by FlashAttention over the whole row at once: of a GPU, in bfloat16 or float16."""

    def __init__(self, lengths: Sequence[int], size: int, device: torch.device) -> None:
        rest = size - sum(lengths)
        own = [*lengths, rest] if rest else list(lengths)
        self.ends = torch.from_numpy(np.cumsum([0, *own], dtype=np.int32)).to(device, non_blocking=True)
        # The kernel takes any bound. Few different ones mean that compiled layers are compiled few times.
        self.longest = -(-max(own) // LENGTHS_ALIKE) * LENGTHS_ALIKE
        self.dtype = torch.get_autocast_dtype("cuda")
        torch._dynamo.maybe_mark_dynamic(self.ends, 0)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """As `PackedAttention`."""
        rows = [each[0].transpose(0, 1).to(self.dtype).contiguous() for each in (query, key, value)]
        q, k, v = (row.repeat_interleave(rows[0].shape[1] // row.shape[1], dim=1) for row in rows)
        mixed = varlen_attn(q, k, v, self.ends, self.ends, self.longest, self.longest, scale=scaling, **CAUSAL)
        return cast(Tensor, mixed)[None], None


def attention_of(lengths: Sequence[int], size: int, device: torch.device) -> PackedAttention | VarlenAttention:
    """The fastest attention of each sample of a row to itself."""
    is_fast = device.type == "cuda" and torch.is_autocast_enabled("cuda") and CAUSAL
    return VarlenAttention(lengths, size, device) if is_fast else PackedAttention(lengths, size, device)


def attend_causally(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Plain causal attention by two batched products: with bfloat16 tiles about twice as fast as SDPA's CPU kernel.

    query (B, N, S, D), key and value (B, K, S, D) -> (B, S, N, D).
    """
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1).reshape(-1, length, width) for x in (key, value))
    future = torch.full((length, length), -1e4, dtype=query.dtype).triu(1)
    scores = torch.baddbmm(
        future.expand(batch * heads, -1, -1), query.reshape(-1, length, width), key.transpose(1, 2), alpha=scaling
    )
    mixed = torch.bmm(scores.softmax(-1), value)
    return mixed.view(batch, heads, length, width).transpose(1, 2)


def attend_on_cpu(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """`attend_causally`, as `get_attention`'s functions are called."""
    return attend_causally(query, key, value, scaling), None


def _attend_by_sdpa(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return mixed.transpose(1, 2)


class NextTokenLoss(nn.Module):
    """The loss of a language model on rows of samples; `forward(row) -> StepResult`.

    `model` is an `Emu3ForCausalLM` or an `Emu3ForConditionalGeneration`, whose vision tokenizer is not used.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def head(self) -> nn.Linear:
        """States to logits."""
        return cast(nn.Linear, self.model.lm_head)

    @property
    def text_model(self) -> Any:
        """Embeddings and layers."""
        return getattr(self.model.model, "text_model", self.model.model)

    @cached_property
    def flops_per_token(self) -> float:
        """Of a forward pass through the layers: two for each weight. Attention and head come on top."""
        return 2.0 * sum(each.numel() for each in self.text_model.layers.parameters() if each.ndim == 2)

    def forward(self, row: Row) -> StepResult:
        """The sum of losses by weight; the mean loss of each kind of target that counts."""
        text_model, head = self.text_model, self.head
        device = text_model.embed_tokens.weight.device
        ids_S, weights_S, kinds_S, held_S = (each.to(device, non_blocking=True) for each in row[:4])
        counts_S = weights_S > 0
        targets, weights, kinds, held = (each[counts_S] for each in (ids_S, weights_S, kinds_S, held_S))
        states = self.states(row.lengths, ids_S)[:-1][counts_S[1:]]
        losses = _cross_entropy(states, self.head, targets)
        if held.any():
            losses = losses.index_put((held.nonzero()[:, 0],), self._divergence(row, ids_S, counts_S, states, held))
        metrics = {"held": (losses.detach()[held].sum(), held.sum())}
        for kind, name in enumerate(KINDS):
            own = (kinds == kind) & ~held
            metrics[name] = losses.detach()[own].sum(), own.sum()
        of_attention = 4.0 * self.text_model.config.hidden_size * len(text_model.layers) / 2
        forward = self.flops_per_token * len(ids_S) + of_attention * sum(length**2 for length in row.lengths)
        forward += 2.0 * head.in_features * head.out_features * len(targets)
        return StepResult((losses * weights).sum(), weights.sum(), metrics, sum(row.lengths), 3 * forward)

    def states(self, lengths: Sequence[int], ids_S: Tensor) -> Tensor:
        """The final state of each token, given those before it in its sample: (S, E)."""
        text_model = self.text_model
        positions = torch.cat([torch.arange(length) for length in (*lengths, len(ids_S) - sum(lengths))])
        attend = attention_of(lengths, len(ids_S), ids_S.device)
        embeds = text_model.embed_tokens(ids_S)[None]
        return cast(Tensor, text_model.run_layers(embeds, None, positions.to(ids_S.device)[None], attend=attend)[0])

    def _divergence(self, row: Row, ids_S: Tensor, counts_S: Tensor, states: Tensor, held: Tensor) -> Tensor:
        """Of what the model expects at each held target from what it expects without its adapters (targets held,)."""
        own_S, lengths = _held_samples(row)
        own_S = own_S.to(ids_S.device)
        with torch.no_grad(), without_adapters(self.model):
            before = self.states(lengths, ids_S[own_S])[:-1][counts_S[own_S][1:]]
            expected = self.head(before).float().log_softmax(-1)
        found = self.head(states[held]).float().log_softmax(-1)
        return F.kl_div(found, expected, reduction="none", log_target=True).sum(-1)


def _held_samples(row: Row) -> tuple[Tensor, list[int]]:
    """Which tokens of a row are of samples that are held (S,), and the lengths of these samples."""
    rest = len(row.ids_S) - sum(row.lengths)
    starts = [end - length for end, length in zip(accumulate(row.lengths), row.lengths, strict=True)]
    # The first token of a sample says it for all of them.
    is_held = [bool(row.held_S[start]) for start in starts]
    own_S = torch.repeat_interleave(torch.tensor([*is_held, False]), torch.tensor([*row.lengths, rest]))
    return own_S, [length for length, own in zip(row.lengths, is_held, strict=True) if own]


def _cross_entropy(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Of each state (targets, E) with its target; logits are held for some targets at a time."""

    def compute(states: Tensor, wanted: Tensor) -> Tensor:
        logits_V = head(states)
        logits_V = logits_V.float() if logits_V.dtype in (torch.bfloat16, torch.float16) else logits_V
        return F.cross_entropy(logits_V, wanted, reduction="none")

    size = max(1, LOGITS_AT_ONCE // head.out_features)
    if len(targets) <= size:
        return compute(hidden, targets)
    blocks = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(compute, *block, use_reentrant=False) for block in blocks])
