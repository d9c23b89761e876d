"""Clips that clients ask for and fetch later: in memory, few of them, and only for a while."""

from __future__ import annotations

import asyncio
import io
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
from PIL import Image

from emu3.clips import Clip
from emu3.generation.events import Failed, Started, Tokens
from emu3.generation.request import Request
from emu3.pictures import data_url
from emu3.results import Result
from emu3.segments import Visual
from emu3.serving.jobs import Job, QueueFull
from emu3.serving.worker import Worker

_MOST_UNFINISHED = 64
_MOST_FINISHED = 256
_MOST_BYTES = 2**28  # of the frames of all that are finished
_KEPT_SECONDS = 3600

MEDIA = {"mp4": "video/mp4", "webm": "video/webm", "webp": "image/webp", "gif": "image/gif"}
"""Formats of a clip's file, and how HTTP names them."""


@dataclass(eq=False)
class Film:
    """A clip that was asked for. Changes while it is made.

    Attributes:
        about: what a client is told of it beyond its state: prompt, model, size, seconds ...
        settings: options with which it is drawn.
        done: tokens that are decided, of `length`.
    """

    about: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: f"video_{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    status: Literal["queued", "in_progress", "completed", "failed"] = "queued"
    done: int = 0
    length: int = 0
    completed: int | None = None
    error: str | None = None
    clip: Clip | None = None
    codes: Visual | None = None  # the clip's own: its frames, encoded again, may come to others
    job: Job | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more comes."""
        return self.status in ("completed", "failed")

    @property
    def expires(self) -> int | None:
        """When it is forgotten."""
        return None if self.completed is None else self.completed + _KEPT_SECONDS

    def told(self) -> dict[str, Any]:
        """As OpenAI's API says it."""
        part = 100 * self.done // self.length if self.length else 0
        return {
            "id": self.id,
            "object": "video",
            "status": self.status,
            "progress": 100 if self.status == "completed" else min(part, 99),
            "created_at": self.created,
            "completed_at": self.completed,
            "expires_at": self.expires,
            "error": None if self.error is None else {"code": "generation_failed", "message": self.error},
            "remixed_from_video_id": None,
            **self.about,
        }

    def end(self, result: Result | None, error: str | None = None) -> None:
        """It is made, or failed."""
        self.error, self.completed = error, int(time.time())
        self.status = "failed" if result is None else "completed"
        if result is not None:
            self.clip, self.codes = cast(Clip, result.output), Visual(cast(Any, result.codes_THW))


class Films:
    """Those of a server, the oldest first."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._films: dict[str, Film] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself does not keep them

    def __iter__(self) -> Iterator[Film]:
        self._forget()
        return iter(list(self._films.values()))

    def get(self, name: str) -> Film | None:
        """One by its id."""
        self._forget()
        return self._films.get(name)

    def keep(self, film: Film) -> None:
        """Keep one that is made."""
        self._films[film.id] = film
        self._forget()

    def make(self, asked: Request, about: dict[str, Any], settings: dict[str, Any]) -> Film:
        """Begin one. See `Film`.

        Raises:
            QueueFull, Draining: not now.
        """
        self._forget()
        if sum(not film.finished for film in self._films.values()) >= _MOST_UNFINISHED:
            raise QueueFull(1)
        job = self._worker.open([asked], live=True)
        film = Film(about, settings, job=job)
        task = asyncio.get_running_loop().create_task(self._follow(film, job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._films[film.id] = film
        return film

    def drop(self, film: Film) -> None:
        """Forget one; what is not made of it is given up."""
        if film.job is not None:
            self._worker.close(film.job)
            film.job.heard.put_nowait(Failed(0, "it was deleted"))  # ends its task
        self._films.pop(film.id, None)

    async def _follow(self, film: Film, job: Job) -> None:
        try:
            async for heard in self._worker.listen(job):
                match heard:
                    case Started():
                        film.status, film.length = "in_progress", heard.length
                    case Tokens():
                        film.done += len(heard.ids)
                    case Result():
                        film.end(heard)
                    case Failed():
                        film.end(None, heard.error)
        finally:
            self._worker.close(job)
            film.job = None
            self._forget()

    def _forget(self) -> None:
        """The expired, and the oldest ones where there are too many."""
        now, count, size = time.time(), 0, 0
        for film in reversed(list(self._films.values())):
            if not film.finished:
                continue
            count += 1
            size += film.clip.frames_THWC.nbytes if film.clip is not None else 0
            too_many = count > 1 and (count > _MOST_FINISHED or size > _MOST_BYTES)
            if too_many or now > (film.expires or now):
                del self._films[film.id]


def file_of(clip: Clip, format_: str) -> bytes:
    """The file of a clip. ValueError as `Clip.save`."""
    out = io.BytesIO()
    clip.save(out, format_)
    return out.getvalue()


def clip_url(clip: Clip) -> str:
    """A clip as a data URL, an animated WebP."""
    return data_url(file_of(clip, "webp"), MEDIA["webp"])


def sheet_of(clip: Clip) -> tuple[Image.Image, int]:
    """All frames as one picture, in rows and without gaps; and how many are in a row."""
    count, height, width, _ = clip.frames_THWC.shape
    columns = math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    sheet = np.zeros((rows, columns, height, width, 3), np.uint8)
    sheet.reshape(-1, height, width, 3)[:count] = clip.frames_THWC
    return Image.fromarray(sheet.swapaxes(1, 2).reshape(rows * height, columns * width, 3)), columns


def page_of(films: Sequence[Film], after: str | None, limit: int, order: str) -> tuple[list[Film], bool]:
    """Films by age, behind the one with the id `after`; and whether there are more. KeyError for an unknown id."""
    found = list(films) if order == "asc" else list(films)[::-1]
    if after is not None:
        places = {film.id: place for place, film in enumerate(found)}
        found = found[places[after] + 1 :]
    return found[:limit], len(found) > limit
