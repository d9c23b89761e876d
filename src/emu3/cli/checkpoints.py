"""Commands about the files of a checkpoint: `emu3 info`, `emu3 convert`, `emu3 quantize`, `emu3 pull`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emu3.cli.common import JsonOption, print_out, progress
from emu3.cli.files import check_folder
from emu3.options import ABILITIES, check_choice

if TYPE_CHECKING:
    from emu3.checkpoints.info import AdapterInfo


def info(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint: nano (shipped), a folder, or a hub id.")],
    download: Annotated[
        bool, typer.Option("--download", help="Ask the hub about a hub id; fetches settings and headers, no weights.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a checkpoint holds, from its headers, without loading it."""
    from emu3.checkpoints import resolve
    from emu3.checkpoints.info import inspect, inspect_hub
    from emu3.checkpoints.names import is_hub_id

    found = inspect_hub(checkpoint) if download and is_hub_id(checkpoint) else inspect(resolve(checkpoint))
    if as_json:
        print_out(found.to_dict())
        return

    def megabytes(count: int) -> str:
        return f"{count / 1e6:,.1f} MB"

    side, other = found.pixels_per_token_side, f" together with the {found.missing[0]}" if found.missing else ""
    dtypes, verbs = (
        ("float32", "bfloat16", "int8")[: 2 if found.quantized else 3],
        {
            "draw": "draws pictures",
            "read": "reads pictures",
            "edit": "edits pictures",
            "film": "makes clips",
            "tell": "tells with pictures",
        },
    )
    rows = {
        "adapter": found.adapter and _adapter_in_words(found.adapter),
        "base": found.adapter and found.adapter.base,
        "layout": found.layout,
        "parameters": f"{found.parameters:,} in {found.tensors} tensors",
        **{f"  {part}": f"{count:,}" for part, count in found.parameters_by_part.items()},
        "stored as": ", ".join(f"{dtype} {count:,}" for dtype, count in found.parameters_by_dtype.items()),
        "layers in": found.quantized,
        "on disk": megabytes(found.bytes_on_disk),
        "in memory": ", ".join(f"{megabytes(getattr(found, f'memory_{dtype}'))} {dtype}" for dtype in dtypes),
        "context": found.context and f"{found.context:,} tokens",
        "vocabulary": found.vocabulary_size and f"{found.vocabulary_size:,} tokens",
        "visual tokens": found.codebook_size and f"{found.codebook_size:,}, each {side}x{side} pixels",
        "reads pictures of": found.min_pixels
        and found.max_pixels
        and f"{found.min_pixels:,} to {found.max_pixels:,} pixels",
        "tokenizer": ", ".join(found.tokenizer_files) or "none",
        "draft head": found.draft_parameters and f"{found.draft_parameters:,} parameters",
        "abilities": ", ".join(verbs[ability] for ability in found.abilities or ()) or "unknown",
        "to load it": found.layout == "baai" and f"convert it{other} with `emu3 convert`",
    }
    print_out("\n".join([found.path, *(f"{name:<20}{text}" for name, text in rows.items() if text)]))


def _adapter_in_words(adapter: "AdapterInfo") -> str:
    ranks, replaced = (
        " to ".join(str(rank) for rank in sorted({*adapter.ranks[:1], *adapter.ranks[-1:]})),
        adapter.replaced,
    )
    parts = [f"LoRA of rank {ranks} on {adapter.matrices} matrices"] if adapter.matrices else []
    parts += [f"{replaced} tensor{'s' * (replaced > 1)} replaced"] if replaced else []
    return f"{' and '.join(parts)}: {adapter.parameters:,} parameters, {adapter.bytes_on_disk / 1e6:,.1f} MB"


def convert(
    source: Annotated[
        str, typer.Argument(help="Checkpoint or adapter to read: a folder, or a hub id in the local cache.")
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.", show_default=False)],
    vision: Annotated[
        str | None, typer.Option(help="BAAI's vision tokenizer, if SOURCE is its language model.")
    ] = None,
    to: Annotated[str, typer.Option(help="Layout to write: documented, legacy or baai.")] = "documented",
    abilities: Annotated[
        str | None, typer.Option(help="What it was trained for, of draw,read,edit,film,tell; other uses are refused.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint in another layout, or merge an adapter into its base. All other tensors keep their bits."""
    from emu3.checkpoints import resolve
    from emu3.checkpoints.info import LAYOUTS, folders_of

    able = None if abilities is None else abilities.split(",")
    check_choice("--to", to, LAYOUTS)
    for ability in able or ():
        check_choice("--abilities", ability, list(ABILITIES))
    folders = resolve(source), None if vision is None else resolve(vision)
    folders_of(*folders)  # refuses what is no checkpoint
    check_folder(target, is_new=True)
    from emu3.checkpoints.config import RefusedTensorsError
    from emu3.checkpoints.convert import convert

    try:
        with progress("converting", in_bytes=True) as advance:
            report = convert(folders[0], target, vision=folders[1], to=to, abilities=able, on_progress=advance)
    except RefusedTensorsError as error:
        if as_json:
            print_out({"refused": error.refused})
        raise
    summary = (
        f"{report.target}  {report.source_layout} to {report.target_layout}: {len(report.moves)} tensors, "
        f"{report.renamed} renamed, {report.reshaped} reshaped, {f'{report.merged} merged, ' if report.merged else ''}"
        f"none refused, {report.bytes / 1e6:,.1f} MB"
    )
    print_out(report.to_dict() if as_json else summary)


def quantize(
    source: Annotated[str, typer.Argument(help="Checkpoint to read: nano, a folder, or a hub id in the local cache.")],
    target: Annotated[
        Path, typer.Argument(help="Folder to write; it must not exist, and is there when all is.", show_default=False)
    ],
    bits: Annotated[int, typer.Option(help="Of a weight of the layers: 8 or 4.")] = 8,
    group: Annotated[
        int | None, typer.Option(help="Inputs that share a scale, 32 or 128; for 4 bits.", show_default="32")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint with layers in 8 or 4 bits, for CPUs; it loads as any other. Goes on where it was cut."""
    from emu3.checkpoints import resolve

    check_choice("--bits", str(bits), ("8", "4"))
    if group is not None:
        check_choice("--group", str(group), ("32", "128"))
        if bits != 4:
            raise ValueError("--group is for 4 bits; in 8 bits each output has one scale")
    folder = resolve(source)
    check_folder(target, is_new=True)
    from emu3.checkpoints.quantize import quantize

    try:
        with progress("quantizing", in_bytes=True) as advance:
            report = quantize(folder, target, bits, group, advance)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on", err=True)
        raise
    head = f", the head in {report.head_bits}" if report.head_bits else ""
    kept = f", {len(report.kept)} kept as they are" if report.kept else ""
    summary = (
        f"{report.target}  {report.matrices} matrices in {bits} bits{head}{kept}: "
        f"{report.bytes_before / 1e6:,.1f} MB to {report.bytes_after / 1e6:,.1f} MB"
    )
    print_out(report.to_dict() if as_json else summary)


def pull(
    checkpoint: Annotated[str, typer.Argument(help="Hub id owner/name.", show_default=False)],
) -> None:
    """Download a checkpoint of the Hugging Face hub: weights and settings, no code. Goes on where it was cut off."""
    from emu3.checkpoints import resolve

    typer.echo(str(resolve(checkpoint, download=True)))
