"""The text tokenizer: byte-level BPE, then control tokens, then visual tokens, all with contiguous ids.

    0 ......... N-1 | <|endoftext|> <image> ... <|image end|> | <|visual token 000000|> ... <|visual token K-1|>
    byte-level BPE  | control tokens, in CONTROL_TOKENS order  | one per entry of the vision codebook

Every token after the BPE is *special*: it is left out by `decode(..., skip_special_tokens=True)`, and `encode_plain`
never returns it, whatever the text says.
"""

from collections.abc import Iterable

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
"""Tokenizer attribute -> surface, in the order of the ids."""

# Emu3 splits text as Qwen does: every digit stands alone, so a picture's "12*9" is always '1', '2', '*', '9'.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_BASE_ATTRIBUTES = ("bos_token", "eos_token", "pad_token")
_BYTES = 256


def visual_token(code: int) -> str:
    """Surface of the token that stands for entry `code` of the vision codebook."""
    return f"<|visual token {code:06d}|>"


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, codebook_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocabulary_size` entries on `texts` and add the control and visual tokens after it.

    The same texts in the same order give the same tokenizer. It pads on the left and has the attributes named in
    `CONTROL_TOKENS`, each with its `_id` form. Raises ValueError for a size below the 256 bytes, an empty codebook, or
    texts that hold fewer pairs to merge than asked for.
    """
    if vocabulary_size < _BYTES:
        raise ValueError(f"vocabulary_size={vocabulary_size} cannot hold the {_BYTES} bytes; ask for at least {_BYTES}")
    if codebook_size < 1:
        raise ValueError(f"codebook_size={codebook_size} leaves no visual token; ask for at least 1")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
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
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **{name: CONTROL_TOKENS[name] for name in _BASE_ATTRIBUTES},
        extra_special_tokens={name: s for name, s in CONTROL_TOKENS.items() if name not in _BASE_ATTRIBUTES},
    )


def vocabulary_map(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Surface -> id of every control and visual token, by ascending id: what `Emu3Config.vocabulary_map` holds."""
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
    """Ids of `text` read as plain text: "<image>" or "<|image start|>" in it are so many ordinary characters.

    The BPE model is asked directly, so no control or visual token can come out, and nothing shared is switched
    meanwhile: threads may use one tokenizer. Raises ValueError for text that is not valid Unicode.
    """
    backend = tokenizer.backend_tokenizer
    try:
        normalized = backend.normalizer.normalize_str(text) if backend.normalizer else text
        pieces = backend.pre_tokenizer.pre_tokenize_str(normalized)
    except UnicodeEncodeError as error:
        raise ValueError(f"text {text!r} is not valid Unicode ({error.reason}); remove the lone surrogate") from error
    return [token.id for piece, _ in pieces for token in backend.model.tokenize(piece)]
