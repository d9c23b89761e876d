"""Requests that come and go: admission, shared prompts, chunks, cancelling, and the accounting of the cache."""

import random

import pytest
import torch

from emu3.generation.cache import EMPTY
from emu3.generation.decoders import Batch
from emu3.generation.decoders.jacobi import JacobiDecoder
from emu3.generation.decoders.raster import RasterDecoder
from emu3.generation.decoders.zipar import ZipARDecoder
from emu3.generation.engine import WORTH_SHARING, Engine, Session
from emu3.generation.events import Finished, Started, Tokens
from emu3.generation.grammar import GridGrammar
from emu3.generation.request import Guidance, Request
from emu3.generation.sampling import Sampling

WARM = Sampling(1.3, top_k=12)


def picture(vocabulary, text, height=2, width=3, scale=3.0, seed=0, negative=()):
    prompts = [(vocabulary.bos, *words, vocabulary.boi, 1, vocabulary.img) for words in (text, negative)]
    return Request(prompts[0], GridGrammar(height, width, 1, vocabulary), WARM, Guidance(prompts[1], scale), seed)


def alone(model, request, decoder=None):
    return list(Engine(model, decoder or RasterDecoder()).stream([request]))[-1].ids


def run(session):
    events = []
    while not session.idle:
        events += session.step()
    return {event.request: event.ids for event in events if isinstance(event, Finished)}


@pytest.fixture
def fed(monkeypatch):
    """Tokens that each forward feeds, by row."""
    calls, feed = [], Batch.feed

    def counting(batch, tokens, rows=None):
        calls.append([len(ids) for ids, _, _ in tokens])
        return feed(batch, tokens, rows)

    monkeypatch.setattr(Batch, "feed", counting)
    return calls


def test_what_does_not_fit_waits_for_its_turn(model, vocabulary):
    requests = [picture(vocabulary, (n,), height=1 + n % 3, seed=n) for n in range(7)]
    session = Session(Engine(model), rows=5, slots=40)
    numbers = [session.submit(request) for request in requests]
    started = [event.request for event in session.step() if isinstance(event, Started)]
    assert started == numbers[:2]  # two rows each, and one row stays free
    assert session.rows_in_use == 4
    assert run(session) == {n: alone(model, request) for n, request in zip(numbers, requests, strict=True)}
    assert session.rows_in_use == 0
    assert (session.batch.cache.turns_BC == EMPTY).all()


def test_requests_may_come_while_others_run(model, vocabulary):
    first, second = picture(vocabulary, (5,), 4, 4), picture(vocabulary, (6, 7), 2, 5, scale=1, seed=3)
    text = Request((vocabulary.bos, 20, 21), sampling=WARM, seed=9, max_new_tokens=12)
    session, found = Session(Engine(model), rows=8, slots=64), {}
    for late in (first, second, text):
        session.submit(late)
        for _ in range(3):
            found |= {event.request: event.ids for event in session.step() if isinstance(event, Finished)}
    found |= run(session)
    assert found == {n: alone(model, request) for n, request in enumerate((first, second, text))}


def test_a_prompt_in_chunks_is_the_prompt(model, vocabulary, fed):
    long, short = picture(vocabulary, tuple(range(1, 31))), picture(vocabulary, (5,), 3, 3)
    expected = [alone(model, long), alone(model, short)]
    fed.clear()
    session = Session(Engine(model, chunk=8), rows=4, slots=64)
    session.submit(short)
    session.step()
    session.submit(long)
    fed.clear()
    session.step()
    assert fed == [[8, 3], [1, 1]]  # a chunk of the long prompt and all of its negative one, then the others' step
    assert run(session) == {0: expected[1], 1: expected[0]}
    assert max(max(call) for call in fed) == 8


def test_what_prompts_share_is_computed_once(model, vocabulary, fed):
    same = tuple(range(1, WORTH_SHARING + 5))
    requests = [picture(vocabulary, (*same, 30 + n), negative=(*same, 3), seed=n) for n in range(3)]
    expected = {n: alone(model, request) for n, request in enumerate(requests)}
    fed.clear()
    session = Session(Engine(model), rows=6, slots=64)
    for request in requests:
        session.submit(request)
    found = run(session)
    prefills = [call for call in fed if max(call) > 2 or len(call) < 6]
    assert sum(sum(call) for call in prefills) < 2 * len(requests[0].prompt_ids)
    assert found == expected


