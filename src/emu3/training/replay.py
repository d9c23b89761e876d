"""What a checkpoint draws and says by itself, as samples: adapters that learn something new are held to it.

It draws without words, so nobody needs to know what it knows, and describes what it drew. Each picture is there with
its description as the prompt, without a prompt, and as a question with an answer, if the checkpoint reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from emu3.data.samples import Part, Sample
from emu3.generation.grammar import GridGrammar
from emu3.pipeline import Emu3Pipeline
from emu3.results import Result
from emu3.segments import Shape, Text, Visual

QUESTION = "Describe the picture."
AT_ONCE = 16


def make_replay(
    pipeline: Emu3Pipeline,
    count: int,
    seed: int,
    can_read: bool = True,
    on_progress: Callable[[int, int], object] = lambda done, in_all: None,
) -> list[Sample]:
    """`count` pictures, drawn at temperature 1 and without guidance, in the checkpoint's own size."""
    samples: list[Sample] = []
    with torch.random.fork_rng():
        for start in range(0, count, AT_ONCE):
            number = min(AT_ONCE, count - start)
            asked = pipeline.draw_requests(["-"] * number, guidance_scale=1, seed=seed + start)
            grammar = asked[0].grammar
            assert isinstance(grammar, GridGrammar)
            opening = tuple(pipeline.layout.prompt("", Shape(grammar.height, grammar.width)))
            drawn = pipeline.results([replace(request, prompt_ids=opening) for request in asked])
            said = _describe(pipeline, drawn) if can_read else [""] * number
            for place, (result, words) in enumerate(zip(drawn, said, strict=True), start):
                visual = Visual(np.asarray(result.codes_HW)[None])
                draw = Part("draw", visual)
                samples.append(Sample(f"{place}-alone", (draw,)))
                if words:
                    samples.append(Sample(f"{place}-drawn", (Part("prompt", Text(words)), draw)))
                    talk = (Part("read", visual), Part("prompt", Text(QUESTION)), Part("answer", Text(words)))
                    samples.append(Sample(f"{place}-said", talk))
            on_progress(start + number, count)
    return samples


def _describe(pipeline: Emu3Pipeline, drawn: list[Result]) -> list[str]:
    asked = [(QUESTION, [result.output]) for result in drawn]
    return list(pipeline.chat(asked, max_new_tokens=128))
