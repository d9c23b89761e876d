"""Weights that are split over processes, as `from_pretrained(..., tp_plan="auto")` leaves them: tensor parallelism.

transformers keeps them as `DTensor` parameters, and replaces `forward` of their modules. Each process has some of the
heads, and a part of the feed-forward layer:

    hidden ── q, k, v: some outputs ── attention ── o: some inputs ── sum ── gate, up ── down ── sum ── hidden
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Shard


def is_split(weight: object) -> TypeGuard[DTensor]:
    """Whether a weight lies in parts on several processes."""
    return torch.distributed.is_available() and isinstance(weight, DTensor)


def processes_of(module: nn.Module) -> int:
    """How many processes share a module's weight."""
    weight = getattr(module, "weight", None)
    return weight.device_mesh.size() if is_split(weight) else 1


def own_part(weight: Tensor) -> Tensor:
    """What this process has of a weight. A change of its `data` changes the weight's."""
    return weight._local_tensor if is_split(weight) else weight  # `to_local` returns another object of the same memory


@torch.no_grad()
def whole(weight: Tensor) -> Tensor:
    """The weight in one piece; a copy if it is split. All processes must ask for it together."""
    return weight.full_tensor() if is_split(weight) else weight


def least(number: int, weight: Tensor) -> int:
    """The smallest of the numbers that the processes have which share a weight; the number itself if there is one."""
    if not is_split(weight):
        return number
    agreed = torch.tensor(number, device=own_part(weight).device)
    torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN, weight.device_mesh.get_group())
    return int(agreed)


def summed(linear: Callable[[Tensor], Tensor], weight: Tensor) -> Callable[[Tensor], Tensor]:
    """A product with this process's part of a weight. Where each has some of its inputs, their results are summed."""
    if not is_split(weight) or Shard(1) not in weight.placements:
        return linear
    group = weight.device_mesh.get_group()

    def sum_over_processes(x: Tensor) -> Tensor:
        result = linear(x)
        torch.distributed.all_reduce(result, group=group)
        return result

    return sum_over_processes
