"""The engine against `generate`, of transformers' own model with the same weights and of ours: the same greedy ids."""

import pytest
import torch
from transformers import Emu3Config as ReferenceConfig
from transformers import Emu3ForConditionalGeneration as ReferenceModel

from emu3.generation.engine import Engine
from emu3.generation.events import Finished
from emu3.generation.grammar import GridGrammar, TextGrammar, prefix_allowed_tokens_fn
from emu3.generation.request import Guidance, Request


@pytest.fixture(scope="module", params=["transformers", "emu3"])
def reference(request, model, config):
    """A model to call `generate` on: transformers' own with our weights, and ours itself."""
    if request.param == "emu3":
        return model
    theirs = ReferenceModel(ReferenceConfig(**config.to_dict())).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


def padded(prompts, pad):
    """Left-padded ids and their mask."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def documented_function(vocabulary, height, width):
    """The function of the documentation, on the ids of a vocabulary."""
    visual_tokens = list(range(*vocabulary.visual_span))

    def prefix_allowed_tokens_fn(batch_id, input_ids):
        position = torch.nonzero(input_ids == vocabulary.img, as_tuple=True)[0][0]
        offset = input_ids.shape[0] - position
        if offset % (width + 1) == 0:
            return [vocabulary.eol]
        if offset == (width + 1) * height + 1:
            return [vocabulary.eof]
        if offset == (width + 1) * height + 2:
            return [vocabulary.eoi]
        if offset == (width + 1) * height + 3:
            return [vocabulary.eos]
        if offset > (width + 1) * height + 3:
            return [vocabulary.pad]
        return visual_tokens

    return prefix_allowed_tokens_fn


def drawn(model, prompts, negatives, grammars, scale):
    requests = [
        Request(prompt, grammar, guidance=None if scale == 1 else Guidance(negative, scale))
        for prompt, negative, grammar in zip(prompts, negatives, grammars, strict=True)
    ]
    return {event.request: event.ids for event in Engine(model).stream(requests) if isinstance(event, Finished)}


def generated(reference, vocabulary, prompts, negatives, function, scale, length):
    negative = padded(negatives, vocabulary.pad)
    guidance = {
        "guidance_scale": scale,
        "negative_prompt_ids": negative["input_ids"],
        "negative_prompt_attention_mask": negative["attention_mask"],
    }
    inputs = padded(prompts, vocabulary.pad)
    out = reference.generate(
        **inputs,
        **(guidance if scale != 1 else {}),
        do_sample=False,
        max_new_tokens=length,
        prefix_allowed_tokens_fn=function,
    )
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def prompts_of(vocabulary, *texts):
    return [(vocabulary.bos, *text, vocabulary.boi, 2, vocabulary.img) for text in texts]


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("negative", [(), (9,), (11, 12, 13, 14, 15, 16, 17)], ids=["empty", "short", "long"])
def test_pictures_equal_generate_with_the_documented_function(model, reference, vocabulary, scale, negative):
    prompts = prompts_of(vocabulary, (1, 2, 3, 4), (5,), (6, 7, 8))
    negatives = prompts_of(vocabulary, negative, negative, (10, *negative))
    grammar = GridGrammar(4, 5, vocabulary=vocabulary)
    ours = drawn(model, prompts, negatives, [grammar] * 3, scale)
    function = documented_function(vocabulary, 4, 5)
    theirs = generated(reference, vocabulary, prompts, negatives, function, scale, grammar.length)
    assert [list(ours[i]) for i in range(3)] == theirs


def test_pictures_of_different_sizes_equal_generate_with_our_function(model, reference, vocabulary):
    """Also after a picture in the prompt, which the documented function cannot do."""
    shown = (vocabulary.boi, 2, vocabulary.img, *vocabulary.ids_of(torch.arange(3)).tolist(), vocabulary.eol)
    shown += (vocabulary.eof, vocabulary.eoi)
    prompts = prompts_of(vocabulary, (1, 2), (3, *shown, 4), (), (7, 8, 9))
    negatives = prompts_of(vocabulary, (30,), (31, 32), (), (33, 34, 35, 36, 37))
    grammars = [GridGrammar(h, w, vocabulary=vocabulary) for h, w in ((3, 3), (5, 2), (2, 1), (1, 6))]
    ours = drawn(model, prompts, negatives, grammars, 2.5)
    function = prefix_allowed_tokens_fn(grammars)
    length = max(grammar.length for grammar in grammars)
    theirs = generated(reference, vocabulary, prompts, negatives, function, 2.5, length)
    for index, grammar in enumerate(grammars):
        assert list(ours[index]) == theirs[index][: grammar.length]
        assert set(theirs[index][grammar.length :]) <= {vocabulary.pad}


def test_text_equals_generate(model, reference, vocabulary):
    prompts = [(vocabulary.bos, *range(n, n + n)) for n in range(1, 6)]
    text = TextGrammar(model.config.text_config.vocab_size, (vocabulary.eos,))
    ours = {
        event.request: event.ids
        for event in Engine(model).stream([Request(prompt, text, max_new_tokens=25) for prompt in prompts])
        if isinstance(event, Finished)
    }
    theirs = reference.generate(**padded(prompts, vocabulary.pad), do_sample=False, max_new_tokens=25)
    for index, ids in ours.items():
        after_prompt = theirs[index, max(map(len, prompts)) :].tolist()
        assert list(ids) == after_prompt[: len(ids)]
        assert set(after_prompt[len(ids) :]) <= {vocabulary.pad}
