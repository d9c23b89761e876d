"""`generate` with each of its documented ways: the same tokens as transformers' on the same weights and seed."""

import pytest
import torch
from transformers import GenerationMixin, StaticCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from emu3.generation.grammar import GridGrammar
from emu3.modeling.pretrained import CACHE

NEW = 10
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 3.0, "top_k": 30, "top_p": 0.95},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2, "top_k": 30},
    "repetition penalty": {"do_sample": False, "repetition_penalty": 0.1},
    "without a cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


def prompts(pair):
    """What a model is asked: words, one picture, several, and a padded batch with two, one and no pictures."""
    words = pair.prompts([2, 3, 4, 5, 6])
    one = pair.prompts([2, *pair.shown(4, 3), 5, 6]) | pair.pixels((4, 3))
    several = pair.prompts([2, *pair.shown(2, 2), 5, *pair.shown(3, 1), 6, *pair.shown(1, 4)])
    several |= pair.pixels((2, 2), (3, 1), (1, 4))
    batch = pair.prompts([2, *pair.shown(4, 3), 5], [3, *pair.shown(2, 5), 7, *pair.shown(3, 3), 8], [9, 10, 11])
    batch |= pair.pixels((4, 3), (2, 5), (3, 3))
    return {"no picture": words, "one picture": one, "several pictures": several, "padded batch": batch}


# Before 5.23, transformers mixes up the pictures of a prompt's copies (picture by picture, A A B B for A B A B).
MIXES_PICTURES = not hasattr(GenerationMixin, "_supports_mm_encoder_outputs")


def generate(pair, seed=0, **arguments):
    """What both models write; the same."""
    written = []
    several = len(arguments.get("image_sizes", [])) > 1
    copies = max(arguments.get("num_beams", 1), arguments.get("num_return_sequences", 1)) > 1
    for model in [pair.ours] if MIXES_PICTURES and several and copies else pair.both:
        torch.manual_seed(seed)
        written.append(model.generate(**{"max_new_tokens": NEW} | arguments))
    assert written[0].tolist() == written[-1].tolist()
    return written[0]


@pytest.mark.parametrize("prompt", ["no picture", "one picture", "several pictures", "padded batch"])
@pytest.mark.parametrize("way", WAYS)
def test_ways(pair, way, prompt):
    inputs = prompts(pair)[prompt]
    written = generate(pair, **inputs, **WAYS[way])
    rows = inputs["input_ids"].shape[0] * WAYS[way].get("num_return_sequences", 1)
    assert written.shape[0] == rows
    assert len(written[:, inputs["input_ids"].shape[1] :].unique()) > 2


