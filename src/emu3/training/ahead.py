"""Batches made ahead of their step by other processes, so that a GPU does not wait for Python to draw scenes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch.utils.data import DataLoader

Batch = TypeVar("Batch")

CORES_FOR_TRAINING = 2
MOST_WORKERS = 10


def made_ahead(make: Callable[[int], Batch], steps: range) -> Iterator[Batch]:
    """`make(step)` of every step, in order; in this process where no cores are to spare.

    Args:
        make: a pure function of the step, so that a resumed run gets the same batches; picklable.
    """
    workers = min(MOST_WORKERS, max(0, (os.cpu_count() or 1) - CORES_FOR_TRAINING))
    loader = DataLoader(
        cast(Any, steps),
        batch_size=None,
        collate_fn=cast(Any, make),
        num_workers=workers,
        generator=torch.Generator(),  # its own, so that the random numbers of training do not depend on it
    )
    return iter(loader)
