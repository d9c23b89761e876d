"""Prompts: words and pictures in, token ids and pixels out, in the layout that Emu3 is trained on.

    drawing     bos text boi H*W img                                  the model goes on with visual tokens
    reading     bos text boi H*W img placeholders eof eoi text        H*(W+1) placeholders for H rows and their ends
    chatting    bos You are a helpful assistant. USER: ... . ASSISTANT:

H and W count tokens, not pixels. The processor sees no network: the model puts visual tokens over the placeholders.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from emu3.image_processing import Emu3ImageProcessor, flat_pictures
from emu3.tokenization import encode_plain

CHAT_TEMPLATE = """\
{%- macro parts(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}{{ '<image>' if part['type'] == 'image' else part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] != 'system' -%}You are a helpful assistant.{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' and loop.first -%}{{ parts(message['content']) }}
{%- elif message['role'] == 'user' -%}{{ ' USER: ' + parts(message['content']) + '.' }}
{%- elif message['role'] == 'assistant' -%}{{ ' ASSISTANT: ' + parts(message['content']) + eos_token }}
{%- else -%}{{ raise_exception('role ' + message['role'] + ' is out of place: give system (first), user, assistant') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}
"""
"""Emu3-Chat's sentence, which puts a full stop after every question; an answer is closed by eos."""

Message = Mapping[str, Any]
"""`{"role": ..., "content": text or [{"type": "text", "text": ...}, {"type": "image", "image": picture}]}`."""

Parts = list[str | int]
"""A prompt taken apart: a text is plain, an id is a control token, and the id of "<image>" marks a picture."""

# Every control and visual token is spelled <...> without further angle brackets inside.
_SURFACE = re.compile(r"(<[^<>]*>)")
# Stands for a message's text while the template is rendered; the digits count the texts.
_STAND_IN = re.compile("\ue000(\\d+)\ue001")

# What says how ids become a batch, of the arguments of `Emu3Processor.__call__`.
_BATCH_OPTIONS = {
    "add_special_tokens",
    "padding",
    "truncation",
    "max_length",
    "pad_to_multiple_of",
    "padding_side",
    "return_tensors",
    "images_kwargs",
}


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

    def __init__(
        self,
        image_processor: Emu3ImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        image_area: int = 518400,
        **kwargs: Any,
    ) -> None:
        self.image_area = image_area
        self.image_token: str = tokenizer.image_token
        self.image_token_id: int = tokenizer.image_token_id
        super().__init__(
            image_processor,
            tokenizer,
            chat_template=chat_template or tokenizer.chat_template or CHAT_TEMPLATE,
            **kwargs,
        )

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
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        return_for_image_generation: bool = False,
        ratio: str | Sequence[str] = "1:1",
        image_area: int | Sequence[int] | None = None,
        split_special_tokens: bool = False,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        images_kwargs: Mapping[str, Any] | None = None,
    ) -> BatchFeature:
        """Ids of one text or several, each "<image>" in them standing for the next picture.

        Args:
            images: pictures in the order of their marks, flat or one list per text.
            text: one prompt, or B of them.
            return_for_image_generation: end each prompt where its picture begins; takes no `images`.
            ratio, image_area: size of the picture to draw (see `generation_size`), for all prompts or one each; the
                area is the processor's own by default.
            split_special_tokens: read `text` as plain text, so that no control token and no "<image>" in it counts.
            add_special_tokens: put bos before each text, unless it is there.
            padding: True or "longest", "max_length" (with `max_length`), False.
            truncation: cut the end of texts, so that no row is longer than `max_length`; a picture is never cut.
            pad_to_multiple_of, padding_side: as in tokenizers; the side is the tokenizer's by default.
            return_tensors: "pt", "np" or None for lists.
            images_kwargs: further arguments of the image processor.

        Returns `input_ids` and `attention_mask` (B, S), for pictures `pixel_values` and `image_sizes` (height and
        width in pixels), for drawing `image_sizes` (B, 2) in tokens. Raises ValueError where pictures and marks, or
        sizes and prompts, differ in number, and where a picture would have to be cut.
        """
        texts = [text] if isinstance(text, str) else list(text or ())
        if not texts or not all(isinstance(sample, str) for sample in texts):
            raise ValueError(f"text={text!r:.80} is no prompt; give a string or a non-empty list of strings")
        if return_for_image_generation and images is not None:
            raise ValueError(
                "images and return_for_image_generation=True exclude each other: such a prompt ends where its picture "
                "begins; leave out one of them"
            )
        prompts: list[Parts] = [[sample] if split_special_tokens else self._take_apart(sample) for sample in texts]
        sizes: list[tuple[int, int]] = []
        if return_for_image_generation:
            factor = self.image_processor.spatial_factor
            image_area = self.image_area if image_area is None else image_area
            sizes = [
                generation_size(sample_ratio, area, factor)
                for sample_ratio, area in zip(
                    _one_each("ratio", ratio, len(texts)), _one_each("image_area", image_area, len(texts)), strict=True
                )
            ]
        return self._assemble(
            prompts,
            images,
            sizes,
            add_special_tokens=add_special_tokens,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_tensors=return_tensors,
            images_kwargs=images_kwargs,
        )

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        split_special_tokens: bool = False,
        padding: bool | str = False,
        return_tensors: str | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """A conversation, or several, as the template's text, or with `tokenize` as ids.

        With `tokenize`, a picture is given in the conversation itself, `{"type": "image", "image": picture}`, and
        `split_special_tokens` reads the messages' texts as plain text: the template's control tokens and pictures
        count, those that someone typed do not. `processor_kwargs` are arguments of `__call__` that say how ids become
        a batch: add_special_tokens, padding, truncation, max_length, pad_to_multiple_of, padding_side, return_tensors,
        images_kwargs. They may be given directly too. Other `variables` go to the template.

        Returns a string (or one per conversation), the `input_ids`, or with `return_dict` all that `__call__` returns.
        Raises ValueError for a message that the template refuses, for content that is neither text nor picture, and for
        another name in `processor_kwargs`.
        """
        options = {name: variables.pop(name) for name in _BATCH_OPTIONS if name in variables}
        options |= {"padding": padding, "return_tensors": return_tensors, **(processor_kwargs or {})}
        if unknown := options.keys() - _BATCH_OPTIONS:
            raise ValueError(f"processor_kwargs has {sorted(unknown)}; it takes {', '.join(sorted(_BATCH_OPTIONS))}")
        if not conversation:
            raise ValueError("the conversation is empty; give at least one message")
        if not tokenize:
            if split_special_tokens:
                raise ValueError("split_special_tokens=True needs tokenize=True: a string cannot say what is plain")
            return self._render(conversation, chat_template, add_generation_prompt, variables)
        conversations: list[Any] = [conversation] if isinstance(conversation[0], Mapping) else list(conversation)
        texts: list[str] = []
        images: list[list[Any]] = []
        stripped = []
        for turns in conversations:
            images.append([])
            stripped.append([_strip(message, texts, images[-1]) for message in turns])
        rendered = self._render(stripped, chat_template, add_generation_prompt, variables)
        outputs = self._assemble(
            [self._fill(prompt, texts, split_special_tokens) for prompt in rendered],
            images if any(images) else None,
            **options,
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

    def _render(
        self, conversation: Any, chat_template: str | None, add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> Any:
        try:
            return super().apply_chat_template(
                conversation, chat_template, add_generation_prompt=add_generation_prompt, tokenize=False, **variables
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error

    def _take_apart(self, text: str) -> Parts:
        """`text` with its control tokens as ids, as the tokenizer itself would find them."""
        parts: Parts = []
        for index, piece in enumerate(_SURFACE.split(text)):  # every second piece looks like a control token
            ids = self.tokenizer.encode(piece, add_special_tokens=False) if index % 2 else []
            is_control = len(ids) == 1 and ids != encode_plain(self.tokenizer, piece)
            parts.append(ids[0] if is_control else piece)
        return parts

    def _fill(self, prompt: str, texts: Sequence[str], plain: bool) -> Parts:
        """A rendered prompt with its texts put in for their stand-ins, as plain text or as part of the prompt."""
        pieces = _STAND_IN.split(prompt)  # template, number of a text, template, number of a text, ..., template
        pieces[1::2] = [texts[int(number)] for number in pieces[1::2]]
        if not plain:
            return self._take_apart("".join(pieces))
        parts: Parts = []
        for index, piece in enumerate(pieces):
            parts += [piece] if index % 2 else self._take_apart(piece)
        return parts

    def _size_ids(self, height: int, width: int) -> list[int]:
        """What comes before a picture of `height` x `width` tokens: boi, "H*W", img."""
        size = encode_plain(self.tokenizer, f"{height}*{width}")
        return [self.tokenizer.boi_token_id, *size, self.tokenizer.image_wrapper_token_id]

    def _picture_ids(self, height: int, width: int) -> list[int]:
        """A whole picture in a prompt, with a placeholder for each visual and each end-of-row token."""
        placeholders = [self.image_token_id] * (height * (width + 1))
        return [
            *self._size_ids(height, width),
            *placeholders,
            self.tokenizer.eof_token_id,
            self.tokenizer.eoi_token_id,
        ]

    def _assemble(
        self,
        prompts: list[Parts],
        images: Any,
        sizes: Sequence[tuple[int, int]] = (),
        *,
        add_special_tokens: bool = True,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        images_kwargs: Mapping[str, Any] | None = None,
        **padding: Any,
    ) -> BatchFeature:
        """Ids of `prompts` with `images` at their marks; `sizes` in tokens of the pictures that they ask for."""
        if truncation not in (True, False, "longest_first", "do_not_truncate"):
            raise ValueError(f"truncation={truncation!r} is unknown; give True or False")
        if truncation in (True, "longest_first") and max_length is None:
            raise ValueError("truncation=True needs max_length, the number of tokens to cut at")
        _check_counts([parts.count(self.image_token_id) for parts in prompts], images)
        data: dict[str, Any] = {}
        picture_sizes: list[tuple[int, int]] = []
        if images is not None and (pictures := list(flat_pictures(images))):
            data = dict(self.image_processor(pictures, **(images_kwargs or {})))
            factor = self.image_processor.spatial_factor
            picture_sizes = [(height // factor, width // factor) for height, width in data["image_sizes"]]
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
                        ids += self._picture_ids(*next(remaining)) if token == self.image_token_id else [token]
            bos = self.tokenizer.bos_token_id
            rows.append([bos, *ids] if add_special_tokens and ids[:1] != [bos] else ids)
        ends = [self._size_ids(*size) for size in sizes] or [[] for _ in rows]
        if truncation in (True, "longest_first") and max_length is not None:
            rows = [self._cut(ids, max_length - len(end)) for ids, end in zip(rows, ends, strict=True)]
        rows = [ids + end for ids, end in zip(rows, ends, strict=True)]
        if sizes:
            data["image_sizes"] = [list(size) for size in sizes]
        return BatchFeature(
            data={**self._pad(rows, max_length=max_length, **padding), **data}, tensor_type=return_tensors
        )

    def _pad(
        self,
        rows: list[list[int]],
        padding: bool | str = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
    ) -> dict[str, list[list[int]]]:
        """`input_ids` and `attention_mask` of `rows`, brought to one length as `padding` says; nothing is cut."""
        if padding not in (True, False, "longest", "max_length", "do_not_pad"):
            raise ValueError(f'padding={padding!r} is unknown; give True, "longest", "max_length" or False')
        length = 0
        if padding == "max_length":
            if max_length is None:
                raise ValueError('padding="max_length" needs max_length, the number of tokens to pad to')
            length = max_length
        elif padding not in (False, "do_not_pad"):
            length = max(map(len, rows))
        length = -(-length // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
        input_ids, attention_mask = [], []
        for ids in rows:
            fill = [self.tokenizer.pad_token_id] * (length - len(ids))
            masked, attended = [0] * len(fill), [1] * len(ids)
            left = (padding_side or self.tokenizer.padding_side) == "left"
            input_ids.append([*fill, *ids] if left else [*ids, *fill])
            attention_mask.append([*masked, *attended] if left else [*attended, *masked])
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


def _one_each(name: str, value: Any, count: int) -> list[Any]:
    """`value` for each of `count` prompts, where it is not a list of that many already."""
    if isinstance(value, str | int):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} lists {len(value)} values for {count} prompts; give one for all, or one each")
    return list(value)


def _check_counts(marks: list[int], images: Any) -> None:
    """ValueError unless there is a picture for each mark: prompt by prompt for nested lists, else in all."""
    nested = isinstance(images, list | tuple) and images and all(isinstance(own, list | tuple) for own in images)
    shares = images if nested else [() if images is None else images]
    pictures = [sum(1 for _ in flat_pictures(share)) for share in shares]
    if pictures != (marks if nested else [sum(marks)]):
        raise ValueError(
            f"{sum(pictures)} pictures for {sum(marks)} <image> marks (by prompt: {pictures} for {marks}); "
            "give one picture for each mark, in order"
        )


def _strip(message: Message, texts: list[str], images: list[Any]) -> dict[str, Any]:
    """The message with a stand-in for each of its texts; texts and pictures are appended to the lists."""

    def stand_in(text: str) -> str:
        texts.append(text)
        return f"\ue000{len(texts) - 1}\ue001"

    fields = message if isinstance(message, Mapping) else {}
    role, given = fields.get("role"), fields.get("content")
    # A template may print the role, so it must not be able to spell a control token either.
    if not (isinstance(role, str) and role.isidentifier() and isinstance(given, str | list | tuple)):
        raise ValueError(
            f"{message!r:.80} is no message; give {{'role': 'user', 'content': a text or a list of texts and pictures}}"
        )
    if isinstance(given, str):
        return {"role": role, "content": stand_in(given)}
    content: list[dict[str, str]] = []
    for part in given:
        match part:
            case {"type": "text", "text": str(text)}:
                content.append({"type": "text", "text": stand_in(text)})
            case {"type": "image", "image": picture}:
                images.append(picture)
                content.append({"type": "image"})
            case _:
                raise ValueError(
                    f"{part!r:.80} is no content; give {{'type': 'text', 'text': ...}} or "
                    "{'type': 'image', 'image': picture}, with the picture opened already"
                )
    return {"role": role, "content": content}
