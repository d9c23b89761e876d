"""Requests that come and go: admission, shared prompts, chunks, cancelling, failures, and what the cache holds."""

import copy
import random
import threading
from dataclasses import dataclass, replace

import pytest
import torch

from emu3 import kernels
from emu3.generation import admission
from emu3.generation.decoders.jacobi import JacobiDecoder
from emu3.generation.decoders.predictive import PredictiveDecoder
from emu3.generation.decoders.raster import RasterDecoder
from emu3.generation.decoders.zipar import ZipARDecoder
from emu3.generation.engine import Engine
from emu3.generation.events import Failed, Finished, Started, Stepped, Tokens
from emu3.generation.grammar import GridGrammar, TextGrammar
from emu3.generation.prefixes import BLOCK
from emu3.generation.request import Guidance, Request
from emu3.generation.runtime import runner
from emu3.generation.runtime.cache import EMPTY
from emu3.generation.runtime.forward import Forward
from emu3.generation.sampling import GREEDY, Sampling

WARM = Sampling(1.3, top_k=12)
DECODERS = [RasterDecoder(), PredictiveDecoder(4), ZipARDecoder(1), JacobiDecoder(4)]


class FirstPicture(GridGrammar):
    """More may follow it."""

    final = False


def picture(vocabulary, text, height=2, width=3, scale=3.0, seed=0, negative=(), decoder=DECODERS[0]):
    prompts = [(vocabulary.bos, *words, vocabulary.boi, 1, vocabulary.img) for words in (text, negative)]
    grammar = GridGrammar(height, width, vocabulary=vocabulary)
    return Request(prompts[0], grammar, WARM, Guidance(prompts[1], scale), seed, decoder=decoder)


def alone(model, request):
    return list(Engine(model).stream([request]))[-1].ids


def finished(events):
    return {event.request: event.ids for event in events if isinstance(event, Finished)}


def run(engine):
    events = []
    while not engine.idle:
        events += engine.step()
    return finished(events)


def is_empty(engine):
    return engine.lanes_in_use == engine.tokens_in_use == 0 and bool((engine._runner.cache.turns_BL == EMPTY).all())


def test_what_does_not_fit_waits_for_its_turn(model, vocabulary):
    requests = [picture(vocabulary, (n,), height=1 + n % 3, seed=n) for n in range(7)]
    engine = Engine(model, lanes=5)
    numbers = [engine.submit(request) for request in requests]
    started = [event.request for event in engine.step() if isinstance(event, Started)]
    assert started == numbers[:2]  # two lanes each, and one lane stays free
    assert engine.lanes_in_use == 4
    assert run(engine) == {n: alone(model, request) for n, request in zip(numbers, requests, strict=True)}
    assert is_empty(engine)


def test_tokens_are_counted_and_not_lanes_only(model, vocabulary):
    """A large picture beside small ones makes every lane as long as its own."""
    small, large = picture(vocabulary, (5,), 1, 2), picture(vocabulary, (5,), 4, 4)
    slots = [request.reserved(256) for request in (small, large)]
    engine = Engine(model, tokens=4 * slots[1])
    numbers = [engine.submit(request) for request in (small, small, small, large, small)]
    started = [event.request for event in engine.step() if isinstance(event, Started)]
    assert started == numbers[:3]  # six lanes of small ones fit, eight as long as the large one do not
    assert engine.tokens_in_use == 6 * slots[0] <= engine.tokens
    assert run(engine) == {n: alone(model, large if n == 3 else small) for n in numbers}
    assert is_empty(engine)
    with pytest.raises(ValueError, match=r"takes \d+ tokens of the cache, this engine has 20"):
        Engine(model, tokens=20).submit(small)


def test_requests_may_come_while_others_run(model, vocabulary, text):
    first, second = picture(vocabulary, (5,), 4, 4), picture(vocabulary, (6, 7), 2, 5, scale=1, seed=3)
    words = Request((vocabulary.bos, 20, 21), text, WARM, seed=9, max_new_tokens=12)
    engine, found = Engine(model, lanes=8), {}
    for late in (first, second, words):
        engine.submit(late)
        for _ in range(3):
            found |= finished(engine.step())
    found |= run(engine)
    assert found == {n: alone(model, request) for n, request in enumerate((first, second, words))}


