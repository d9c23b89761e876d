"""Batches made before they are needed, by other processes, so that a GPU does not wait for Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch.utils.data import DataLoader

Batch = TypeVar("Batch")

CORES_FOR_TRAINING = 2
MAX_WORKERS = 10


def prefetch(make_batch: Callable[[int], Batch], steps: range) -> Iterator[Batch]:
    """`make_batch(step)` of every step, in order; in this process where no cores are to spare.

    Args:
        make_batch: a pure function of the step, so that a resumed run gets the same batches; picklable.
        steps: which batches to make.
    """
    workers = min(MAX_WORKERS, max(0, (os.cpu_count() or 1) - CORES_FOR_TRAINING))
    loader = DataLoader(
        cast(Any, steps),
        batch_size=None,
        collate_fn=cast(Any, make_batch),
        num_workers=workers,
        generator=torch.Generator(),  # its own, so that the random numbers of training do not depend on it
    )
    return iter(loader)
