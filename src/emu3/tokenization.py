"""The text tokenizer. Its ids are contiguous: a byte-level BPE, then control tokens, then visual tokens.

    0 ......... N-1 | <|endoftext|> <image> ... <|image end|> | <|visual token 000000|> ... <|visual token K-1|>
    byte-level BPE  | control tokens, in CONTROL_TOKENS order  | one per entry of the vision codebook

Every token after the BPE is *special*: `decode(..., skip_special_tokens=True)` leaves it out, and `encode_plain` never
returns it, whatever the text says.

Released checkpoints hold a BPE in tiktoken's file format. RELEASED_TOKENS follow it, then the tokens of a second file:

    0 .... 151642 | <|endoftext|> ... <|extra_204|> | <|image token|> <|image start|> <|image end|> <|visual token ...|>
    emu3.tiktoken | RELEASED_TOKENS                 | emu3_vision_tokens.txt
"""

import base64
import binascii
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from emu3.vocabulary import SURFACES, VISUAL_SURFACE

CONTROL_TOKENS = {
    "pad_token": SURFACES["pad"],
    "image_token": SURFACES["image_placeholder"],
    "eol_token": SURFACES["eol"],
    "eof_token": SURFACES["eof"],
    "bos_token": SURFACES["bos"],
    "eos_token": SURFACES["eos"],
    "image_wrapper_token": SURFACES["img"],
    "boi_token": SURFACES["boi"],
    "eoi_token": SURFACES["eoi"],
}
"""Attribute of the tokenizer -> surface of the token, in the order of the ids."""

# As in Qwen. Each digit is a piece of its own, so a picture's size "12*9" is always '1', '2', '*', '9'.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

RELEASED_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
"""The tokens after the BPE of the released checkpoints, in the order of their ids."""

PLACEHOLDER_ORIGIN = "<|extra_0|>"
"""An unused token of the released checkpoints. The documented layout gives its id to "<image>"."""

Pieces = Sequence[str | int]
"""A prompt in pieces: a string is plain text, a number is the id of a token that is not text."""

# Every control and visual token is spelled <...> without further angle brackets inside.
_SURFACE = re.compile(r"(<[^<>]*>)")
_BASE_ATTRIBUTES = ("bos_token", "eos_token", "pad_token")
_BYTES = 256