def test_a_prompt_in_chunks_is_the_prompt(model, vocabulary):
    long, short = picture(vocabulary, tuple(range(1, 31))), picture(vocabulary, (5,), 3, 3)
    engine = Engine(model, chunk=8)
    engine.submit(short)
    engine.step()
    engine.submit(long)
    steps = [event for event in engine.step() if isinstance(event, Stepped)]
    # A chunk of the long prompt and all of its negative one, then the others' step.
    fed = 11 if kernels.library() else 16  # without kernels the negative prompt is padded
    assert [(step.lanes, step.tokens, step.prefill) for step in steps] == [(2, fed, True), (2, 2, False)]
    assert run(engine) == {0: alone(model, short), 1: alone(model, long)}


def test_short_prompts_are_not_padded_to_a_long_one(model, vocabulary, text):
    prompts = [(n, *[7] * length) for n, length in enumerate((200, 150, 3, 40, 38))]
    engine = Engine(model)
    for prompt in prompts:
        engine.submit(Request(prompt, text, GREEDY, max_new_tokens=1))
    fed = [(step.lanes, step.tokens) for step in engine.step() if isinstance(step, Stepped) and step.prefill]
    # With kernels nothing is padded.
    assert fed == ([(2, 350), (2, 78), (1, 3)] if kernels.library() else [(2, 400), (2, 80), (1, 3)])


def test_what_prompts_share_is_computed_once(model, vocabulary):
    same = tuple(range(1, BLOCK + 5))
    requests = [picture(vocabulary, (*same, 30 + n), negative=(*same, 3), seed=n) for n in range(3)]
    events = list(Engine(model).stream(requests))
    prefilled = sum(event.tokens for event in events if isinstance(event, Stepped) and event.prefill)
    assert prefilled < 2 * len(requests[0].prompt_ids)
    assert finished(events) == {n: alone(model, request) for n, request in enumerate(requests)}


def test_a_prompt_whose_source_is_cancelled_is_computed(model, vocabulary):
    same = tuple(range(1, 40))
    requests = [picture(vocabulary, (*same, 30 + n), scale=1.0, seed=n) for n in range(2)]
    engine = Engine(model, chunk=8)
    first, second = map(engine.submit, requests)
    engine.step()
    assert engine.cancel(first)
    assert run(engine) == {second: alone(model, requests[1])}


def test_answers_do_not_wait_for_pictures(model, vocabulary, text):
    """Some lanes are theirs. Pictures are admitted in their order, however many answers come."""
    engine = Engine(model, lanes=8, for_answers=2)
    pictures = [engine.submit(picture(vocabulary, (n,), 3, 3, seed=n)) for n in range(5)]  # of two lanes each
    answers = [
        engine.submit(Request((vocabulary.bos, 3, n), text, WARM, None, n, 40, decoder=DECODERS[0])) for n in range(4)
    ]
    started = [event.request for event in engine.step() if isinstance(event, Started)]
    assert started == [*pictures[:3], *answers[:2]]
    ends, begins, step = {}, {}, 0
    while not engine.idle:
        step += 1
        if step % 3 == 0 and len(answers) < 60:
            answers.append(engine.submit(Request((vocabulary.bos, step), text, WARM, None, step, 2)))
        for event in engine.step():
            if isinstance(event, Started):
                begins[event.request] = step
            elif isinstance(event, Finished):
                ends[event.request] = step
    assert begins[pictures[3]] <= min(ends[number] for number in pictures[:3]) + 1
    assert sorted(ends) == sorted([*pictures, *answers])
    order = [number for number in begins if number in answers]
    assert order == sorted(order)


def test_one_lane_is_kept_where_tokens_are_scarce(model, vocabulary, text):
    large, answer = picture(vocabulary, (1,), 4, 4), Request((vocabulary.bos, 3), text, WARM, None, 0, 4)
    slots = large.reserved(256)
    for kept, expected in ((0, [0, 1]), (1, [0, 2])):
        engine = Engine(model, lanes=64, tokens=4 * slots, for_answers=kept)
        for request in (large, large, answer):
            engine.submit(request)
        assert [event.request for event in engine.step() if isinstance(event, Started)] == expected
        assert len(run(engine)) == 3


@pytest.mark.parametrize("decoder", DECODERS)
def test_cancelling_frees_the_lanes_at_once_and_disturbs_nobody(model, vocabulary, decoder):
    requests = [picture(vocabulary, (n,), 3, 3, seed=n, decoder=decoder) for n in range(4)]
    engine = Engine(model, lanes=6)
    for request in requests:
        engine.submit(request)
    engine.step()
    engine.step()
    assert engine.lanes_in_use == 6
    assert engine.cancel(1)
    assert engine.lanes_in_use == 4
    assert not engine.cancel(1)
    assert not engine.cancel(99)
    events = engine.step()
    assert Started(3, len(requests[3].prompt_ids), requests[3].grammar.length) in events
    assert run(engine) == {n: alone(model, requests[n]) for n in (0, 2, 3)}


