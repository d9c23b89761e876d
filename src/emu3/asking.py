"""From what a caller wants of a pipeline to requests of its engine: prompts as ids, pictures as codes, sizes, guidance.

words                      bos, words, boi 12*12 img
words about pictures       bos, the pictures, words, boi 12*12 img
a clip                     bos, words, boi 4*12*12, 8 fps, 2 s img; what it begins with is pinned in its grammar
a conversation             the chat template's text, with pictures and clips in place of <image>
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from emu3.asked import Asked, check_prompts, clip_of, conversations_of, seeds_of, shape_of
from emu3.chat import Message
from emu3.clips import MAX_RATE, Clip, moves, read_clip
from emu3.generation.decoders.named import decoder_named
from emu3.generation.grammar import Grammar, PinnedGrid
from emu3.generation.request import Guidance, Request
from emu3.generation.sampling import Sampling
from emu3.layout import ClipText, Emu3Layout
from emu3.options import (
    GUIDANCE,
    Answer,
    Draw,
    check_ability,
    check_number,
    check_text,
    check_whole,
    check_words,
    make,
    takes,
)
from emu3.segments import Shape, Visual
from emu3.sizes import frames_of_codes, tokens_to_draw, upright_size
from emu3.tokenization import PlainText
from emu3.video_processing import sample_frames

if TYPE_CHECKING:
    from emu3.generation.engine import Engine
    from emu3.modeling.multimodal import Emu3ForConditionalGeneration
    from emu3.processing import Emu3Processor

_LEAST_TOKENS = 3
"""Of a frame of codes: one, the end of its row, its own end."""

_GUIDANCE = dict(zip(GUIDANCE, (3.0, 0.0, 0.0), strict=True))
"""Of a checkpoint that recommends none."""


class Asking(ABC):
    """What of a pipeline makes requests."""

    model: Emu3ForConditionalGeneration
    processor: Emu3Processor

    @property
    @abstractmethod
    def engine(self) -> Engine:
        """Runs the requests."""

    @cached_property
    def layout(self) -> Emu3Layout:
        """How the checkpoint spells pictures."""
        return Emu3Layout(
            self.model.model.vocabulary, PlainText(self.processor.tokenizer), ClipText.of(self.model.config)
        )

    @property
    def temporal_factor(self) -> int:
        """Frames of a clip that share a code."""
        return int(self.model.model.vqmodel.config.temporal_downsample_factor)

    @property
    def independent_groups(self) -> bool:
        """Whether each group of frames that share a code is encoded and decoded as a clip of its own."""
        return bool((getattr(self.model.config, "clips", None) or {}).get("independent_groups"))

    def require(self, ability: str) -> None:
        """ValueError where the checkpoint's config.json says that it lacks one of `emu3.options.ABILITIES`."""
        check_ability(ability, getattr(self.model.config, "abilities", None))

    @takes(Draw)
    def draw_requests(
        self,
        prompts: str | Sequence[str],
        *,
        pinned: Any = None,
        given: Any = None,
        shape: Any = None,
        picture_guidance: Any = False,
        **options: Any,
    ) -> list[Request]:
        """What `image`, `video` and `edit` ask the engine for: one request for each prompt. Errors as there.

        Args:
            prompts: see `image`.
            pinned: codes (H, W), or of a clip (T, H, W), that are kept, and -1 where one is to be drawn; see
                `PinnedGrid`. Their size is then that of what is drawn.
            given: for each prompt the pictures and clips that it speaks of.
            shape: size in visual tokens, in place of that of the options.
            picture_guidance: see `edit`.
        """
        draw = self.settled(make(Draw, options))
        self.require("draw" if given is None else "edit")
        texts = check_prompts(prompts)
        shape = shape or shape_of(draw, self.processor)
        grammar = self.layout.grammar(shape)
        if pinned is not None:
            grammar = PinnedGrid.of(pinned, self.layout.vocabulary)
            rate = shape.frames_per_second
            shape = Shape(grammar.height, grammar.width, grammar.frames, rate)
        decoder = decoder_named(draw.decoding) if isinstance(draw.decoding, str) else draw.decoding
        sampling = Sampling(draw.temperature, draw.top_k, draw.top_p)
        requests = []
        for number, (text, seed) in enumerate(zip(texts, seeds_of(draw.seed, len(texts)), strict=True)):
            own = () if given is None else given[number]
            words = check_text("prompt", text) if pinned is not None else check_words("prompt", text)
            guidance = None
            if draw.guidance_scale != 1:
                without = self.layout.prompt(draw.negative_prompt or "", shape, () if picture_guidance else own)
                scale, floor, agreement = (cast(float, getattr(draw, name)) for name in GUIDANCE)
                guidance = Guidance(tuple(without), scale, floor=floor, agreement=agreement)
            ids = tuple(self.layout.prompt(words, shape, own))
            requests.append(Request(ids, grammar, sampling, guidance, seed, decoder=decoder))
            requests[-1].budget(self.engine.context)  # refuses what does not fit
        return requests

    def settled(self, draw: Draw, film: bool = False) -> Draw:
        """With the guidance that the checkpoint's config.json recommends, where none is asked for.

        It stands under "drawing". What stands under "clips" goes before it, for a clip.
        """
        own: dict[str, Any] = {}
        for name in ("drawing", "clips") if film else ("drawing",):
            given = getattr(self.model.config, name, None) or {}
            own |= {key: value for key, value in given.items() if value is not None}
        missing = [name for name in _GUIDANCE if getattr(draw, name) is None]
        found: Any = {name: _GUIDANCE[name] if own.get(name) is None else own[name] for name in missing}
        return replace(draw, **found)

    def frames_after(self, have: int) -> int:
        """How many frames go on from so many, unless others are asked for: up to the longest clip that was learned.

        Where the checkpoint does not list what it has learned, 16.
        """
        lengths = (getattr(self.model.config, "clips", None) or {}).get("lengths")
        if not lengths:
            return -(-16 // self.temporal_factor) * self.temporal_factor
        return max(max(lengths) - have, self.temporal_factor)

    @takes(Draw)
    def video_requests(
        self,
        prompts: str | Sequence[str],
        *,
        frames: int | None = None,
        fps: float | None = None,
        start: Any = None,
        **options: Any,
    ) -> list[Request]:
        """What `video` asks the engine for. Arguments and errors as there."""
        self.require("film")
        own = getattr(self.model.config, "clips", None) or {}
        count = check_whole("frames", own.get("frames") or 16 if frames is None else frames)
        frames_of_codes(count, self.temporal_factor)  # refuses before a start is encoded
        rate = None if fps is None else check_number("fps", fps, 1e-3, MAX_RATE)
        draw = make(Draw, options)
        begin = None if start is None else self.encode_start(start, rate)
        have = 0 if begin is None else begin.shape.frames * self.temporal_factor
        if frames is None and have >= count:
            count = have + self.frames_after(have)
        codes = frames_of_codes(count, self.temporal_factor)
        rate = rate or (begin and begin.frames_per_second) or self.layout.clips.fps
        shape = shape_of(draw, self.processor)
        if begin is not None and draw.height is None and draw.image_area is None and draw.ratio is None:
            shape = begin.shape
        shape = Shape(shape.height, shape.width, codes, rate)
        self._check_length(shape)
        pinned = None
        if begin is not None:
            if begin.shape[:2] != shape[:2]:
                raise ValueError(
                    f"the clip begins with {begin.shape.width}x{begin.shape.height} tokens, and "
                    f"{shape.width}x{shape.height} are asked for; leave the size out"
                )
            if have >= count:
                raise ValueError(f"frames is {count}, and the start has {have} already; ask for more")
            pinned = np.full((codes, shape.height, shape.width), -1)
            pinned[: begin.shape.frames] = begin.codes_THW
        settled = self.settled(draw, film=True)
        options |= {name: getattr(settled, name) for name in GUIDANCE}
        return self.draw_requests(prompts, shape=shape, pinned=pinned, **options)

    @takes(Draw)
    def edit_requests(
        self, pictures: Any, prompts: str | Sequence[str], *, picture_guidance: bool = False, **options: Any
    ) -> list[Request]:
        """What `edit` asks the engine for. Arguments and errors as there."""
        self.require("edit")
        check_prompts(prompts)
        given = self.given_for(pictures, prompts)
        sizes = [each[-1].shape._replace(frames=1, frames_per_second=None) for each in given]
        asked = make(Draw, options)
        has_size = (asked.height, asked.image_area, asked.ratio) != (None, None, None)
        if not has_size and len(set(sizes)) > 1:
            raise ValueError("the pictures are of several sizes; edit them one by one, or give height and width")
        shape = None if has_size else sizes[0]
        return self.draw_requests(prompts, given=given, shape=shape, picture_guidance=picture_guidance, **options)

    @takes(Draw)
    def complete_requests(
        self, picture: Any, prompts: str | Sequence[str], *, mask: Any = None, below: int = 0, **options: Any
    ) -> list[Request]:
        """What `complete` asks the engine for. Arguments and errors as there."""
        check_prompts(prompts)
        return self.draw_requests(prompts, pinned=self.codes_to_complete(picture, mask=mask, below=below), **options)

    def codes_to_complete(self, picture: Any, *, mask: Any = None, below: int = 0) -> NDArray[np.int64]:
        """Codes (H, W) of a picture, and -1 where `complete` draws. Arguments and errors as there."""
        codes_HW = self._encode_still(picture).codes_THW[0].astype(np.int64)
        factor = int(self.processor.image_processor.spatial_factor)
        size = upright_size(picture) if isinstance(picture, Image.Image) else None
        drawn_HW = tokens_to_draw(Shape(*codes_HW.shape), factor, size, mask, below)
        codes_HW = np.pad(codes_HW, ((0, len(drawn_HW) - len(codes_HW)), (0, 0)))
        codes_HW[drawn_HW] = -1
        return codes_HW

    def given_for(self, pictures: Any, prompts: str | Sequence[str]) -> list[list[Visual]]:
        """For each prompt the codes of its pictures; see `edit`."""
        count = 1 if isinstance(prompts, str) else len(prompts)
        if getattr(pictures, "ndim", None) == 4:
            pictures = list(pictures)
        if not isinstance(pictures, list | tuple):
            return [[self._encode_still(pictures)]] * count
        if isinstance(prompts, str) and not any(isinstance(each, list | tuple) for each in pictures):
            pictures = [pictures]
        if len(pictures) != count or not count:
            raise ValueError(
                f"{len(pictures)} pictures and {count} prompts; give a picture, or a list, for each prompt"
            )
        lists = [each if isinstance(each, list | tuple) else [each] for each in pictures]
        if not all(lists):
            raise ValueError("a prompt has no picture; give at least one")
        return [[self._encode_still(picture) for picture in each] for each in lists]

    def _encode_still(self, picture: Any) -> Visual:
        if isinstance(picture, Clip) or moves(picture):
            raise ValueError("only pictures are edited, and this is a clip; `extend` goes on with a clip")
        return self.encode_visual(picture)

    def encode_start(self, source: Any, fps: float | None = None) -> Visual:
        """The codes of what a clip begins with, at a rate; `source` as `read_clip` takes it, or codes already."""
        if isinstance(source, Visual):
            return source
        clip = read_clip(source)
        if len(clip) == 1:
            return replace(self.encode_visual(clip.pictures[0]), frames_per_second=fps)
        most = self.temporal_factor * (self.engine.context // _LEAST_TOKENS + 1)  # more cannot fit
        return self.encode_visual(sample_frames(clip, fps, self.temporal_factor, most))

    def _check_length(self, shape: Shape) -> None:
        """ValueError for a clip that the context does not hold, before much is done for it."""
        needed, context = shape.frames * (shape.height * (shape.width + 1) + 1) + 2, self.engine.context
        if needed > context:
            raise ValueError(
                f"{shape.frames * self.temporal_factor} frames of {shape.width}x{shape.height} tokens are {needed} "
                f"tokens, and do not fit the model's context of {context}; ask for fewer frames or a smaller size"
            )

    @torch.inference_mode()
    def encode_visual(self, source: Any) -> Visual:
        """The codes of a picture or a `Clip`, resized as one that is read; a `Visual` stays as it is."""
        if isinstance(source, Visual):
            return source
        vqmodel, pictures = self.model.model.vqmodel, self.processor.image_processor
        device = self.model.lm_head.weight.device
        if not isinstance(source, Clip):
            inputs = pictures(source, return_tensors="pt")
            (codes_HW,) = vqmodel.encode(inputs["pixel_values"].to(device), inputs["image_sizes"]).image_tokens
            return Visual(codes_HW.cpu().numpy()[None])
        clip = sample_frames(source, None, self.temporal_factor)
        factor = pictures.spatial_factor
        height, width = pictures(Image.fromarray(clip.frames_THWC[0]), return_tensors="pt")["image_sizes"][0].tolist()
        self._check_length(Shape(height // factor, width // factor, len(clip) // self.temporal_factor))
        groups = np.split(clip.frames_THWC, len(clip) // self.temporal_factor)
        pieces = (pictures(list(group), return_tensors="pt")["pixel_values"][None].to(device) for group in groups)
        codes_THW = torch.cat(list(vqmodel.encode_stream(pieces, self.independent_groups)), 1)[0]
        return Visual(codes_THW.cpu().numpy(), clip.frames_per_second)

    @takes(Answer)
    def answer_requests(
        self, messages: Any, pictures: Any = None, *, drawing: Draw | None = None, **options: Any
    ) -> list[Asked]:
        """What `chat`, and with `drawing` what `tell` asks the engine for, one for each conversation; see `encode`.

        Arguments and errors as there.
        """
        answer = make(Answer, options)
        conversations = conversations_of(messages, pictures)
        self.require("read")
        sampling: Any = Sampling(answer.temperature, answer.top_k, answer.top_p)
        grammar: Grammar = self.layout.answer(len(self.model.lm_head.weight))
        decoder = decoder_named("raster")
        if drawing is not None:
            self.require("tell")
            visual = Sampling(drawing.temperature, drawing.top_k, drawing.top_p)
            sampling = {"text": sampling, "visual": visual}
            grammar = self.layout.mixed_answer(shape_of(drawing, self.processor))
            decoder = decoder_named(drawing.decoding) if isinstance(drawing.decoding, str) else drawing.decoding
        seeds = seeds_of(answer.seed, len(conversations))
        return [
            self._asked(conversation, grammar, sampling, seed, answer.max_new_tokens, decoder)
            for conversation, seed in zip(conversations, seeds, strict=True)
        ]

    def _asked(
        self,
        conversation: list[Message],
        grammar: Grammar,
        sampling: Any,
        seed: int,
        max_new_tokens: int,
        decoder: Any,
    ) -> Asked:
        conversation, clips = self._without_clips(conversation)
        inputs = self.processor.apply_chat_template(
            conversation,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            split_special_tokens=True,
            add_generation_prompt=True,
        )
        ids = tuple(self._with_clips(inputs["input_ids"][0].tolist(), clips))
        request = Request(ids, grammar, sampling, seed=seed, max_new_tokens=max_new_tokens, decoder=decoder)
        request.budget(self.engine.context)  # refuses what does not fit, before the pictures are encoded
        if "pixel_values" not in inputs:
            return Asked(request)
        # One by one and without padding, which would change the codes near it.
        pixels = (
            (pixels_CHW[None, :, : size[0], : size[1]], size[None])
            for pixels_CHW, size, clip in zip(inputs["pixel_values"], inputs["image_sizes"], clips, strict=True)
            if clip is None
        )
        return Asked(request, tuple(pixels))

    def _without_clips(self, conversation: list[Message]) -> tuple[list[Message], list[Visual | None]]:
        """The conversation with a small picture in place of each clip; and for each picture the clip that it is."""
        side = int(self.processor.image_processor.spatial_factor)
        messages: list[Message] = []
        clips: list[Visual | None] = []
        for message in conversation:
            content = message.get("content") if isinstance(message, Mapping) else None
            if not isinstance(content, list | tuple):
                messages.append(message)
                continue
            parts = []
            for part in content:
                source = clip_of(part)
                if source is not None:
                    clips.append(self.encode_start(source, self.layout.clips.fps))
                    part = {"type": "image", "image": Image.new("RGB", (side, side))}
                elif isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
                    clips.append(None)
                parts.append(part)
            messages.append({**message, "content": parts})
        return messages, clips

    def _with_clips(self, ids: list[int], clips: Sequence[Visual | None]) -> list[int]:
        """Ids with clips in place of the pictures that stand for them."""
        if not any(clips):
            return ids
        vocabulary, whole, pictures = self.layout.vocabulary, list[int](), iter(clips)
        while vocabulary.boi in ids:
            start, end = ids.index(vocabulary.boi), ids.index(vocabulary.eoi) + 1
            clip = next(pictures)
            whole += ids[:start] + (ids[start:end] if clip is None else self.layout.spell([clip]))
            ids = ids[end:]
        return whole + ids

    @torch.inference_mode()
    def encode(self, asked: Asked) -> Request:
        """The request, with the visual tokens of its pictures in place of the placeholders."""
        if not asked.pictures:
            return asked.request
        device, model = self.model.lm_head.weight.device, self.model.model
        visual = [model.get_image_tokens(pixels_BCHW.to(device), sizes) for pixels_BCHW, sizes in asked.pictures]
        ids_S = torch.tensor(asked.request.prompt_ids)
        ids_S[ids_S == model.vocabulary.image_placeholder] = torch.cat(visual).to(ids_S)
        return replace(asked.request, prompt_ids=tuple(ids_S.tolist()))