@pytest.mark.parametrize("decoder", [RasterDecoder(), ZipARDecoder(1), JacobiDecoder(4)])
def test_cancelling_frees_the_rows_at_once_and_disturbs_nobody(model, vocabulary, decoder):
    requests = [picture(vocabulary, (n,), 3, 3, seed=n) for n in range(4)]
    session = Session(Engine(model, decoder), rows=6, slots=40)
    for request in requests:
        session.submit(request)
    session.step()
    session.step()
    assert session.rows_in_use == 6
    assert session.cancel(1)
    assert session.rows_in_use == 4
    assert not session.cancel(1)
    assert not session.cancel(99)
    events = session.step()
    assert Started(3, len(requests[3].prompt_ids), requests[3].grammar.length) in events
    rest = run(session)
    assert rest == {n: alone(model, requests[n], decoder) for n in (0, 2, 3)}


def test_a_thousand_comings_and_goings_leave_the_accounting_exact(model, vocabulary):
    """Random submissions, cancellations and steps; the rows in use and filled are those of who is there."""
    dice = random.Random(0)
    session = Session(Engine(model), rows=7, slots=24)
    alive, done, tokens = {}, 0, {}
    for _ in range(1000):
        action = dice.random()
        if action < 0.25:
            scale = dice.choice([1.0, 3.0])
            request = picture(vocabulary, (1,) * dice.randrange(4), 1 + dice.randrange(2), 1 + dice.randrange(3), scale)
            alive[session.submit(request)] = request
        elif action < 0.35 and alive:
            number = dice.choice(list(alive))
            assert session.cancel(number)
            del alive[number]
        else:
            for event in session.step():
                assert event.request in alive
                if isinstance(event, Tokens):
                    tokens[event.request] = tokens.get(event.request, 0) + len(event.ids)
                if isinstance(event, Finished):
                    assert len(event.ids) == tokens[event.request] == alive.pop(event.request).grammar.length
                    done += 1
        admitted = [s.number for s in (*session.batch.sequences, *session.prefilling)]
        waiting = [s.number for s in session.waiting]
        assert sorted(admitted + waiting) == sorted(alive)
        assert session.rows_in_use == sum(len(alive[n].rows) for n in admitted) <= 7
        assert (session.batch.cache.turns_BC[session.rows_in_use :] == EMPTY).all()
    while not session.idle:
        session.step()
    assert session.rows_in_use == 0
    assert (session.batch.cache.turns_BC == EMPTY).all()
    assert done > 50


def test_a_schedule_of_guidance(model, vocabulary):
    constant = picture(vocabulary, (5, 6), 4, 4, scale=2.0)
    for decoder in (RasterDecoder(), ZipARDecoder(2), JacobiDecoder(4)):
        scheduled = picture(vocabulary, (5, 6), 4, 4, scale=lambda progress: 2.0)
        assert alone(model, scheduled, decoder) == alone(model, constant, decoder)
        rising = picture(vocabulary, (5, 6), 4, 4, scale=lambda progress: 2.0 if progress < 0.5 else 9.0)
        late = alone(model, rising, decoder)
        if isinstance(decoder, RasterDecoder):
            assert late[:11] == alone(model, constant)[:11]
        assert late != alone(model, constant, decoder)


def test_no_guidance_runs_no_negative_row(model, vocabulary, fed):
    alone(model, picture(vocabulary, (5, 6), scale=1.0))
    assert {len(call) for call in fed} == {1}


def test_what_never_fits_is_refused(model, vocabulary):
    session = Session(Engine(model), rows=1, slots=20)
    with pytest.raises(ValueError, match="takes 2 rows, this session has 1"):
        session.submit(picture(vocabulary, (5,)))
    with pytest.raises(ValueError, match=r"do not fit the model's context of 20"):
        session.submit(picture(vocabulary, (5,), 3, 9, scale=1.0))
    with pytest.raises(ValueError, match="schedule of guidance needs a picture"):
        Request((1, 2), guidance=Guidance((1,), lambda progress: 2.0))
    endless = picture(vocabulary, (5,), scale=lambda progress: float("nan"))
    with pytest.raises(ValueError, match="finite number, got nan at token 0"):
        alone(model, endless)


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
