"""Every argument that a user gives, of every type: it works, or one ValueError names it, and nothing is drawn."""

from __future__ import annotations

import inspect
import math
import random
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from emu3.generation.decoders.jacobi import JacobiDecoder
from emu3.generation.decoders.predictive import PredictiveDecoder
from emu3.generation.decoders.raster import RasterDecoder
from emu3.generation.decoders.zipar import ZipARDecoder
from emu3.generation.engine import Engine
from emu3.generation.grammar import GridGrammar, TextGrammar
from emu3.generation.request import Guidance, Request
from emu3.generation.sampling import Sampling
from emu3.options import Answer, Draw, Load, check_number, check_seed, check_whole, make
from emu3.pipeline import Emu3Pipeline

ANYTHING: list[Any] = [
    None, True, False, 0, 1, 2, 16, -1, 2**31, 2**63, 2**64, 10**30, 10**400, 0.0, 0.5, 1.0, 1.5, -0.1, 1e-9, 1e9,
    math.nan, math.inf, -math.inf, 1j, "", "1", "a", "16:9", "0:1", "1:1e9", "nope", "auto", "cpu", "cuda", "cuda:99",
    "mps",
    "float32", "bfloat16", "raster", "zipar:2", "zipar:0", "predictive:999999999", "\udc80", "\x00", b"7", b"", [], [1],
    [1, 2], ["a"], [[1]], [None], (), (1,), (3, 4), {}, {"a": 1}, {1}, object(), object, int, len, lambda progress: 2.0,
    lambda progress: None, lambda: 1, Fraction(1, 2), Path("x"), Path(), range(2), np.float32(0.5), np.int64(3),
    np.array(3), np.array([1, 2]), np.float64("nan"), torch.tensor(2), torch.tensor(0.5), torch.tensor([1, 2]),
    torch.float32, torch.int8, torch.device("cpu"), RasterDecoder(), RasterDecoder, ZipARDecoder(1), Sampling(),
    Image.new("RGB", (8, 8)), ...,
]  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> Emu3Pipeline:
    return Emu3Pipeline.from_pretrained(tiny_checkpoint)


def outcome(function: Any, arguments: dict[str, Any], names: tuple[str, ...]) -> str:
    """Whether a call works, or is refused by a ValueError that names an argument; all else is an error here."""
    try:
        function(**arguments)
    except ValueError as error:
        assert any(name in str(error) for name in names), (names, error)
        return "refused"
    return "worked"


def options_of(kind: type) -> list[str]:
    return [each.name for each in fields(kind)]


@pytest.mark.parametrize("kind", [Load, Draw, Answer])
def test_defaults_pass_their_own_checks(kind: Any) -> None:
    assert make(kind, {}) == kind()
    with pytest.raises(ValueError, match="unknown option 'sed'; the options are"):
        make(kind, {"sed": 1})


@pytest.mark.parametrize("kind", [Load, Draw, Answer])
def test_help_describes_every_option(kind: Any) -> None:
    said = inspect.getdoc(kind)
    assert said is not None and said.startswith("How ")
    assert [line for line in said.splitlines() if ": " in line] == [
        f"    {each.name}: {each.metadata['help']}" for each in fields(kind)
    ]


@pytest.mark.parametrize("where", [{"device": "cuda"}, {"device": "mps"}, {"device_map": "auto"}])
def test_layers_in_8_bits_are_for_one_cpu(where: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"int8 is for one CPU, and device.* is not; leave out one of them"):
        Load(int8=True, **where)


@pytest.mark.parametrize("kind", [Load, Draw, Answer])
def test_options_of_every_type(kind: Any) -> None:
    for name in options_of(kind):
        both = {name} | ({"height", "width"} if name in ("height", "width") else set())
        counts = [outcome(kind, {name: value}, tuple(both)) for value in ANYTHING]
        assert "refused" in counts


DRAWING = {"height": 8, "width": 8, "seed": 1}
WORDS = {  # what a message may say of an argument in other words
    "image_area": ("area", "context", "longer than wide"),
    "ratio": ("context", "longer than wide"),
    "height": ("both height", "context", "longer than wide"),
    "width": ("both height", "context", "longer than wide"),
    "seed": ("seeds",),
    "guidance_scale": ("guidance",),
    "prompts": ("prompt",),
    "messages": ("conversation", "question", "message", "content", "context"),
    "pictures": ("picture",),
    "device": ("GPU", "CUDA", "mps"),
    "name": ("checkpoint",),
}


