"""What a checkpoint draws and says by itself, as samples: adapters that learn something new are held to it.

It draws without words, so nobody needs to know what it knows, and describes what it drew. Each picture is there with
its description as the prompt, without a prompt, and as a question with an answer, if the checkpoint reads. Then it
draws what is asked for in the words of the new data, with its own words in place of the new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

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
    captions: Sequence[str] = (),
    on_progress: Callable[[int, int], object] = lambda done, in_all: None,
) -> list[Sample]:
    """Samples of what the checkpoint draws at temperature 1 and without guidance, in its own size.

    Args:
        pipeline: the checkpoint.
        count: pictures that it draws without words; with captions, up to as many again with words like theirs.
        seed: of all.
        can_read: whether it describes pictures.
        captions: of the data that will be learned; see `neighbours`.
        on_progress: (pictures drawn, in all).
    """
    samples: list[Sample] = []
    described: list[str] = []
    for start in range(0, count, AT_ONCE):
        drawn = _draw(pipeline, [""] * min(AT_ONCE, count - start), seed + start)
        said = _describe(pipeline, drawn) if can_read else [""] * len(drawn)
        for place, (result, words) in enumerate(zip(drawn, said, strict=True), start):
            visual = Visual(np.asarray(result.codes_HW)[None])
            draw = Part("draw", visual)
            samples.append(Sample(f"{place}-alone", (draw,)))
            if words:
                described.append(words)
                samples.append(Sample(f"{place}-drawn", (Part("prompt", Text(words)), draw)))
                talk = (Part("read", visual), Part("prompt", Text(QUESTION)), Part("answer", Text(words)))
                samples.append(Sample(f"{place}-said", talk))
        on_progress(start + len(drawn), count)
    prompts = neighbours(captions, described, count, seed)
    for start in range(0, len(prompts), AT_ONCE):
        asked = prompts[start : start + AT_ONCE]
        drawn = _draw(pipeline, asked, seed + count + start)
        for place, (words, result) in enumerate(zip(asked, drawn, strict=True), start):
            draw = Part("draw", Visual(np.asarray(result.codes_HW)[None]))
            samples.append(Sample(f"{place}-like", (Part("prompt", Text(words)), draw)))
        on_progress(count + start + len(asked), count + len(prompts))
    return samples


def neighbours(captions: Sequence[str], known: Sequence[str], count: int, seed: int) -> list[str]:
    """Up to `count` captions like these, of known words alone: "a red castle" becomes "a red cat".

    A word that no known text has is replaced by one that stands behind the same word in a known text. These are the
    prompts that a checkpoint forgets first: they differ from the new captions by the new word alone. Capital letters,
    and full stops and commas behind a word, make no other word of it.
    """
    following: dict[str, list[str]] = {}
    for text in known:
        for word, follower in pairwise(map(_bare, text.split())):
            following.setdefault(word, []).append(follower)
    words_known = {_bare(word) for text in known for word in text.split()}
    fit = [text for text in captions if _can_replace(text.split(), words_known, following)]
    if not fit:
        return []
    rng = np.random.default_rng(seed)
    made: list[str] = []
    for _ in range(count):
        words = fit[int(rng.integers(len(fit)))].split()
        for place, word in enumerate(words):
            if (bare := _bare(word)) not in words_known:
                choices = following[_bare(words[place - 1])]
                words[place] = choices[int(rng.integers(len(choices)))] + word[len(bare) :]
        made.append(" ".join(words))
    return made


def _can_replace(words: Sequence[str], known: Collection[str], following: Mapping[str, Sequence[str]]) -> bool:
    """Whether a caption has unknown words, and something is known to stand behind the word before each."""
    new = [place for place, word in enumerate(words) if _bare(word) not in known]
    return bool(new) and all(place > 0 and _bare(words[place - 1]) in following for place in new)


def _bare(word: str) -> str:
    """A word in small letters, without what closes a clause behind it."""
    return word.lower().rstrip(".,;:!?")


def _draw(pipeline: Emu3Pipeline, prompts: Sequence[str], seed: int) -> list[Result]:
    """A picture for each prompt, by a temperature of 1 and without guidance; an empty prompt is none."""
    with torch.random.fork_rng():
        requests = pipeline.draw_requests([prompt or "-" for prompt in prompts], guidance_scale=1, seed=seed)
        grammar = requests[0].grammar
        assert isinstance(grammar, GridGrammar)
        alone = tuple(pipeline.layout.prompt("", Shape(grammar.height, grammar.width)))
        return pipeline.results(
            [
                request if prompt else replace(request, prompt_ids=alone)
                for prompt, request in zip(prompts, requests, strict=True)
            ]
        )


def _describe(pipeline: Emu3Pipeline, drawn: list[Result]) -> list[str]:
    asked = [(QUESTION, [result.output]) for result in drawn]
    return list(pipeline.chat(asked, max_new_tokens=128))