def anything(vocabulary, text, dice, number):
    """A request of any kind; some fail."""
    if dice.random() < 0.25:
        return Request((vocabulary.bos, *[3] * dice.randrange(30)), text, WARM, None, number, dice.randrange(1, 12))
    scale = dice.choice([1.0, 3.0, lambda progress: 1 + progress, lambda progress: 2.0 if progress < 0.5 else None])
    words = tuple(dice.choices(range(4), k=dice.choice([0, 3, 20])))
    size = dice.randrange(1, 4), dice.randrange(1, 5)
    return picture(vocabulary, words, *size, scale, number, decoder=dice.choice(DECODERS))


def test_one_engine_for_five_hundred_requests(model, vocabulary, text):
    """Random submissions, cancellations, failures and steps: each result is that of the request alone, what is in use
    is what is there, and the cache does not grow with the number of requests."""
    dice, engine = random.Random(0), Engine(model, lanes=9, tokens=9 * 60)
    asked, alive, found, failed, tokens, sizes = [], set(), {}, {}, {}, set()
    while len(asked) < 500 or not engine.idle:
        action = dice.random()
        if action < 0.3 and len(asked) < 500:
            asked.append(anything(vocabulary, text, dice, len(asked)))
            alive.add(engine.submit(asked[-1]))
        elif action < 0.34 and alive:
            number = dice.choice(sorted(alive))
            assert engine.cancel(number)
            alive.remove(number)
        else:
            for event in engine.step():
                if isinstance(event, Stepped):
                    continue
                assert event.request in alive
                if isinstance(event, Tokens):
                    tokens[event.request] = tokens.get(event.request, 0) + len(event.ids)
                elif isinstance(event, Finished):
                    found[event.request] = event.ids
                    assert tokens[event.request] == len(event.ids)
                elif isinstance(event, Failed):
                    failed[event.request] = event.error
                if isinstance(event, Finished | Failed):
                    alive.remove(event.request)
        admitted = engine._decoding + engine._prefilling
        assert {s.number for s in (*admitted, *engine._waiting)} == alive
        lanes = [lane for sequence in admitted for lane in sequence.lanes]
        assert [lane.index for lane in lanes] == list(range(len(lanes)))
        assert engine.lanes_in_use == sum(len(asked[s.number].prompts) for s in admitted) <= 9
        longest = max((asked[s.number].reserved(256) for s in admitted), default=0)
        assert engine.tokens_in_use == engine.lanes_in_use * longest <= 9 * 60
        if engine._runner.cache is not None:
            sizes.add(engine._runner.cache.turns_BL.numel())
            assert (engine._runner.cache.turns_BL[engine.lanes_in_use :] == EMPTY).all()
    assert max(sizes) <= 9 * 60
    assert is_empty(engine)
    assert not engine._prefixes._lanes
    assert len(found) > 300 and len(failed) > 30
    assert all("guidance scale at token" in error for error in failed.values())
    for number, ids in found.items():
        assert ids == alone(model, asked[number]), asked[number]


