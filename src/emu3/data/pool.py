"""Processes that tokenize the pieces of a source, on one machine. Whoever is free takes the next piece."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emu3.data.places import Place
from emu3.data.shards import shard_name, write_shard
from emu3.data.sources import Source
from emu3.data.tokenize import Encoder, Tokenizer

_SPAWN = multiprocessing.get_context("spawn")
_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class Progress:
    """How far a run is: pieces that are done, and of all; pictures encoded; how many a second; codes that occurred."""

    done: int
    pieces: int
    pictures: int
    pictures_per_second: float
    codes_in_use: int


OnProgress = Callable[[Progress], None]


class Tally:
    """What the processes of a machine share: the next piece, and counts that change in place."""

    def __init__(self, pieces: int, codebook_size: int) -> None:
        self.pieces = pieces
        self.next = _SPAWN.Value("q", 0)
        self.done = _SPAWN.Value("q", 0)
        self.pictures = _SPAWN.Value("q", 0)
        self.used = _SPAWN.RawArray("b", codebook_size)
        self.start = time.monotonic()

    def take(self) -> int | None:
        """The number of the next piece that nobody has taken."""
        with self.next.get_lock():
            if self.next.value >= self.pieces:
                return None
            self.next.value += 1
            return self.next.value - 1

    def count(self, codes: NDArray[Any], pictures: int) -> None:
        """Counts a batch."""
        np.frombuffer(self.used, np.int8)[codes.reshape(-1)] = 1
        with self.pictures.get_lock():
            self.pictures.value += pictures

    def codes(self) -> NDArray[np.int64]:
        """Those that occurred."""
        return np.flatnonzero(np.frombuffer(self.used, np.int8))

    def look(self) -> Progress:
        """Where it is."""
        speed = self.pictures.value / max(time.monotonic() - self.start, 1e-6)
        return Progress(self.done.value, self.pieces, self.pictures.value, speed, len(self.codes()))


def tokenize_piece(encoder: Encoder, source: Source, place: Place, piece: int) -> None:
    """Tokenizes one piece and writes its shard: the work that is the same everywhere."""
    info = encoder.tokenizer.info(source, piece)  # before: what is changed meanwhile is not taken for done
    write_shard(place.join(shard_name(piece)), info, *encoder.tokenize(source, piece))


def tokenize_pieces(
    tokenizer: Tokenizer,
    source: Source,
    place: Place,
    pieces: Sequence[int],
    devices: Sequence[str],
    on_progress: OnProgress = lambda progress: None,
) -> int:
    """Tokenizes pieces in as many processes as there are devices, each with one thread for torch.

    One device is used in this process. Returns how many pictures and clips were encoded.

    Raises:
        ValueError: a process cannot go on, as with a full disk, or was killed. What it finished stays.
    """
    tally = Tally(len(pieces), tokenizer.codebook_size)
    if len(devices) == 1:
        with _one_thread():
            _work(tokenizer, source, place, pieces, devices[0], 1, tally, lambda: on_progress(tally.look()))
        return int(tally.pictures.value)
    with _started(tokenizer, source, place, pieces, devices, tally) as running:
        while running:
            ready = wait(
                [each for process, pipe in running for each in (process.sentinel, pipe)], _SECONDS_BETWEEN_LOOKS
            )
            on_progress(tally.look())
            if ready:
                running = [(process, pipe) for process, pipe in running if not _has_ended(process, pipe)]
    return int(tally.pictures.value)


def _work(
    tokenizer: Tokenizer,
    source: Source,
    place: Place,
    pieces: Sequence[int],
    device: str,
    processes: int,
    tally: Tally,
    on_batch: Callable[[], None] = lambda: None,
) -> None:
    """Does pieces until none is left."""
    threads = 1 if device == "cpu" else max(1, (os.cpu_count() or 1) // processes)
    encoder = tokenizer.load(device, threads)

    def count(codes: NDArray[Any], pictures: int) -> None:
        tally.count(codes, pictures)
        on_batch()

    encoder.on_codes = count
    while (index := tally.take()) is not None:
        tokenize_piece(encoder, source, place, pieces[index])
        with tally.done.get_lock():
            tally.done.value += 1
        on_batch()


def _run(pipe: Connection, *arguments: Any) -> None:
    """What a process does. A user's mistake, or what the system refuses, goes to the parent as words."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        _work(*arguments)
    except (ValueError, OSError) as error:
        pipe.send(str(error))
        os._exit(1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _end_with_parent() -> None:
    """Ends this process when its parent is killed, so that nobody writes behind the next run's back."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextmanager
def _started(
    tokenizer: Tokenizer, source: Source, place: Place, pieces: Sequence[int], devices: Sequence[str], tally: Tally
) -> Iterator[list[tuple[Any, Connection]]]:
    """The processes, each with the pipe by which it says what is wrong. At the end of the block they are killed."""
    processes = []
    try:
        for device in devices:
            receive, send = _SPAWN.Pipe(duplex=False)
            arguments = (send, tokenizer, source, place, pieces, device, len(devices), tally)
            process = _SPAWN.Process(target=_run, args=arguments, daemon=True)
            with _without_stopping():
                process.start()
            send.close()
            processes.append((process, receive))
        yield processes
    finally:
        for process, receive in processes:
            process.kill()
            process.join()
            receive.close()


@contextmanager
def _without_stopping() -> Iterator[None]:
    """A process that starts here does not hear Ctrl-C: its parent ends it, without a traceback of the child's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _has_ended(process: Any, pipe: Connection) -> bool:
    """Whether a process has done all. ValueError where it failed."""
    try:
        if pipe.poll():
            raise ValueError(pipe.recv())
    except EOFError:  # it has closed its end
        process.join()
    if process.exitcode is None:
        return False
    if process.exitcode == 0:
        return True
    if process.exitcode < 0:
        raise ValueError(
            f"a process was killed by signal {-process.exitcode}, perhaps because memory ran out; run the same command "
            "again to go on, with fewer --processes"
        )
    raise RuntimeError(f"a process failed with exit code {process.exitcode}; its error is printed above")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch with one thread, as in the processes: with more, sums may be rounded otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
