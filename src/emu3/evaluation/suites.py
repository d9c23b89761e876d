"""The suites that score pictures, clips and edits: what their prompt files say, and where their scripts look.

    suite            its prompts                      its samples in FOLDER               its script
    geneval          evaluation_metadata.jsonl        00000/samples/00000.png             evaluate_images.py FOLDER
    dpg-bench        a folder of NAME.txt             NAME.png, a grid of 2x2 pictures    dist_eval.sh FOLDER SIDE
    t2i-compbench    a .txt file, a prompt a line     samples/PROMPT_000000.png           BLIP_vqa.py --out_dir FOLDER
    vbench           VBench_full_info.json            PROMPT-0.mp4                        evaluate.py --videos_path ...
    imgedit          basic_edit.json, and pictures    KEY.png                             basic_bench.py

GenEval also reads 00000/metadata.jsonl, the prompt's line of the file. Grids that a suite's own generator draws for
people, and no script of it reads, are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from emu3.options import check_choice, check_whole, check_words

# Of a file's name, as most file systems have it.
_MOST_BYTES = 255
_PROMPTS = "get the suite's own file again"


@dataclass(frozen=True)
class Prompt:
    """One prompt of a suite.

    Attributes:
        words: to draw.
        name: what the names of its files are made of.
        samples: how many the suite asks for.
        picture: to edit.
        metadata: what is kept beside the samples.
    """

    words: str
    name: str
    samples: int
    picture: Path | None = None
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True)
class SampleFile:
    """A file to write: of which prompt, its place in the prompt file, and which samples of the prompt it holds."""

    path: str
    prompt: Prompt
    index: int
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Suite:
    """A suite.

    Attributes:
        name: on the command line.
        ability: that it needs, of `emu3.options.ABILITIES`.
        read: the prompts in a file, and for edits the folder of the pictures.
        path: of the file with a sample: from a prompt, its place, the sample's number, and how many samples each has.
        most: samples for each prompt that its script can tell apart.
        in_grid: whether a prompt's samples are in one file.
        manifest_inside: whether its script overlooks other files in the folder.
    """

    name: str
    ability: str
    read: Callable[[Path, Path | None], list[Prompt]]
    path: Callable[[Prompt, int, int, int], str]
    most: int | None = None
    in_grid: bool = False
    manifest_inside: bool = True

    def counted(self, prompts: list[Prompt], per_prompt: int | None) -> list[Prompt]:
        """Prompts with another number of samples than the suite's own. ValueError for more than its script reads."""
        if per_prompt is None:
            return prompts
        check_whole("per_prompt", per_prompt, 1, self.most)
        return [replace(prompt, samples=per_prompt) for prompt in prompts]

    def files(self, prompts: list[Prompt]) -> list[SampleFile]:
        """What to write, in order."""
        files = []
        for index, prompt in enumerate(prompts):
            numbers = range(prompt.samples)
            for held in [tuple(numbers)] if self.in_grid else [(number,) for number in numbers]:
                files.append(SampleFile(self.path(prompt, index, held[0], prompt.samples), prompt, index, held))
        return files


def suite_named(name: str) -> Suite:
    """One of `SUITES`. ValueError for another name."""
    return SUITES[check_choice("suite", name, list(SUITES))]


def _read_geneval(file: Path, pictures: Path | None) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(_lines(file), 1):
        place = f"{file}, line {number}"
        metadata = _parsed(file, line, number)
        if not isinstance(metadata, dict):
            _refuse(place, f"{line!r:.80} is no JSON object")
        _words(place, "tag", metadata)  # by which the script sums up
        prompts.append(Prompt(_words(place, "prompt", metadata), f"{number - 1:05}", 4, metadata=metadata))
    return prompts


def _read_dpg_bench(folder: Path, pictures: Path | None) -> list[Prompt]:
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder; DPG-Bench's prompts are a folder of .txt files, one for each")
    prompts = []
    for file in sorted(folder.glob("*.txt")):
        if "." in file.stem:  # the script takes what is before the first full stop for the prompt's name
            _refuse(str(file), "a name with a full stop in it cannot be told by DPG-Bench", "rename the file")
        words = _words(str(file), "prompt", {"prompt": _text(file).strip()})
        prompts.append(Prompt(words, _as_name(str(file), file.stem, ".png"), 4))
    return prompts


def _read_t2i_compbench(file: Path, pictures: Path | None) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(_lines(file), 1):
        place = f"{file}, line {number}"
        words = _words(place, "prompt", {"prompt": line.split("\t")[0]})
        if "_" in words:  # behind which the script looks for the sample's number
            _refuse(place, f"{words!r:.80} has an underscore, at which T2I-CompBench cuts a name", "write a space")
        prompts.append(Prompt(words, _as_name(place, words, "_000000.png"), 10))
    return prompts


