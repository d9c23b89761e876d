"""Prompts: words and pictures in, token ids and pixels out, in the layout that Emu3 is trained on.

    drawing     bos text boi H*W img                                  the model goes on with visual tokens
    reading     bos text boi H*W img placeholders eof eoi text        H*(W+1) placeholders for H rows and their ends
    chatting    bos You are a helpful assistant. USER: ... . ASSISTANT:

H and W count tokens, not pixels. The processor sees no network: the model puts visual tokens over the placeholders.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import MultiModalData, ProcessingKwargs, TextKwargs
from transformers.utils import logging

from emu3.chat import CHAT_TEMPLATE, STAND_IN, Message, as_plain, check_message, strip
from emu3.image_processing import Emu3ImageProcessor, Emu3ImageProcessorKwargs, flat_pictures, smart_resize
from emu3.layout import Emu3Layout
from emu3.segments import Shape, Visual
from emu3.tokenization import CONTROL_TOKENS, PlainText, encode_plain
from emu3.vocabulary import SURFACES, Vocabulary

logger = logging.get_logger(__name__)

Parts = list[str | int]
"""A prompt taken apart: a text is plain, an id is a control token, and the id of "<image>" marks a picture."""

# Every control and visual token is spelled <...> without further angle brackets inside.
_SURFACE = re.compile(r"(<[^<>]*>)")
# Options that only the tokenizer can serve. It then gets the whole prompt as a string, with pictures written out.
_BY_TOKENIZER = {
    "is_split_into_words",
    "return_length",
    "return_offsets_mapping",
    "return_overflowing_tokens",
    "return_special_tokens_mask",
    "return_text_replacement_offsets",
    "return_token_type_ids",
    "stride",
    "text_pair",
    "text_pair_target",
    "text_target",
}
_ENDLESS = 10**20  # what tokenizers say where they know no longest text


class Emu3TextKwargs(TextKwargs, total=False):  # type: ignore[call-arg]  # its base is unknown to mypy
    """What a call of the processor may say of texts."""

    return_for_image_generation: bool
    split_special_tokens: bool


class Emu3ProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]  # its base is unknown to mypy
    """What a call of the processor may say beside texts and pictures."""

    # Older releases of transformers read `_defaults`. With an annotation it would become an argument of the call.
    _defaults = {}  # type: ignore[var-annotated]  # noqa: RUF012

    text_kwargs: Emu3TextKwargs
    images_kwargs: Emu3ImageProcessorKwargs


# Libraries read from the signature what else a call takes; type checkers do not see into transformers.
if TYPE_CHECKING:
    Options = Any
else:
    Options = Unpack[Emu3ProcessorKwargs]


def generation_size(ratio: str, image_area: int, spatial_factor: int) -> tuple[int, int]:
    """(height, width) in tokens of a picture of `ratio` ("width:height") and about `image_area` pixels.

    `spatial_factor` is the pixels per token side. `f"{width}:{height}"` and `width * height` give exactly that size
    where the factor divides it. Raises ValueError for a ratio that is not two positive integers, and for an area too
    small for one token a side.
    """
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(ratio))
    width, height = map(int, match.groups()) if match else (0, 0)
    if width < 1 or height < 1:
        raise ValueError(f'ratio={ratio!r} is not "width:height" in positive integers, such as "16:9"')
    if image_area < 1:
        raise ValueError(f"image_area={image_area} holds no pixel; give a positive number of pixels")
    scale = (image_area / (width * height)) ** 0.5
    token_height, token_width = round(height * scale / spatial_factor), round(width * scale / spatial_factor)
    if min(token_height, token_width) < 1:
        raise ValueError(
            f"image_area={image_area} at ratio={ratio} is {token_height}x{token_width} tokens "
            f"of {spatial_factor} pixels a side; give a larger area or a ratio closer to 1:1"
        )
    return token_height, token_width


class Emu3Processor(ProcessorMixin):
    """An image processor and a tokenizer that together write Emu3's prompts.

    Args:
        image_processor: its `spatial_factor` is the number of pixels per token side.
        tokenizer: has the attributes named in `emu3.tokenization.CONTROL_TOKENS`.
        chat_template: Jinja source; by default the tokenizer's, else `CHAT_TEMPLATE`.
        image_area: pixels of a picture to draw where a call names none; what the model was trained on.
    """

    valid_processor_kwargs = Emu3ProcessorKwargs
    image_area: int = 518400

    def __init__(
        self,
        image_processor: Emu3ImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        # In `kwargs`, as transformers takes the default of a call's option from an attribute of that name.
        self.image_area = kwargs.pop("image_area", self.image_area)
        self.image_token: str = tokenizer.image_token
        self.image_token_id: int = tokenizer.image_token_id
        # The names that transformers gives to the control tokens of a picture.
        self.image_start_token: str = tokenizer.boi_token
        self.image_end_token: str = tokenizer.eoi_token
        self.fake_token_around_image: str = tokenizer.image_wrapper_token
        self.eof_token: str = tokenizer.eof_token
        self.bos_token: str = tokenizer.bos_token
        super().__init__(
            image_processor,
            tokenizer,
            chat_template=chat_template or tokenizer.chat_template or CHAT_TEMPLATE,
            **kwargs,
        )

    # transformers saves and loads only what `__init__` names. `image_area` is not named there, so these methods add it.
    def to_dict(self) -> dict[str, Any]:
        own = {} if self.image_area == type(self).image_area else {"image_area": self.image_area}
        return dict(super().to_dict()) | own

    @staticmethod
    def validate_init_kwargs(processor_config: dict[str, Any], valid_kwargs: Sequence[str]) -> Any:
        return ProcessorMixin.validate_init_kwargs(processor_config, [*valid_kwargs, "image_area"])

    @property
    def downsample_ratio(self) -> int:
        """Pixels per token side: the image processor's `spatial_factor`."""
        return int(self.image_processor.spatial_factor)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        # The inherited method looks classes up by name among those of transformers, where another one is called
        # Emu3ImageProcessor. Prompts of a batch must end together, so the tokenizer pads on the left.
        kwargs = {"trust_remote_code": False, **kwargs}
        return [
            Emu3ImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
            AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **{"padding_side": "left", **kwargs}),
        ]

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, videos: Any = None, **kwargs: Options
    ) -> BatchFeature:
        """Ids of one text or several, each "<image>" in them standing for the next picture.

        Args:
            images: pictures in the order of their marks, flat or one list per text. An address, a path or base64 is
                read, see `emu3.pictures.open_picture`.
            text: one prompt, or B of them; None gives the pictures alone.
            videos: left out, which is logged.
            return_for_image_generation: end each prompt where its picture begins; takes no `images`.
            ratio, image_area: size of the picture to draw (see `generation_size`), for all prompts or one each; the
                area is the processor's own by default.
            split_special_tokens: read `text` as plain text, so that no control token and no "<image>" in it counts.
            add_special_tokens: put bos before each text, unless it is there; on by default.
            padding: True or "longest", "max_length" (with `max_length`), False.
            truncation: cut the end of texts, so that no row is longer than `max_length`; a picture is never cut.
            pad_to_multiple_of, padding_side: as in tokenizers; the side is the tokenizer's by default.
            return_attention_mask: on by default.
            return_mm_token_type_ids: 1 for each placeholder of a picture, 0 for others.
            return_tensors: "pt", "np" or None for lists.
            **kwargs: these, and the arguments of the image processor and the tokenizer. They may also stand in
                `text_kwargs`, `images_kwargs`, or for both in `common_kwargs`, which come before the defaults of
                tokenizer and image processor. What nobody takes is logged.

        Returns `input_ids` and `attention_mask` (B, S), for pictures `pixel_values` and `image_sizes` (height and
        width in pixels), for drawing `image_sizes` (B, 2) in tokens. Raises ValueError where pictures and marks, or
        sizes and prompts, differ in number, where a picture would have to be cut, and for an option given twice.
        """
        if videos is not None:
            logger.warning_once("the processor reads no clips and leaves out videos; give a clip's pictures as images")
        for_text, for_images = self._options(kwargs)
        drawing = for_text.pop("return_for_image_generation", False)
        plain = for_text.pop("split_special_tokens", False)
        ratio, area = for_images.pop("ratio", None) or "1:1", for_images.pop("image_area", None)
        if images is not None:
            images = self.image_processor.fetch_images(images)
        if text is None and images is not None:
            return self.image_processor(list(flat_pictures(images)), **for_images)
        texts = [text] if isinstance(text, str) else list(text or ())
        if not texts or not all(isinstance(sample, str) for sample in texts):
            raise ValueError(f"text={text!r:.80} is no prompt; give a string or a non-empty list of strings")
        sizes: list[tuple[int, int]] = []
        if drawing and images is not None:
            raise ValueError(
                "images and return_for_image_generation=True exclude each other: such a prompt ends where its picture "
                "begins; leave out one of them"
            )
        if drawing:
            areas = _one_each("image_area", self.image_area if area is None else area, len(texts))
            ratios = _one_each("ratio", ratio, len(texts))
            factor = self.image_processor.spatial_factor
            sizes = [generation_size(*each, factor) for each in zip(ratios, areas, strict=True)]
        if asked := sorted(name for name in _BY_TOKENIZER if for_text.get(name)):
            if plain:
                raise ValueError(f"{', '.join(asked)} cannot be had of plain text; leave out split_special_tokens")
            return self._by_tokenizer(texts, images, sizes, for_text, for_images)
        prompts: list[Parts] = [[sample] if plain else self._take_apart(sample) for sample in texts]
        return self._assemble(prompts, images, sizes, for_text, for_images)

    def _options(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments for texts and those for pictures, after the precedence that transformers has."""
        try:
            merged = self._merge_kwargs(Emu3ProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"an argument of the processor cannot be used: {error}") from error
        for_text = merged["text_kwargs"]
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):
            if merged.get(name) is not None:  # where newer releases keep what is for text and pictures
                for_text.setdefault(name, merged[name])
        return for_text, merged["images_kwargs"]

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        split_special_tokens: bool = False,
        sanitize_control_tokens: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A conversation, or several, as the template's text, or with `tokenize` as ids.

        Args:
            conversation: messages, see `emu3.chat.Message`; or a list of conversations.
            chat_template: in place of the processor's own.
            tokenize: give ids, with the pictures of the conversation in their places.
            return_dict: with `tokenize`, give all that `__call__` returns, and not the `input_ids` alone.
            split_special_tokens, sanitize_control_tokens: with `tokenize`, read the messages' texts as plain text: the
                template's control tokens and pictures count, those that someone typed do not. Two names of one option.
            processor_kwargs: arguments of `__call__`. They may be given directly too.
            **kwargs: these, `add_generation_prompt` and the other arguments of transformers' method, and variables of
                the template.

        Raises:
            ValueError: a message that the template refuses, or content that is neither text nor picture.
        """
        if not conversation:
            raise ValueError("the conversation is empty; give at least one message")
        known = {"text_kwargs", "images_kwargs", "common_kwargs"}
        known |= Emu3TextKwargs.__annotations__.keys() | Emu3ImageProcessorKwargs.__annotations__.keys()
        own = {name: kwargs.pop(name) for name in known & kwargs.keys()}
        own = {"return_tensors": None, **own, **(processor_kwargs or {})}
        plain = split_special_tokens or sanitize_control_tokens
        if plain and not tokenize:
            raise ValueError("split_special_tokens=True needs tokenize=True: a string cannot say what is plain")
        talk = as_plain(conversation)
        single = not isinstance(talk[0], list)
        conversations = [talk] if single else talk
        for message in (message for turns in conversations for message in turns):
            check_message(message)
        if not plain:
            return self._render(
                talk,
                chat_template,
                tokenize=tokenize,
                return_dict=return_dict,
                return_tensors=own.pop("return_tensors"),
                processor_kwargs=own,
                **kwargs,
            )
        texts: list[str] = []
        images: list[list[Any]] = [[] for _ in conversations]
        stripped = [
            [strip(message, texts, own_images) for message in turns]
            for turns, own_images in zip(conversations, images, strict=True)
        ]
        rendered = self._render(stripped, chat_template, **kwargs)
        for_text, for_images = self._options(own)
        outputs = self._assemble(
            [self._fill(prompt, texts) for prompt in rendered],
            self.image_processor.fetch_images(images) if any(images) else None,
            [],
            for_text,
            for_images,
        )
        return outputs if return_dict else outputs["input_ids"]

    def calculate_generate_size(self, ratio: str, image_area: int, spatial_factor: int) -> tuple[int, int]:
        """(height, width) in tokens of a picture to draw: `generation_size`."""
        return generation_size(ratio, image_area, spatial_factor)

    def postprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Pixels that the model decoded as pictures: `Emu3ImageProcessor.postprocess`."""
        return self.image_processor.postprocess(images, **kwargs)

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Texts of generated ids, or with `generation_mode="image"` PIL pictures of decoded pixels.

        `kwargs` go to the tokenizer's `decode`. Raises ValueError for any other mode.
        """
        if generation_mode == "image":
            return list(self.postprocess(generated_outputs)["pixel_values"])
        if generation_mode not in (None, "text"):
            raise ValueError(f'generation_mode={generation_mode!r} is not supported; give "text" or "image"')
        texts = self.tokenizer.decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return [texts] if isinstance(texts, str) else texts

    def _render(self, conversation: Any, chat_template: str | None, **kwargs: Any) -> Any:
        """transformers' method; ValueError where the template refuses, or its own code fails."""
        try:
            return super().apply_chat_template(conversation, chat_template, **kwargs)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        except (TypeError, KeyError, ArithmeticError) as error:
            if kwargs.get("tokenize"):  # then it may come from anything behind the template
                raise
            raise ValueError(f"the chat template fails at this conversation: {error}") from error

    def _take_apart(self, text: str) -> Parts:
        """`text` with its control tokens as ids, as the tokenizer itself would find them."""
        parts: Parts = []
        for index, piece in enumerate(_SURFACE.split(text)):  # every second piece looks like a control token
            ids = self.tokenizer.encode(piece, add_special_tokens=False) if index % 2 else []
            is_control = len(ids) == 1 and ids != encode_plain(self.tokenizer, piece)
            parts.append(ids[0] if is_control else piece)
        return parts

    def _fill(self, prompt: str, texts: Sequence[str]) -> Parts:
        """A rendered prompt with its texts put in for their stand-ins, as plain text."""
        pieces = STAND_IN.split(prompt)  # template, number of a text, template, number of a text, ..., template
        parts: Parts = []
        for index, piece in enumerate(pieces):
            parts += [texts[int(piece)]] if index % 2 else self._take_apart(piece)
        return parts

    @cached_property
    def _layout(self) -> Emu3Layout:
        """Spells pictures that are not encoded yet: each visual and each end-of-row token is a placeholder."""
        roles = {SURFACES[role]: role for role in SURFACES}
        ids = {roles[surface]: getattr(self.tokenizer, f"{name}_id") for name, surface in CONTROL_TOKENS.items()}
        placeholder = ids["image_placeholder"]
        vocabulary = Vocabulary(visual_base=placeholder, codebook_size=1, control=ids | {"eol": placeholder})
        return Emu3Layout(vocabulary, PlainText(self.tokenizer))

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """What a picture is written out as: transformers' name for it."""
        height, width = (int(side) // self.downsample_ratio for side in image_inputs["image_sizes"][image_idx])
        return self._written_out(self._layout.spell([_unknown(height, width)]))

    def _written_out(self, ids: list[int]) -> str:
        """The surfaces of a picture's tokens, joined; its digits stand for themselves."""
        return "".join(self.tokenizer.convert_ids_to_tokens(ids))

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """How many placeholders pictures of so many (height, width) pixels take; servers ask by this name."""
        if image_sizes is None:
            return MultiModalData()
        pictures = self.image_processor
        sizes = [
            smart_resize(int(height), int(width), pictures.spatial_factor, pictures.min_pixels, pictures.max_pixels)
            for height, width in image_sizes
        ]
        ratio = self.downsample_ratio
        tokens = [(height // ratio) * (width // ratio + 1) for height, width in sizes]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * len(tokens))

    def _process_pictures(
        self, images: Any, marks: Sequence[int], for_images: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[tuple[int, int]]]:
        """The image processor's output, and the sizes in tokens of the pictures, one for each mark."""
        _check_counts(list(marks), images)
        if images is None or not (pictures := list(flat_pictures(images))):
            return {}, []
        data = dict(self.image_processor(pictures, **for_images))
        ratio = for_images.get("spatial_factor") or self.downsample_ratio
        return data, [(int(height) // ratio, int(width) // ratio) for height, width in data["image_sizes"]]

    def _by_tokenizer(
        self,
        texts: list[str],
        images: Any,
        sizes: Sequence[tuple[int, int]],
        for_text: dict[str, Any],
        for_images: Mapping[str, Any],
    ) -> BatchFeature:
        """As `_assemble`, by the tokenizer itself, which is given whole prompts as strings."""
        data, _ = self._process_pictures(images, [text.count(self.image_token) for text in texts], for_images)
        replacements = [self.replace_image_token(data, index) for index in range(len(data.get("image_sizes", ())))]
        if for_text.get("add_special_tokens", True):
            texts = [text if text.startswith(self.bos_token) else self.bos_token + text for text in texts]
        wants_types = for_text.pop("return_mm_token_type_ids", False)
        wants_offsets = for_text.pop("return_text_replacement_offsets", False)
        texts, offsets = self.get_text_with_replacements(texts, replacements)
        ends = [self._written_out(self._layout.opening(Shape(*size))) for size in sizes] or [""] * len(texts)
        encoded = self.tokenizer([text + end for text, end in zip(texts, ends, strict=True)], **for_text)
        if wants_types:
            encoded["mm_token_type_ids"] = self._kinds([list(map(int, row)) for row in encoded["input_ids"]])
        if wants_offsets:
            encoded["text_replacement_offsets"] = offsets
        if sizes:
            data["image_sizes"] = [list(size) for size in sizes]
        return BatchFeature(
            data={**encoded, **data},
            tensor_type=for_text.get("return_tensors"),
            skip_tensor_conversion=["text_replacement_offsets"],
        )

    def _kinds(self, rows: list[list[int]]) -> list[list[int]]:
        """1 for each placeholder of a picture, 0 for others."""
        return [[int(token == self.image_token_id) for token in row] for row in rows]

    def _assemble(
        self,
        prompts: list[Parts],
        images: Any,
        sizes: Sequence[tuple[int, int]],
        for_text: Mapping[str, Any],
        for_images: Mapping[str, Any],
    ) -> BatchFeature:
        """Ids of `prompts` with `images` at their marks; `sizes` in tokens of the pictures that they ask for."""
        marks = [parts.count(self.image_token_id) for parts in prompts]
        data, picture_sizes = self._process_pictures(images, marks, for_images)
        rows: list[list[int]] = []
        remaining = iter(picture_sizes)
        for parts in prompts:
            ids: list[int] = []
            # Neighbouring texts are encoded as one, so that the seam between template and user leaves no trace.
            for is_text, run in groupby(parts, key=lambda part: isinstance(part, str)):
                if is_text:
                    ids += encode_plain(self.tokenizer, "".join(map(str, run)))
                else:
                    for token in map(int, run):
                        is_picture = token == self.image_token_id
                        ids += self._layout.spell([_unknown(*next(remaining))]) if is_picture else [token]
            bos = self.tokenizer.bos_token_id
            wants_bos = for_text.get("add_special_tokens") in (None, True)
            rows.append([bos, *ids] if wants_bos and ids[:1] != [bos] else ids)
        ends = [self._layout.opening(Shape(*size)) for size in sizes] or [[] for _ in rows]
        if _switched_on("truncation", for_text, ("longest_first", "only_first"), "do_not_truncate"):
            longest = self._longest("truncation=True", for_text)
            rows = [self._cut(ids, longest - len(end)) for ids, end in zip(rows, ends, strict=True)]
        rows = [ids + end for ids, end in zip(rows, ends, strict=True)]
        if sizes:
            data["image_sizes"] = [list(size) for size in sizes]
        padded = self._pad(rows, for_text)
        if for_text.get("return_mm_token_type_ids"):
            padded["mm_token_type_ids"] = self._kinds(padded["input_ids"])
        return BatchFeature(data={**padded, **data}, tensor_type=for_text.get("return_tensors"))

    def _longest(self, option: str, for_text: Mapping[str, Any]) -> int:
        """The length to cut or to pad to: what the call says, or the tokenizer. ValueError where neither does."""
        given = for_text.get("max_length")
        longest: int = self.tokenizer.model_max_length if given is None else given
        if longest >= _ENDLESS:
            raise ValueError(f"{option} needs max_length, a number of tokens; this tokenizer has none of its own")
        return longest

    def _pad(self, rows: list[list[int]], for_text: Mapping[str, Any]) -> dict[str, list[list[int]]]:
        """`input_ids` and `attention_mask` of `rows`, brought to one length as `padding` says; nothing is cut."""
        multiple, length = for_text.get("pad_to_multiple_of") or 1, 0
        if _switched_on("padding", for_text, ("longest", "max_length"), "do_not_pad"):
            wants_most = for_text["padding"] == "max_length"
            length = self._longest('padding="max_length"', for_text) if wants_most else max(map(len, rows))
        length = -(-length // multiple) * multiple
        input_ids, attention_mask = [], []
        for ids in rows:
            fill = [self.tokenizer.pad_token_id] * (length - len(ids))
            masked, attended = [0] * len(fill), [1] * len(ids)
            left = (for_text.get("padding_side") or self.tokenizer.padding_side) == "left"
            input_ids.append([*fill, *ids] if left else [*ids, *fill])
            attention_mask.append([*masked, *attended] if left else [*attended, *masked])
        if for_text.get("return_attention_mask") is False:
            return {"input_ids": input_ids}
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _cut(self, ids: list[int], length: int) -> list[int]:
        """The first `length` ids; ValueError where nothing would be left, or a picture be cut."""
        kept, cut = ids[: max(0, length)], ids[max(0, length) :]
        if cut and (not kept or self.image_token_id in cut or self.tokenizer.eoi_token_id in cut):
            raise ValueError(
                f"a prompt of {len(ids)} tokens cannot be cut to {length}: a picture would be cut, or no text be left; "
                "raise max_length, or give smaller pictures"
            )
        return kept


def _unknown(height: int, width: int) -> Visual:
    """A picture of so many tokens whose codes are not known yet."""
    return Visual(np.zeros((1, height, width), dtype=np.int32))


def _one_each(name: str, value: Any, count: int) -> list[Any]:
    """`value` for each of `count` prompts, where it is not a list of that many already."""
    if isinstance(value, str | int):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} lists {len(value)} values for {count} prompts; give one for all, or one each")
    return list(value)


def _switched_on(name: str, options: Mapping[str, Any], ways: tuple[str, ...], off: str) -> bool:
    """Whether an option is True or one of its `ways`. ValueError where it is none of these, nor off."""
    value = options.get(name)
    if value not in (None, True, False, off, *ways):
        raise ValueError(f"{name}={value!r} is unknown; give True, False or one of {', '.join(map(repr, ways))}")
    return value not in (None, False, off)


def _check_counts(marks: list[int], images: Any) -> None:
    """ValueError unless there is a picture for each mark: prompt by prompt for nested lists, else in all."""
    nested = isinstance(images, list | tuple) and images and all(isinstance(own, list | tuple) for own in images)
    shares = images if nested else [() if images is None else images]
    pictures = [sum(1 for _ in flat_pictures(share)) for share in shares]
    if pictures != (marks if nested else [sum(marks)]):
        raise ValueError(
            "the number of <image> tokens in the prompts should be the same as the number of pictures: "
            f"{sum(pictures)} pictures for {sum(marks)} tokens (by prompt: {pictures} for {marks}); give them in order"
        )
