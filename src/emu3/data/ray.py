"""Tokenizing on a Ray cluster: Ray Data hands the pieces to actors, each with the vision tokenizer in its memory.

An actor does what a process does on one machine, so the shards are the same. Ray starts an actor that died again, and
gives its piece to another. Sources, checkpoint and results lie where every machine can reach them: on a shared disk, or
at addresses such as s3://bucket/name. Needs the extra `ray`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import ray
import ray.data
import torch
from ray.exceptions import RayError

from emu3.data.job import Job
from emu3.data.places import Place
from emu3.data.pool import OnProgress, Tally, tokenize_piece
from emu3.data.report import Report
from emu3.data.sources import Source
from emu3.data.tokenize import Tokenizer

LOCAL = "local"
"""In place of an address: a cluster of this machine alone, that ends with the run."""


class Worker:
    """An actor: tokenizes one piece after the other."""

    def __init__(self, tokenizer: Tokenizer, source: Source, place: Place, device: str) -> None:
        torch.set_num_threads(1)
        self.encoder = tokenizer.load(device, 1 if device == "cpu" else os.cpu_count() or 1)
        self.source, self.place = source, place

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Tokenizes a piece; returns how many pictures it has and which codes occur in them."""
        tally = Tally(1, self.encoder.tokenizer.codebook_size)
        self.encoder.on_codes = tally.count
        tokenize_piece(self.encoder, self.source, self.place, row["piece"])
        return {"pictures": tally.pictures.value, "codes": tally.codes()}


def tokenize(
    source: Source,
    out: str | Path,
    *,
    address: str = LOCAL,
    model: str | Path = "nano",
    area: int | None = None,
    independent_groups: bool | None = None,
    processes: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    on_progress: OnProgress = lambda progress: None,
) -> Report:
    """Tokenizes a source on a cluster, into shards and report.json in a folder.

    Args:
        address: of the cluster, such as "auto" or "ray://host:10001"; or `LOCAL`.
        processes: how many actors; by default one for each GPU of the cluster, else one for each core.
        device: "cpu", "cuda", or "auto" for GPUs where the cluster has some.

    The others are those of `emu3.data.job.tokenize`, and the errors too. A cluster that cannot be reached, or that ends
    the work, is a ValueError.
    """
    place = Place.of(out)
    if place.spec.startswith("memory:"):
        raise ValueError(
            f"{out} is in the memory of one process, which no other sees; name a folder or another address"
        )
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {device!r:.40} is for one machine; with Ray it is auto, cpu or cuda")
    job = Job(Tokenizer.of(model, area, independent_groups), source, place)

    def dispatch(pieces: list[int], on_progress: OnProgress) -> int:
        tally = Tally(len(pieces), job.tokenizer.codebook_size)
        with _connected(address, processes):
            resources = ray.cluster_resources()
            on_gpu = device == "cuda" or (device == "auto" and resources.get("GPU", 0) >= 1)
            if on_gpu and resources.get("GPU", 0) < 1:
                raise ValueError("device='cuda', but the cluster has no GPU; leave it out")
            actors = processes or max(1, int(resources["GPU" if on_gpu else "CPU"]))
            work = ray.data.from_items([{"piece": piece} for piece in pieces], override_num_blocks=len(pieces)).map(
                cast(Any, Worker),  # a class whose objects are called
                fn_constructor_args=(job.tokenizer, source, place, "cuda" if on_gpu else "cpu"),
                compute=ray.data.ActorPoolStrategy(size=min(actors, len(pieces))),
                num_cpus=1,
                num_gpus=int(on_gpu),
            )
            for row in work.iter_rows():
                tally.count(row["codes"], row["pictures"])
                tally.done.value += 1
                on_progress(tally.look())
        return int(tally.pictures.value)

    return job.run(dispatch, overwrite, on_progress)


@contextmanager
def _connected(address: str, processes: int | None) -> Iterator[None]:
    """A connection to the cluster, if this process has none, for a while. Ray's errors become ValueErrors."""
    mine = not ray.is_initialized()
    try:
        if mine and address == LOCAL:
            ray.init(num_cpus=processes, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
        elif mine:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot reach a Ray cluster at {address!r}: {error}; check the address") from error
    context = ray.data.DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the command has its own bar
    try:
        yield
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        raise ValueError(f"the Ray cluster could not do the work: {cause}") from error
    finally:
        context.enable_progress_bars = bars
        if mine:
            ray.shutdown()
