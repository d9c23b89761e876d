"""Samples of a checkpoint for a suite: drawn, laid out as the suite's scripts expect, and written down in a manifest.

    emu3 samples geneval nano --prompts evaluation_metadata.jsonl -o samples/geneval

A sample's seed follows from the run's seed, the prompt's place and the sample's number alone, and a file is there as a
whole or not at all. So a run that was cut off goes on where it was, and in float32 ends with the same bytes as one that
was not; in 16 bits the products of another batch round differently, which may change a token.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from PIL import Image

from emu3 import __version__
from emu3.checkpoints import resolve
from emu3.checkpoints.adapters import base_of, is_adapter
from emu3.checkpoints.files import write_json
from emu3.clips import Clip
from emu3.evaluation.suites import Prompt, SampleFile, Suite, read_prompts, suite_named
from emu3.generation.events import Event, Tokens
from emu3.generation.grammar import GridGrammar
from emu3.generation.request import Request
from emu3.locks import locked
from emu3.options import MOST_SEED, DrawSamples, Load, check_whole, make, takes
from emu3.pipeline import Emu3Pipeline
from emu3.whole import remove_unfinished, write_whole

BATCH = 16
"""Samples that are drawn at once. Many cost little more than one."""

# Files that decide what a checkpoint draws.
_WEIGHTS = ("*.safetensors", "draft/*.safetensors", "config.json", "adapter_config.json")
# Fields of a manifest that do not say how samples are drawn.
_FREE = ("model", "count", "finished", "samples")
_UNITS = 1000


@dataclass(frozen=True)
class Written:
    """What a run came to.

    Attributes:
        manifest: what was written to `file`.
        file: the manifest's.
        drawn: how many samples this run drew; the others were there.
    """

    manifest: dict[str, Any]
    file: Path
    drawn: int


@takes(DrawSamples)
def write_samples(
    suite: str,
    prompts: str | Path,
    output: str | Path,
    *,
    model: str | Path = "nano",
    load: Load | None = None,
    pictures: str | Path | None = None,
    per_prompt: int | None = None,
    limit: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    batch: int = BATCH,
    on_progress: Callable[[int, int], object] = lambda done, in_all: None,
    **options: Any,
) -> Written:
    """Draw a suite's samples into a folder, or those that are not there yet, and write the manifest.

    Args:
        suite: "geneval", "dpg-bench", "t2i-compbench", "vbench" or "imgedit".
        prompts: the suite's own file of prompts; of DPG-Bench a folder.
        output: the folder.
        model: a checkpoint that draws, films or edits, as the suite needs.
        load: how it is loaded.
        pictures: of ImgEdit, the folder of the pictures to edit; by default that of the prompt file.
        per_prompt: samples for each prompt; by default as many as the suite asks for.
        limit: only the first prompts. A later run may go on with more.
        frames, fps: of the clips; see `Emu3Pipeline.video`.
        batch: samples that are drawn at once.
        on_progress: called with what is done and what there is in all.
        **options: those of `emu3.options.DrawSamples`.

    Raises:
        ValueError: the prompts are malformed, the checkpoint cannot do what the suite needs, an option is wrong, or the
            folder holds samples made otherwise, or other files. Nothing is written then.
    """
    asked = suite_named(suite)
    read = read_prompts(asked, Path(prompts), None if pictures is None else Path(pictures))
    read = asked.counted(read, per_prompt)
    files = asked.files(read if limit is None else read[: check_whole("limit", limit)])
    check_whole("batch", batch)
    draw = make(DrawSamples, options)
    load = load or Load()
    if asked.ability != "film" and (frames, fps) != (None, None):
        raise ValueError(f"{asked.name} has no clips; leave frames and fps out")
    folder = Path(output).expanduser().absolute()
    weights = _weights_of(resolve(model, download=load.download))
    pipeline = Emu3Pipeline.from_pretrained(model, **asdict(load))
    pipeline.require(asked.ability)
    run = _Run(asked, pipeline, cast(DrawSamples, pipeline.settled(draw, asked.ability == "film")), frames, fps)
    manifest = {
        "suite": asked.name,
        "model": str(model),
        "weights": weights,
        "prompts": _digest_of(Path(prompts), read),
        "per_prompt": sorted({prompt.samples for prompt in read}),
        "settings": run.settings(files[0]) | _loaded(pipeline, load),
        "versions": {"emu3": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        **_plan(files, draw.seed),
    }
    target = folder / "manifest.json" if asked.manifest_inside else folder.with_name(f"{folder.name}.manifest.json")
    with locked(target.with_name(f".{target.name}.lock"), f"the samples of {target}"):
        manifest = _go_on(target, manifest, folder)
        remove_unfinished(folder)
        missing = [file for file in files if not (folder / file.path).is_file()]
        run.draw(missing, folder, batch, on_progress)
        manifest["finished"] = all((folder / sample["file"]).is_file() for sample in manifest["samples"])
        write_whole(target, lambda unfinished: write_json(unfinished, manifest))
    return Written(manifest, target, sum(len(file.samples) for file in missing))


def sample_seed(seed: int, index: int, number: int) -> int:
    """The seed of a sample: of the run's seed, the prompt's place and the sample's number, each from 0 on."""
    digest = hashlib.sha256(f"{seed} {index} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & MOST_SEED


@dataclass(frozen=True, eq=False)
class _Run:
    suite: Suite
    pipeline: Emu3Pipeline
    options: DrawSamples
    frames: int | None
    fps: float | None

    def request(self, file: SampleFile, number: int) -> Request:
        """What a sample asks the engine for."""
        prompt = file.prompt
        options = asdict(self.options) | {"seed": sample_seed(self.options.seed, file.index, number)}
        if self.suite.ability == "film":
            (request,) = self.pipeline.video_requests(prompt.words, frames=self.frames, fps=self.fps, **options)
        elif prompt.picture is not None:
            (request,) = self.pipeline.edit_requests([_read_picture(prompt)], [prompt.words], **options)
        else:
            (request,) = self.pipeline.draw_requests(prompt.words, **options)
        return request

    def settings(self, first: SampleFile) -> dict[str, Any]:
        """How samples are drawn, as it comes to. ValueError where they cannot be, or a file cannot say how."""
        settings = asdict(self.options)
        grammar = cast(GridGrammar, self.request(first, first.samples[0]).grammar)
        factor = self.pipeline.processor.image_processor.spatial_factor
        if self.suite.ability != "edit":
            settings |= {"height": grammar.height * factor, "width": grammar.width * factor}
        if self.suite.ability == "film":
            frames = grammar.frames * self.pipeline.temporal_factor
            settings |= {"frames": frames, "fps": self.fps or self.pipeline.layout.clips.fps}
        if self.suite.in_grid and grammar.height != grammar.width:
            raise ValueError(
                f"{self.suite.name} cuts its grids into squares, and pictures of {settings['width']}x"
                f"{settings['height']} pixels are asked for; give height and width the same number"
            )
        for name, value in settings.items():
            if not isinstance(value, int | float | str | None):
                raise ValueError(f"{name} is {value!r:.80}, which a manifest cannot hold; give a number or a name")
        return settings

    def draw(
        self, files: Sequence[SampleFile], folder: Path, batch: int, on_progress: Callable[[int, int], object]
    ) -> None:
        """Draws and writes all samples of the files."""
        samples = [(file, number) for file in files for number in file.samples]
        waiting: dict[str, dict[int, Image.Image | Clip]] = defaultdict(dict)
        for start in range(0, len(samples), batch):
            chunk = samples[start : start + batch]
            requests = [self.request(file, number) for file, number in chunk]
            tokens, in_all = 0, sum(request.grammar.length or 0 for request in requests)

            def look(event: Event, start: int = start, count: int = len(chunk), in_all: int = in_all) -> None:
                nonlocal tokens
                if isinstance(event, Tokens):
                    tokens += len(event.ids)
                    on_progress(int(_UNITS * (start + count * tokens / in_all)), _UNITS * len(samples))

            for result in self.pipeline.iterate(requests, look):
                file, number = chunk[result.request]
                made = waiting[file.path]
                made[number] = result.output
                if len(made) == len(file.samples):
                    _write(file, [made[each] for each in file.samples], folder)
                    del waiting[file.path]


def _write(file: SampleFile, made: Sequence[Any], folder: Path) -> None:
    path = folder / file.path
    if file.prompt.metadata is not None:
        text = json.dumps(file.prompt.metadata)
        write_whole(path.parents[1] / "metadata.jsonl", lambda unfinished: unfinished.write_text(text))
    if isinstance(made[0], Clip):
        write_whole(path, lambda unfinished: made[0].save(unfinished, path.suffix))
    else:
        write_whole(path, lambda unfinished: _in_grid(made).save(unfinished, format="PNG"))


def _in_grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """Up to four pictures of one size, two in a row."""
    width, height = pictures[0].size
    columns = min(2, len(pictures))
    grid = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for number, picture in enumerate(pictures):
        grid.paste(picture, (number % columns * width, number // columns * height))
    return grid


def _read_picture(prompt: Prompt) -> Image.Image:
    picture = cast(Path, prompt.picture)
    try:
        with Image.open(picture) as opened:
            return opened.convert("RGB")
    # What Pillow raises depends on the format and on where the file breaks.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"cannot read {str(picture)!r} as a picture: {error}; get the suite's pictures again"
        ) from error


def _plan(files: Sequence[SampleFile], seed: int) -> dict[str, Any]:
    samples = [
        {
            "file": file.path,
            "prompt": file.prompt.words,
            "seeds": [sample_seed(seed, file.index, number) for number in file.samples],
        }
        for file in files
    ]
    return {"count": sum(len(file.samples) for file in files), "finished": False, "samples": samples}


def _loaded(pipeline: Emu3Pipeline, load: Load) -> dict[str, Any]:
    """How the checkpoint runs, as far as that can change a token."""
    weight = pipeline.model.model.text_model.embed_tokens.weight
    loaded = {"dtype": str(weight.dtype).removeprefix("torch."), "device": weight.device.type}
    return {**loaded, "int8": load.int8, "compiled": load.compiled, "draft": pipeline.draft is not None}


def _weights_of(folder: Path) -> str:
    """A hash of a checkpoint's weights and settings; of an adapter, with those of its base."""
    folders = [folder, base_of(folder)] if is_adapter(folder) else [folder]
    return _hash_of(file for each in folders for pattern in _WEIGHTS for file in sorted(each.glob(pattern)))


def _digest_of(source: Path, prompts: Sequence[Prompt]) -> str:
    """A hash of a file of prompts and of the pictures that it names."""
    files = sorted(source.glob("*.txt")) if source.is_dir() else [source]
    return _hash_of([*files, *(prompt.picture for prompt in prompts if prompt.picture is not None)])


def _hash_of(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            digest.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _go_on(target: Path, manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Writes the manifest, and returns it: of a longer run with these settings, if there was one.

    ValueError where the folder holds samples made otherwise, or other files.
    """
    remedy = "name another folder with -o, or remove this one"
    if not target.is_file():
        others = [file.name for file in folder.glob("*") if not file.name.startswith(".")]
        if others:
            raise ValueError(f"{folder} holds {others[0]!r:.80} and its manifest {target} is missing; {remedy}")
    else:
        there = _read_manifest(target, remedy)
        for name, value in manifest.items():
            if name not in _FREE and there.get(name) != value:
                was, now = _difference(there.get(name), value)
                raise ValueError(f"{folder} holds samples made with {name} {was}, not with {now}; {remedy}")
        if len(there["samples"]) > len(manifest["samples"]):
            return there
    write_whole(target, lambda unfinished: write_json(unfinished, manifest))
    return manifest


def _read_manifest(target: Path, remedy: str) -> dict[str, Any]:
    try:
        there = json.loads(target.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        there = None
    if not isinstance(there, dict) or not isinstance(there.get("samples"), list):
        raise ValueError(f"{target} is no manifest of samples; {remedy}")
    return there


def _difference(was: Any, now: Any) -> tuple[str, str]:
    """How two values differ: of objects, the first entries that do."""
    if isinstance(was, dict) and isinstance(now, dict):
        name = next(name for name in {**now, **was} if was.get(name) != now.get(name))
        return f"{name}={was.get(name)!r:.80}", f"{name}={now.get(name)!r:.80}"
    return f"{was!r:.80}", f"{now!r:.80}"
