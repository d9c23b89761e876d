"""Sixty requests whose ids are frozen in `golden.json`: whatever is rebuilt must answer them as it did.

Half go to nano, half to a tiny random model: pictures and clips of mixed sizes, texts, every decoder, guidance by
numbers and by schedules, all ways to choose, many seeds. `python tests/generation/test_golden.py` writes the file anew.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from emu3.generation.decoders.named import decoder_named
from emu3.generation.engine import Engine
from emu3.generation.events import Finished
from emu3.generation.grammar import GridGrammar, TextGrammar
from emu3.generation.request import Guidance, Request
from emu3.generation.sampling import Sampling
from emu3.pipeline import Emu3Pipeline
from emu3.testing import write_tiny_checkpoint

IDS = Path(__file__).with_name("golden.json")
DECODERS = ("raster", "predictive", "predictive:5", "zipar", "zipar:2", "jacobi", "jacobi:4")
SCHEDULES: dict[str, Callable[[float], float]] = {
    "rising": lambda progress: 1.5 + 3 * progress,
    "late": lambda progress: 1.0 if progress < 0.4 else 4.0,
}
WORDS = ("a photo of a red car", "two cups", "", "a blue tree and a cat", "a photo of a pink dog", "zzz 12 <image>")


@dataclass(frozen=True)
class Golden:
    """One request as plain values. `size` is frames, height, width in tokens; None asks for a text."""

    decoder: str
    words: str
    negative: str
    size: tuple[int, int, int] | None
    scale: float | str
    sampling: tuple[float, int, float]
    seed: int
    max_new_tokens: int | None


def golden(frames: tuple[int, ...], sides: tuple[int, ...], count: int, seed: int) -> list[Golden]:
    """Requests by the dice: every decoder, and a text among every five."""
    dice = random.Random(seed)
    found = []
    for number in range(count):
        picture = number % 5 != 4
        found.append(
            Golden(
                decoder=DECODERS[number % len(DECODERS)],
                words=dice.choice(WORDS),
                negative=dice.choice(WORDS),
                size=(dice.choice(frames), dice.choice(sides), dice.choice(sides)) if picture else None,
                scale=dice.choice([1.0, 3.0, 3.0, 1.7, *(SCHEDULES if picture else ())]),
                sampling=dice.choice(
                    [(0.0, 2048, 1.0), (1.0, 2048, 1.0), (1.0, 20, 1.0), (0.8, 0, 0.9), (1.4, 0, 1.0)]
                ),
                seed=dice.randrange(2**40),
                max_new_tokens=None if picture else dice.choice([5, 24, None]),
            )
        )
    return found


def request(pipeline: Emu3Pipeline, wanted: Golden) -> Request:
    """As the engine takes it."""
    vocabulary, processor = pipeline.model.model.vocabulary, pipeline.processor

    def prompt(words: str) -> tuple[int, ...]:
        if wanted.size is None:
            return tuple(processor(text=words + "?", split_special_tokens=True)["input_ids"][0])
        _, height, width = wanted.size
        size = {"ratio": f"{width}:{height}", "image_area": height * width * processor.downsample_ratio**2}
        inputs = processor(text=words, return_for_image_generation=True, split_special_tokens=True, **size)
        return tuple(inputs["input_ids"][0])

    scale = SCHEDULES[wanted.scale] if isinstance(wanted.scale, str) else wanted.scale
    return Request(
        prompt(wanted.words),
        GridGrammar(wanted.size[1], wanted.size[2], wanted.size[0], vocabulary=vocabulary)
        if wanted.size
        else TextGrammar(len(pipeline.model.lm_head.weight), (vocabulary.eos,)),
        Sampling(*wanted.sampling),
        None if scale == 1 else Guidance(prompt(wanted.negative), scale),
        wanted.seed,
        wanted.max_new_tokens,
        decoder_named(wanted.decoder),
    )


def answers(pipeline: Emu3Pipeline, asked: list[Golden]) -> list[tuple[int, ...]]:
    """The ids of each, run together."""
    stream = Engine(pipeline.model).stream([request(pipeline, each) for each in asked])
    found = {event.request: event.ids for event in stream if isinstance(event, Finished)}
    return [found[number] for number in range(len(asked))]


def suites(tiny_checkpoint: Path) -> dict[str, tuple[Emu3Pipeline, list[Golden]]]:
    """Both models with what they are asked."""
    return {
        "nano": (Emu3Pipeline.from_pretrained("nano"), golden((1,), (3, 5, 6, 7, 8), 30, seed=1)),
        "tiny": (Emu3Pipeline.from_pretrained(tiny_checkpoint), golden((1, 1, 2, 3), (1, 2, 4, 7), 30, seed=2)),
    }


@pytest.fixture(scope="module")
def ours(tiny_checkpoint: Path) -> dict[str, tuple[Emu3Pipeline, list[Golden]]]:
    return suites(tiny_checkpoint)


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_the_answers_are_those_of_old(ours: dict[str, tuple[Emu3Pipeline, list[Golden]]], name: str) -> None:
    for asked, found, expected in zip(
        ours[name][1], answers(*ours[name]), json.loads(IDS.read_text())[name], strict=True
    ):
        assert list(found) == expected, asked


if __name__ == "__main__":
    with TemporaryDirectory() as folder, IDS.open("w") as stream:
        frozen = {name: answers(*suite) for name, suite in suites(write_tiny_checkpoint(Path(folder))).items()}
        json.dump(frozen, stream, separators=(",", ":"))