def test_threads_may_share_an_engine(model, vocabulary):
    requests = [picture(vocabulary, (n,), 2, 4, seed=n, decoder=DECODERS[n % 4]) for n in range(12)]
    engine, found = Engine(model), {}

    def ask(own):
        ids = finished(engine.stream([requests[n] for n in own]))
        found.update({own[place]: each for place, each in ids.items()})

    threads = [threading.Thread(target=ask, args=(range(start, start + 3),)) for start in range(0, 12, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: alone(model, request) for n, request in enumerate(requests)}
    assert engine.idle


def test_a_stream_that_is_closed_cancels_what_it_asked_for(model, vocabulary):
    engine = Engine(model)
    stream = engine.stream([picture(vocabulary, (n,)) for n in range(3)])
    assert isinstance(next(stream), Started)
    assert not engine.idle
    stream.close()
    assert engine.idle
    assert is_empty(engine)


def test_a_request_that_fails_ends_alone(model, vocabulary):
    """A schedule that gives no number half-way, and one that raises."""
    good = picture(vocabulary, (5,), 3, 3)
    nan = picture(vocabulary, (6,), 3, 3, scale=lambda progress: float("nan") if progress > 0.5 else 2.0)
    worse = picture(vocabulary, (7,), 3, 3, scale=lambda progress: 1 / 0)
    events = list(Engine(model).stream([nan, good, worse]))
    assert finished(events) == {1: alone(model, good)}
    errors = {event.request: event.error for event in events if isinstance(event, Failed)}
    assert errors[0] == "guidance scale at token 8 must be a finite number from -1e+06 to 1e+06, got nan"
    assert errors[2].startswith("the guidance schedule fails at token 0: ZeroDivisionError")


def test_a_request_that_fails_leaves_nothing_behind(model, vocabulary):
    """The token 9 has a NaN in its embedding. Lanes that it was in are clean for those that come after."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.model.text_model.embed_tokens.weight[9, 0] = torch.nan
    short, long = picture(vocabulary, (5,), 3, 3), picture(vocabulary, tuple(range(10, 40)), 3, 3)
    broken = picture(vocabulary, (9,) * 40, 3, 3)
    engine = Engine(model)
    expected = finished(engine.stream([short, long]))
    (failed,) = (event for event in engine.stream([broken]) if isinstance(event, Failed))
    assert "embed_tokens.weight holds NaN" in failed.error
    assert finished(engine.stream([short, long])) == expected
    # Dropped before it was in the cache as a whole.
    chunked = Engine(model, chunk=8)
    number = chunked.submit(broken)
    chunked.step()
    chunked.cancel(number)
    assert finished(chunked.stream([short, long])) == expected


@dataclass(frozen=True)
class Failing(RasterDecoder):
    """Raises at a position, in the method `where`."""

    where: str

    def propose(self, state, ids, most):
        step = super().propose(state, ids, most)
        return 1 / 0 if self.where == "propose" and step.targets[0] >= 4 else step

    @property
    def draw(self):
        return self.fail if self.where == "draw" else super().draw

    def accept(self, state, step, drawn, lo):
        return (
            self.fail() if self.where == "accept" and step.targets[0] >= 4 else super().accept(state, step, drawn, lo)
        )

    @staticmethod
    def fail(*arguments):
        return 1 / 0


@pytest.mark.parametrize("where", ["propose", "draw", "accept"])
def test_a_decoder_that_fails_ends_its_own_request(model, vocabulary, where):
    """Also where the other request comes to its end in the same step."""
    good, bad = picture(vocabulary, (5,), 2, 2), picture(vocabulary, (6,), 3, 3, decoder=Failing(where))
    engine = Engine(model)
    other = engine.stream([good])
    events = [next(other)]
    events += [*engine.stream([bad]), *other]
    assert [event.error for event in events if isinstance(event, Failed)] == [
        "its decoder fails: ZeroDivisionError('division by zero')"
    ]
    assert finished(events) == {0: alone(model, good)}
    assert is_empty(engine)


def test_a_failure_is_told_though_the_forward_of_its_step_fails_too(model, vocabulary, monkeypatch):
    good, bad = picture(vocabulary, (5,), 3, 3), picture(vocabulary, (6,), 3, 3, decoder=Failing("propose"))
    engine = Engine(model)
    streams = [engine.stream([request]) for request in (good, bad)]
    for stream in streams:
        next(stream)
    feed = engine._runner.feed

    def fail_after_a_failure(inputs, lanes=None):
        if len(engine._decoding) == 1:
            monkeypatch.undo()
            raise MemoryError
        return feed(inputs, lanes)

    monkeypatch.setattr(engine._runner, "feed", fail_after_a_failure)
    with pytest.raises(MemoryError):
        list(streams[0])
    assert isinstance(list(streams[1])[-1], Failed)


class Twice(GridGrammar):
    """A picture, and another of the same size."""

    final = False

    def then(self, ids):
        return self if len(ids) < self.length else GridGrammar(self.height, self.width, vocabulary=self.vocabulary)


@pytest.mark.parametrize("decoder", DECODERS)
def test_two_pictures_of_an_answer_have_random_numbers_of_their_own(model, vocabulary, decoder):
    """All ids are equally likely, so that only the random numbers decide."""
    model = copy.deepcopy(model)
    torch.nn.init.zeros_(model.lm_head.weight)
    grammar = Twice(4, 4, vocabulary=vocabulary)
    ids = alone(model, Request((5, vocabulary.img), grammar, Sampling(1.0), seed=3, decoder=decoder))
    first, second = ids[: grammar.length], ids[grammar.length :]
    assert len(first) == len(second)
    assert sum(a == b for a, b in zip(first, second, strict=True)) < len(first) - 6  # of 16; 7 are forced


class Multinomial(RasterDecoder):
    """Draws by a function that refuses NaN."""

    @staticmethod
    def draw(logits_BV, sampling, noise_B):
        return torch.multinomial(logits_BV.softmax(-1), 1)[:, 0] * 0


def test_a_draw_that_fails_is_that_of_one_request(model, vocabulary):
    """The token 9 has a NaN in its embedding, and the two requests draw alike."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.model.text_model.embed_tokens.weight[9, 0] = torch.nan
    good, broken = (picture(vocabulary, (text,), 3, 3, decoder=Multinomial()) for text in (5, 9))
    events = list(Engine(model).stream([broken, good]))
    assert finished(events) == {1: alone(model, good)}
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert failed.error.startswith("the model gives no finite logits")


def test_memory_that_runs_out_in_a_draw_ends_no_request(model, vocabulary, monkeypatch):
    request, engine = picture(vocabulary, (5,)), Engine(model)
    number = engine.submit(request)
    with monkeypatch.context() as patch:
        patch.setattr(RasterDecoder, "draw", lambda *arguments: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        with pytest.raises(torch.OutOfMemoryError):
            engine.step()
    assert run(engine) == {number: alone(model, request)}


class Line(TextGrammar):
    """A row of forced ids, which may be that of a picture, and what follows it."""

    length, final, must_follow = 4, False, None
    follower = None

    def span(self, k):
        return k * 0 + 3, k * 0 + 4

    def then(self, ids):
        return self if len(ids) < 4 else self.follower


class VisualLine(Line):
    kind = "visual"


class Before(Line):
    follower = VisualLine(9, (1,))


def test_a_part_that_cannot_begin_ends_its_own_request(model, vocabulary):
    """The first part is forced as a whole, so that it ends as soon as the request is admitted."""
    bad = Request((5, vocabulary.img), Before(9, (1,)), decoder=PredictiveDecoder())
    good = picture(vocabulary, (5,))
    events = list(Engine(model).stream([bad, good]))
    assert finished(events) == {1: alone(model, good)}
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert "VisualLine has no rows and columns" in failed.error


def test_a_decoder_of_rows_for_a_grammar_without_rows_is_refused(model, vocabulary):
    for decoder in (JacobiDecoder(), PredictiveDecoder(), ZipARDecoder()):
        request = Request((5, vocabulary.img), VisualLine(9, (1,)), decoder=decoder)
        with pytest.raises(ValueError, match="VisualLine has no rows and columns to guess by; use RasterDecoder"):
            Engine(model).submit(request)


def test_a_request_of_a_stream_that_is_cancelled_by_its_number(model, vocabulary):
    requests = [picture(vocabulary, (n,), 3, 3, seed=n) for n in range(3)]
    engine = Engine(model)
    stream = engine.stream(requests)
    events = [next(stream) for _ in range(4)]
    assert engine.cancel(1)
    later = list(stream)
    assert not any(event.request == 1 for event in later if not isinstance(event, Stepped))
    assert finished(events + later) == {n: alone(model, requests[n]) for n in (0, 2)}


def test_memory_that_runs_out_at_the_start_may_come_back(model, vocabulary, monkeypatch):
    request, engine = picture(vocabulary, (5,)), Engine(model)
    number = engine.submit(request)
    with monkeypatch.context() as patch:
        patch.setattr(Forward, "pack", lambda *arguments: torch.empty(2**60))
        with pytest.raises(RuntimeError):
            engine.step()
    assert run(engine) == {number: alone(model, request)}


def test_weights_that_were_changed_are_read_after_refresh(model, vocabulary):
    model = copy.deepcopy(model)
    request = replace(picture(vocabulary, (5,), 4, 4), sampling=GREEDY)
    engine = Engine(model)
    before = finished(engine.stream([request]))
    with torch.no_grad():
        for weight in model.model.text_model.parameters():
            weight.copy_(weight.roll(1, 0))
    engine.refresh()
    after = finished(engine.stream([request]))
    assert after == {0: alone(model, request)} != before
    engine.submit(request)
    engine.step()
    with pytest.raises(RuntimeError, match="requests are under way"):
        engine.refresh()


def test_a_schedule_of_guidance(model, vocabulary):
    for decoder in (RasterDecoder(), ZipARDecoder(2), JacobiDecoder(4)):
        constant = picture(vocabulary, (5, 6), 4, 4, scale=2.0, decoder=decoder)
        scheduled = picture(vocabulary, (5, 6), 4, 4, scale=lambda progress: 2.0, decoder=decoder)
        assert alone(model, scheduled) == alone(model, constant)
        rising = picture(
            vocabulary, (5, 6), 4, 4, scale=lambda progress: 2.0 if progress < 0.5 else 9.0, decoder=decoder
        )
        late = alone(model, rising)
        if isinstance(decoder, RasterDecoder):
            assert late[:11] == alone(model, constant)[:11]
        assert late != alone(model, constant)


def test_no_guidance_runs_no_negative_prompt(model, vocabulary):
    steps = Engine(model).stream([picture(vocabulary, (5, 6), scale=1.0)])
    assert {step.lanes for step in steps if isinstance(step, Stepped)} == {1}


def test_what_never_fits_is_refused(model, vocabulary, text):
    engine = Engine(model, lanes=1)
    with pytest.raises(ValueError, match="takes 2 lanes, this engine has 1"):
        engine.submit(picture(vocabulary, (5,)))
    with pytest.raises(ValueError, match=r"do not fit the model's context of 256"):
        engine.submit(picture(vocabulary, (5,), 10, 26, scale=1.0))
    good = picture(vocabulary, (5,), scale=1.0)
    with pytest.raises(ValueError, match="takes 2 lanes"):
        list(engine.stream([good, picture(vocabulary, (5,))]))
    assert engine.idle
    with pytest.raises(ValueError, match="schedule of guidance needs a picture"):
        replace(good, guidance=Guidance((1,), lambda progress: 2.0), grammar=text)
    with pytest.raises(ValueError, match="schedule of guidance needs a picture"):
        replace(
            good,
            guidance=Guidance(good.prompt_ids, lambda progress: 2.0),
            grammar=FirstPicture(2, 2, vocabulary=vocabulary),
        )
    with pytest.raises(ValueError, match="lanes must be a whole number, at least 1, got 0"):
        Engine(model, lanes=0)
    with pytest.raises(ValueError, match="for_answers must be a whole number, from 0 to 3, got 4"):
        Engine(model, lanes=4, for_answers=4)


def test_the_model_can_be_trained_and_saved_after_it_was_run(model, vocabulary, tmp_path):
    """Joining its matrices in one piece of memory changes neither their values nor what can be done with them."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        alone(model, picture(vocabulary, (5,)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ids = torch.tensor([[1, 2, 3, 4]])
    model(input_ids=ids, labels=ids).loss.backward()
    attention = model.model.text_model.layers[0].self_attn
    assert attention.k_proj.weight.grad.abs().max() > 0
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()
    model.zero_grad(set_to_none=True)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.items())


def test_texts_have_room_for_some_tokens_and_get_more(model, vocabulary, text, monkeypatch):
    """Beside a picture, and where tokens are scarce; the cache grows while both are under way."""
    monkeypatch.setattr(admission, "_TEXT_ROOM", 8)
    endless = replace(text, ends=())
    words = Request((vocabulary.bos, 20, 21), endless, WARM, seed=9)
    small = picture(vocabulary, (5,), 1, 2)
    for tokens in (None, 3 * model.config.text_config.max_position_embeddings):
        engine = Engine(model, tokens=tokens)
        numbers = [engine.submit(words)]
        engine.step()
        before = engine._runner.cache.slots
        numbers.append(engine.submit(small))
        found = run(engine)
        assert engine.context > engine._runner.cache.slots or before < engine._runner.cache.slots
        assert len(found[numbers[0]]) == engine.context - 3
        assert found[numbers[1]] == alone(model, small)
        with monkeypatch.context() as patch:
            patch.setattr(admission, "_TEXT_ROOM", engine.context)
            assert found[numbers[0]] == alone(model, words)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_cpu_without_kernels_decodes_the_same(model, vocabulary, text, decoder, monkeypatch):
    """Lanes of different length in one batch: padded there, one behind the other with kernels."""
    requests = [picture(vocabulary, (n,) * (1 + n), 2 + n, 4, seed=n, decoder=decoder) for n in range(3)]
    requests.append(Request((vocabulary.bos, 20, 21), text, WARM, seed=9, max_new_tokens=12))
    with_kernels = finished(Engine(model).stream(requests))
    monkeypatch.setattr(runner, "can_pack", lambda text_model: False)
    assert finished(Engine(model).stream(requests)) == with_kernels
