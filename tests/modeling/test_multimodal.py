"""The whole model; equality with transformers is in tests/parity."""

import pytest
import torch

from emu3.generation.grammar import GridGrammar, prefix_allowed_tokens_fn
from emu3.modeling.multimodal import Emu3ForConditionalGeneration, Emu3Model


def scores(model, ids, **pictures):
    """Logits of each token after the first, from one forward pass."""
    with torch.no_grad():
        return model(input_ids=ids, **pictures).logits[:, :-1]


def test_greedy_text_is_what_one_forward_pass_prefers(model, shown):
    written = model.generate(**shown, do_sample=False, max_new_tokens=20)
    start = shown["input_ids"].shape[1]
    assert len(set(written[0, start:].tolist())) > 2
    pictures = {name: shown[name] for name in ("pixel_values", "image_sizes")}
    assert torch.equal(scores(model, written, **pictures)[:, start - 1 :].argmax(-1), written[:, start:])


def test_greedy_picture_is_what_one_forward_pass_prefers(model, vocabulary):
    grammar = GridGrammar(3, 4, vocabulary=vocabulary)
    prompt = torch.tensor([[vocabulary.bos, 7, vocabulary.boi, 2, vocabulary.img]])
    drawn = model.generate(
        prompt,
        do_sample=False,
        max_new_tokens=grammar.length,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn([grammar]),
    )
    logits = scores(model, drawn)[0, prompt.shape[1] - 1 :]
    assert len(logits) == grammar.length
    for k, row in enumerate(logits):
        lo, hi = grammar.span(k)
        assert drawn[0, prompt.shape[1] + k] == lo + row[lo:hi].argmax()
    assert model.decode_image_tokens(drawn[:, prompt.shape[1] :], 3, 4).shape == (1, 3, 12, 16)


@torch.no_grad()
def test_placeholders_stand_for_the_tokens_of_the_picture(model, vocabulary, shown):
    """A picture given as pixels, and the same one written into the prompt as ids."""
    pictures = {name: shown[name] for name in ("pixel_values", "image_sizes")}
    ids = model.model.get_image_tokens(**pictures)
    assert ids.shape == (16,)
    assert ids[3::4].tolist() == [vocabulary.eol] * 4
    written = shown["input_ids"].clone()
    written[written == vocabulary.image_placeholder] = ids
    assert torch.equal(model(**shown).logits, model(input_ids=written).logits)


@torch.no_grad()
def test_tokens_of_a_picture_decode_to_what_the_tokenizer_makes_of_it(model, vqmodel, vocabulary, shown):
    codes = vqmodel.encode(shown["pixel_values"], shown["image_sizes"]).image_tokens[0]
    ids = model.model.get_image_tokens(shown["pixel_values"], shown["image_sizes"])
    drawn = torch.cat((ids, torch.tensor([vocabulary.eof, vocabulary.eoi, vocabulary.eos])))[None]
    assert torch.equal(model.decode_image_tokens(drawn, height=4, width=3), vqmodel.decode(codes[None]))


@pytest.mark.parametrize("extra", [-1, 1, 4])
def test_wrong_number_of_tokens_to_decode(model, extra):
    ids = torch.full((1, 4 * 4 + 3 + extra), 60)
    with pytest.raises(ValueError, match=rf"4x3 tokens is 19 ids, got {19 + extra}: .*and no prompt"):
        model.decode_image_tokens(ids, height=4, width=3)


def test_tokens_to_decode_that_are_not_visual(model, vocabulary):
    ids = torch.full((1, 19), vocabulary.eol)
    with pytest.raises(ValueError, match="no visual token ids"):
        model.decode_image_tokens(ids, height=4, width=3)


@pytest.mark.parametrize("placeholders", [0, 15, 17])
def test_pictures_that_do_not_fit_the_placeholders(model, vocabulary, shown, placeholders):
    shown["input_ids"] = torch.tensor([[2, *[vocabulary.image_placeholder] * placeholders, 3]])
    with pytest.raises(ValueError, match=f"{placeholders} image placeholders, the pictures 16 tokens"):
        model(**shown)


def test_pictures_without_sizes(model, shown):
    del shown["image_sizes"]
    with pytest.raises(ValueError, match="pixel_values need image_sizes"):
        model(**shown)


@pytest.mark.parametrize("kind", [Emu3ForConditionalGeneration, Emu3Model])
def test_vision_stays_in_float32(model, vqmodel, tmp_path, shown, kind):
    """Half precision would move latents to other codes."""
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path, dtype=torch.bfloat16)
    vision = getattr(loaded, "model", loaded).vqmodel
    kinds = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    for name, dtype in kinds.items():
        if "num_batches_tracked" not in name:
            assert dtype == (torch.float32 if "vqmodel." in name else torch.bfloat16), name
    weights = zip(vision.state_dict().values(), vqmodel.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    with torch.no_grad():
        output = loaded(**shown)[0]
        halves = shown | {"pixel_values": shown["pixel_values"].bfloat16()}  # as `inputs.to(dtype=...)` makes them
        assert loaded(**halves)[0].dtype == output.dtype == torch.bfloat16


def test_any_attention_of_the_language_model(model, tmp_path):
    """The vision tokenizer attends in its one way, whatever the language model is loaded with."""
    model.save_pretrained(tmp_path)
    for attention in ("eager", "sdpa", "flex_attention"):
        loaded = Emu3ForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention)
        assert loaded.model.text_model.config._attn_implementation == attention


def test_vocabulary_mapping(model, vocabulary):
    mapping = model.vocabulary_mapping
    codes = torch.tensor([[[0, 1, 63], [5, 6, 7]]])
    base = vocabulary.visual_base
    ids = mapping.convert_img2bpe(codes)
    assert ids.tolist() == [
        [[base, base + 1, base + 63, vocabulary.eol], [base + 5, base + 6, base + 7, vocabulary.eol]]
    ]
    assert torch.equal(mapping.convert_bpe2img(ids), codes)
    assert mapping.image_tokens == list(range(base, base + 64))
