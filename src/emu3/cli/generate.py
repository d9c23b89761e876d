"""Commands that run a checkpoint: `emu3 image`, `edit`, `video`, `chat`, `serve`."""

import secrets
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from emu3 import __version__
from emu3.cli.common import (
    JsonOption,
    ModelArgument,
    ModelOption,
    load_pipeline,
    need_packages,
    note,
    print_out,
    progress,
    settings_of,
    takes_options,
)
from emu3.cli.files import (
    check_folder,
    check_is_no_file,
    output_paths,
    read_media,
    read_start,
    read_still,
    write_clip,
    write_picture,
    write_text,
)
from emu3.learned import NotLearned
from emu3.options import Answer, Draw, Load, Serve, check_words
from emu3.suffixes import ANIMATIONS, CLIPS

if TYPE_CHECKING:
    from emu3.generation.request import Request
    from emu3.pipeline import Emu3Pipeline


@takes_options(draw=Draw, load=Load)
def image(
    draw: Draw,
    load: Load,
    prompts: Annotated[
        list[str], typer.Argument(help="What to draw, one picture for each; in quotes.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="A .png file (numbered for several prompts), or a folder; replaces what is there."
        ),
    ] = Path("out.png"),
    model: ModelOption = "nano",
    as_json: JsonOption = False,
) -> None:
    """Draw pictures from words. The settings are kept in each PNG, under the text key "emu3"."""
    _check_prompts(prompts)
    paths = output_paths(output, len(prompts))
    settings = settings_of(model, load)
    settings.check_size(draw)
    for each in settings.learned.notes(prompts):
        note(each)
    pipeline = load_pipeline(model, load, "draw")
    draw = _with_seed(pipeline, draw)
    requests = pipeline.draw_requests(prompts, **asdict(draw))
    records = [{"prompt": prompt} for prompt in prompts]
    print_out(_make(pipeline, requests, paths, records, model, load, draw, as_json))


@takes_options(draw=Draw, load=Load)
def edit(
    draw: Draw,
    load: Load,
    picture: Annotated[str, typer.Argument(help="The picture to change, a file.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="What to change, in quotes.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="A .png file, or a folder.")] = Path("out.png"),
    beside: Annotated[
        list[str] | None, typer.Option(help="One more picture that the words speak of; may be given again.")
    ] = None,
    mask: Annotated[
        str | None, typer.Option(help="A picture, white where it is drawn anew; the words say what it shows then.")
    ] = None,
    below: Annotated[int, typer.Option(min=0, help="Pixels to go on for below; the words say what it shows.")] = 0,
    model: ModelOption = "nano",
    as_json: JsonOption = False,
) -> None:
    """Draw a picture anew, changed as words say: emu3 edit cat.png "make the cat blue".

    The result has the size at which the checkpoint reads the picture: nano about 48x48 pixels.

    With --mask or --below, only a part is drawn, and the rest keeps its tokens.
    """
    check_words("prompt", prompt)
    check_is_no_file("prompt", prompt)
    completes = mask is not None or below > 0
    if completes and beside:
        raise ValueError("--beside is for a picture that is drawn anew as a whole; leave it out, or --mask and --below")
    (path,) = output_paths(output, 1)
    names = [picture, *(beside or [])]
    opened = [read_still(name) for name in names]
    hole = None if mask is None else read_still(mask)
    settings = settings_of(model, load)
    settings.check_size(draw)
    if completes:
        settings.check_part(opened[0], hole, below)
    for each in settings.learned.notes(prompt):
        note(each)
    resized = [change for each in zip(names, opened, strict=True) if (change := settings.resized(*each))]
    for change in resized:
        (width, height), (new_width, new_height) = change["from"], change["to"]
        note(f"{change['picture']} is resized from {width}x{height} to {new_width}x{new_height} pixels, as it is read")
    pipeline = load_pipeline(model, load, "draw" if completes else "edit")
    draw = _with_seed(pipeline, draw)
    if completes:
        requests = pipeline.complete_requests(opened[0], [prompt], mask=hole, below=below, **asdict(draw))
    else:
        requests = pipeline.edit_requests([opened], [prompt], **asdict(draw))
    record: dict[str, Any] = {"prompt": prompt, "pictures": names, "resized": resized}
    record |= {"mask": mask, "below": below} if completes else {}
    print_out(_make(pipeline, requests, [path], [record], model, load, draw, as_json))


