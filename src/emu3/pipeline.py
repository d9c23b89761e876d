"""The one-line interface: pictures from words, and words from pictures.

What a user writes is plain text: "<image>" or "<|image start|>" in it are characters, not tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from emu3.asked import Asked, are_several, conversations_of, seeds_of, tokens_of
from emu3.chat import Message
from emu3.checkpoints import resolve
from emu3.checkpoints.memory import check_fits, free_memory
from emu3.generation.decoders.named import decoder_named
from emu3.generation.engine import Engine
from emu3.generation.events import Event, Failed, Finished
from emu3.generation.grammar import GridGrammar, PinnedGrid
from emu3.generation.request import Guidance, Request
from emu3.generation.runtime.head import Head
from emu3.generation.sampling import Sampling, guide, implausible, probabilities
from emu3.image_processing import MAX_ASPECT_RATIO
from emu3.layout import Emu3Layout, Layout
from emu3.modeling.parallel import least
from emu3.options import Answer, Draw, Load, check_ability, check_words, make, takes
from emu3.quantization import Int8Linear, QuantizedHead, QuantizedLinear
from emu3.results import Pictures, Result, Stream
from emu3.segments import Shape, Text, Visual
from emu3.tokenization import PlainText

if TYPE_CHECKING:
    from emu3.modeling.draft import DraftHead
    from emu3.modeling.multimodal import Emu3ForConditionalGeneration
    from emu3.processing import Emu3Processor

# Of the module, because a lock in a pipeline could not be copied or pickled.
_MAKING_ENGINE = threading.Lock()
# What is not drawn yet, in a preview.
_GREY = (128, 128, 128)
_GUIDANCE = {"guidance_scale": 3.0, "guidance_floor": 0.0}
"""Of a checkpoint that recommends none."""


@dataclass(frozen=True, eq=False)
class Emu3Pipeline:
    """A model in evaluation mode and its processor, ready to draw and to answer.

    Its engine is made at the first call and kept. Call `engine.refresh()` after you change the model's weights.
    `compiled` compiles the layers, and `draft` is a draft head, as `Engine` says.
    """

    model: Emu3ForConditionalGeneration
    processor: Emu3Processor
    compiled: bool = False
    draft: DraftHead | None = None

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
        from emu3.checkpoints.opened import holder
        from emu3.modeling.draft import load_draft

        device = pick_device(load.device, load.int8)
        folder = resolve(name, download=load.download)
        if load.device_map is None:
            check_fits(folder, load.dtype, load.int8, device)
        processor = load_processor(folder)  # first, as it is small and tells whether it goes with the model
        model = load_model(folder, dtype=load.dtype, device=device, int8=load.int8, device_map=load.device_map)
        draft = load_draft(holder(folder, "draft"), model) if load.draft else None
        return cls(model, processor, compiled=load.compiled, draft=draft)

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

    @cached_property
    def layout(self) -> Layout:
        """How the checkpoint spells pictures."""
        return Emu3Layout(self.model.model.vocabulary, PlainText(self.processor.tokenizer))

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
        return Pictures(self._results(self.draw_requests(prompts, pinned=pinned, **options), on_event))

    @takes(Answer)
    def chat(
        self, messages: Any, pictures: Any = None, *, on_event: Callable[[Event], object] | None = None, **options: Any
    ) -> Any:
        """Answer a question or conversation; or a list of conversations, with a list of answers.

        Args:
            messages: a question; or a conversation, which is a list of messages `{"role": ..., "content": ...}`, whose
                content is a text or a list of `{"type": "text", "text": ...}` and `{"type": "image", "image": picture}`
                (see `emu3.chat.Message`); or a list of conversations, each as before or a pair (question, pictures).
            pictures: one or a list, which stand in front of the question.
            on_event: called with the engine's events, whose requests are numbered like the conversations.
            **options: those of `emu3.options.Answer`. Answer i of several has seed + i, or its own of a list of seeds.

        Raises:
            ValueError: the checkpoint only draws, a conversation does not fit the context, or an argument is wrong.
        """
        requests = [self.encode(asked) for asked in self.answer_requests(messages, pictures, **options)]
        answers = self._results(requests, on_event)
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
        else:
            requests = [self.encode(each) for each in self.answer_requests(asked, pictures, **options)]
        requests = [replace(request, log_probabilities=log_probabilities) for request in requests]
        return Stream(self._run(requests), requests, self)

    def require(self, ability: str) -> None:
        """ValueError where the checkpoint's config.json says that it lacks an ability, "draw" or "read"."""
        check_ability(ability, getattr(self.model.config, "abilities", None))

    def _run(self, requests: list[Request]) -> Generator[Event | Result]:
        with closing(self.engine.stream(requests)) as events:  # closing cancels what still runs
            for event in events:
                yield event
                if isinstance(event, Failed):
                    raise ValueError(event.error)
                if isinstance(event, Finished):
                    yield self.result(event, requests[event.request])

    def results(self, requests: list[Request]) -> list[Result]:
        """The result of each request, in their order, all in one batch. ValueError where one fails."""
        found = [each for each in self._run(requests) if isinstance(each, Result)]
        return sorted(found, key=lambda result: result.request)

    def _results(self, requests: list[Request], on_event: Callable[[Event], object] | None) -> list[Any]:
        """The picture or answer of each request."""
        if on_event is not None and not callable(on_event):
            raise ValueError(f"on_event must be a function that takes an event, got {on_event!r:.80}")
        outputs: dict[int, Any] = {}
        with closing(self._run(requests)) as events:
            for event in events:
                if isinstance(event, Result):
                    outputs[event.request] = event.output
                elif on_event is not None:
                    on_event(event)
        return [outputs[number] for number in range(len(requests))]

    @takes(Draw)
    def draw_requests(self, prompts: str | Sequence[str], *, pinned: Any = None, **options: Any) -> list[Request]:
        """What `image` asks the engine for: one request for each prompt. Arguments and errors as there.

        `pinned` are codes (H, W) that are given, and -1 where one is to be drawn; see `PinnedGrid`. Their size is then
        that of the picture.
        """
        draw = self.settled(make(Draw, options))
        self.require("draw")
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"prompts must be a string or a non-empty list of strings, got {prompts!r:.80}")
        grid = None if pinned is None else PinnedGrid.of(pinned, self.layout.vocabulary)
        shape = self._shape(draw) if grid is None else Shape(grid.height, grid.width)
        grammar, guidance = self.layout.grammar(shape) if grid is None else grid, None
        if draw.guidance_scale != 1:
            negative_ids = self.layout.prompt(draw.negative_prompt or "", shape)
            scale, floor = cast(float, draw.guidance_scale), cast(float, draw.guidance_floor)
            guidance = Guidance(tuple(negative_ids), scale, floor=floor)
        decoder = decoder_named(draw.decoding) if isinstance(draw.decoding, str) else draw.decoding
        sampling = Sampling(draw.temperature, draw.top_k, draw.top_p)
        requests = []
        for text, seed in zip(texts, seeds_of(draw.seed, len(texts)), strict=True):
            ids = tuple(self.layout.prompt(check_words("prompt", text), shape))
            requests.append(Request(ids, grammar, sampling, guidance, seed, decoder=decoder))
            requests[-1].budget(self.engine.context)  # refuses what does not fit
        return requests

    def settled(self, draw: Draw) -> Draw:
        """With the guidance that the checkpoint's config.json recommends under "drawing", where none is asked for."""
        own = getattr(self.model.config, "drawing", None) or {}
        missing = [name for name in _GUIDANCE if getattr(draw, name) is None]
        found: Any = {name: _GUIDANCE[name] if own.get(name) is None else own[name] for name in missing}
        return replace(draw, **found)

    def _shape(self, draw: Draw) -> Shape:
        """Height and width in visual tokens."""
        factor: int = self.processor.image_processor.spatial_factor
        if draw.height is None or draw.width is None:
            area = self.processor.image_area if draw.image_area is None else draw.image_area
            shape = Shape(*self.processor.calculate_generate_size(draw.ratio, area, factor))
        else:
            shape = Shape(tokens_of("height", draw.height, factor), tokens_of("width", draw.width, factor))
        if max(shape.height, shape.width) > MAX_ASPECT_RATIO * min(shape.height, shape.width):
            raise ValueError(
                f"a picture of {shape.width * factor}x{shape.height * factor} pixels is more than {MAX_ASPECT_RATIO} "
                "times longer than wide; ask for a squarer one"
            )
        return shape

    @takes(Answer)
    def answer_requests(self, messages: Any, pictures: Any = None, **options: Any) -> list[Asked]:
        """What `chat` asks the engine for, one for each conversation; see `encode`. Arguments and errors as there."""
        answer = make(Answer, options)
        conversations = conversations_of(messages, pictures)
        self.require("read")
        sampling = Sampling(answer.temperature, answer.top_k, answer.top_p)
        seeds = seeds_of(answer.seed, len(conversations))
        return [
            self._asked(conversation, sampling, seed, answer.max_new_tokens)
            for conversation, seed in zip(conversations, seeds, strict=True)
        ]

    def _asked(self, conversation: list[Message], sampling: Sampling, seed: int, max_new_tokens: int) -> Asked:
        inputs = self.processor.apply_chat_template(
            conversation,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            split_special_tokens=True,
            add_generation_prompt=True,
        )
        ids = tuple(inputs["input_ids"][0].tolist())
        grammar = self.layout.answer(len(self.model.lm_head.weight))
        request = Request(ids, grammar, sampling, seed=seed, max_new_tokens=max_new_tokens)
        request.budget(self.engine.context)  # refuses what does not fit, before the pictures are encoded
        if "pixel_values" not in inputs:
            return Asked(request)
        # One by one and without padding, which would change the codes near it.
        pixels = (
            (pixels_CHW[None, :, : size[0], : size[1]], size[None])
            for pixels_CHW, size in zip(inputs["pixel_values"], inputs["image_sizes"], strict=True)
        )
        return Asked(request, tuple(pixels))

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

    def result(self, event: Finished, request: Request) -> Result:
        """What a request that is finished came to."""
        codes = None if request.grammar.kind == "text" else np.asarray(self._visual(request, event.ids).codes_THW)[0]
        output = self.read(request, event.ids)
        return Result(event.request, output, event.ids, event.reason, codes, event.log_probabilities)

    def read(self, request: Request, ids: Sequence[int]) -> Image.Image | str:
        """The picture or the text that all ids of an answer mean."""
        if request.grammar.kind == "text":
            return self.text(ids).strip()
        return self.decode(self._visual(request, ids))

    def text(self, ids: Sequence[int]) -> str:
        """The text in the ids of an answer, with the spaces at its ends."""
        return "".join(each.text for each in self.layout.read(ids) if isinstance(each, Text))

    def _visual(self, request: Request, ids: Sequence[int]) -> Visual:
        opening = len(request.prompt_ids) - 1 - request.prompt_ids[::-1].index(self.layout.vocabulary.boi)
        (visual,) = self.layout.read([*request.prompt_ids[opening:], *ids])
        return cast(Visual, visual)

    @torch.inference_mode()
    def probabilities(self, request: Request, ids: Sequence[int]) -> NDArray[np.float32]:
        """The probability of each id of a picture, given all before it and as the request samples; 1 where forced.

        In raster order they are those with which the ids were drawn.
        """
        grammar, head = request.grammar, Head(self.model.lm_head)
        lo, hi = (np.broadcast_to(bound, len(ids)) for bound in grammar.span(np.arange(len(ids))))
        free = (hi > lo + 1).nonzero()[0]
        states = []
        for prompt in request.prompts:
            ids_BS = torch.tensor([[*prompt, *ids[:-1]]], device=head.device)
            hidden_BSE = self.model.model.text_model(input_ids=ids_BS, use_cache=False).last_hidden_state
            states.append(hidden_BSE[0, len(prompt) - 1 :])
        found = np.ones(len(ids), dtype=np.float32)
        sampling = request.sampling_of(grammar.kind)
        for k in free.tolist():  # one by one, because the logits of all would take much memory
            logits_BV = head.logits(torch.stack([state[k] for state in states]), (int(lo[k]), int(hi[k])))
            scale = request.guidance_at(grammar, k)
            guided_BV = logits_BV[:1]
            if scale is not None:
                guided_BV = guide(guided_BV, logits_BV[1:], scale)
                if floor := request.floor_at(scale):
                    guided_BV[implausible(logits_BV[:1], floor)] = -torch.inf
            found[k] = probabilities(guided_BV, sampling)[0, ids[k] - int(lo[k])]
        return found

    def preview(self, grid: GridGrammar, ids: Sequence[int]) -> Image.Image:
        """A picture of which only the first `ids` are there. The whole rows of them are shown; the rest is grey."""
        factor: int = self.processor.image_processor.spatial_factor
        picture = Image.new("RGB", (grid.width * factor, grid.height * factor), _GREY)
        if rows := min(len(ids) // (grid.width + 1), grid.height):
            ids_HW = np.array(ids[: rows * (grid.width + 1)]).reshape(rows, -1)[:, :-1]
            picture.paste(self.decode(Visual(grid.vocabulary.codes_of(ids_HW)[None])))
        return picture

    @torch.inference_mode()
    def decode(self, visual: Visual) -> Image.Image:
        """The RGB picture that the codes of a `Visual` mean."""
        codes_THW = torch.tensor(np.asarray(visual.codes_THW), device=self.model.lm_head.weight.device)
        pixels_BCHW = self.model.model.vqmodel.decode(codes_THW)
        picture: Image.Image = self.processor.postprocess(pixels_BCHW.float())["pixel_values"][0]
        return picture
