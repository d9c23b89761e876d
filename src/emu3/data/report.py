"""What is in a folder of shards, counted from the shards themselves: so it is the same however often a run was cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from emu3.data.samples import Broken
from emu3.data.shards import Shard

SHOWN = 20
"""Broken samples and duplicate keys that the page names."""


@dataclass(frozen=True)
class Report:
    """Counts of all shards of a folder; the last three are those of one run.

    Attributes:
        shards, samples: how many there are.
        pictures, clips: in the samples.
        tokens: codes of all pictures and clips.
        codebook_size: how many codes the tokenizer has.
        codes_in_use: how many of them occur.
        perplexity: the exponential of the codes' entropy: how many codes there would be if all were equally frequent.
        sizes: how many pictures and clips have which size, as "height x width" or "frames x height x width" in tokens;
            the most frequent first.
        broken: samples that could not be tokenized.
        duplicates: keys that more than one sample has.
        tokenizer, settings: what made the shards.
        seconds: that the run took.
        new_pictures: pictures and clips that it encoded.
        pictures_per_second: these by those.
    """

    shards: int
    samples: int
    pictures: int
    clips: int
    tokens: int
    codebook_size: int
    codes_in_use: int
    perplexity: float
    sizes: dict[str, int]
    broken: tuple[Broken, ...]
    duplicates: tuple[str, ...]
    tokenizer: str
    settings: str
    seconds: float = 0.0
    new_pictures: int = 0
    pictures_per_second: float = 0.0

    @property
    def share_in_use(self) -> float:
        """Codes in use of all codes."""
        return self.codes_in_use / self.codebook_size

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"share_in_use": round(self.share_in_use, 4)}

    def __str__(self) -> str:
        """A page for people."""
        speed = f", {self.pictures_per_second:,.1f} pictures/s" if self.new_pictures else ", all was there already"
        rows = {
            "samples": f"{self.samples:,} in {self.shards:,} shards",
            "pictures": f"{self.pictures:,}" + (f", and {self.clips:,} clips" if self.clips else ""),
            "tokens": f"{self.tokens:,}",
            "codes in use": f"{self.codes_in_use:,} of {self.codebook_size:,} ({self.share_in_use:.1%}), "
            f"perplexity {self.perplexity:,.1f}",
            "sizes in tokens": ", ".join(f"{size} {count:,}" for size, count in list(self.sizes.items())[:SHOWN]),
            "tokenizer": f"{self.tokenizer} ({self.settings})",
            "seconds": f"{self.seconds:,.1f}{speed}",
            "broken": f"{len(self.broken):,}",
        }
        lines = [f"{name:<20}{text}" for name, text in rows.items()]
        lines += [f"  {each.key}: {each.reason}" for each in self.broken[:SHOWN]]
        if len(self.broken) > SHOWN:
            lines.append(f"  and {len(self.broken) - SHOWN:,} more, see report.json")
        if self.duplicates:
            more = f" and {len(self.duplicates) - SHOWN:,} more" if len(self.duplicates) > SHOWN else ""
            lines.append(f"{'duplicate keys':<20}{', '.join(self.duplicates[:SHOWN])}{more}")
        return "\n".join(lines)


def count_shards(shards: Iterable[Shard], tokenizer: str, codebook_size: int, settings: str) -> Report:
    """Counts shards, one after the other; all are made by one tokenizer with one codebook and the same settings."""
    codes = np.zeros(codebook_size, np.int64)
    shapes: Counter[tuple[int, ...]] = Counter()
    keys: Counter[str] = Counter()
    broken: list[Broken] = []
    count = 0
    for shard in shards:
        count += 1
        codes += np.bincount(shard.codes, minlength=codebook_size)
        shapes.update({(shape.frames, shape.height, shape.width): n for shape, n in shard.shapes.items()})
        keys.update(shard.keys)
        broken += shard.broken
    shares = codes[codes > 0] / max(1, codes.sum())
    ordered = sorted(shapes.items(), key=lambda each: (-each[1], each[0]))
    return Report(
        shards=count,
        samples=keys.total(),
        pictures=sum(n for shape, n in ordered if shape[0] == 1),
        clips=sum(n for shape, n in ordered if shape[0] > 1),
        tokens=int(codes.sum()),
        codebook_size=codebook_size,
        codes_in_use=int((codes > 0).sum()),
        perplexity=round(float(np.exp(-(shares * np.log(shares)).sum())), 2) if len(shares) else 0.0,
        sizes={"x".join(map(str, shape[1:] if shape[0] == 1 else shape)): n for shape, n in ordered},
        broken=tuple(broken),
        duplicates=tuple(sorted(key for key, n in keys.items() if n > 1)),
        tokenizer=tokenizer,
        settings=settings,
    )
