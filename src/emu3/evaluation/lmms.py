"""A model for lmms-eval, which measures reading by the benchmarks that it knows. Needs lmms-eval 0.7 or later.

    python -m lmms_eval --model emu3 --model_args pretrained=nano --tasks TASK

lmms-eval finds `manifest` by the entry point `lmms_eval.models` of this package, and nothing else imports this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from emu3.clips import Clip, read_clip
from emu3.options import Answer, Load, check_whole, make

try:
    from lmms_eval.api.model import lmms as Model
except ImportError:  # the reference of all modules is also built where it is not installed
    Model = object

if TYPE_CHECKING:
    from emu3.chat import Message

# Options of a task that other models have, and that change nothing where answers are sampled one by one.
_WITHOUT_EFFECT = ("do_sample", "image_aspect_ratio", "num_beams", "until", "use_cache")


def manifest() -> Any:
    """What lmms-eval asks a package for: the name of the model, and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="emu3", chat_class_path=f"{__name__}.LmmsModel")


class LmmsModel(Model):
    """A checkpoint that answers lmms-eval's requests, as many at once as `--batch_size` says.

    Args:
        pretrained: "nano", a folder, or a hub id.
        batch_size: conversations that are answered at once.
        max_frames: of a video. A longer one gives so many, evenly spaced.
        max_batch_size: left out of account.
        **options: those of `emu3.options.Load`; lmms-eval's own `--device` is one of them.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "nano",
        batch_size: Any = 1,
        max_batch_size: Any = None,
        max_frames: int = 16,
        **options: Any,
    ) -> None:
        super().__init__()
        from emu3.pipeline import Emu3Pipeline

        count = str(batch_size)
        if not count.isdecimal():
            raise ValueError(f"batch_size must be a whole number, got {batch_size!r:.80}; give one, as 16")
        self.batch_size = check_whole("batch_size", int(count))
        self.max_frames = check_whole("max_frames", max_frames)
        make(Load, options)  # names what is wrong before anything is loaded
        self.pipeline = Emu3Pipeline.from_pretrained(pretrained, **options)
        self.pipeline.require("read")

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request, in their order."""
        answers: list[str] = []
        start = 0
        while start < len(requests):
            wanted = requests[start].args[2]
            end = start + 1
            while end < min(start + self.batch_size, len(requests)) and requests[end].args[2] == wanted:
                end += 1
            batch = requests[start:end]
            options = _options(wanted)
            options["seed"] = options.get("seed", 0) + start  # the same run, the same answers
            said = self.pipeline.chat([self._conversation(each) for each in batch], **options)
            for each, text in zip(batch, said, strict=True):
                answers.append(_until(text, wanted.get("until")))
                self.cache_hook.add_partial("generate_until", (each.args[0], wanted), answers[-1])
            start = end
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not to be had."""
        raise NotImplementedError("emu3 answers in one round; choose tasks whose output_type is generate_until")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not to be had."""
        raise NotImplementedError(
            "emu3 answers in words and does not rate given ones; choose tasks whose output_type is generate_until"
        )

    def _conversation(self, request: Any) -> list[Message]:
        _, messages_of, _, document, task, split = request.args
        return [self._message(each) for each in messages_of(self.task_dict[task][split][document])]

    def _message(self, message: Mapping[str, Any]) -> Message:
        """A message of lmms-eval as one of ours."""
        content = message["content"]
        if isinstance(content, str):
            return message
        return {"role": message["role"], "content": [self._part(each) for each in content]}

    def _part(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """A part of a message of lmms-eval, whose pictures and videos are under "url"."""
        kind = part["type"]
        if kind == "text":
            return dict(part)
        if kind == "image":
            return {"type": "image", "image": part["url"]}
        if kind != "video":
            raise NotImplementedError(f"emu3 reads pictures and videos, and this task has {kind}; choose another task")
        video = part["url"]
        if isinstance(video, Mapping) or part.get("start_time") is not None or part.get("end_time") is not None:
            raise NotImplementedError("emu3 reads whole videos, and this task names parts of them; choose another task")
        clip = read_clip(video, self.max_frames, evenly=True)
        if (clip.frames_per_second or 0) < self.pipeline.layout.clips.fps:  # frames are not shown twice to fill it up
            clip = Clip(clip.frames_THWC)
        return {"type": "video", "video": clip}


def _options(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an answer, of those with which a task wants text to be generated. ValueError for others."""
    options = {name: value for name, value in wanted.items() if name not in _WITHOUT_EFFECT and value is not None}
    if wanted.get("do_sample") is False:
        options |= {"temperature": 0.0}
    if options.get("top_k", 0) == -1:  # all, as others say it
        options["top_k"] = 0
    if not options.get("top_p", 1.0):  # of a task that takes the likeliest token anyway
        del options["top_p"]
    make(Answer, options)
    return options


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """A text up to the first of some strings."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.split(stop)[0] if stop else text
    return text
