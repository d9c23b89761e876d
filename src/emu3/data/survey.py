"""What a source holds, before anybody trains on it: counts, sizes, captions, what is broken, what is there twice."""

from __future__ import annotations

import hashlib
import random
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

from PIL import Image

from emu3.data.duplicates import alike, difference_hash
from emu3.data.media import open_clip, open_picture_of, picture_size, read_file
from emu3.data.samples import Broken, Media, Sample
from emu3.data.sources import Source
from emu3.segments import Text
from emu3.sheet import contact_sheet
from emu3.vocabulary import SURFACES, VISUAL_PREFIX

DECODED = 2000
"""How many pictures are decoded unless all are: the others are opened as far as their headers."""
LONG_CAPTION = 4096
"""Characters; a longer caption is told, since it may not fit beside a picture."""

# What the processor refuses, too.
_MAX_RATIO = 200
_EXAMPLES = 24
_SHOWN = 20
_FRAMES = 64
_BATCH = 256
_CAPTION_SHOWN = 60
_BAR = 30

_SIDES = (16, 64, 128, 256, 512, 1024)
_RATIOS = {"1:1": 1.0, "5:4": 5 / 4, "4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9, "2:1": 2.0, "3:1": 3.0}
_CONTROL = re.compile("|".join(map(re.escape, (*SURFACES.values(), VISUAL_PREFIX))))


@dataclass(frozen=True)
class Found:
    """Something to know about samples: how many, and the keys of the first of them."""

    count: int = 0
    keys: tuple[str, ...] = ()

    def __add__(self, key: str) -> Found:
        return Found(self.count + 1, (*self.keys, key) if len(self.keys) < _SHOWN else self.keys)


@dataclass(frozen=True)
class Captions:
    """Lengths of the captions of drawings, in characters, and the key of the longest."""

    count: int
    shortest: int
    median: float
    longest: int
    longest_key: str


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was seen of a source.

    Attributes:
        samples: that can be trained on; each is a drawing or a conversation.
        texts: parts of samples; so are `pictures` and `clips`.
        decoded: how many pictures and clips were decoded; of the others only the header was read.
        sides: pictures by the length of their shorter side in pixels.
        ratios: pictures by the ratio of width to height that is nearest.
        captions: None where there are none.
        same_captions: drawings whose caption another one has.
        long_captions: those above 4,096 characters.
        control_tokens: samples whose texts spell a control token. It stays text.
        copies: groups of keys whose pictures or clips are the same file.
        lookalikes: groups of keys whose pictures look alike, and are not all the same file. Only of decoded ones.
        broken: what cannot be trained on.
        is_whole: whether everything was seen, and not the first samples only.
        examples: up to 24 pictures with their captions.
    """

    name: str
    samples: int = 0
    drawings: int = 0
    conversations: int = 0
    pictures: int = 0
    clips: int = 0
    texts: int = 0
    decoded: int = 0
    sides: dict[str, int] = field(default_factory=dict)
    ratios: dict[str, int] = field(default_factory=dict)
    captions: Captions | None = None
    same_captions: Found = Found()
    long_captions: Found = Found()
    control_tokens: Found = Found()
    copies: tuple[tuple[str, ...], ...] = ()
    lookalikes: tuple[tuple[str, ...], ...] = ()
    broken: tuple[Broken, ...] = ()
    is_whole: bool = True
    examples: tuple[tuple[str, Media], ...] = ()

    @property
    def reasons(self) -> dict[str, int]:
        """How much is broken for which reason, the most frequent first."""
        return dict(Counter(_kind_of_reason(each.reason) for each in self.broken).most_common())

    def to_dict(self) -> dict[str, Any]:
        """All but the examples, for JSON."""
        known = asdict(replace(self, examples=()))
        del known["examples"]
        return {**known, "reasons": self.reasons}

    def to_page(self) -> str:
        """A page to read."""
        return "\n".join(_lines_of(self))

    def to_sheet(self) -> Image.Image:
        """The examples as a contact sheet. ValueError where none can be shown."""
        shown = [(caption, frame) for caption, media in self.examples if (frame := _first_frame(media)) is not None]
        if not shown:
            raise ValueError(f"{self.name!r} holds no picture that can be shown; leave out -o")
        return contact_sheet(
            [frame for _, frame in shown], [caption[:_CAPTION_SHOWN] for caption, _ in shown], columns=6
        )


@dataclass(frozen=True)
class _Look:
    """What a look at a picture or clip told. `size` is height and width; `problem` is why it cannot be used."""

    digest: bytes = b""
    size: tuple[int, int] = (0, 0)
    hash: int | None = None
    is_decoded: bool = False
    problem: str = ""


def survey(
    source: Source,
    *,
    limit: int | None = None,
    check: bool = False,
    report: Callable[[int, int], None] = lambda done, in_all: None,
) -> Survey:
    """Looks through a source.

    Args:
        limit: look at so many samples only, the first ones.
        check: decode every picture, and not just 2,000.
        report: is told how much is done, and how much there is.
    """
    seen = _Seen(source.name)
    items = _read_all(source, report)
    limited = items if limit is None else islice(items, limit)
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(limited, _BATCH)):
            media = [part.content for each in batch if isinstance(each, Sample) for part in each.parts]
            asked = [each for each in media if isinstance(each, Media)]
            left = len(asked) if check else max(0, DECODED - seen.decoded)
            looks = iter(list(pool.map(_look_at, asked, [number < left for number in range(len(asked))])))
            for each in batch:
                if isinstance(each, Broken):
                    seen.broken.append(each)
                else:
                    seen.add(each, looks)
    return seen.sum_up(is_whole=next(items, None) is None)


def _read_all(source: Source, report: Callable[[int, int], None]) -> Iterator[Sample | Broken]:
    thousand = 1000  # a piece has about so many samples
    for piece in range(source.pieces):
        for number, each in enumerate(source.read(piece)):
            report(thousand * piece + min(number, thousand - 1), thousand * source.pieces)
            yield each


def _look_at(media: Media, decode: bool) -> _Look:
    try:
        content = read_file(media)
        digest = hashlib.blake2b(content, digest_size=16).digest()
        inside = Media(media.kind, content)
        height, width = picture_size(inside)
        if max(height, width) < 2:
            raise ValueError("1x1 pixels, too small to train on")
        if max(height, width) > _MAX_RATIO * min(height, width):
            raise ValueError(f"one side is more than {_MAX_RATIO} times the other: {height}x{width} pixels")
        if not decode:
            return _Look(digest, (height, width))
        if media.kind == "clip":
            open_clip(inside, _FRAMES)
            return _Look(digest, (height, width), is_decoded=True)
        return _Look(digest, (height, width), difference_hash(open_picture_of(inside)), is_decoded=True)
    except ValueError as error:
        return _Look(problem=str(error), is_decoded=decode)


class _Seen:
    """What was seen so far. Changes in place."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: Counter[str] = Counter()
        self.sides: Counter[str] = Counter()
        self.ratios: Counter[str] = Counter()
        self.broken: list[Broken] = []
        self.decoded = 0
        self._lengths: list[int] = []
        self._longest = (0, "")
        self._captions: dict[bytes, list[str]] = {}
        self._files: dict[bytes, list[str]] = {}
        self._hashes: list[tuple[int, bytes, str]] = []
        self._keys: set[str] = set()
        self._long, self._control = Found(), Found()
        self._examples: list[tuple[int, str, Media]] = []
        self._chance = random.Random(0)

    def add(self, sample: Sample, looks: Iterator[_Look]) -> None:
        """A sample, and what a look at each of its pictures and clips told."""
        media = [part.content for part in sample.parts if isinstance(part.content, Media)]
        its_looks = list(islice(looks, len(media)))
        self.decoded += sum(look.is_decoded for look in its_looks)
        problems = [look.problem for look in its_looks if look.problem]
        if sample.key in self._keys:
            problems.append("two samples with one key")
        if problems:
            self.broken.append(Broken(sample.key, problems[0]))
            return
        self._keys.add(sample.key)
        texts = [part.content.text for part in sample.parts if isinstance(part.content, Text)]
        self.counts.update(samples=1, texts=len(texts))
        self.counts["conversations" if sample.is_conversation else "drawings"] += 1
        if any(map(_CONTROL.search, texts)):
            self._control += sample.key
        if not sample.is_conversation:
            for text in texts:
                self._add_caption(sample.key, text)
        for each, look in zip(media, its_looks, strict=True):
            self._add_look(sample.key, each, look)
        if media:
            self._add_example(" ".join(texts), media[0])

    def _add_caption(self, key: str, caption: str) -> None:
        self._lengths.append(len(caption))
        self._longest = max(self._longest, (len(caption), key), key=lambda pair: pair[0])
        if len(caption) > LONG_CAPTION:
            self._long += key
        self._captions.setdefault(_digest(caption), []).append(key)

    def _add_look(self, key: str, media: Media, look: _Look) -> None:
        self.counts["pictures" if media.kind == "picture" else "clips"] += 1
        height, width = look.size
        self.sides[_side_label(min(height, width))] += 1
        self.ratios[_ratio_label(width / height)] += 1
        self._files.setdefault(look.digest, []).append(key)
        if look.hash is not None and len(self._files[look.digest]) == 1:
            self._hashes.append((look.hash, look.digest, key))

    def _add_example(self, caption: str, media: Media) -> None:
        """Keeps each sample with the same chance, whatever comes later."""
        number = self.counts["samples"]
        if len(self._examples) < _EXAMPLES:
            self._examples.append((number, caption, media))
        elif (place := self._chance.randrange(number)) < _EXAMPLES:
            self._examples[place] = (number, caption, media)

    def sum_up(self, *, is_whole: bool) -> Survey:
        """All of it as a value."""
        same = Found()
        for key in (key for keys in self._captions.values() if len(keys) > 1 for key in keys):
            same += key
        captions = None
        if self._lengths:
            median = statistics.median(self._lengths)
            captions = Captions(len(self._lengths), min(self._lengths), median, *self._longest)
        groups = alike([hash for hash, _, _ in self._hashes])
        return Survey(
            name=self.name,
            **self.counts,
            decoded=self.decoded,
            sides={label: self.sides[label] for label in map(_side_label, (0, *_SIDES)) if self.sides[label]},
            ratios={label: self.ratios[label] for label in _ratio_labels() if self.ratios[label]},
            captions=captions,
            same_captions=same,
            long_captions=self._long,
            control_tokens=self._control,
            copies=tuple(tuple(keys) for keys in self._files.values() if len(keys) > 1),
            lookalikes=tuple(tuple(self._hashes[place][2] for place in group) for group in groups),
            broken=tuple(self.broken),
            is_whole=is_whole,
            examples=tuple((caption, media) for _, caption, media in sorted(self._examples, key=lambda each: each[0])),
        )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _first_frame(media: Media) -> Image.Image | None:
    """None for a picture that was not decoded so far, and is broken."""
    try:
        return (
            open_picture_of(media) if media.kind == "picture" else Image.fromarray(open_clip(media, 1).frames_THWC[0])
        )
    except ValueError:
        return None


def _side_label(side: int) -> str:
    above = [start for start in _SIDES if side >= start]
    if not above:
        return f"below {_SIDES[0]}"
    following = _SIDES[len(above) :]
    return f"{above[-1]} to {following[0] - 1}" if following else f"{above[-1]} and more"


def _ratio_labels() -> list[str]:
    wide = list(_RATIOS)
    return [*(":".join(reversed(label.split(":"))) for label in reversed(wide[1:])), *wide]


def _ratio_label(ratio: float) -> str:
    """The nearest of the ratios, as its factor."""
    wide = max(ratio, 1 / ratio)
    label = min(_RATIOS, key=lambda name: max(_RATIOS[name] / wide, wide / _RATIOS[name]))
    return label if ratio >= 1 else ":".join(reversed(label.split(":")))


def _kind_of_reason(reason: str) -> str:
    """A reason without names and numbers, so that the same ones can be counted."""
    reason = re.sub(r"^\S+\.(txt|jsonl|csv)(:\d+)?: ", "", reason)
    reason = re.sub(r"'[^']*'|\"[^\"]*\"|\[.*\]|\{.*\}", "...", reason.split("; ")[0].split(": ")[0])
    return re.sub(r"(?<![\w-])\d[\d,]*(x\d+)?(?= (pixels|characters|frames))", "...", reason)


def _lines_of(survey: Survey) -> Iterator[str]:
    counts = {name: getattr(survey, name) for name in ("samples", "drawings", "conversations")}
    yield f"{survey.name}: {_counted(counts)}" + ("" if survey.is_whole else ", the first ones only")
    yield _counted({name: getattr(survey, name) for name in ("pictures", "clips", "texts")})
    media = survey.pictures + survey.clips
    if survey.decoded < media:
        yield f"decoded {survey.decoded:,} of {media:,}, of the others only headers were read; --check decodes all"
    if survey.captions is not None:
        told = survey.captions
        lengths = f"{told.shortest:,} to {told.longest:,} characters, median {told.median:,.10g}"
        yield f"captions: {lengths}; the longest is that of {told.longest_key}"
    for title, bars in (("shorter side in pixels", survey.sides), ("width to height", survey.ratios)):
        if bars:
            yield from ("", title, *_bars(bars))
    told_samples = {
        f"captions above {LONG_CAPTION:,} characters": survey.long_captions,
        "samples that spell a control token, which stays text": survey.control_tokens,
        "drawings whose caption another one has": survey.same_captions,
    }
    for title, found in told_samples.items():
        if found.count:
            yield from ("", f"{title} ({found.count:,}): {_shown(found.keys, found.count)}")
    groups_of = {"the same file": survey.copies, "pictures that look alike": survey.lookalikes}
    for title, groups in groups_of.items():
        if groups:
            yield from ("", f"{title} ({sum(map(len, groups)):,}, in {len(groups):,} groups)")
            yield from (f"    {_shown(group, len(group))}" for group in groups[:_SHOWN])
            yield from _more(len(groups))
    if survey.broken:
        yield from ("", f"broken, which training leaves out ({len(survey.broken):,})")
        yield from (f"    {count:>6,}  {reason}" for reason, count in survey.reasons.items())
        yield "the first:"
        yield from (f"    {each.key}: {each.reason}" for each in survey.broken[:_SHOWN])
        yield from _more(len(survey.broken))


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name if count != 1 else name.removesuffix('s')}" for name, count in counts.items())


def _bars(counts: dict[str, int]) -> Iterable[str]:
    most = max(counts.values())
    for label, count in counts.items():
        yield f"    {label:>13} {count:>9,} {'█' * max(1, round(_BAR * count / most))}"


def _shown(keys: Sequence[str], count: int) -> str:
    first = keys[:5]
    return ", ".join(first) + (f" and {count - len(first):,} more" if count > len(first) else "")


def _more(count: int) -> Iterable[str]:
    if count > _SHOWN:
        yield f"    and {count - _SHOWN:,} more; --json tells all"