@pytest.mark.parametrize("prompt", ["one picture", "several pictures", "padded batch"])
@pytest.mark.parametrize("way", ["beams", "sampled beams", "several samples"])
def test_copies_of_a_prompt_keep_its_pictures(pair, way, prompt):
    """Written out as ids, pictures cannot be mixed up."""
    inputs = prompts(pair)[prompt]
    arguments = WAYS.get(way, {"do_sample": True, "num_return_sequences": 3, "top_k": 30})
    pictures = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    ids = inputs["input_ids"].clone()
    ids[ids == pair.vocabulary.image_placeholder] = pair.ours.model.get_image_tokens(**pictures)
    shown = generate(pair, **inputs, **arguments)
    written = generate(pair, input_ids=ids, attention_mask=inputs["attention_mask"], **arguments)
    assert shown[:, ids.shape[1] :].tolist() == written[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("prompt", ["one picture", "several pictures", "padded batch"])
@pytest.mark.parametrize("way", ["greedy", "beams", "sampled beams"])
def test_embeddings_with_pictures(pair, way, prompt):
    """Embeddings of a prompt, placeholders among them, give what its ids give, copies included."""
    inputs = prompts(pair)[prompt]
    torch.manual_seed(0)
    expected = pair.ours.generate(**inputs, **WAYS[way], max_new_tokens=NEW)
    ids = inputs.pop("input_ids")
    torch.manual_seed(0)
    embeddings = pair.ours.get_input_embeddings()(ids)
    written = pair.ours.generate(inputs_embeds=embeddings, **inputs, **WAYS[way], max_new_tokens=NEW)
    assert written.tolist() == expected[:, ids.shape[1] :].tolist()


def test_ways_differ(pair):
    """Where two ways give the same, the comparison above would say nothing."""
    inputs = prompts(pair)["one picture"]
    greedy, penalty = (generate(pair, **inputs, **WAYS[way]).tolist() for way in ("greedy", "repetition penalty"))
    first, again, other = (generate(pair, seed, **inputs, **WAYS["sampling"]).tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first != greedy
    assert penalty != greedy
    for way in ("without a cache", "static cache"):
        assert generate(pair, **inputs, **WAYS[way]).tolist() == greedy


def test_the_picture_matters(pair):
    inputs = prompts(pair)["one picture"]
    written = [generate(pair, **inputs | pair.pixels((4, 3), seed=seed), do_sample=False) for seed in (0, 1)]
    assert written[0].tolist() != written[1].tolist()


def test_left_padding_changes_nothing(pair):
    """A row of a padded batch is what it is alone."""
    batch, alone = prompts(pair)["padded batch"], prompts(pair)["no picture"] | pair.prompts([9, 10, 11])
    written = generate(pair, **batch, do_sample=False)[2, -NEW:].tolist()
    expected = generate(pair, **alone, do_sample=False)[0, -NEW:].tolist()
    assert written == expected


def test_static_cache_object(pair):
    inputs = prompts(pair)["one picture"]
    written = []
    for model in pair.both:
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
        written.append(model.generate(**inputs, **{CACHE: cache}, max_new_tokens=NEW, do_sample=False).tolist())
    assert written == [generate(pair, **inputs, do_sample=False).tolist()] * 2


class Collected(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamer(pair):
    streamer = Collected()
    written = pair.ours.generate(**prompts(pair)["one picture"], streamer=streamer, max_new_tokens=NEW, do_sample=False)
    assert streamer.tokens == written[0].tolist()
    assert streamer.ended


class StopAt(StoppingCriteria):
    """Stops at a length."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_stopping_criteria(pair):
    inputs = prompts(pair)["no picture"]
    written = generate(pair, **inputs, do_sample=False, stopping_criteria=StoppingCriteriaList([StopAt(8)]))
    assert written.tolist() == generate(pair, **inputs, do_sample=False)[:, :8].tolist()


def documented_constraint(pair, height, width):
    """The function of the usage example, for pictures of `height` x `width` tokens."""
    v = pair.vocabulary
    visual_tokens = pair.ours.vocabulary_mapping.image_tokens

    def prefix_allowed_tokens_fn(batch_id, input_ids):
        position = torch.nonzero(input_ids == v.img, as_tuple=True)[0][0]
        offset = input_ids.shape[0] - position
        if offset % (width + 1) == 0:
            return [v.eol]
        tail = [v.eof, v.eoi, v.eos]
        past = int(offset) - (width + 1) * height - 1
        if past < 0:
            return visual_tokens
        return tail[past : past + 1] or [v.pad]

    return prefix_allowed_tokens_fn


@pytest.mark.parametrize("way", ["greedy", "sampling"])
def test_prefix_allowed_tokens_fn(pair, way):
    v, height, width = pair.vocabulary, 3, 4
    inputs = pair.prompts([v.bos, 2, 3, v.boi, 1, v.img], [v.bos, 4, v.boi, 1, v.img])
    constraint = documented_constraint(pair, height, width)
    written = generate(pair, **inputs, prefix_allowed_tokens_fn=constraint, max_new_tokens=1000, **WAYS[way])[:, 6:]
    grammar = GridGrammar(height, width, vocabulary=v)
    assert written.shape == (2, grammar.length)
    for row in written.tolist():
        assert all(lo <= token < hi for token, (lo, hi) in zip(row, map(grammar.span, range(len(row))), strict=True))
    assert len(written.unique()) > 6


def test_negative_prompt_ids(pair):
    v = pair.vocabulary
    inputs = pair.prompts([v.bos, 2, 3, 4, v.boi, 1, v.img], [v.bos, 5, v.boi, 1, v.img])
    negative = pair.prompts([v.bos, 9, v.boi, 1, v.img], [v.bos, 10, 11, 12, v.boi, 1, v.img])
    common = {**inputs, "do_sample": False, "prefix_allowed_tokens_fn": documented_constraint(pair, 2, 3)}
    guided = common | {"negative_prompt_ids": negative["input_ids"], "guidance_scale": 4.0}
    masked = generate(pair, **guided, negative_prompt_attention_mask=negative["attention_mask"]).tolist()
    assert masked != generate(pair, **common).tolist()
    # Without a scale there is no guidance, as the usage example is printed.
    unscaled = {name: value for name, value in guided.items() if name != "guidance_scale"}
    unscaled["negative_prompt_attention_mask"] = negative["attention_mask"]
    assert generate(pair, **unscaled).tolist() == generate(pair, **common).tolist()
    # The mask hides the padding: a row gets what it gets alone.
    alone = guided | {"input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]}
    alone["negative_prompt_ids"] = negative["input_ids"][:1, 2:]
    alone["negative_prompt_attention_mask"] = negative["attention_mask"][:1, 2:]
    assert generate(pair, **alone).tolist() == masked[:1]


def test_return_dict_in_generate(pair):
    inputs = prompts(pair)["one picture"]
    wanted = {"output_scores": True, "output_logits": True, "output_hidden_states": True, "output_attentions": True}
    for model in pair.both:
        model.set_attn_implementation("eager")
    ours, theirs = (
        model.generate(**inputs, do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True, **wanted)
        for model in pair.both
    )
    for model in pair.both:
        model.set_attn_implementation("sdpa")
    assert ours.keys() == theirs.keys()
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    start = inputs["input_ids"].shape[1]
    assert len(ours.scores) == len(ours.logits) == len(ours.hidden_states) == len(ours.attentions) == NEW
    assert ours[CACHE].get_seq_length() == start + NEW - 1
    for field in ("scores", "logits"):
        for a, b in zip(ours[field], theirs[field], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    for field in ("hidden_states", "attentions"):
        torch.testing.assert_close(ours[field][3][1], theirs[field][3][1], atol=1e-5, rtol=0)
    # One pass over what was written gives the same scores as writing it.
    with torch.no_grad():
        again = pair.ours(input_ids=ours.sequences, **pair.pixels((4, 3))).logits[:, start - 1 : -1]
    torch.testing.assert_close(torch.stack(ours.logits, dim=1), again, atol=1e-4, rtol=0)


def test_from_embeddings(pair):
    ids = prompts(pair)["no picture"]["input_ids"]
    embeddings = pair.ours.get_input_embeddings()(ids)
    written = pair.ours.generate(inputs_embeds=embeddings, do_sample=False, max_new_tokens=NEW)
    assert written.tolist() == generate(pair, input_ids=ids, do_sample=False)[:, ids.shape[1] :].tolist()
