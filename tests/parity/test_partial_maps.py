"""Configurations such as transformers' own tests have: a vocabulary map of a few tokens, spelled without a space.

Built, run, saved, and loaded by both libraries: equal logits, codes and ids.
"""

import random

import pytest
import torch
from transformers import Emu3Config as ReferenceConfig
from transformers import Emu3ForConditionalGeneration as ReferenceModel

from emu3.configuration import Emu3Config
from emu3.generation.engine import Engine
from emu3.generation.grammar import GridGrammar, TextGrammar
from emu3.generation.request import Request
from emu3.modeling.multimodal import Emu3ForConditionalGeneration

from .conftest import shake

VOCABULARY, CODES, IMAGE, EOL = 99, 20, 3, 4
SIDE, FACTOR = 15, 4  # pixels of a picture, which is not a whole number of tokens
ROWS = SIDE // FACTOR


def whole_map():
    """Every id has a surface; codes 5 to 22 stand at ids 5 to 22, and ids 3 and 4 are taken by control tokens."""
    surfaces = [chr(number) for number in range(VOCABULARY)]
    surfaces[IMAGE : IMAGE + CODES] = [f"<|visual token{code:06d}|>" for code in range(IMAGE, IMAGE + CODES)]
    surfaces[IMAGE], surfaces[EOL] = "<image>", "<|extra_200|>"
    return {surface: number for number, surface in enumerate(surfaces)}


MAPS = {
    "spelled without a space": whole_map(),
    "scattered codes": {
        "<image>": IMAGE,
        "<|extra_200|>": EOL,
        **{f"<|visual token {code:06d}|>": 98 - code for code in range(CODES)},
    },
    "one code": {"<image>": IMAGE, "<|extra_200|>": EOL, "<|visual token 000019|>": 50},
}


@pytest.fixture(scope="module", params=MAPS)
def both(request):
    torch.manual_seed(0)
    arguments = {
        "text_config": {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 37,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "vq_config": {
            "codebook_size": CODES,
            "temporal_downsample_factor": 1,
            "base_channels": 32,
            "channel_multiplier": [1, 2, 1],
            "hidden_size": 32,
            "attn_resolutions": [],
        },
        "vocabulary_map": MAPS[request.param],
    }
    ours = Emu3ForConditionalGeneration(Emu3Config(**arguments)).eval()
    shake(ours)
    theirs = ReferenceModel(ReferenceConfig(**arguments)).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs(batch=3):
    noise = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (batch, ROWS * (ROWS + 1) + 7), generator=noise)
    ids[:, : ROWS * (ROWS + 1)] = IMAGE
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, 3, SIDE, SIDE, generator=noise),
        "image_sizes": torch.tensor([[SIDE, SIDE]] * batch),
    }


def assert_equal(ours, theirs):
    given = inputs()
    pictures = {name: given[name] for name in ("pixel_values", "image_sizes")}
    with torch.no_grad():
        codes = [model.model.vqmodel.encode(**pictures).image_tokens for model in (ours, theirs)]
        assert [c.tolist() for c in codes[0]] == [c.tolist() for c in codes[1]]
        ids = [model.model.get_image_tokens(**pictures).tolist() for model in (ours, theirs)]
        assert ids[0] == ids[1]
        logits = [model(**given).logits for model in (ours, theirs)]
        assert logits[1].std() > 0.1
        torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
        for way in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}):
            written = [model.generate(**given, **way, max_new_tokens=8, min_new_tokens=8) for model in (ours, theirs)]
            assert written[0].tolist() == written[1].tolist()


def test_logits_codes_and_ids(both):
    assert_equal(*both)


def test_saved_by_each_and_loaded_by_both(both, tmp_path):
    for number, model in enumerate(both):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        assert_equal(*(kind.from_pretrained(folder) for kind in (Emu3ForConditionalGeneration, ReferenceModel)))
    assert Emu3Config.from_pretrained(tmp_path / "0").vocabulary_map == both[0].config.vocabulary_map


