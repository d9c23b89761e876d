"""The documented methods of `Emu3Model` that take pictures, argument by argument, against transformers."""

import pytest
import torch

SIZES = (4, 3), (2, 5)
PLACEHOLDERS = 4 * 4 + 2 * 6


@pytest.fixture
def prompt(pair):
    return pair.prompts([2, *pair.shown(4, 3), 5, *pair.shown(2, 5), 6])["input_ids"]


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True], ids=["Emu3Model", "Emu3ForConditionalGeneration"])
def test_pixel_values_and_image_sizes(pair, prompt, whole):
    pictures = pair.pixels(*SIZES)
    models = pair.both if whole else [model.model for model in pair.both]

    def read(pixel_values, image_sizes):
        outputs = [
            model(input_ids=prompt, pixel_values=pixel_values, image_sizes=image_sizes)[0][:, -1] for model in models
        ]
        assert outputs[1].std() > 0.1
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)
        return outputs[0]

    first = read(pictures["pixel_values"], pictures["image_sizes"])
    other = read(pair.pixels(*SIZES, seed=1)["pixel_values"], pictures["image_sizes"])
    assert (first - other).abs().max() > 0.01
    # Another size is another number of tokens.
    with pytest.raises(ValueError, match=f"{PLACEHOLDERS} image placeholders, the pictures 32 tokens"):
        models[0](input_ids=prompt, pixel_values=pictures["pixel_values"], image_sizes=torch.tensor([[16, 12]] * 2))


@torch.no_grad()
def test_get_image_tokens(pair):
    pictures = pair.pixels(*SIZES)
    ours, theirs = (
        model.model.get_image_tokens(pixel_values=pictures["pixel_values"], image_sizes=pictures["image_sizes"])
        for model in pair.both
    )
    assert ours.shape == (PLACEHOLDERS,)
    assert ours.tolist() == theirs.tolist()
    assert len(ours.unique()) > 8


@torch.no_grad()
def test_get_image_features(pair):
    pictures = pair.pixels(*SIZES)
    ours, theirs = (
        model.model.get_image_features(pixel_values=pictures["pixel_values"], image_sizes=pictures["image_sizes"])
        for model in pair.both
    )
    for a, b in zip(ours.pooler_output, theirs.pooler_output, strict=True):
        assert torch.equal(a, b)
    tokens = pair.ours.model.get_image_tokens(**pictures)
    assert torch.equal(torch.cat(ours.pooler_output), pair.ours.get_input_embeddings()(tokens))
    outputs = pair.ours.get_image_features(**pictures, return_dict=False)
    assert isinstance(outputs, tuple)
    assert torch.equal(torch.cat(outputs[ours.to_tuple().index(ours.pooler_output)]), torch.cat(ours.pooler_output))


@torch.no_grad()
def test_get_placeholder_mask(pair, prompt):
    image_features = torch.zeros(PLACEHOLDERS, 32)
    expected = (prompt == pair.vocabulary.image_placeholder)[..., None]
    for model in pair.both:
        inputs_embeds = model.get_input_embeddings()(prompt)
        for input_ids in (prompt, None):
            mask = model.model.get_placeholder_mask(
                input_ids=input_ids, inputs_embeds=inputs_embeds, image_features=image_features
            )
            assert torch.equal(mask, expected)
        with pytest.raises(ValueError, match=str(PLACEHOLDERS)):
            model.model.get_placeholder_mask(
                input_ids=prompt, inputs_embeds=inputs_embeds, image_features=image_features[1:]
            )


@torch.no_grad()
def test_decode_image_tokens(pair):
    """Rows of visual tokens with their ends, and the three tokens that close a picture."""
    v, height, width = pair.vocabulary, 2, 5
    codes = torch.randint(0, 64, (3, height, width), generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.pad(v.ids_of(codes), (0, 1), value=v.eol).flatten(1)
    image_tokens = torch.cat((rows, torch.tensor([[v.eof, v.eoi, v.eos]] * 3)), dim=1)
    for part in (lambda model: model, lambda model: model.model):
        ours, theirs = (
            part(model).decode_image_tokens(image_tokens=image_tokens, height=height, width=width)
            for model in pair.both
        )
        assert ours.shape == (3, 3, 8, 20)
        scale = theirs.std()
        torch.testing.assert_close(ours / scale, theirs / scale, atol=1e-5, rtol=0)
        assert torch.equal(ours, pair.ours.model.vqmodel.decode(codes))
