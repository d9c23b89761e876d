import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from emu3.tokenization import CONTROL_TOKENS, encode_plain, train_tokenizer, visual_token, vocabulary_map
from emu3.vocabulary import Vocabulary

TEXTS = ["a photo of a red car and a blue tree", "a photo of 12 dogs", "What colour is the cat? It is red."] * 4
SIZE, CODES = 290, 16
TOKENIZER = train_tokenizer(TEXTS, SIZE, CODES)
FIRST_CONTROL = SIZE
FIRST_VISUAL = SIZE + len(CONTROL_TOKENS)

SURFACES = [*CONTROL_TOKENS.values(), visual_token(0), visual_token(CODES - 1)]
PROMPTS = st.lists(st.one_of(st.text(), st.sampled_from(SURFACES)), max_size=6).map("".join)


def test_ids_are_bpe_then_control_then_visual_tokens():
    expected = [*CONTROL_TOKENS.values(), *map(visual_token, range(CODES))]
    assert TOKENIZER.convert_tokens_to_ids(expected) == list(range(FIRST_CONTROL, FIRST_VISUAL + CODES))
    assert len(TOKENIZER) == FIRST_VISUAL + CODES


def test_attributes_name_the_control_tokens():
    for offset, (name, surface) in enumerate(CONTROL_TOKENS.items()):
        assert getattr(TOKENIZER, name) == surface
        assert getattr(TOKENIZER, f"{name}_id") == FIRST_CONTROL + offset


def test_digits_are_single_tokens():
    assert TOKENIZER.tokenize("12*12") == ["1", "2", "*", "1", "2"]
    ids = TOKENIZER("<|image start|>90*3<|image token|>")["input_ids"]
    assert TOKENIZER.convert_ids_to_tokens(ids) == ["<|image start|>", "9", "0", "*", "3", "<|image token|>"]


def test_text_is_composed_before_encoding():
    assert TOKENIZER("cafe\u0301")["input_ids"] == TOKENIZER("caf\u00e9")["input_ids"]


def test_same_texts_give_the_same_file(tmp_path):
    for name in ("first", "second"):
        train_tokenizer(TEXTS, SIZE, CODES).save_pretrained(tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_saved_tokenizer_loads_beside_a_model(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "emu3"}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "a 12*12 tree\n\n</b>'S <image><|image start|><|visual token 000003|><|extra_204|>"
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert {name: getattr(loaded, name) for name in CONTROL_TOKENS} == CONTROL_TOKENS
    assert loaded.padding_side == "left"
    assert encode_plain(loaded, text) == encode_plain(TOKENIZER, text)


def test_vocabulary_map_feeds_the_vocabulary():
    mapping = vocabulary_map(TOKENIZER)
    assert list(mapping.values()) == list(range(FIRST_CONTROL, FIRST_VISUAL + CODES))
    vocabulary = Vocabulary.from_map(mapping)
    assert vocabulary.pad == FIRST_CONTROL
    assert vocabulary.eoi == FIRST_VISUAL - 1
    assert vocabulary.visual_span == (FIRST_VISUAL, FIRST_VISUAL + CODES)
    assert vocabulary.image_placeholder == TOKENIZER.image_token_id


def test_vocabulary_map_refuses_a_tokenizer_without_control_tokens():
    class Bare:
        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(ValueError, match="<image>"):
        vocabulary_map(Bare())


@settings(max_examples=50, deadline=None)
@given(PROMPTS)
def test_plain_text_never_holds_a_control_token(text):
    ids = encode_plain(TOKENIZER, text)
    assert all(index < FIRST_CONTROL for index in ids)
    assert ids == TOKENIZER(text, split_special_tokens=True)["input_ids"]


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec="ascii")))
def test_plain_text_comes_back(text):
    assert TOKENIZER.decode(encode_plain(TOKENIZER, text)) == text


def test_parsed_control_tokens_are_left_out_of_decoded_text():
    ids = TOKENIZER("a<|image start|><|visual token 000001|> cat")["input_ids"]
    assert ids[1:3] == [TOKENIZER.boi_token_id, FIRST_VISUAL + 1]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "a cat"


@pytest.mark.parametrize(
    ("texts", "size", "codes", "named"),
    [(TEXTS, 255, 4, "255"), (TEXTS, 290, 0, "codebook_size=0"), (["ab"], 300, 4, "257")],
)
def test_impossible_sizes_are_refused(texts, size, codes, named):
    with pytest.raises(ValueError, match=named):
        train_tokenizer(texts, size, codes)


def test_lone_surrogates_are_refused():
    with pytest.raises(ValueError, match="surrogate"):
        encode_plain(TOKENIZER, "a \ud800")