def test_vocabulary_mapping(both):
    """Every documented attribute, and both conversions of everything that they take."""
    ours, theirs = (model.vocabulary_mapping for model in both)
    for name in (
        "vocab_map",
        "eol_token_id",
        "image_token_id",
        "image_tokens",
        "image_tokens_str",
        "img2bpe",
        "bpe2img",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("img2bpe_mapping_tensor", "bpe2img_mapping_tensor"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    codes = torch.arange(max(ours.img2bpe) + 1)[None]
    ids = ours.convert_img2bpe(codes)
    assert torch.equal(ids, theirs.convert_img2bpe(codes).long())
    assert torch.equal(ours.convert_bpe2img(ids), theirs.convert_bpe2img(ids).long())
    with pytest.raises(ValueError, match=rf"codes must be in .*\.\.{max(ours.img2bpe)}, got 99"):
        ours.convert_img2bpe(torch.tensor([[99]]))


def test_texts_need_no_control_tokens_of_pictures(both):
    """The engine writes what `generate` writes; the end of a text is the config's."""
    ours = both[0]
    ids = [5, 50, 60]
    expected = ours.generate(torch.tensor([ids]), attention_mask=torch.ones(1, 3), max_new_tokens=12, do_sample=False)
    events = list(
        Engine(ours).stream(
            [
                Request(
                    tuple(ids),
                    TextGrammar(ours.config.text_config.vocab_size, (ours.config.text_config.eos_token_id,)),
                    max_new_tokens=12,
                )
            ]
        )
    )
    assert list(events[-1].ids) == expected[0, 3:].tolist()


def test_a_missing_token_is_named_when_a_picture_is_drawn(both):
    vocabulary = both[0].model.vocabulary
    with pytest.raises(ValueError, match=r"no <\|image token\|> \(img\)"):
        Request((5, 6), GridGrammar(2, 2, vocabulary=vocabulary))
    with pytest.raises(ValueError, match=r"no <\|extra_201\|> \(eof\)"):
        GridGrammar(2, 2, vocabulary=vocabulary).span(0)


def test_rows_cannot_be_closed_without_their_token():
    lacking = {surface: number for surface, number in whole_map().items() if surface != "<|extra_200|>"}
    config = Emu3Config(
        text_config={"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0},
        vq_config={"codebook_size": CODES, "base_channels": 32, "channel_multiplier": [1], "hidden_size": 32,
                   "attn_resolutions": [], "num_res_blocks": 1, "temporal_downsample_factor": 1},
        vocabulary_map=lacking,
    )  # fmt: skip
    model = Emu3ForConditionalGeneration(config).eval()
    with torch.no_grad(), pytest.raises(ValueError, match=r"no <\|extra_200\|>, which closes the rows"):
        model.model.get_image_tokens(torch.randn(1, 3, 4, 4), torch.tensor([[4, 4]]))


@pytest.mark.parametrize("seed", range(8))
def test_any_set_of_codes_in_any_spelling(seed):
    """Random maps: the views of both libraries agree."""
    from transformers.models.emu3.modeling_emu3 import Emu3ImageVocabularyMapping as Reference

    from emu3.modeling.multimodal import Emu3ImageVocabularyMapping

    random.seed(seed)
    codes = random.sample(range(200), random.randint(1, 40))
    ids = random.sample(range(500), len(codes))
    spellings = ["<|visual token {:06d}|>", "<|visual token{:06d}|>", "<|visual tokens {:06d}|>"]
    given = {random.choice(spellings).format(code): number for code, number in zip(codes, ids, strict=True)}
    given |= {"<image>": 600, "<|extra_200|>": 601, "word": 602}
    ours, theirs = Emu3ImageVocabularyMapping(given), Reference(given)
    assert (ours.img2bpe, ours.bpe2img, ours.image_tokens) == (theirs.img2bpe, theirs.bpe2img, theirs.image_tokens)
    assert ours.image_tokens_str == theirs.image_tokens_str
    known = torch.tensor([codes])
    assert ours.convert_img2bpe(known).tolist() == theirs.convert_img2bpe(known).tolist()
