"""Another family of checkpoints is an addition of one file: this one spells and writes sequences as Emu3.5 does.

    picture    boi H*W img rows joined by eol eoi       no eol after the last row, no eof
    answer     text, boi, a size that the model writes, the picture, text, ... up to eos

Its grammars and its layout are below; the engine, the decoders and the pipeline's parts know nothing of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from emu3.configuration import Emu3Config
from emu3.generation.decoders.jacobi import JacobiDecoder
from emu3.generation.decoders.predictive import PredictiveDecoder
from emu3.generation.decoders.raster import RasterDecoder
from emu3.generation.decoders.zipar import ZipARDecoder
from emu3.generation.engine import Engine
from emu3.generation.events import Finished, FrameDone, RowDone, Tokens
from emu3.generation.grammar import Grammar, Grid, GridGrammar, Kind, TextGrammar
from emu3.generation.request import Guidance, Request
from emu3.generation.sampling import Sampling, choose, guide, uniform_noise
from emu3.layout import Layout, Words
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.segments import Segment, Shape, Text, Visual
from emu3.tokenization import PlainText, train_tokenizer, vocabulary_map
from emu3.vocabulary import Integers, Vocabulary


@dataclass(frozen=True)
class JoinedGrid(Grid):
    """Rows joined by eol, and eoi in place of the last one: for 2x3, v v v EOL v v v EOI. Then the text goes on."""

    follow: Grammar | None = None

    @property
    def final(self) -> bool:
        return self.follow is None

    @property
    def frame_length(self) -> int:
        return self.height * (self.width + 1)

    @property
    def length(self) -> int:
        return self.frame_length

    def span(self, k: Integers) -> tuple[Integers, Integers]:
        lo, hi = (bound + k * 0 for bound in self.vocabulary.visual_span)
        rules = ((k % (self.width + 1) == self.width, self.vocabulary.eol), (k == self.length - 1, self.vocabulary.eoi))
        for applies, forced in rules:
            lo, hi = lo + (forced - lo) * applies, hi + (forced + 1 - hi) * applies
        return lo, hi

    def then(self, ids: Sequence[int]) -> Grammar | None:
        return self if len(ids) < self.length else self.follow


@dataclass(frozen=True)
class SizeGrammar:
    """A size of two digits each, "12*17", and the image start; at most 19 tokens a side, to keep the test small."""

    layout: JoinedLayout
    kind: ClassVar[Kind] = "text"
    length: ClassVar[int] = 6
    final: ClassVar[bool] = False
    must_follow: ClassVar[None] = None

    def span(self, k: Any) -> tuple[Any, Any]:
        digit, star, img = self.layout.digit, self.layout.star, self.layout.vocabulary.img
        spans = np.array([(digit + 1, digit + 2), (digit, digit + 10), (star, star + 1)] * 2)
        spans[5] = img, img + 1
        lo, hi = spans[k].T
        return (int(lo), int(hi)) if isinstance(k, int) else (lo, hi)

    def then(self, ids: Sequence[int]) -> Grammar | None:
        if len(ids) < self.length:
            return self
        height, width = self.layout.words.decode(ids[:5]).split("*")
        return self.layout.grammar(Shape(int(height), int(width)), follow=self.layout.answer(0))


@dataclass(frozen=True)
class InterleavedText:
    """Any id that is not visual; an image start begins a picture, eos ends the answer."""

    layout: JoinedLayout
    kind: ClassVar[Kind] = "text"
    length: ClassVar[None] = None
    final: ClassVar[bool] = False
    must_follow: ClassVar[None] = None

    def span(self, k: Integers) -> tuple[Integers, Integers]:
        return k * 0, k * 0 + self.layout.vocabulary.visual_base

    def then(self, ids: Sequence[int]) -> Grammar | None:
        if ids[-1] == self.layout.vocabulary.boi:
            return SizeGrammar(self.layout)
        return None if ids[-1] == self.layout.vocabulary.eos else self


@dataclass(frozen=True)
class JoinedLayout:
    """The layout of this family."""

    vocabulary: Vocabulary
    words: Words

    @property
    def digit(self) -> int:
        """The id of "0"; those of the other digits follow."""
        ids = self.words.encode("0123456789")
        assert ids == list(range(ids[0], ids[0] + 10))
        return ids[0]

    @property
    def star(self) -> int:
        return self.words.encode("*")[0]

    def opening(self, shape: Shape) -> list[int]:
        return [self.vocabulary.boi, *self.words.encode(f"{shape.height}*{shape.width}"), self.vocabulary.img]

    def prompt(self, text: str, shape: Shape, given: Sequence[Visual] = ()) -> list[int]:
        return [*self.spell(given), *self.asked(text), *self.opening(shape)]

    def asked(self, text: str) -> list[int]:
        return [self.vocabulary.bos, *self.words.encode(f"USER: {text} ASSISTANT: ")]

    def grammar(self, shape: Shape, follow: Grammar | None = None) -> JoinedGrid:
        return JoinedGrid(shape.height, shape.width, vocabulary=self.vocabulary, follow=follow)

    def answer(self, size: int) -> InterleavedText:
        return InterleavedText(self)

    def mixed_answer(self, shape: Shape) -> InterleavedText:
        return InterleavedText(self)

    def spell(self, segments: Sequence[Segment]) -> list[int]:
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, Text):
                ids += self.words.encode(segment.text)
                continue
            lo, hi = self.grammar(segment.shape).span(np.arange(self.grammar(segment.shape).length))
            lo[hi - lo > 1] = self.vocabulary.ids_of(segment.codes_THW.flatten())
            ids += [*self.opening(segment.shape), *lo.tolist()]
        return ids

    def read(self, ids: Sequence[int]) -> list[Segment]:
        segments: list[Segment] = []
        text: list[int] = []
        rest = list(ids)
        while rest:
            if rest[0] != self.vocabulary.boi or self.vocabulary.eoi not in rest:
                text.append(rest.pop(0))
                continue
            img, eoi = rest.index(self.vocabulary.img), rest.index(self.vocabulary.eoi)
            size = re.fullmatch(r"(\d\d)\*(\d\d)", self.words.decode(rest[1:img]))
            assert size is not None
            shape = Shape(*map(int, size.groups()))
            body = np.array([*rest[img + 1 : eoi], self.vocabulary.eol]).reshape(shape.height, shape.width + 1)
            segments += [Text(self.words.decode(text))] if text else []
            segments.append(Visual(self.vocabulary.codes_of(body[None, :, :-1])))
            text, rest = [], rest[eoi + 1 :]
        return segments + ([Text(self.words.decode(text))] if text else [])


CODES, CONTEXT = 24, 2048
SAMPLING = {"text": Sampling(1.0, top_k=200, top_p=0.95), "visual": Sampling(1.3, top_k=12)}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["USER: a cat ASSISTANT: "], 265, CODES)


@pytest.fixture(scope="module")
def layout(tokenizer) -> JoinedLayout:
    return JoinedLayout(Vocabulary.from_map(vocabulary_map(tokenizer)), PlainText(tokenizer))


@pytest.fixture(scope="module")
def model(tokenizer, layout):
    vision = {"codebook_size": CODES, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    text |= {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    model = Emu3ForConditionalGeneration(
        Emu3Config(
            text_config=text | {"max_position_embeddings": CONTEXT},
            vq_config=vision | {"hidden_size": 32, "attn_resolutions": []},
            vocabulary_map=vocabulary_map(tokenizer),
        )
    )
    with torch.no_grad():  # now and then a picture, now and then the end
        model.lm_head.weight[layout.vocabulary.boi] *= 3.0
        model.lm_head.weight[layout.vocabulary.eos] *= 2.0
    return model.eval()


@pytest.fixture(scope="module")
def requests(layout):
    """Answers with pictures in them, by every decoder; guidance is for pictures only."""
    decoders = [RasterDecoder(), PredictiveDecoder(6), ZipARDecoder(3), JacobiDecoder(4)]
    negative = tuple(layout.asked(""))
    return [
        Request(
            tuple(layout.asked("a cat" * (seed % 3))),
            layout.answer(0),
            SAMPLING,
            Guidance(negative, lambda progress: 1.5 + 2 * progress, kinds=frozenset(["visual"])) if seed % 2 else None,
            seed,
            max_new_tokens=500,
            decoder=decoders[seed % 4],
        )
        for seed in range(8)
    ]


def finished(model, requests):
    events = [event for event in Engine(model).stream(requests) if isinstance(event, Finished)]
    return [event.ids for event in sorted(events, key=lambda event: event.request)]


@pytest.fixture(scope="module")
def answers(model, requests):
    return finished(model, requests)


def test_it_is_a_layout(layout):
    as_layout: Layout = layout
    picture = Visual(np.arange(12 * 10).reshape(1, 12, 10) % CODES)
    segments = [Text("first"), picture, picture, Text("and last")]
    ids = as_layout.spell(segments)
    v = layout.vocabulary
    assert ids.count(v.eol) == 2 * 11 and v.eof not in ids
    assert ids[ids.index(v.eoi) - 1] >= v.visual_base
    again = as_layout.read(ids)
    assert [type(segment) for segment in again] == [Text, Visual, Visual, Text]
    assert [again[0], again[3]] == [segments[0], segments[3]]
    assert all(np.array_equal(segment.codes_THW, picture.codes_THW) for segment in again[1:3])


def parts(layout, ids):
    """Each part of an answer: its grammar, where it begins, and its end, by walking from grammar to grammar."""
    grammar, start, found = layout.answer(0), 0, []
    for end in range(1, len(ids) + 1):
        then = grammar.then(ids[start:end])
        if then is not grammar:
            found.append((grammar, start, end))
            grammar, start = then, end
    return found + ([(grammar, start, len(ids))] if start < len(ids) else [])


def test_answers_hold_texts_and_pictures(layout, answers, requests):
    pictures = 0
    for ids in answers:
        for grammar, start, end in parts(layout, ids):
            for k, id_ in enumerate(ids[start:end]):
                lo, hi = grammar.span(k)
                assert lo <= id_ < hi
        segments = layout.read(ids)
        pictures += sum(isinstance(segment, Visual) for segment in segments)
        spelled = [tuple(layout.spell([segment])) for segment in segments if isinstance(segment, Visual)]
        starts = [k for k, id_ in enumerate(ids) if id_ == layout.vocabulary.boi]
        assert [ids[start : start + len(own)] for start, own in zip(starts, spelled, strict=False)] == spelled
    assert pictures >= 6
    assert any(sum(isinstance(segment, Visual) for segment in layout.read(ids)) > 1 for ids in answers)
    assert any(isinstance(layout.read(ids)[-1], Text) and layout.vocabulary.eoi in ids for ids in answers)


@torch.no_grad()
def scores(model, ids):
    """Logits of one forward over all ids, without a cache: row i follows ids[:i + 1]."""
    text, ids_1S = model.model.text_model, torch.tensor([ids])
    hidden = text.run_layers(text.embed_tokens(ids_1S), None, torch.arange(len(ids))[None])
    return model.lm_head(hidden)[0]


def test_scoring_an_answer_reproduces_every_choice(layout, model, requests, answers):
    """Across parts and with guidance in pictures only: for the decoders that decide what raster does."""
    checked = 0
    for request, ids in zip(requests, answers, strict=True):
        if isinstance(request.decoder, JacobiDecoder | ZipARDecoder):
            continue
        logits = scores(model, request.prompt_ids + ids)[len(request.prompt_ids) - 1 :]
        negative_logits = None
        if request.guidance is not None:
            negative = request.guidance.negative_ids
            negative_logits = scores(model, negative + ids)[len(negative) - 1 :]
        noise = uniform_noise(request.seed, request.budget(CONTEXT))
        for grammar, start, end in parts(layout, ids):
            for k in range(start, end):
                scale, row = request.guidance_at(grammar, k - start), logits[k : k + 1]
                if scale is not None:
                    row = guide(row, negative_logits[k : k + 1], scale)
                lo, hi = grammar.span(k - start)
                chosen = choose(row[:, lo:hi], request.sampling[grammar.kind], noise[k : k + 1]) + lo
                assert int(chosen) == ids[k], (request.seed, k)
                checked += grammar.kind == "visual"
    assert checked > 300


def test_decoders_agree_and_neighbours_do_not_matter(model, layout, requests, answers):
    assert [finished(model, [request])[0] for request in requests] == answers
    for request in requests[:2]:
        raster = finished(model, [replace(request, decoder=RasterDecoder())])
        for decoder in (PredictiveDecoder(9), ZipARDecoder(99)):
            assert finished(model, [replace(request, decoder=decoder)]) == raster


def test_both_families_run_in_one_engine(model, layout, requests, answers):
    """A picture and a text as Emu3 spells them, beside answers of the other family."""
    v = layout.vocabulary
    size = len(model.lm_head.weight)
    old = [
        Request((v.bos, 5, v.boi, 1, v.img), GridGrammar(3, 4, vocabulary=v), SAMPLING["visual"], seed=3),
        Request((v.bos, 7), TextGrammar(size, (v.eos,)), SAMPLING["text"], seed=4, max_new_tokens=20),
    ]
    together = finished(model, [requests[1], *old, requests[2]])
    assert together == [answers[1], *(finished(model, [each])[0] for each in old), answers[2]]


def test_events_of_an_answer_with_pictures(model, layout, requests, answers):
    for number, ids in enumerate(answers):
        events = list(Engine(model).stream([requests[number]]))
        at = {
            k: id_ for event in events if isinstance(event, Tokens) for k, id_ in enumerate(event.ids, event.position)
        }
        assert tuple(at[k] for k in range(len(ids))) == ids
        grids = [(grammar, end - start) for grammar, start, end in parts(layout, ids) if grammar.kind == "visual"]
        whole = [grammar for grammar, length in grids if length == grammar.length]
        assert [event.row for event in events if isinstance(event, RowDone)] == [
            row for grammar in whole for row in range(grammar.height)
        ]
        assert sum(isinstance(event, FrameDone) for event in events) == len(whole)
