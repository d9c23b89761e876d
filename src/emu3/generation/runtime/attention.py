"""How new tokens attend to the slots of their lanes: rotation, cache, scores and their mix.

There are two ways. `Padded` are tensor operations for any device. `Packed` is one function on a CPU, without padding
or masks; see `emu3/kernels/attention.cpp`.

Shapes: B lanes, S tokens of a lane, T tokens of all, N query heads, K key-value heads, L slots, D width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from emu3 import kernels


class Padded(NamedTuple):
    """Tokens of B lanes that are S each; a lane that has fewer repeats its last.

    The N / K query heads of a key-value head are stacked: it has `queries` = N / K * S rows.

    Attributes:
        cos_BS1D, sin_BS1D: of the tokens' slots; see `Forward`.
        bias: added to the scores, 0 or -inf: (B * K, queries, end), or for many queries (B, 1, queries, end).
        indices: where keys and values go; see `SlotCache.fill`.
        lanes_B: of the cache; None for the first B.
    """

    cos_BS1D: Tensor
    sin_BS1D: Tensor
    bias: Tensor
    indices: Tensor
    lanes_B: Tensor | None


class Packed(NamedTuple):
    """Tokens of all lanes, one lane behind the other.

    Attributes:
        cos_TD, sin_TD: of the tokens' slots; see `Forward`.
        slots_T, turns_T: of the tokens.
        lanes_B: of the cache.
        starts: (B + 1,), the first token of each lane, and T.
        turns_BL: of the cache, with those of the tokens.
    """

    cos_TD: Tensor
    sin_TD: Tensor
    slots_T: Tensor
    turns_T: Tensor
    lanes_B: Tensor
    starts: Tensor
    turns_BL: Tensor


def attend(tokens: Padded | Packed, x: Tensor, keys_BKLD: Tensor, values_BKLD: Tensor, scaling: float) -> Tensor:
    """From queries, keys and values (..., (N + 2 K) * D) of tokens to what they mix (..., N * D)."""
    if isinstance(tokens, Packed):
        run = _opaque_attend_packed if torch.compiler.is_compiling() else kernels.attend
        return run(x, keys_BKLD, values_BKLD, scaling, *tokens)
    return _attend_padded(tokens, x, keys_BKLD, values_BKLD, scaling)


def _attend_padded(tokens: Padded, x: Tensor, keys_BKLD: Tensor, values_BKLD: Tensor, scaling: float) -> Tensor:
    cos_BS1D, sin_BS1D, bias, indices, lanes_B = tokens
    batch, length = x.shape[:2]
    heads, width, queries, end = keys_BKLD.shape[1], keys_BKLD.shape[3], bias.shape[-2], bias.shape[-1]
    groups = queries // length
    query_key, value_BSKD = x.view(batch, length, (groups + 2) * heads, width).split(((groups + 1) * heads, heads), 2)
    halves = query_key[..., width // 2 :], query_key[..., : width // 2]  # `roll` costs several times as much
    query_key = torch.addcmul(query_key * cos_BS1D, torch.cat(halves, -1), sin_BS1D)
    query_BSND, key_BSKD = query_key.split((groups * heads, heads), 2)
    keys_BKLD.view(-1, width).index_copy_(0, indices, key_BSKD.reshape(-1, width))
    values_BKLD.view(-1, width).index_copy_(0, indices, value_BSKD.reshape(-1, width))
    keys_BKLD, values_BKLD = (
        cached[:batch, :, :end] if lanes_B is None else cached[lanes_B, :, :end] for cached in (keys_BKLD, values_BKLD)
    )
    # (B, S, N, D) -> (B, K, queries, D)
    query = query_BSND.unflatten(2, (heads, groups)).permute(0, 2, 3, 1, 4).reshape(batch, heads, queries, width)
    if bias.ndim == 3:
        scores = torch.baddbmm(bias, query.flatten(0, 1), keys_BKLD.flatten(0, 1).mT, alpha=scaling)
        mixed = torch.bmm(scores.softmax(-1), values_BKLD.flatten(0, 1))
    else:
        mixed = F.scaled_dot_product_attention(
            query, keys_BKLD, values_BKLD, attn_mask=bias.expand(-1, heads, -1, -1), scale=scaling
        )
    # back to (B, S, N * D)
    mixed = mixed.view(batch, heads, groups, length, width).permute(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, groups * heads * width)


_opaque_attend_packed = torch.library.custom_op(
    "emu3::attend_packed",
    kernels.attend,
    mutates_args=("keys", "values"),
    schema=(
        "(Tensor x, Tensor(a!) keys, Tensor(b!) values, float scaling, Tensor cos, Tensor sin, Tensor slots, "
        "Tensor turns, Tensor lanes, Tensor starts, Tensor turns_of_slots) -> Tensor"
    ),
)


@_opaque_attend_packed.register_fake
def _(x: Tensor, keys: Tensor, *others: object) -> Tensor:
    return x.new_empty(len(x), x.shape[1] - 2 * keys.shape[1] * keys.shape[3])