@takes_options(draw=Draw, load=Load)
def video(
    draw: Draw,
    load: Load,
    prompts: Annotated[
        list[str], typer.Argument(help="What happens, one clip for each; in quotes.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help=f"A file that ends in {', '.join(CLIPS)}; or a folder for GIFs."),
    ] = Path("out.gif"),
    frames: Annotated[
        int | None,
        typer.Option(help="In all, those of --start too; a multiple of 4.", show_default="the checkpoint's, or 16"),
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second.", show_default="the checkpoint's, or 24")] = None,
    start: Annotated[
        str | None, typer.Option(help="A picture or clip that it begins with, a file.", show_default=False)
    ] = None,
    model: ModelOption = "nano",
    as_json: JsonOption = False,
) -> None:
    """Film clips from words; with --start, go on with a clip or animate a picture."""
    _check_prompts(prompts)
    paths = output_paths(output, len(prompts), CLIPS)
    if paths[0].suffix.lower() not in ANIMATIONS:
        need_packages(f"writing {paths[0].suffix[1:]}", "video", "av")
    begin = None if start is None else read_start(start)
    settings = settings_of(model, load)
    settings.check_size(draw)
    settings.check_frames(frames)
    for each in settings.learned.notes(prompts, frames):
        note(each)
    pipeline = load_pipeline(model, load, "film")
    draw = _with_seed(pipeline, draw, film=True)
    requests = pipeline.video_requests(prompts, frames=frames, fps=fps, start=begin, **asdict(draw))
    records = [{"prompt": prompt, "start": start} for prompt in prompts]
    print_out(_make(pipeline, requests, paths, records, model, load, draw, as_json))


def _check_prompts(prompts: list[str]) -> None:
    for prompt in prompts:
        check_words("prompt", prompt)
    if len(prompts) > 1 and all(len(prompt.split()) == 1 for prompt in prompts):
        note(f"{len(prompts)} prompts of one word each; if they are one prompt, put it in quotes")


def _with_seed(pipeline: "Emu3Pipeline", draw: Draw, film: bool = False) -> Draw:
    """The options as they are used: the checkpoint's own guidance, and a seed."""
    return pipeline.settled(replace(draw, seed=secrets.randbelow(2**31) if draw.seed is None else draw.seed), film)


def _make(
    pipeline: "Emu3Pipeline",
    requests: "list[Request]",
    paths: list[Path],
    records: list[dict[str, Any]],
    model: str,
    load: Load,
    draw: Draw,
    as_json: bool,
) -> Any:
    """Draws with a bar, writes pictures and clips as they come, and returns what is printed of them."""
    from emu3.clips import Clip
    from emu3.generation.events import Event, Started, Tokens

    weight = pipeline.model.model.text_model.embed_tokens.weight
    loaded: dict[str, Any] = {"dtype": str(weight.dtype).removeprefix("torch."), "device": str(weight.device)}
    loaded |= {"int8": load.int8, "compiled": load.compiled, "draft": pipeline.draft is not None}
    done: dict[int, dict[str, Any]] = {}
    drawn, in_all = 0, 0
    with progress("drawing") as report:

        def look(event: Event) -> None:
            nonlocal drawn, in_all
            if isinstance(event, Started):
                in_all += event.length
            elif isinstance(event, Tokens):
                drawn += len(event.ids)
                report(drawn, in_all)

        for result in pipeline.iterate(requests, look):
            number, made = result.request, result.output
            # What draws it again on its own: its own seed, and the size that ratio and model came to.
            own: dict[str, Any] = {"seed": cast(int, draw.seed) + number}
            if isinstance(made, Clip):
                count, height, width, _ = made.frames_THWC.shape
                own |= {"frames": count, "fps": made.frames_per_second}
            else:
                width, height = made.size
            record = records[number] | {"model": model, "version": __version__, **loaded, **asdict(draw), **own}
            record |= {"height": height, "width": width}
            write_clip(made, paths[number]) if isinstance(made, Clip) else write_picture(made, paths[number], record)
            done[number] = {"path": str(paths[number]), **record}
    in_order = [done[number] for number in sorted(done)]
    if as_json:
        return in_order
    return "\n".join(
        f"{each['path']}  seed {each['seed']}  {each['width']}x{each['height']}  "
        + (f"{each['frames']} frames  " if "frames" in each else "")
        + each["prompt"]
        for each in in_order
    )


@takes_options(answer=Answer, load=Load)
def chat(
    answer: Answer,
    load: Load,
    picture: Annotated[str, typer.Argument(help="The picture or clip to look at, a file.", show_default=False)],
    question: Annotated[
        str | None, typer.Argument(help="What to ask about it.", show_default="Describe the picture, or the clip.")
    ] = None,
    beside: Annotated[
        list[str] | None, typer.Option(help="One more picture or clip, after the first; may be given again.")
    ] = None,
    model: ModelOption = "nano",
    as_json: JsonOption = False,
) -> None:
    """Ask about a picture or clip, or about several: emu3 chat before.png "What changed?" --beside after.png."""
    if question is not None:
        check_words("question", question)
        check_is_no_file("question", question)
    names = [picture, *(beside or [])]
    opened = [read_media(name) for name in names]
    if question is None:
        question = f"Describe the {'clip' if hasattr(opened[0], 'frames_THWC') else 'picture'}."
    said = load_pipeline(model, load, "read").chat(question, opened, **asdict(answer))
    print_out({"picture": picture, "question": question, "answer": said, "model": model} if as_json else said)


@takes_options(answer=Answer, load=Load)
def tell(
    answer: Answer,
    load: Load,
    prompt: Annotated[str, typer.Argument(help="What to tell, in quotes.", show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A folder, for story.md and its pictures, 1.png and so on.")
    ] = Path("story"),
    model: ModelOption = "nano",
    as_json: JsonOption = False,
) -> None:
    """Tell a story with pictures in it: emu3 tell "Tell a story about a red dog." """
    check_words("prompt", prompt)
    check_folder(output)
    for each in settings_of(model, load).learned.notes(prompt):
        note(each)
    pipeline = load_pipeline(model, load, "tell")
    answer = replace(answer, seed=secrets.randbelow(2**31) if answer.seed is None else answer.seed)
    with warnings.catch_warnings(action="ignore", category=NotLearned):  # noted already
        told = pipeline.tell(prompt, **asdict(answer))
    lines: list[str] = []
    count = 0
    for part in told:
        if isinstance(part, str):
            lines.append(part)
            continue
        count += 1
        path = output / f"{count}.png"
        write_picture(part, path, {"prompt": prompt, "model": model, "version": __version__, **asdict(answer)})
        lines.append(f"![]({path.name})")
    text = "\n\n".join(lines) + "\n"
    write_text(text, output / "story.md")
    story = {"prompt": prompt, "folder": str(output), "parts": lines, "model": model, **asdict(answer)}
    print_out(story if as_json else text)
    if not as_json:
        note(f"written to {output / 'story.md'}")


@takes_options(serve=Serve, load=Load)
def serve(serve: Serve, load: Load, model: ModelArgument = "nano") -> None:
    """Serve a checkpoint over HTTP, in the forms that clients of OpenAI's API send, with a page at /."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"serving needs more packages: pip install -e '.[serve]' in the clone ({error})") from error
    pipeline = load_pipeline(model, load)
    from emu3.serving.server import run

    run(pipeline, Path(model).name or model, serve)