def _read_vbench(file: Path, pictures: Path | None) -> list[Prompt]:
    entries = _parsed(file, _text(file))
    if not isinstance(entries, list):
        _refuse(str(file), f"a JSON {type(entries).__name__} is no list of prompts")
    samples: dict[str, int] = {}
    for number, entry in enumerate(entries, 1):
        place = f"{file}, entry {number}"
        words = _as_name(place, _words(place, "prompt_en", entry), "-00.mp4")
        dimensions = entry.get("dimension")
        if not isinstance(dimensions, list):
            _refuse(place, f"dimension must be a list of names, got {dimensions!r:.80}")
        # Of what flickers, a filter of the suite leaves clips that move out. A prompt may come twice, with one name.
        own = 25 if "temporal_flickering" in dimensions else 5
        samples[words] = max(own, samples.get(words, 0))
    return [Prompt(words, words, count) for words, count in samples.items()]


def _read_imgedit(file: Path, pictures: Path | None) -> list[Prompt]:
    edits = _parsed(file, _text(file))
    if not isinstance(edits, dict):
        _refuse(str(file), f"a JSON {type(edits).__name__} is no object with an edit for each key")
    folder = pictures or file.parent
    prompts = []
    for key, edit in edits.items():
        place = f"{file}, key {key!r:.40}"
        words = _words(place, "prompt", edit)
        _words(place, "edit_type", edit)  # by which the script chooses its question
        picture = folder / _words(place, "id", edit)
        if not _is_file(picture):
            _refuse(place, f"there is no picture {str(picture)!r:.200}", "give the folder of the pictures, --pictures")
        prompts.append(Prompt(words, _as_name(place, key, ".png"), 1, picture))
    return prompts


SUITES = {
    suite.name: suite
    for suite in (
        Suite("geneval", "draw", _read_geneval, lambda p, index, number, each: f"{p.name}/samples/{number:05}.png"),
        Suite(
            "dpg-bench",
            "draw",
            _read_dpg_bench,
            lambda p, index, number, each: f"{p.name}.png",
            most=4,
            in_grid=True,
            manifest_inside=False,
        ),
        Suite(
            "t2i-compbench",
            "draw",
            _read_t2i_compbench,
            lambda p, index, number, each: f"samples/{p.name}_{index * each + number:06}.png",
        ),
        Suite(
            "vbench",
            "film",
            _read_vbench,
            lambda p, index, number, each: f"{p.name}-{number}.mp4",
            manifest_inside=False,
        ),
        Suite("imgedit", "edit", _read_imgedit, lambda p, index, number, each: f"{p.name}.png", most=1),
    )
}
"""By name."""


def read_prompts(suite: Suite, file: Path, pictures: Path | None = None) -> list[Prompt]:
    """A suite's prompts, at least one. ValueError for a file that is missing or malformed, with place and remedy."""
    if pictures is not None and suite.ability != "edit":
        raise ValueError(f"{suite.name} has no pictures to edit; leave --pictures {str(pictures)!r:.80} out")
    prompts = suite.read(file, pictures)
    if not prompts:
        _refuse(str(file), "there are no prompts")
    return prompts


def _text(file: Path) -> str:
    """What is in a text file, with newlines as Python has them."""
    if not _is_file(file):
        raise ValueError(f"there is no file {str(file)!r:.200}; name the suite's own file of prompts")
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {str(file)!r:.200}: {error.strerror}; allow it, or name another file") from error
    except UnicodeDecodeError as error:
        _refuse(f"{file}, byte {error.start}", "this is no UTF-8")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a null character
        return False


def _lines(file: Path) -> list[str]:
    text = _text(file)
    # `splitlines` also cuts at signs that a prompt may have.
    return text.removesuffix("\n").split("\n") if text.strip() else []


def _parsed(file: Path, text: str, line: int = 1) -> Any:
    """The JSON in a text, which begins at a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"{file}, line {line + error.lineno - 1}"
        _refuse(at, f"this is not JSON ({error.msg} at column {error.colno})")
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number with thousands of digits
        _refuse(f"{file}, line {line}", f"this JSON cannot be read ({error})")


def _words(place: str, name: str, fields: Any) -> str:
    if not isinstance(fields, dict):
        _refuse(place, f"{fields!r:.80} is no JSON object")
    try:
        return check_words(name, fields.get(name))
    except ValueError as error:
        _refuse(place, str(error))


def _as_name(place: str, words: str, ending: str) -> str:
    """Words from which the suite makes a file's name. ValueError where no file can be named so."""
    try:
        check_words("name", words)
    except ValueError as error:
        _refuse(place, str(error))
    if "/" in words or "\0" in words:
        _refuse(place, f"{words!r:.80} has a sign that no file's name can have, and the suite names files so")
    if len(f"{words}{ending}".encode()) > _MOST_BYTES:
        _refuse(place, f"{words!r:.40}... is too long for the name of a file", f"use {_MOST_BYTES} bytes at most")
    return words


def _refuse(place: str, why: str, remedy: str = _PROMPTS) -> NoReturn:
    raise ValueError(f"{place}: {why}; {remedy}")
