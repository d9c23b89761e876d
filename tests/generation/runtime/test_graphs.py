"""Recorded forwards. Without a GPU, a recording is a call that is repeated with the tensors that it was given."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from emu3.generation.engine import Engine
from emu3.generation.grammar import GridGrammar
from emu3.generation.request import Guidance, Request
from emu3.generation.runtime.cache import SlotCache
from emu3.generation.runtime.forward import Forward
from emu3.generation.runtime.graphs import MOST_TOKENS, RecordedForward


class Repeated:
    """Stands in for a CUDA graph: its `replay` runs the recorded call again, into the first result."""

    def __init__(self, forward):
        self.forward = forward

    def __call__(self, *arguments):
        self.arguments, self.result = arguments, self.forward(*arguments)
        return self.result

    def graph(self):
        def replay():
            arguments, result = graph.recorded
            result.copy_(self.forward(*arguments))

        graph = SimpleNamespace(replay=replay)
        return graph

    @contextlib.contextmanager
    def record(self, graph, capture_error_mode):
        assert capture_error_mode == "thread_local"  # or what other threads do on the GPU breaks it
        yield
        graph.recorded = self.arguments, self.result


@pytest.fixture
def repeated(model, monkeypatch):
    repeated = Repeated(Forward.pack(model.model.text_model, 256))
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in (
        ("Stream", lambda: stream),
        ("current_stream", lambda: stream),
        ("stream", lambda stream: contextlib.nullcontext()),
        ("CUDAGraph", repeated.graph),
        ("graph", repeated.record),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    return repeated


def cache_of(model, lanes=2, slots=256):
    config = model.config.text_config
    width = config.head_dim
    return SlotCache.allocate(config.num_hidden_layers, lanes, config.num_key_value_heads, slots, width)


@torch.inference_mode()
def test_recordings_compute_what_the_forward_does(model, repeated):
    """Steps of one to five tokens in two lanes, which are rounded up to one, two, four and eight."""
    torch.manual_seed(0)
    recorded, caches = RecordedForward(repeated), [cache_of(model), cache_of(model)]
    at = 0
    for length in (1, 3, 4, 2, 5, 1, 3, 5):
        ids, turns = torch.randint(0, 60, (2, length)), torch.zeros(2, length, dtype=torch.long)
        slots = torch.arange(at, at + length).repeat(2, 1)
        at += length
        results = [
            forward(cache, ids, slots, turns, None, at)
            for forward, cache in zip((repeated.forward, recorded), caches, strict=True)
        ]
        torch.testing.assert_close(results[1], results[0])
    assert sorted(recorded.recordings) == [(2, length, 256) for length in (1, 2, 4, 8)]
    assert torch.equal(caches[0].turns_BL, caches[1].turns_BL)


@torch.inference_mode()
def test_prompts_are_not_recorded(model, repeated):
    recorded, cache = RecordedForward(repeated), cache_of(model)
    zeros = torch.zeros(1, MOST_TOKENS + 1, dtype=torch.long)
    slots = torch.arange(MOST_TOKENS + 1)[None]
    for lanes in (None, [1]):
        recorded(cache, zeros, slots, zeros, lanes, MOST_TOKENS + 1)
    recorded(cache, zeros[:, :3], slots[:, :3], zeros[:, :3], [0], 3)
    assert recorded.recordings == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_compiled_engine_draws_the_same_on_a_gpu(model, vocabulary):
    on_gpu = type(model)(model.config).eval().cuda()
    on_gpu.load_state_dict(model.state_dict())
    prompt = (vocabulary.bos, 5, vocabulary.boi, 1, vocabulary.img)
    requests = [
        Request(prompt, GridGrammar(4, 4, vocabulary=vocabulary), guidance=Guidance(prompt, 2.0), seed=seed)
        for seed in range(3)
    ]
    ids = [
        {
            event.request: event.ids
            for event in Engine(on_gpu, compiled=compiled).stream(requests)
            if hasattr(event, "reason")
        }
        for compiled in (False, True)
    ]
    assert ids[0] == ids[1]
