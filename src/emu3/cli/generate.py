"""Commands that run a checkpoint: `emu3 image`, `emu3 chat`, `emu3 serve`."""

import secrets
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from emu3 import __version__
from emu3.cli.common import JsonOption, ModelArgument, ModelOption, load_pipeline, print_out, progress, takes_options
from emu3.cli.files import output_paths, read_picture, write_picture
from emu3.options import Answer, Draw, Load, Serve, check_words

if TYPE_CHECKING:
    from PIL import Image


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
    for prompt in prompts:
        check_words("prompt", prompt)
    if len(prompts) > 1 and all(len(prompt.split()) == 1 for prompt in prompts):
        typer.echo(f"{len(prompts)} prompts of one word each; quote the words of one picture", err=True)
    paths = output_paths(output, len(prompts))
    seed = secrets.randbelow(2**31) if draw.seed is None else cast(int, draw.seed)
    pipeline = load_pipeline(model, load, "draw")
    settings = asdict(pipeline.settled(replace(draw, seed=seed)))
    from emu3.generation.events import Started, Tokens
    from emu3.results import Result

    weight = pipeline.model.model.text_model.embed_tokens.weight
    loaded: dict[str, Any] = {"dtype": str(weight.dtype).removeprefix("torch."), "device": str(weight.device)}
    loaded |= {"int8": load.int8, "compiled": load.compiled, "draft": pipeline.draft is not None}
    records: dict[int, dict[str, Any]] = {}
    drawn, in_all = 0, 0
    with progress("drawing") as report:
        for event in pipeline.stream(prompts, **settings):
            if isinstance(event, Started):
                in_all += event.length
            elif isinstance(event, Tokens):
                drawn += len(event.ids)
                report(drawn, in_all)
            elif isinstance(event, Result):
                number, picture = event.request, cast("Image.Image", event.output)
                record = {"prompt": prompts[number], "model": model, "version": __version__, **loaded, **settings}
                # What draws this picture again on its own: its own seed, and the size that ratio and model came to.
                record |= {"seed": seed + number, "height": picture.height, "width": picture.width}
                write_picture(picture, paths[number], record)
                records[number] = {"path": str(paths[number]), **record}
    in_order = [records[number] for number in sorted(records)]
    lines = (
        f"{each['path']}  seed {each['seed']}  {each['width']}x{each['height']}  {each['prompt']}" for each in in_order
    )
    print_out(in_order if as_json else "\n".join(lines))


@takes_options(answer=Answer, load=Load)
def chat(
    answer: Answer,
    load: Load,
    picture: Annotated[str, typer.Argument(help="The picture to look at, a file.", show_default=False)],
    question: Annotated[str, typer.Argument(help="What to ask about it.")] = "Describe the picture.",
    model: ModelOption = "nano",
    as_json: JsonOption = False,
) -> None:
    """Ask about a picture."""
    check_words("question", question)
    opened = read_picture(picture)
    said = load_pipeline(model, load, "read").chat(question, [opened], **asdict(answer))
    print_out({"picture": picture, "question": question, "answer": said, "model": model} if as_json else said)


@takes_options(serve=Serve, load=Load)
def serve(serve: Serve, load: Load, model: ModelArgument = "nano") -> None:
    """Serve a checkpoint over HTTP, in the forms that clients of OpenAI's API send, with a page at /."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"serving needs more packages: pip install 'emu3[serve]' ({error})") from error
    pipeline = load_pipeline(model, load)
    from emu3.serving.server import run

    run(pipeline, Path(model).name or model, serve)
