"""The one-line interface: pictures from words, and words from pictures.

What a user writes is plain text: "<image>" or "<|image start|>" in it are characters, not tokens.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from emu3.chat import Message
from emu3.checkpoints import resolve
from emu3.generation.decoders import Decoder
from emu3.generation.decoders.named import decoder_named
from emu3.generation.decoders.raster import RasterDecoder
from emu3.generation.engine import Engine
from emu3.generation.events import Event, Finished
from emu3.generation.grammar import GridGrammar
from emu3.generation.request import Guidance, Request
from emu3.generation.sampling import Sampling

if TYPE_CHECKING:
    from PIL import Image

    from emu3.modeling.multimodal import Emu3ForConditionalGeneration
    from emu3.processing import Emu3Processor

MAX_ASPECT_RATIO = 200


@dataclass(frozen=True, eq=False)
class Emu3Pipeline:
    """A model and its processor, ready to draw and to answer.

    Args:
        model: in evaluation mode.
        processor: the checkpoint's own.
        compiled: whether to compile the layers; see `Engine`.

    Raises:
        ValueError: the processor counts other pixels per token side than the model.
    """

    model: Emu3ForConditionalGeneration
    processor: Emu3Processor
    compiled: bool = False

    def __post_init__(self) -> None:
        ours, theirs = self.processor.image_processor.spatial_factor, self.model.model.vqmodel.spatial_scale_factor
        if ours != theirs:
            raise ValueError(
                f"the processor has spatial_factor={ours}, the model's vision tokenizer {theirs} pixels a token; "
                "give the processor that belongs to the model"
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = "auto",
        download: bool = False,
        compiled: bool = False,
        int8: bool = False,
    ) -> Emu3Pipeline:
        """Load "nano", which is part of the package, a folder, or a hub id `owner/name`.

        Args:
            name: which checkpoint.
            device: where the model runs.
            dtype: of its weights; "auto" is the checkpoint's own, see `load_model`.
            download: whether a hub id may be fetched; otherwise it must be in the local cache.
            compiled: whether to compile the layers, which pays for many pictures; see `Engine`.
            int8: whether to compute the layers in 8 bits, on a CPU; see `emu3.quantization`.

        Raises:
            ValueError: there is no such checkpoint, its files do not fit together, or it does not fit into memory.
        """
        from emu3.checkpoints.load import load_model, load_processor
        from emu3.checkpoints.memory import check_fits

        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={str(device)!r}, but this PyTorch sees no GPU; leave it out to run on the CPU")
        folder = resolve(name, download=download)
        check_fits(folder, dtype, int8, device)
        processor = load_processor(folder)  # first, as it is small and tells whether it goes with the model
        model = load_model(folder, dtype=dtype, device=device, int8=int8)
        return cls(model, processor, compiled=compiled)

    def image(
        self,
        prompts: str | Sequence[str],
        negative_prompt: str | None = None,
        ratio: str = "1:1",
        image_area: int | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | Callable[[float], float] = 3.0,
        top_k: int = 2048,
        top_p: float = 1.0,
        temperature: float = 1.0,
        seed: int | Sequence[int] | None = None,
        decoding: str | Decoder = "predictive",
        on_event: Callable[[Event], object] | None = None,
    ) -> list[Image.Image]:
        """Draw one picture for each prompt, together in one batch.

        Args:
            prompts: what to draw; a string is one prompt.
            negative_prompt: what to stay away from; None guides away from the empty prompt.
            ratio: "width:height"; with `image_area` it sets the size.
            image_area: in pixels; None is what the model was trained on.
            height, width: in pixels, in place of ratio and area; multiples of the vision tokenizer's factor.
            guidance_scale: how closely to follow the words; 1 is no guidance, and half the work. Or a function of
                progress, from 0 to 1.
            top_k, top_p, temperature: see `Sampling`. Temperature 0 takes the likeliest token, whatever the seed.
            seed: picture i has seed + i, or its own of a list. None draws new ones. In float32 a picture depends on its
                seed and not on the batch; in 16 bits products round differently in a batch, which may change a token.
            decoding: "predictive" or "raster", the same tokens up to rounding; "jacobi", lossless; "zipar", close to
                them; perhaps with a window, as in "zipar:7"; or a decoder. See docs/draw.md.
            on_event: is called with the engine's events; its requests are numbered like the prompts.

        Returns:
            A list of RGB pictures, also for a single prompt.

        Raises:
            ValueError: a checkpoint that only reads, a size that cannot be drawn or does not fit the context with its
                prompt, sampling settings or a ratio out of range, or seeds that are not as many as the prompts.
        """
        self.require("draw")
        texts = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, list | tuple) else []
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"prompts must be a string or a non-empty list of strings, got {prompts!r:.80}")
        rows, columns = self._grid(ratio, image_area, height, width)
        grammar = GridGrammar(rows, columns, vocabulary=self.model.model.vocabulary)
        sampling = Sampling(temperature, top_k, top_p)
        prompt_ids = self._drawing_prompts(texts, rows, columns)
        guidance = None
        if guidance_scale != 1:
            if not isinstance(negative_prompt, str | None):
                raise ValueError(f"negative_prompt must be a string, for all prompts, got {negative_prompt!r:.80}")
            guidance = Guidance(self._drawing_prompts([negative_prompt or ""], rows, columns)[0], guidance_scale)
        requests = [
            Request(ids, grammar, sampling, guidance, own_seed)
            for ids, own_seed in zip(prompt_ids, _seeds(seed, len(texts)), strict=True)
        ]
        decoder = decoder_named(decoding) if isinstance(decoding, str) else decoding
        return [self._decode(ids, grammar) for ids in self._run(requests, decoder, on_event)]

    @overload
    def chat(
        self,
        messages: Sequence[Message] | tuple[str, Any],
        max_new_tokens: int = ...,
        temperature: float = ...,
        seed: int | None = ...,
        on_event: Callable[[Event], object] | None = ...,
    ) -> str: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message] | tuple[str, Any]],
        max_new_tokens: int = ...,
        temperature: float = ...,
        seed: int | Sequence[int] | None = ...,
        on_event: Callable[[Event], object] | None = ...,
    ) -> list[str]: ...

    def chat(
        self,
        messages: Any,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        seed: int | Sequence[int] | None = None,
        on_event: Callable[[Event], object] | None = None,
    ) -> str | list[str]:
        """Answer the last message of a conversation, or of each of several.

        Args:
            messages: `{"role": ..., "content": ...}` each, where content is a text or a list of
                `{"type": "text", "text": ...}` and `{"type": "image", "image": picture}`; see `emu3.chat.Message`. Or a
                pair (text, pictures): one question, after its pictures, or its picture. Or a list of conversations.
            max_new_tokens: the longest answer; the context may end it sooner.
            temperature: 0 takes the likeliest token.
            seed: of the answer, above temperature 0; answer i of several has seed + i, or its own of a list. None draws
                new ones.
            on_event: is called with the engine's events; its requests are numbered like the conversations.

        Returns:
            The answer, or a list of answers for a list of conversations.

        Raises:
            ValueError: a checkpoint that only draws, a message or picture that cannot be read, or a conversation longer
                than the context.
        """
        self.require("read")
        several = isinstance(messages, list) and bool(messages) and isinstance(messages[0], list | tuple)
        conversations = [_conversation(each) for each in (messages if several else [messages])]
        sampling = Sampling(temperature, top_k=0)
        requests = [
            self._reading(conversation, sampling, own_seed, max_new_tokens)
            for conversation, own_seed in zip(conversations, _seeds(seed, len(conversations)), strict=True)
        ]
        answers = [
            str(self.processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()
            for ids in self._run(requests, RasterDecoder(), on_event)
        ]
        return answers if several else answers[0]

    def require(self, ability: str) -> None:
        """ValueError where the checkpoint's config.json says that it lacks an ability, "draw" or "read"."""
        abilities = getattr(self.model.config, "abilities", None)
        if abilities is not None and ability not in abilities:
            what = {"draw": "draw pictures", "read": "answer or read pictures"}[ability]
            other = {"draw": "Emu3-Gen", "read": "Emu3-Chat"}[ability]
            raise ValueError(f"this checkpoint does not {what}, says its config.json; load one that does, as {other}")

    def _run(
        self, requests: list[Request], decoder: Decoder, on_event: Callable[[Event], object] | None
    ) -> list[tuple[int, ...]]:
        """The ids of each request."""
        finished = {}
        for event in Engine(self.model, decoder, compiled=self.compiled).stream(requests):
            if on_event is not None:
                on_event(event)
            if isinstance(event, Finished):
                finished[event.request] = event.ids
        return [finished[number] for number in range(len(requests))]

    def _grid(self, ratio: str, image_area: int | None, height: int | None, width: int | None) -> tuple[int, int]:
        """Rows and columns of visual tokens of the picture to draw."""
        factor: int = self.processor.image_processor.spatial_factor
        if height is None and width is None:
            area = self.processor.image_area if image_area is None else image_area
            rows, columns = self.processor.calculate_generate_size(ratio, area, factor)
        elif height is None or width is None:
            raise ValueError(f"give both height and width, or neither; got height={height}, width={width}")
        else:
            rows, columns = _tokens("height", height, factor), _tokens("width", width, factor)
        if max(rows, columns) > MAX_ASPECT_RATIO * min(rows, columns):
            raise ValueError(
                f"a picture of {rows * factor}x{columns * factor} pixels is more than {MAX_ASPECT_RATIO} times longer "
                "than wide; ask for a squarer one"
            )
        return rows, columns

    def _drawing_prompts(self, texts: list[str], rows: int, columns: int) -> list[tuple[int, ...]]:
        """Ids of the prompts, each with the image prefix of this size."""
        factor = self.processor.image_processor.spatial_factor
        inputs = self.processor(
            text=texts,
            return_for_image_generation=True,
            ratio=f"{columns}:{rows}",
            image_area=rows * columns * factor**2,
            split_special_tokens=True,
        )
        return [tuple(ids) for ids in inputs["input_ids"]]

    @torch.inference_mode()
    def _reading(self, conversation: list[Message], sampling: Sampling, seed: int, max_new_tokens: int) -> Request:
        """The request for an answer: the conversation's ids, with visual tokens in place of the placeholders."""
        inputs = self.processor.apply_chat_template(
            conversation,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            split_special_tokens=True,
            add_generation_prompt=True,
        )
        ids_S = inputs["input_ids"][0]
        request = Request(tuple(ids_S.tolist()), sampling=sampling, seed=seed, max_new_tokens=max_new_tokens)
        # Whether it fits is known before the pictures are encoded, which takes far longer.
        request.budget(self.model.model.text_model.config.max_position_embeddings)
        if "pixel_values" not in inputs:
            return request
        device = self.model.lm_head.weight.device
        # One by one and without padding, which would change the codes near it.
        visual = [
            self.model.model.get_image_tokens(pixels_CHW[None, :, : size[0], : size[1]].to(device), size[None])
            for pixels_CHW, size in zip(inputs["pixel_values"], inputs["image_sizes"], strict=True)
        ]
        ids_S[ids_S == self.model.model.vocabulary.image_placeholder] = torch.cat(visual).to(ids_S)
        return replace(request, prompt_ids=tuple(ids_S.tolist()))

    @torch.inference_mode()
    def _decode(self, ids: tuple[int, ...], grammar: GridGrammar) -> Image.Image:
        """The picture that the ids say."""
        codes_1HW = grammar.codes_of(torch.tensor(ids, device=self.model.lm_head.weight.device))
        pixels_1CHW = self.model.model.vqmodel.decode(codes_1HW)
        picture: Image.Image = self.processor.postprocess(pixels_1CHW.float())["pixel_values"][0]
        return picture