def visual_token(code: int) -> str:
    """Surface of the visual token for entry `code` of the vision codebook."""
    return f"<|visual token {code:06d}|>"


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, codebook_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocabulary_size` entries on `texts`, and add the control and visual tokens after it.

    The same texts in the same order give the same tokenizer. It pads on the left. It has the attributes of
    `CONTROL_TOKENS`, each also with `_id` at its end for the id. Raises ValueError for fewer entries than the 256
    bytes, an empty codebook, and texts with too few pairs to merge.
    """
    if vocabulary_size < _BYTES:
        raise ValueError(f"vocabulary_size={vocabulary_size} cannot hold the {_BYTES} bytes; ask for at least {_BYTES}")
    if codebook_size < 1:
        raise ValueError(f"codebook_size={codebook_size} leaves no visual token; ask for at least 1")
    backend = _make_byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() < vocabulary_size:
        raise ValueError(
            f"vocabulary_size={vocabulary_size}, but these texts yield only {backend.get_vocab_size()} entries; "
            "give more texts or ask for fewer entries"
        )
    surfaces = [*CONTROL_TOKENS.values(), *map(visual_token, range(codebook_size))]
    backend.add_special_tokens([AddedToken(surface, special=True, normalized=False) for surface in surfaces])
    return _wrap(backend)


def read_tiktoken(ranks_file: Path, vision_tokens_file: Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a released checkpoint from `emu3.tiktoken` and `emu3_vision_tokens.txt`.

    All ids are the same. One surface differs: `PLACEHOLDER_ORIGIN` becomes "<image>". Raises ValueError for a file of
    another format, ranks with gaps, a byte without a rank, and a missing control token.
    """
    ranks = _read_ranks(ranks_file)
    surfaces = [*RELEASED_TOKENS, *vision_tokens_file.read_text(encoding="utf-8").split("\n")]
    surfaces = [surface.strip() for surface in surfaces if surface.strip()]
    surfaces[surfaces.index(PLACEHOLDER_ORIGIN)] = SURFACES["image_placeholder"]
    missing = set(CONTROL_TOKENS.values()) - set(surfaces)
    if missing or len(set(surfaces)) < len(surfaces):
        raise ValueError(f"{vision_tokens_file} lacks {sorted(missing)} or repeats a token; get the checkpoint again")
    letters = _byte_letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    # tiktoken merges the two neighbours that form the token of lowest rank, whichever two they are. So each way to cut
    # a token in two becomes a merge. A piece that is a token as a whole is taken as it is: `ignore_merges`.
    merges = [
        (names[token[:cut]], names[token[cut:]])
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    backend = _make_byte_level(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    # The original composes characters (NFC) before it searches for control tokens; `normalized` keeps that order.
    backend.add_special_tokens([AddedToken(surface, special=True, normalized=True) for surface in surfaces])
    return _wrap(backend)


def write_tiktoken(tokenizer: PreTrainedTokenizerBase, ranks_file: Path, vision_tokens_file: Path) -> None:
    """Write the two files that `read_tiktoken` reads. ValueError if the ids are not laid out as in a released one."""
    backend = tokenizer.backend_tokenizer
    surfaces = {index: token.content for index, token in backend.get_added_tokens_decoder().items()}
    first = min(surfaces, default=0)
    expected = [SURFACES["image_placeholder"] if s == PLACEHOLDER_ORIGIN else s for s in RELEASED_TOKENS]
    found = [surfaces.get(first + offset) for offset in range(len(expected))]
    if found != expected or sorted(surfaces) != list(range(first, first + len(surfaces))):
        unlike = next((pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1]), (None, None))
        raise ValueError(
            f"the tokenizer cannot be written as emu3.tiktoken: after the BPE the released one has {unlike[1]!r} "
            f"where this one has {unlike[0]!r}; only checkpoints with the released vocabulary have that layout"
        )
    values = {letter: byte for byte, letter in enumerate(_byte_letters())}
    names = {index: name for name, index in backend.get_vocab(with_added_tokens=False).items() if index < first}
    if sorted(names) != list(range(first)):
        raise ValueError(f"the tokenizer's BPE does not have the ids 0 to {first - 1} without gaps")
    with ranks_file.open("wb") as stream:
        for rank in range(first):
            stream.write(base64.b64encode(bytes(values[letter] for letter in names[rank])) + f" {rank}\n".encode())
    with vision_tokens_file.open("w", encoding="utf-8", newline="\n") as text:
        text.writelines(f"{surfaces[index]}\n" for index in range(first + len(expected), first + len(surfaces)))


def vocabulary_map(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Surface -> id of every control and visual token, by ascending id, as `Emu3Config.vocabulary_map` holds it."""
    control = set(CONTROL_TOKENS.values())
    found = [
        (index, surface)
        for surface, index in tokenizer.get_vocab().items()
        if surface in control or VISUAL_SURFACE.fullmatch(surface)
    ]
    missing = control - {surface for _, surface in found}
    if missing:
        raise ValueError(f"the tokenizer has no {sorted(missing)}; it is not one of Emu3's")
    return {surface: index for index, surface in sorted(found)}


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode `text` as plain text: "<image>" or "<|image start|>" in it are ordinary characters.

    It calls the BPE model directly, so the result never holds a control or visual token. The tokenizer's state does not
    change, so threads may share it. Raises ValueError if the text is not valid Unicode.
    """
    backend = tokenizer.backend_tokenizer
    try:
        if isinstance(backend.normalizer, normalizers.NFC):
            # As the original: with Python's tables. Those of `tokenizers` lack the newest combining marks.
            normalized = unicodedata.normalize("NFC", text)
        else:
            normalized = backend.normalizer.normalize_str(text) if backend.normalizer else text
        pieces = backend.pre_tokenizer.pre_tokenize_str(normalized)
    except UnicodeEncodeError as error:
        raise ValueError(f"text {text!r} is not valid Unicode ({error.reason}); remove the lone surrogate") from error
    return [token.id for piece, _ in pieces for token in backend.model.tokenize(piece)]


def take_apart(tokenizer: PreTrainedTokenizerBase, text: str) -> Pieces:
    """The pieces of a text. Its control tokens are those that the tokenizer itself would find."""
    pieces: list[str | int] = []
    for piece in filter(None, _SURFACE.split(text)):
        ids = tokenizer.encode(piece, add_special_tokens=False) if _SURFACE.fullmatch(piece) else []
        is_control = len(ids) == 1 and ids != encode_plain(tokenizer, piece)
        pieces.append(ids[0] if is_control else piece)
    return pieces


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Pieces) -> list[int]:
    """Ids of pieces. Adjacent texts are encoded as one, so that no seam is left between them."""
    ids: list[int] = []
    for is_text, run in groupby(pieces, key=lambda piece: isinstance(piece, str)):
        if is_text:
            ids += encode_plain(tokenizer, "".join(map(str, run)))
        else:
            ids += map(int, run)
    return ids


def write_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Pieces) -> str:
    """Pieces as one text, with the surfaces of their tokens: "<|image start|>" for its id."""
    return "".join(piece if isinstance(piece, str) else tokenizer.convert_ids_to_tokens(piece) for piece in pieces)


class PlainText:
    """What a layout needs of a tokenizer: words to ids and back, without control tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """See `encode_plain`."""
        return encode_plain(self.tokenizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control and visual tokens are left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def _make_byte_level(model: models.BPE) -> Tokenizer:
    """A tokenizer around `model`: it composes text (NFC), splits it by `SPLIT_PATTERN` and encodes the bytes."""
    backend = Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap it for transformers, with the attributes of `CONTROL_TOKENS`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **{name: CONTROL_TOKENS[name] for name in _BASE_ATTRIBUTES},
        extra_special_tokens={name: s for name, s in CONTROL_TOKENS.items() if name not in _BASE_ATTRIBUTES},
    )


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Read a file of lines `base64 rank`. Returns bytes -> rank, by ascending rank."""
    try:
        pairs = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"{file} is no tiktoken file: its lines are `base64 rank` ({error})") from error
    if sorted(ranks.values()) != list(range(len(pairs))):
        raise ValueError(f"{file} holds {len(pairs)} lines, but their ranks are not 0 to {len(pairs) - 1}")
    if not all(bytes([byte]) in ranks for byte in range(_BYTES)):
        raise ValueError(f"{file} has no rank for some of the {_BYTES} single bytes; get the checkpoint again")
    return dict(sorted(ranks.items(), key=lambda pair: pair[1]))


def _byte_letters() -> list[str]:
    """The printable letter for each byte in a byte-level BPE: its own, or the next unused one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(_BYTES, 2 * _BYTES))
    return [chr(byte if byte in printable else next(others)) for byte in range(_BYTES)]
