"""A source to a folder of shards, one for each piece, on this machine or on a cluster. What was cut off goes on.

A shard is there as a whole or not at all, and depends only on its piece, the tokenizer and the settings. So a run does
the pieces whose shards are missing, and it does not matter how often it was killed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from emu3.checkpoints.load import pick_device
from emu3.data.places import Place
from emu3.data.pool import OnProgress, tokenize_pieces
from emu3.data.report import Report, count_shards
from emu3.data.shards import Shard, shard_name, shard_names
from emu3.data.sources import Source
from emu3.data.tokenize import Tokenizer
from emu3.locks import locked

REPORT = "report.json"
_WHY = {"source": ": the data were changed, or are others"}
_LOCK = ".lock"

Dispatch = Callable[[list[int], OnProgress], int]
"""(pieces, on_progress) -> how many pictures and clips were encoded: tokenizes pieces of the job somewhere."""


@dataclass(frozen=True)
class Job:
    """What is to be done. ValueErrors of its methods name the remedy."""

    tokenizer: Tokenizer
    source: Source
    place: Place

    def run(
        self,
        dispatch: Dispatch,
        overwrite: bool = False,
        on_progress: OnProgress = lambda progress: None,
    ) -> Report:
        """Does what is missing, and writes report.json.

        Args:
            dispatch: does the work, such as `here`.
            overwrite: whether to make all shards anew.
            on_progress: is called now and then.

        Raises:
            ValueError: the folder holds shards made otherwise, another process is writing into it, the work cannot go
                on, or nothing could be tokenized. In the last case the report is there.
        """
        start = time.monotonic()
        self._check_place()
        self.place.create()
        with self._locked():
            self.place.clean()
            done = self._overwritten() if overwrite else self._done()
            missing = [piece for piece in range(self.source.pieces) if piece not in done]
            pictures = dispatch(missing, on_progress) if missing else 0
            self.place.clean()
            shards = (Shard(self.place.join(shard_name(piece))) for piece in range(self.source.pieces))
            made_by = self.tokenizer.hash, self.tokenizer.codebook_size, self.tokenizer.settings
            report = count_shards(shards, *made_by)
            seconds = time.monotonic() - start
            report = replace(
                report,
                seconds=round(seconds, 2),
                new_pictures=pictures,
                pictures_per_second=round(pictures / seconds, 1),
            )
            self.place.write(REPORT, json.dumps(report.to_dict(), indent=2, ensure_ascii=False).encode() + b"\n")
        if not report.samples:
            if not report.broken:
                raise ValueError(f"the source {self.source.name!r} is empty; there is nothing to tokenize")
            first = report.broken[0]
            raise ValueError(
                f"all {len(report.broken)} samples of the source {self.source.name!r} are broken, such as {first.key}: "
                f"{first.reason}; see {self.place.join(REPORT)}"
            )
        return report

    def _check_place(self) -> None:
        """ValueError for a folder that holds other files, among which shards would get lost."""
        own = {REPORT, _LOCK, *shard_names(self.place)}
        others = [name for name in self.place.names() if name not in own and not name.startswith(".")]
        if others and REPORT not in self.place.names():
            raise ValueError(
                f"{self.place} holds other files, such as {others[0]}; name a folder of its own for the shards"
            )

    def _done(self) -> set[int]:
        """The pieces whose shards are there. ValueError for a shard of another tokenizer, other settings or source."""
        done: set[int] = set()
        for name in shard_names(self.place):
            piece = int(name.split(".")[0])
            shard = self._open(name)
            if shard is None:
                continue
            found = shard.info
            if piece >= self.source.pieces:
                raise ValueError(
                    f"{self.place.join(name)} is there, but the source {self.source.name!r} has {self.source.pieces} "
                    "pieces; name another folder, or make all anew with --overwrite"
                )
            expected = self.tokenizer.info(self.source, piece)
            for field in ("tokenizer", "settings", "source"):
                if getattr(found, field) != getattr(expected, field):
                    raise ValueError(
                        f"{self.place.join(name)} was made with the {field} {getattr(found, field)!r}, not with "
                        f"{getattr(expected, field)!r}{_WHY.get(field, '')}; name another folder, or make all anew "
                        "with --overwrite"
                    )
            done.add(piece)
        return done

    def _overwritten(self) -> set[int]:
        """Removes all shards, then there is none. ValueError, and nothing is removed, where a file is no shard."""
        names = shard_names(self.place)
        for name in names:
            self._open(name)
        for name in (*names, REPORT):
            self.place.remove(name)
        return set()

    def _open(self, name: str) -> Shard | None:
        """A shard; None for what an upload left that was cut off. ValueError for somebody's own file."""
        try:
            return Shard(self.place.join(name))
        except ValueError as error:
            if self.place.path is None:
                return None
            file = self.place.join(name)
            raise ValueError(
                f"{file} is no shard of tokenized samples, and stays; remove it, or name another folder"
            ) from error

    def _locked(self) -> AbstractContextManager[None]:
        """Keeps other processes of this machine out of the folder. At an address there is no lock.

        Two runs there do the same work twice, and write the same shards.
        """
        if self.place.path is None:
            return nullcontext()
        return locked(self.place.path / _LOCK, f"into {self.place}")


def tokenize(
    source: Source,
    out: str | Path,
    *,
    model: str | Path = "nano",
    area: int | None = None,
    independent_groups: bool | None = None,
    processes: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    on_progress: OnProgress = lambda progress: None,
) -> Report:
    """Tokenizes a source on this machine, into shards and report.json in a folder.

    Args:
        source: as `open_source` opens it.
        out: the folder, or an address that fsspec can open. Where it has shards of this job, the others are made.
        model: a checkpoint, or the folder of a vision tokenizer.
        area: pixels of a picture that is drawn; by default the checkpoint's own.
        independent_groups: see `Tokenizer.of`.
        processes: how many; by default one for each core, or for each GPU.
        device: "auto", "cpu", "cuda" for all GPUs, or one such as "cuda:1".
        overwrite: whether to make all shards anew.
        on_progress: is called now and then.

    Raises:
        ValueError: see `Job.run` and `Tokenizer.of`.
    """
    place = Place.of(out)
    job = Job(Tokenizer.of(model, area, independent_groups), source, place)

    def dispatch(pieces: list[int], on_progress: OnProgress) -> int:
        devices = pick_devices(device, processes)[: len(pieces)]
        if place.spec.startswith("memory:"):
            devices = devices[:1]  # no other process sees this memory
        return tokenize_pieces(job.tokenizer, source, place, pieces, devices, on_progress)

    return job.run(dispatch, overwrite, on_progress)


def pick_devices(device: str, processes: int | None) -> list[str]:
    """The device of each process. ValueError for one that is not there."""
    picked = pick_device(device)
    if picked == "cpu":
        return ["cpu"] * (processes or _cores())
    there = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if picked == "cuda" else [picked]
    return [there[number % len(there)] for number in range(processes or len(there))]


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