def _conversation(messages: Any) -> list[Message]:
    """The messages of one conversation, which may be given as a pair (question, pictures)."""
    if isinstance(messages, tuple) and len(messages) == 2 and isinstance(messages[0], str):
        text, pictures = messages
        pictures = pictures if isinstance(pictures, list | tuple) else [pictures]
        content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": text}]
        return [{"role": "user", "content": content}]
    if isinstance(messages, str | dict) or not messages:
        raise ValueError(f"{messages!r:.80} is no conversation; give a list of messages, or (question, [picture])")
    return list(messages)


def _tokens(name: str, pixels: int, factor: int) -> int:
    """Tokens along a side of so many pixels."""
    if not isinstance(pixels, int):
        raise ValueError(f"{name} must be a whole number of pixels, got {pixels!r}")
    if pixels < 1 or pixels % factor:
        lower = pixels // factor * factor
        nearest = f"{lower} or {lower + factor}" if lower > 0 else f"{factor}"
        raise ValueError(f"{name} must be a positive multiple of {factor} pixels, got {pixels}; nearest: {nearest}")
    return pixels // factor


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed for each of `count` requests."""
    if isinstance(seed, Sequence):
        if len(seed) != count:
            raise ValueError(f"{len(seed)} seeds for {count} prompts; give one each, or a single one to count from")
        return list(seed)
    first = secrets.randbelow(2**31) if seed is None else seed
    return [first + number for number in range(count)]
