"""The one-line interface: pictures from words, and words from pictures.

What a user writes is plain text: "<image>" or "<|image start|>" in it are characters, not tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from emu3.asked import are_several
from emu3.asking import Asking
from emu3.checkpoints import resolve
from emu3.checkpoints.memory import check_fits, free_memory
from emu3.clips import Clip
from emu3.generation.engine import Engine
from emu3.generation.events import Event, Failed, Finished
from emu3.generation.grammar import GridGrammar, MixedGrammar
from emu3.generation.request import Request
from emu3.generation.runtime.likelihood import probabilities_of
from emu3.learned import Learned
from emu3.modeling.parallel import least
from emu3.options import Answer, Draw, Load, check_text, check_whole, make, takes
from emu3.quantization import Int8Linear, QuantizedHead, QuantizedLinear
from emu3.results import Clips, Pictures, Result, Stream
from emu3.segments import Text, Visual
from emu3.sizes import tokens_of

if TYPE_CHECKING:
    from emu3.modeling.draft import DraftHead
    from emu3.modeling.multimodal import Emu3ForConditionalGeneration
    from emu3.processing import Emu3Processor

# Of the module, because a lock in a pipeline could not be copied or pickled.
_MAKING_ENGINE = threading.Lock()
# What is not drawn yet, in a preview.
_GREY = (128, 128, 128)


@dataclass(frozen=True, eq=False)
class Emu3Pipeline(Asking):
    """A model in evaluation mode and its processor, ready to draw and to answer.

    Its engine is made at the first call and kept. Call `engine.refresh()` after you change the model's weights.
    `compiled` compiles the layers, and `draft` is a draft head, as `Engine` says. What is asked for and not `learned`
    gets a warning, `emu3.learned.NotLearned`.
    """

    model: Emu3ForConditionalGeneration
    processor: Emu3Processor
    compiled: bool = False
    draft: DraftHead | None = None
    learned: Learned = field(default_factory=Learned)

    def __post_init__(self) -> None:
        ours, theirs = self.processor.image_processor.spatial_factor, self.model.model.vqmodel.spatial_scale_factor
        if ours != theirs:
            raise ValueError(
                f"the processor has spatial_factor={ours}, the model's vision tokenizer {theirs} pixels a token; "
                "give the processor that belongs to the model"
            )

    def __repr__(self) -> str:
        # The tensors of quantized layers are buffers, which `num_parameters` does not count.
        layers = [each for each in self.model.modules() if isinstance(each, Int8Linear | QuantizedLinear)]
        heads = [each for each in (self.model.lm_head,) if isinstance(each, QuantizedHead)]
        count = self.model.num_parameters() + sum(each.parameters_in_all for each in (*layers, *heads))
        weight = self.model.model.text_model.embed_tokens.weight
        parts = (("layers", layers), ("head", heads))
        bits = "".join(f", {name} in {part[0].bits} bits" for name, part in parts if part)
        return f"Emu3Pipeline({count:,} parameters, {weight.dtype}{bits}, on {weight.device})"

    @classmethod
    @takes(Load)
    def from_pretrained(cls, name: str | Path, **options: Any) -> Emu3Pipeline:
        """Load "nano", which is part of the package, a folder, or a hub id `owner/name`; an adapter with its base.

        `emu3.options.Load` describes the options.

        Raises:
            ValueError: there is no such checkpoint, its files do not fit together, or an option cannot be used.
        """
        load = make(Load, options)
        if not isinstance(name, str | Path) or not str(name):
            raise ValueError(f'name must be that of a checkpoint, such as "nano", or a folder, got {name!r:.80}')
        from emu3.checkpoints.load import load_model, load_processor, pick_device
        from emu3.checkpoints.opened import holder, read_learned
        from emu3.modeling.draft import load_draft

        device = pick_device(load.device, load.int8)
        folder = resolve(name, download=load.download)
        if load.device_map is None:
            check_fits(folder, load.dtype, load.int8, device)
        processor = load_processor(folder)  # first, as it is small and tells whether it goes with the model
        model = load_model(folder, dtype=load.dtype, device=device, int8=load.int8, device_map=load.device_map)
        draft = load_draft(holder(folder, "draft"), model) if load.draft else None
        return cls(model, processor, compiled=load.compiled, draft=draft, learned=read_learned(folder))

    @property
    def engine(self) -> Engine:
        """Runs the requests; threads may share it. Its cache takes at most half of the memory that is free."""
        with _MAKING_ENGINE:
            if "_engine" not in self.__dict__:
                engine = Engine(self.model, compiled=self.compiled, draft=self.draft)
                weight = self.model.lm_head.weight
                room = free_memory(weight.device) // 2 // engine.bytes_per_token
                # Processes that share a model must admit the same requests.
                engine.tokens = max(2 * engine.context, least(room, weight))
                self.__dict__["_engine"] = engine
            return cast(Engine, self.__dict__["_engine"])

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which make their own engine."""
        return {name: value for name, value in self.__dict__.items() if name != "_engine"}

    @takes(Draw)
    def image(
        self,
        prompts: str | Sequence[str],
        *,
        pinned: Any = None,
        on_event: Callable[[Event], object] | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Draw one picture for each prompt, all in one batch. Returns a list, also for a single prompt.

        A notebook shows the list as pictures.

        Args:
            prompts: what to draw; a string is one prompt.
            pinned: codes (H, W) of the vision tokenizer to keep, and -1 where one is to be drawn. The picture has their
                size; see `emu3.generation.grammar.PinnedGrid`.
            on_event: called with the engine's events, whose requests are numbered like the prompts.
            **options: those of `emu3.options.Draw`. In Python `guidance_scale` may also be a function of progress,
                which goes from 0 to 1, and `decoding` a decoder. For `seed`, picture i has seed + i, or its own of a
                list. In float32 a picture depends on its seed and not on its batch. In 16 bits the products of a batch
                round differently, which may change a token.

        Raises:
            ValueError: the checkpoint only reads, the picture does not fit the context, or an argument is wrong.
        """
        if pinned is not None and np.ndim(pinned) != 2:
            raise ValueError(f"pinned codes of a picture are (H, W), got {np.shape(pinned)}; see video for clips")
        requests = self.draw_requests(prompts, pinned=pinned, **options)
        self.learned.warn(prompts)
        return Pictures(self._results(requests, on_event))

    @takes(Draw)
    def edit(
        self,
        pictures: Any,
        prompts: str | Sequence[str],
        *,
        picture_guidance: bool = False,
        on_event: Callable[[Event], object] | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Draw a picture anew as the words say: `edit(picture, "make the cat blue")`. Returns a list, as `image`.

        Args:
            pictures: one picture for all prompts; or a list with a picture, or a list of pictures, for each prompt.
            prompts: what to change; a string is one prompt.
            picture_guidance: whether guidance leads away from what follows without the pictures, too. By default it
                leads away from what follows from the pictures without the words.
            on_event, **options: as for `image`. Without a size, the result has that at which the model reads the last
                picture.

        Raises:
            ValueError: as `image`, or the number of pictures is not that of the prompts.
        """
        requests = self.edit_requests(pictures, prompts, picture_guidance=picture_guidance, **options)
        self.learned.warn(prompts)
        return Pictures(self._results(requests, on_event))

    @takes(Draw)
    def complete(
        self,
        picture: Any,
        prompts: str | Sequence[str],
        *,
        mask: Any = None,
        below: int = 0,
        on_event: Callable[[Event], object] | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Draw a part of a picture anew, or go on below it; the rest keeps its tokens. Returns a list, as `image`.

        Tokens are decided from top to bottom, so what is drawn sees what is kept above it and to its left, and not what
        is below: a hole is filled to fit its upper edge, and may not fit the lower one. `emu3 edit`'s checkpoints see
        all of a picture.

        Args:
            picture: to complete.
            prompts: what it shows, the new part included; one result for each.
            mask: a picture or an array (H, W) of the picture's size, or of that at which the model reads it; what is
                above half of its range is drawn anew, token by token. None: nothing is.
            below: pixels to go on for, a multiple of a token's side.
            on_event, **options: as for `image`; the size is that of the picture.

        Raises:
            ValueError: as `image`; the mask has another size, or nothing is to be drawn.
        """
        requests = self.complete_requests(picture, prompts, mask=mask, below=below, **options)
        self.learned.warn(prompts)
        return Pictures(self._results(requests, on_event))

    @takes(Draw)
    def video(
        self,
        prompts: str | Sequence[str],
        *,
        frames: int | None = None,
        fps: float | None = None,
        start: Any = None,
        on_event: Callable[[Event], object] | None = None,
        **options: Any,
    ) -> list[Clip]:
        """Film one clip for each prompt, all in one batch. Returns a list, as `image`.

        Args:
            prompts: what happens; a string is one prompt.
            frames: how many, a multiple of those that share a code. Default: the checkpoint's own, or 16; and more than
                the start has.
            fps: frames a second. Default: those of the start, else the checkpoint's own, or 24.
            start: a picture or clip that each clip begins with; `read_clip` says in what form. It is brought to the
                rate, encoded, and the rest is filmed behind it. Frames that fill no code are left out.
            on_event, **options: as for `image`. Without a size, a clip with a start has that of the start.

        Raises:
            ValueError: as `image`, or frames, rate or start cannot be had.
        """
        requests = self.video_requests(prompts, frames=frames, fps=fps, start=start, **options)
        self.learned.warn(prompts, frames)
        return Clips(self._results(requests, on_event))

    def extend(self, clip: Any, prompt: str = "", *, frames: int | None = None, **options: Any) -> Clip:
        """Go on with a clip, or animate a picture: the clip with `frames` more. Options as for `video`.

        By default it becomes as long as the longest clip that the checkpoint has learned, or 16 frames longer.
        """
        if frames is not None:
            tokens_of("frames", check_whole("frames", frames), self.temporal_factor, "frames")
        start = self.encode_start(clip, options.pop("fps", None))
        have = self.temporal_factor * start.shape.frames
        more = self.frames_after(have) if frames is None else frames
        words, on_event = check_text("prompt", prompt), options.pop("on_event", None)
        requests = self.video_requests(words, frames=have + more, fps=start.frames_per_second, start=start, **options)
        self.learned.warn(words, have + more)
        return Clips(self._results(requests, on_event))[0]

    @takes(Answer)
    def chat(
        self, messages: Any, pictures: Any = None, *, on_event: Callable[[Event], object] | None = None, **options: Any
    ) -> Any:
        """Answer a question or conversation; or a list of conversations, with a list of answers.

        Args:
            messages: a question; or a conversation, which is a list of messages `{"role": ..., "content": ...}`, whose
                content is a text or a list of `{"type": "text", "text": ...}`, `{"type": "image", "image": picture}`
                (see `emu3.chat.Message`) and `{"type": "video", "video": clip}`; or a list of conversations, each as
                before or a pair (question, pictures).
            pictures: one or a list, which stand in front of the question. A `Clip` may be among them.
            on_event: called with the engine's events, whose requests are numbered like the conversations.
            **options: those of `emu3.options.Answer`. Answer i of several has seed + i, or its own of a list of seeds.

        Raises:
            ValueError: the checkpoint only draws, a conversation does not fit the context, or an argument is wrong.
        """
        requests = [self.encode(asked) for asked in self.answer_requests(messages, pictures, **options)]
        answers = self._results(requests, on_event)
        return answers if are_several(messages) else answers[0]

    @takes(Answer)
    def tell(
        self,
        messages: Any,
        pictures: Any = None,
        *,
        drawing: Draw | None = None,
        on_event: Callable[[Event], object] | None = None,
        **options: Any,
    ) -> Any:
        """Answer with a text that has pictures in it, wherever the model begins one: a list of texts and pictures.

        Args:
            messages, pictures: as for `chat`; several conversations give a list of such lists.
            drawing: size and sampling of the pictures. They are not guided.
            on_event: called with the engine's events, whose requests are numbered like the conversations.
            **options: those of `emu3.options.Answer`. The longest answer, by default what the context holds, counts the
                tokens of its pictures, too. A picture that does not fit any more ends it.

        Raises:
            ValueError: as `chat`, or the checkpoint only reads.
        """
        options = {"max_new_tokens": self.engine.context} | options
        asked = self.answer_requests(messages, pictures, drawing=drawing or Draw(), **options)
        if isinstance(messages, str):
            self.learned.warn(messages)
        answers = self._results([self.encode(each) for each in asked], on_event)
        return answers if are_several(messages) else answers[0]

    def stream(self, asked: Any, pictures: Any = None, *, log_probabilities: bool = False, **options: Any) -> Stream:
        """Draw or answer, and report as tokens come. A notebook shows what comes.

        Args:
            asked: as for `image` or as for `chat`. A string, or a list of strings, is drawn. With `pictures`, even an
                empty list, a string is a question.
            pictures: of the question.
            log_probabilities: whether each `Result` says how likely its ids were.
            **options: those of `emu3.options.Draw` or `emu3.options.Answer`.

        Yields:
            The engine's events, and after each `Finished` a `Result` with the picture or the answer. Nothing is drawn
            before the first event is asked for. To stop, close the generator.

        Raises:
            ValueError: as `image` and `chat`, at the call and not at the first event.
        """
        is_words = isinstance(asked, str) or (
            isinstance(asked, list | tuple) and all(isinstance(a, str) for a in asked)
        )
        if is_words and pictures is None:
            requests = self.draw_requests(asked, **options)
            self.learned.warn(asked)
        else:
            requests = [self.encode(each) for each in self.answer_requests(asked, pictures, **options)]
        requests = [replace(request, log_probabilities=log_probabilities) for request in requests]
        return Stream(self._run(requests), requests, self)

    def _run(self, requests: list[Request]) -> Generator[Event | Result]:
        with closing(self.engine.stream(requests)) as events:  # closing cancels what still runs
            for event in events:
                yield event
                if isinstance(event, Failed):
                    raise ValueError(event.error)
                if isinstance(event, Finished):
                    yield self.result(event, requests[event.request])

    def iterate(self, requests: list[Request], on_event: Callable[[Event], object] | None = None) -> Generator[Result]:
        """The result of each request as it is finished, all in one batch. ValueError where one fails.

        `on_event` is called with the engine's events, whose requests are numbered as these.
        """
        if on_event is not None and not callable(on_event):
            raise ValueError(f"on_event must be a function that takes an event, got {on_event!r:.80}")
        with closing(self._run(requests)) as events:
            for event in events:
                if isinstance(event, Result):
                    yield event
                elif on_event is not None:
                    on_event(event)

    def results(self, requests: list[Request]) -> list[Result]:
        """The result of each request, in their order, all in one batch. ValueError where one fails."""
        return sorted(self.iterate(requests), key=lambda result: result.request)

    def _results(self, requests: list[Request], on_event: Callable[[Event], object] | None) -> list[Any]:
        """The picture or answer of each request."""
        return [each.output for each in sorted(self.iterate(requests, on_event), key=lambda each: each.request)]

    def result(self, event: Finished, request: Request) -> Result:
        """What a request that is finished came to."""
        output, logs = self.read(request, event.ids), event.log_probabilities
        made = Result(event.request, output, event.ids, event.reason, log_probabilities=logs)
        if isinstance(output, str | list):
            return made
        codes_THW = np.asarray(self._visual(request, event.ids).codes_THW)
        return replace(made, codes_THW=codes_THW) if isinstance(output, Clip) else replace(made, codes_HW=codes_THW[0])

    def read(self, request: Request, ids: Sequence[int]) -> Any:
        """What all ids of an answer mean: a picture, a clip, a text, or a list of texts and pictures."""
        if isinstance(request.grammar, MixedGrammar):
            parts = [
                each.text.strip() if isinstance(each, Text) else self.decode(each) for each in self.layout.read(ids)
            ]
            return [part for part in parts if part != ""]
        if request.grammar.kind == "text":
            return self.text(ids).strip()
        return self.decode(self._visual(request, ids))

    def text(self, ids: Sequence[int]) -> str:
        """The text in the ids of an answer, with the spaces at its ends."""
        return "".join(each.text for each in self.layout.read(ids) if isinstance(each, Text))

    def _visual(self, request: Request, ids: Sequence[int]) -> Visual:
        opening = len(request.prompt_ids) - 1 - request.prompt_ids[::-1].index(self.layout.vocabulary.boi)
        visual = cast(Visual, self.layout.read([*request.prompt_ids[opening:], *ids])[0])
        if len(visual.codes_THW) == 1 or visual.frames_per_second is not None:
            return visual
        return replace(visual, frames_per_second=self.layout.clips.fps)

    def probabilities(self, request: Request, ids: Sequence[int]) -> NDArray[np.float32]:
        """The probability of each id of a picture, given all before it and as the request samples; 1 where forced.

        In raster order they are those with which the ids were drawn.
        """
        return probabilities_of(self.model, request, ids)

    def preview(self, grid: GridGrammar, ids: Sequence[int]) -> Image.Image:
        """A picture of which only the first `ids` are there, or the frame that a clip has come to.

        The whole rows are shown; the rest is grey.
        """
        factor: int = self.processor.image_processor.spatial_factor
        picture = Image.new("RGB", (grid.width * factor, grid.height * factor), _GREY)
        frame = min(max(0, len(ids) - 1) // grid.frame_length, grid.frames - 1)
        ids = ids[frame * grid.frame_length :]
        if rows := min(len(ids) // (grid.width + 1), grid.height):
            ids_HW = np.array(ids[: rows * (grid.width + 1)]).reshape(rows, -1)[:, :-1]
            picture.paste(cast(Image.Image, self.decode(Visual(grid.vocabulary.codes_of(ids_HW)[None]))))
        return picture

    @torch.inference_mode()
    def decode(self, visual: Visual) -> Image.Image | Clip:
        """The RGB picture or clip that the codes of a `Visual` mean."""
        codes_THW = torch.tensor(np.asarray(visual.codes_THW), device=self.model.lm_head.weight.device)
        if len(codes_THW) == 1:
            pixels_BCHW = self.model.model.vqmodel.decode(codes_THW)
            picture: Image.Image = self.processor.postprocess(pixels_BCHW.float())["pixel_values"][0]
            return picture
        pictures = []  # bytes, group by group: pixels of a long clip as numbers would take much memory
        for pixels_BTCHW in self.model.model.vqmodel.decode_stream([codes_THW[None]], self.independent_groups):
            pictures += self.processor.postprocess(pixels_BTCHW[0].float())["pixel_values"]
        return Clip(np.stack([np.asarray(each) for each in pictures]), visual.frames_per_second)
