"""From conversations and pictures to the token ids and pixels that Emu3 is trained on, and back.

    messages      [{"role": "user", "content": [{"type": "image", "image": cat}, {"type": "text", "text": "Why?"}]}]
    prompt        You are a helpful assistant. USER: <image>Why?. ASSISTANT:
    pieces        bos, "You are a helpful assistant. USER: ", <image>, "Why?. ASSISTANT:"
    input_ids     bos, ids of the first text, boi, 2*3, img, 8 placeholders, eof, eoi, ids of the second text
    pixel_values  the cat's pixels, resized to whole tokens; image_sizes: their height and width, here 16 and 24

`apply_chat_template` renders messages as a prompt. `__call__` splits a prompt into pieces, which are plain texts and
control tokens. `_encode` turns pieces into ids. The cat has 2 rows of 3 tokens, and each row takes one more placeholder
for its end. The processor has no network: the model computes the visual tokens from `pixel_values` and writes them over
the placeholders.

For drawing, the prompt ends where its picture begins, and the model goes on with visual tokens:

    input_ids     bos, ids of the text, boi, 90*90, img; image_sizes: 90 and 90, in tokens

Back: `post_process_multimodal_output` turns generated ids into texts. The model's `decode_image_tokens` turns visual
tokens into pixels, and `post_process_multimodal_output` turns these into pictures.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Unpack

from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import MultiModalData, ProcessingKwargs, TextKwargs
from transformers.utils import logging

from emu3.chat import CHAT_TEMPLATE, STAND_IN, Message, read_conversation, strip
from emu3.image_processing import (
    Emu3ImageProcessor,
    Emu3ImageProcessorKwargs,
    check_counts,
    flat_pictures,
    generation_sizes,
)
from emu3.layout import Emu3Layout
from emu3.options import check_folder_or_id
from emu3.segments import Shape
from emu3.sizes import generation_size, smart_resize
from emu3.tokenization import CONTROL_TOKENS, Pieces, PlainText, encode_pieces, take_apart, write_pieces
from emu3.vocabulary import Vocabulary

logger = logging.get_logger(__name__)

# Options that only the tokenizer's own call can serve, see `_encode_by_tokenizer`.
_TOKENIZER_ONLY = (
    "return_offsets_mapping",  # for each token: where it begins and ends in the written-out prompt
    "return_text_replacement_offsets",  # for each picture: where it is in the prompt and in the written-out prompt
    "return_overflowing_tokens",  # what truncation cuts off comes back as further rows
    "stride",  # how many tokens such a row repeats of the row before
    *("return_special_tokens_mask", "return_token_type_ids", "return_length"),  # more about each row
    *("text_pair", "text_target", "text_pair_target", "is_split_into_words"),  # texts in other forms
)


class Emu3TextKwargs(TextKwargs, total=False):  # type: ignore[call-arg]  # its base is unknown to mypy
    """Options of a call for its texts."""

    return_for_image_generation: bool
    split_special_tokens: bool


class Emu3ProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]  # its base is unknown to mypy
    """Options of a call."""

    # Older releases of transformers read `_defaults`. With an annotation it would become an argument of the call.
    _defaults = {}  # type: ignore[var-annotated]  # noqa: RUF012

    text_kwargs: Emu3TextKwargs
    images_kwargs: Emu3ImageProcessorKwargs


class _Options(NamedTuple):
    """Options of a call: for its texts, for its pictures, and (ratio, image_area) if it asks for pictures."""

    text: dict[str, Any]
    images: dict[str, Any]
    drawing: tuple[Any, Any] | None


class Emu3Processor(ProcessorMixin):
    """An image processor and a tokenizer that together write Emu3's prompts.

    Args:
        image_processor: its `spatial_factor` is the number of pixels per token side.
        tokenizer: has the attributes named in `emu3.tokenization.CONTROL_TOKENS`.
        chat_template: Jinja source; by default the tokenizer's, else `CHAT_TEMPLATE`.
        image_area: pixels of a picture to draw where a call does not say; by default those of the training.
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
        # In `kwargs`, because transformers forbids a named argument that is also an option of a call.
        self.image_area = kwargs.pop("image_area", self.image_area)
        self.image_token: str = tokenizer.image_token
        self.image_token_id: int = tokenizer.image_token_id
        # The names that transformers gives to the control tokens of a picture.
        self.image_start_token: str = tokenizer.boi_token
        self.image_end_token: str = tokenizer.eoi_token
        self.fake_token_around_image: str = tokenizer.image_wrapper_token
        self.eof_token: str = tokenizer.eof_token
        self.bos_token: str = tokenizer.bos_token
        template = chat_template or tokenizer.chat_template or CHAT_TEMPLATE
        super().__init__(image_processor, tokenizer, chat_template=template, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in `ProcessorMixin`."""
        check_folder_or_id(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    # transformers saves and loads only what `__init__` names. So these two add `image_area`.
    def to_dict(self) -> dict[str, Any]:
        own = {} if self.image_area == type(self).image_area else {"image_area": self.image_area}
        return dict(super().to_dict()) | own

    @staticmethod
    def validate_init_kwargs(processor_config: dict[str, Any], valid_kwargs: Sequence[str]) -> Any:
        return ProcessorMixin.validate_init_kwargs(processor_config, [*valid_kwargs, "image_area"])

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

    # 1. From messages to a prompt.

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
        """The prompt of a conversation, or of several; with `tokenize` its ids.

        Raises ValueError for a message that the template refuses, and for content that is neither text nor picture.

        Args:
            conversation: messages, see `emu3.chat.Message`; or a list of conversations.
            chat_template: in place of the processor's own.
            tokenize: go on to ids, with the pictures that the messages hold.
            return_dict: with `tokenize`, give all that `__call__` returns, and not the `input_ids` alone.
            split_special_tokens, sanitize_control_tokens: two names of one option, which needs `tokenize`: what a
                message's text spells like a control token or "<image>" is plain text. Those of the template count.
            processor_kwargs: options of `__call__`.
            **kwargs: more options of `__call__`, `add_generation_prompt` and the other arguments of transformers'
                method, and variables of the template.
        """
        plain = split_special_tokens or sanitize_control_tokens
        if plain and not tokenize:
            raise ValueError("split_special_tokens=True needs tokenize=True: a string cannot say what is plain")
        talk = read_conversation(conversation)
        # Options of `__call__` may be among `kwargs`.
        known = Emu3ProcessorKwargs.__annotations__.keys() | {"common_kwargs"}
        known |= Emu3TextKwargs.__annotations__.keys() | Emu3ImageProcessorKwargs.__annotations__.keys()
        options = {name: kwargs.pop(name) for name in known & kwargs.keys()} | dict(processor_kwargs or {})
        if not plain:
            # With `tokenize`, transformers' method calls `__call__` with the rendered prompt and the pictures.
            tensors = options.pop("return_tensors", None)
            kwargs |= {"tokenize": tokenize, "return_dict": return_dict, "return_tensors": tensors}
            return self._render(talk, chat_template, processor_kwargs=options, **kwargs)
        # The template gets stand-ins for the texts, so that every "<image>" in what it renders is its own.
        stripped, texts, images = strip(talk if isinstance(talk[0], list) else [talk])
        prompts = [self._fill(prompt, texts) for prompt in self._render(stripped, chat_template, **kwargs)]
        plain_options = self._sort_options({**options, "split_special_tokens": True})
        output = self._encode(prompts, images if any(images) else None, plain_options)
        return output if return_dict else output["input_ids"]

    def _render(self, conversation: Any, chat_template: str | None, **kwargs: Any) -> Any:
        """transformers' method, with a ValueError where the template refuses the conversation or fails."""
        try:
            return super().apply_chat_template(conversation, chat_template, **kwargs)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        except (TypeError, KeyError, ArithmeticError) as error:
            if kwargs.get("tokenize"):  # then it may come from anything behind the template
                raise
            raise ValueError(f"the chat template fails at this conversation: {error}") from error

    def _fill(self, prompt: str, texts: Sequence[str]) -> Pieces:
        """The pieces of a rendered prompt in which `texts` take the places of their stand-ins, as plain text."""
        pieces: list[str | int] = []
        for index, part in enumerate(STAND_IN.split(prompt)):  # template, number of a text, template, ..., template
            pieces += [texts[int(part)]] if index % 2 else take_apart(self.tokenizer, part)
        return pieces

    # 2. From a prompt to pieces.

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        **kwargs: Unpack[Emu3ProcessorKwargs],  # type: ignore[misc]
    ) -> BatchFeature:
        """Ids of one prompt or several. Each "<image>" in them marks the place of the next picture.

        Args:
            images: pictures in the order of their marks, flat or one list per prompt: PIL pictures, arrays, tensors,
                or strings for `emu3.pictures.open_picture`.
            text: one prompt, or B of them; None gives the pictures alone.
            videos: left out, with a warning.
            return_for_image_generation: end each prompt where its picture begins. `images` must be None.
            ratio, image_area: size of the pictures to draw (see `generation_size`), for all prompts or one each; by
                default "1:1" and the processor's own area.
            split_special_tokens: read `text` as plain text: no control token and no "<image>" in it counts.
            add_special_tokens: put bos before each prompt that does not begin with it; on by default.
            truncation: cut the end of prompts, so that no row is longer than `max_length`. A picture is never cut,
                except with those options that only the tokenizer serves, such as `return_overflowing_tokens`.
            padding, pad_to_multiple_of, padding_side, return_attention_mask, return_tensors: as in tokenizers.
            return_mm_token_type_ids: 1 for each placeholder of a picture, 0 for others.
            **kwargs: these, and the options of the image processor and the tokenizer. They may also stand in the dicts
                `text_kwargs` and `images_kwargs`, or for both in `common_kwargs`. A warning names unknown ones.

        Returns `input_ids` and `attention_mask` (B, S); with pictures `pixel_values` and `image_sizes`, (height, width)
        in pixels; for drawing `image_sizes` (B, 2) in tokens. Raises ValueError where pictures and marks, or sizes and
        prompts, differ in number, where a picture would have to be cut, and for an option given twice.
        """
        if videos is not None:
            logger.warning_once("the processor reads no clips and leaves out videos; give a clip's pictures as images")
        options = self._sort_options(kwargs)
        if text is None and images is not None:
            return self.image_processor(list(flat_pictures(images)), **options.images)
        texts = [text] if isinstance(text, str) else list(text) if isinstance(text, list | tuple) else []
        if not texts or not all(isinstance(sample, str) for sample in texts):
            raise ValueError(f"text={text!r:.80} is no prompt; give a string or a non-empty list of strings")
        plain = options.text.get("split_special_tokens")
        prompts: list[Pieces] = [[sample] if plain else take_apart(self.tokenizer, sample) for sample in texts]
        return self._encode(prompts, images, options)

    def _sort_options(self, given: Mapping[str, Any]) -> _Options:
        """The options of a call, sorted and completed with defaults by transformers' rules."""
        try:
            merged = self._merge_kwargs(Emu3ProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **given)
        except StrictDataclassError as error:
            raise ValueError(f"an argument of the processor cannot be used: {error}") from error
        for_text, for_images = merged["text_kwargs"], merged["images_kwargs"]
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):
            if merged.get(name) is not None:  # newer releases do not put these two with the text
                for_text.setdefault(name, merged[name])
        asked = sorted(name for name in _TOKENIZER_ONLY if for_text.get(name))
        if asked and for_text.get("split_special_tokens"):
            raise ValueError(f"{', '.join(asked)} cannot be had for plain text; leave out split_special_tokens")
        ratio, area = for_images.pop("ratio", None) or "1:1", for_images.pop("image_area", None)
        drawing = (ratio, self.image_area if area is None else area)
        return _Options(for_text, for_images, drawing if for_text.pop("return_for_image_generation", False) else None)

    # 3. From pieces to ids, and from pictures to pixels.

    def _encode(self, prompts: list[Pieces], images: Any, options: _Options) -> BatchFeature:
        """What `__call__` returns, for prompts in pieces and their pictures."""
        if options.drawing and images is not None:
            raise ValueError(
                "images and return_for_image_generation=True exclude each other: such a prompt ends where its picture "
                "begins; leave out one of them"
            )
        sizes = generation_sizes(*options.drawing, self.downsample_ratio, len(prompts)) if options.drawing else []
        # An ending opens the picture to draw. It is kept apart, as truncation must not cut it.
        endings = [self._layout.opening(Shape(*size)) for size in sizes] or [[] for _ in prompts]
        data, pictures = self._process_pictures(prompts, images, options.images)
        if options.text.get("add_special_tokens") in (None, True):
            bos: int = self.tokenizer.bos_token_id
            prompts = [pieces if pieces[:1] == [bos] else [bos, *pieces] for pieces in prompts]
        wants_types = options.text.pop("return_mm_token_type_ids", False)
        needs_tokenizer = any(options.text.get(name) for name in _TOKENIZER_ONLY)
        encode = self._encode_by_tokenizer if needs_tokenizer else self._encode_pieces
        encoded = encode(prompts, pictures, endings, options.text)
        if wants_types:
            encoded["mm_token_type_ids"] = self.create_mm_token_type_ids(encoded["input_ids"])
        if sizes:
            data["image_sizes"] = [list(size) for size in sizes]
        tensors = options.text.get("return_tensors")
        return BatchFeature(encoded | data, tensor_type=tensors, skip_tensor_conversion=["text_replacement_offsets"])

    @property
    def _layout(self) -> Emu3Layout:
        """Spells pictures. Its vocabulary lacks what the processor never writes: visual tokens and ends of rows."""
        written = {name: surface for name, surface in CONTROL_TOKENS.items() if name != "eol_token"}
        control = {surface: getattr(self.tokenizer, f"{name}_id") for name, surface in written.items()}
        return Emu3Layout(Vocabulary.from_map(control), PlainText(self.tokenizer))

    def _process_pictures(
        self, prompts: list[Pieces], images: Any, options: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[list[int]]]:
        """The image processor's output, and for each picture the ids that take its place in a prompt."""
        check_counts(images, [pieces.count(self.image_token_id) for pieces in prompts])
        pictures = [] if images is None else list(flat_pictures(images))
        if not pictures:
            return {}, []
        data = dict(self.image_processor(pictures, **options))
        factor = options.get("spatial_factor") or self.downsample_ratio
        shapes = [Shape(int(height) // factor, int(width) // factor) for height, width in data["image_sizes"]]
        return data, [self._layout.placeholders(shape) for shape in shapes]

    def _encode_pieces(
        self, prompts: list[Pieces], pictures: list[list[int]], endings: list[list[int]], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """`input_ids` and `attention_mask`, cut and padded: the usual way, for all options but `_TOKENIZER_ONLY`."""
        remaining = iter(pictures)
        rows = []
        for pieces in prompts:
            parts = [next(remaining) if piece == self.image_token_id else [piece] for piece in pieces]
            rows.append(encode_pieces(self.tokenizer, list(chain.from_iterable(parts))))
        truncation, padding = options.get("truncation") or "do_not_truncate", options.get("padding") or False
        if truncation not in (True, "longest_first", "only_first", "do_not_truncate"):
            raise ValueError(f"truncation={truncation!r} is unknown; give True, False, 'longest_first' or 'only_first'")
        cuts, fills = truncation != "do_not_truncate", padding == "max_length"
        longest = self.tokenizer.model_max_length if options.get("max_length") is None else options["max_length"]
        if longest >= 10**20 and (cuts or fills):  # tokenizers without a limit have a larger number
            raise ValueError(
                "truncation and padding='max_length' need max_length, a number of tokens; this tokenizer has no limit"
            )
        if cuts:
            rows = [self._cut(ids, longest - len(ending)) for ids, ending in zip(rows, endings, strict=True)]
        padded = self.tokenizer.pad(
            {"input_ids": [ids + ending for ids, ending in zip(rows, endings, strict=True)]},
            padding=padding,
            max_length=longest if fills else None,
            **{name: options.get(name) for name in ("pad_to_multiple_of", "padding_side", "return_attention_mask")},
        )
        return dict(padded)

    def _cut(self, ids: list[int], length: int) -> list[int]:
        """The first `length` ids. ValueError where no id would be left, or a picture would be cut."""
        kept, cut = ids[: max(0, length)], ids[max(0, length) :]
        if cut and (not kept or self.image_token_id in cut or self.tokenizer.eoi_token_id in cut):
            raise ValueError(
                f"a prompt of {len(ids)} tokens cannot be cut to {length}: a picture would be cut, or no text be left; "
                "raise max_length, or give smaller pictures"
            )
        return kept

    def _encode_by_tokenizer(
        self, prompts: list[Pieces], pictures: list[list[int]], endings: list[list[int]], options: dict[str, Any]
    ) -> dict[str, Any]:
        """What the tokenizer returns for prompts written out as text, pictures and endings included.

        This is how transformers' own processor always encodes. Here truncation may cut a picture.
        """
        write = partial(write_pieces, self.tokenizer)
        texts, offsets = self.get_text_with_replacements([*map(write, prompts)], [*map(write, pictures)])
        wants_offsets = options.pop("return_text_replacement_offsets", False)
        texts = [text + write(ending) for text, ending in zip(texts, endings, strict=True)]
        encoded = dict(self.tokenizer(texts, **options))
        return encoded | {"text_replacement_offsets": offsets} if wants_offsets else encoded

    # Back: from generated ids to texts, and from decoded pixels to pictures.

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Texts of generated ids, or with `generation_mode="image"` PIL pictures of pixels; `kwargs` go to `decode`."""
        if generation_mode == "image":
            return list(self.postprocess(generated_outputs)["pixel_values"])
        if generation_mode not in (None, "text"):
            raise ValueError(f'generation_mode={generation_mode!r} is not supported; give "text" or "image"')
        texts = self.tokenizer.decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return [texts] if isinstance(texts, str) else texts

    def postprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Pixels that the model decoded as pictures: `Emu3ImageProcessor.postprocess`."""
        return self.image_processor.postprocess(images, **kwargs)

    # What else transformers and servers call.

    @property
    def downsample_ratio(self) -> int:
        """Pixels per token side: the image processor's `spatial_factor`."""
        return int(self.image_processor.spatial_factor)

    calculate_generate_size = staticmethod(generation_size)

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The text that takes the place of the "<image>" of a processed picture."""
        height, width = (int(side) // self.downsample_ratio for side in image_inputs["image_sizes"][image_idx])
        return write_pieces(self.tokenizer, self._layout.placeholders(Shape(height, width)))

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """How many placeholders pictures of these sizes, (height, width) in pixels, take."""
        if image_sizes is None:
            return MultiModalData()
        factor = self.downsample_ratio
        limits = self.image_processor.min_pixels, self.image_processor.max_pixels
        sizes = [smart_resize(int(height), int(width), factor, *limits) for height, width in image_sizes]
        tokens = [(height // factor) * (width // factor + 1) for height, width in sizes]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * len(tokens))