def test_pipeline_arguments_of_every_type(pipeline: Emu3Pipeline) -> None:
    """Also shown: what is refused is refused before the engine begins."""
    begun = []
    for name in ["prompts", *options_of(Draw)]:
        for value in ANYTHING:
            begun.clear()
            arguments = {"prompts": "a cat", **DRAWING, "on_event": begun.append} | {name: value}
            if name in ("ratio", "image_area"):
                del arguments["height"], arguments["width"]
            if callable(value) and name == "guidance_scale":
                continue  # a schedule may fail when it is asked, see below
            if outcome(pipeline.image, arguments, (name, *WORDS.get(name, ()))) == "refused":
                assert not begun, (name, value)
    for name in ["messages", "pictures", *options_of(Answer)]:
        for value in ANYTHING:
            arguments = {"messages": "what?", "max_new_tokens": 2} | {name: value}
            outcome(pipeline.chat, arguments, (name, *WORDS.get(name, ())))


@pytest.mark.parametrize("schedule", [lambda progress: None, len, lambda: 1, lambda progress: "2", object])
def test_a_schedule_that_fails_is_named(pipeline: Emu3Pipeline, schedule: Any) -> None:
    with pytest.raises(ValueError, match="guidance"):
        pipeline.image("a cat", **DRAWING, guidance_scale=schedule)


def test_loading_arguments_of_every_type(tiny_checkpoint: Path) -> None:
    for name in ["name", *options_of(Load)]:
        for value in ANYTHING:
            if name == "compiled" and value is True:
                continue
            arguments = {"name": tiny_checkpoint} | {name: value}
            outcome(Emu3Pipeline.from_pretrained, arguments, (name, *WORDS.get(name, ())))


def test_engine_requests_of_every_type(pipeline: Emu3Pipeline) -> None:
    vocabulary = pipeline.model.model.vocabulary
    grammar = GridGrammar(2, 2, vocabulary=vocabulary)
    picture = {"prompt_ids": (vocabulary.bos, vocabulary.img), "grammar": grammar}
    text = {
        "prompt_ids": (vocabulary.bos,),
        "grammar": TextGrammar(len(pipeline.model.lm_head.weight), (vocabulary.eos,)),
    }

    def run(**arguments: Any) -> None:
        for _ in pipeline.engine.stream([Request(**arguments)]):
            pass

    for name in inspect.signature(Request).parameters:
        for value in ANYTHING:
            outcome(run, picture | {name: value}, (name, "prompt", "guidance"))
            if name != "max_new_tokens" or not isinstance(value, int):
                outcome(run, text | {"max_new_tokens": 2} | {name: value}, (name, "prompt", "guidance"))
    whole = {"height": 2, "width": 2, "vocabulary": vocabulary}
    makers: list[tuple[Any, tuple[str, ...]]] = [
        (lambda **given: Guidance(**{"negative_ids": (1,)} | given), ("negative_ids", "scale")),
        (Sampling, ("temperature", "top_k", "top_p")),
        (PredictiveDecoder, ("window",)),
        (ZipARDecoder, ("window", "guesses")),
        (JacobiDecoder, ("window",)),
        (lambda **given: Engine(pipeline.model, **given), ("lanes", "tokens", "chunk")),
        (lambda **given: GridGrammar(**whole | given), ("height", "width", "frames")),
    ]
    for maker, own in makers:
        for name in own:
            assert "refused" in [outcome(maker, {name: value}, (name, "guidance")) for value in ANYTHING]


def test_pairs_of_arguments_by_the_dice(pipeline: Emu3Pipeline) -> None:
    """Two arguments at once, so that checks of one do not rely on another."""
    dice, names = random.Random(0), options_of(Draw)
    for _ in range(150):
        pair = dice.sample(names, 2)
        values = {name: dice.choice(ANYTHING) for name in pair}
        if callable(values.get("guidance_scale")):
            continue
        known = tuple(word for name in pair for word in (name, *WORDS.get(name, ())))
        outcome(pipeline.image, {"prompts": "a cat", **DRAWING} | values, known)


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    assert check_whole("n", np.int64(3)) == 3
    assert check_number("x", np.float32(0.5)) == 0.5
    assert check_number("x", torch.tensor(2)) == 2
    assert check_seed("seed", np.array([1, 2]).tolist()) == [1, 2]
    for wrong in (True, 1.0, "1", None):
        with pytest.raises(ValueError, match="n must be a whole number, at least 1"):
            check_whole("n", wrong)
