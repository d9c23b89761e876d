import inspect
import json
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer.main
from PIL import Image

from emu3 import Emu3Pipeline, __version__, cli
from emu3.cli import files, generate
from emu3.icons import recipes
from emu3.icons.captions import DESCRIBE

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    code = stop.value.code
    assert code is None or isinstance(code, int)
    printed = capsys.readouterr()
    return code or 0, printed.out, printed.err


def one_line_error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command line that must end with exit code 2 and one line on stderr."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    return err


def error_before_torch(folder: Path, *arguments: object) -> str:
    """The same of a process in a folder, which must end so before it imports torch."""
    code = "import sys, emu3.cli\ntry: emu3.cli.main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder,
        env={"PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.effect_noise((48, 48), 64).convert("RGB").save(path)
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["image"],
        ["image", "a cat", "--guidance", "much"],
        ["chat"],
        ["eval", "nano", "--count", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--seed -1", "seed must be a whole number, from 0 to 2**63 - 1, got -1"),
        ("--top-k -1", "top_k must be a whole number, from 0 to 2147483647, got -1"),
        ("--top-p 0", "top_p must be above 0 and at most 1, got 0.0"),
        ("--temperature nan", "temperature must be a finite number of at least 0, got nan"),
        ("--guidance inf", "guidance_scale must be a finite number from -1e+06 to 1e+06, got inf"),
        ("--decoding zipar:x", "decoding 'zipar:x': the window must be a whole number above 0"),
        ("--device gpu", "device must be one of auto, cpu, cuda, mps, perhaps with a number as in cuda:1, got 'gpu'"),
        ("--dtype fp16", "dtype must be one of auto, float32, bfloat16, float16, got 'fp16'"),
        ("--dtype int8", "for layers in 8 bits give int8=True, or --int8"),
        ("--height 16", "give both height and width, or neither; got height=16, width=None"),
        ("-o .png", "'.png' names no file"),
        ("-o ", "'.' names no file"),
        ("-o there.png/cat.png", "there.png' is no folder"),
        ("-o " + 250 * "a" + "bc.png", "a name in it is longer than 255 bytes"),
        ("-o cat.jpg", "pictures end in .png"),
        ("-o folder.png/..", "names no file"),
        ("-o two.png", "two-1.png': there is a folder of that name"),
    ],
)
def test_a_wrong_option_is_told_before_torch_is_imported(tmp_path: Path, arguments: str, complaint: str) -> None:
    """Neither the time nor the model is spent on it; nothing is written."""
    (tmp_path / "there.png").write_text("a file")
    (tmp_path / "two-1.png").mkdir()
    flag, value = arguments.split(" ", 1)
    assert complaint in error_before_torch(tmp_path, "image", "a cat", "a dog", flag, value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["there.png", "two-1.png"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["image", ""], "prompt must not be empty, got ''"),
        (["image", "a cat", " "], "prompt must not be empty, got ' '"),
        (["image", "a cat", "--model", "reads"], "this checkpoint does not draw pictures"),
        (["image", "a cat", "--int8", "--device", "cuda"], "int8 is for one CPU, and device='cuda' is not"),
        (["chat", "cat.png", ""], "question must not be empty, got ''"),
        (["chat", "https://example.org/a//cat.png"], "'https://example.org/a//cat.png' is an address; download"),
        (["chat", "cat.png", "--model", "draws"], "this checkpoint does not answer or read pictures"),
        (
            ["image", "a cat", "--height", "18", "--width", "16"],
            "height must be a positive multiple of 4 pixels, got 18",
        ),
        (["image", "a cat", "--height", "4", "--width", "900"], "900x4 pixels is more than 200 times longer than wide"),
        (["video", "a dog", "--frames", "10"], "frames must be a positive multiple of 4 frames, got 10; nearest: 8"),
        (["video", "a dog", "--frames", "4"], "frames is 4, which share one code"),
        (["edit", "cat.png", "a cat", "--mask", "mask.png"], "the mask has 20x10 pixels, and the picture 48x48"),
        (["edit", "cat.png", "a cat", "--mask", "black.png"], "nothing is to be drawn"),
        (["edit", "cat.png", "a cat", "--below", "6"], "below must be a positive multiple of 4 pixels, got 6"),
        (["edit", "moves.gif", "make it blue"], "'moves.gif' is a clip, and only pictures are edited; `emu3 video"),
        (["edit", "cat.png", "blue.png"], "the prompt 'blue.png' is the name of a file; give more files by --beside"),
        (["chat", "cat.png", "mask.png"], "the question 'mask.png' is the name of a file; give more files by --beside"),
        (["eval", "nono"], "unknown checkpoint 'nono'"),
        (["eval", "draws", "--only", "answers"], "this checkpoint does not answer or read pictures"),
        (["eval", "nano", "--only", "films"], "'films' is not measured"),
        (["eval", "nano", "-o", "file"], "'file': "),
        (["eval", "nano", "--decoding", "spiral"], "unknown decoding 'spiral'"),
        (["bench", "nono"], "unknown checkpoint 'nono'"),
        (["bench", "reads"], "this checkpoint does not draw pictures"),
        (["bench", "--height", "16"], "give both height and width, or neither; got height=16"),
        (["bench", "--pictures", "1,two"], "--pictures '1,two' is no list of counts; give whole numbers"),
        (["bench", "--int8", "--device-map", "auto"], "int8 is for one CPU, and device_map='auto' is not"),
        (["convert", "nono", "new"], "unknown checkpoint 'nono'"),
        (["convert", "empty", "new"], "config.json"),
        (["convert", "nano", "new", "--to", "gguf"], "--to must be one of documented, legacy, baai, got 'gguf'"),
        (
            ["convert", "nano", "new", "--abilities", "fly"],
            "must be one of draw, read, edit, film, tell, got 'fly'",
        ),
        (
            ["convert", "nano", "new", "--abilities", ""],
            "must be one of draw, read, edit, film, tell, got ''",
        ),
        (["quantize", "nano", "nano"], "nano means the shipped checkpoint; name another folder, such as my-nano"),
        (["convert", "nano", "empty", "--to", "legacy"], "empty is there already; remove it, or name another folder"),
        (["convert", "nano", "file/new", "--to", "legacy"], "file' is no folder"),
        (["convert", "nano", "new", "--vision", "reads"], "is not needed"),
        (["train", "none.toml"], "none.toml is no file"),
        (["train", "file"], "file is not valid TOML"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_arguments_and_files_tell_is_told_before_torch_is_imported(
    tmp_path: Path, tiny_checkpoint: Path, picture: Path, arguments: list[str], complaint: str
) -> None:
    (tmp_path / "file").write_text("no TOML")
    (tmp_path / "empty").mkdir()
    Image.new("L", (20, 10)).save(tmp_path / "mask.png")
    Image.new("L", (48, 48)).save(tmp_path / "black.png")
    Image.new("L", (48, 48)).save(tmp_path / "moves.gif", save_all=True, append_images=[Image.new("L", (48, 48), 9)])
    for name, ability in (("draws", "draw"), ("reads", "read")):
        config = json.loads((shutil.copytree(tiny_checkpoint, tmp_path / name) / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"abilities": [ability]}))
    before = sorted(tmp_path.rglob("*"))
    assert complaint in error_before_torch(tmp_path, *(str(picture) if a == "cat.png" else a for a in arguments))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not version("torch").endswith("+cpu"), reason="this PyTorch may see a GPU")
def test_a_pytorch_for_cpus_is_told_before_it_is_imported(tmp_path: Path) -> None:
    said = error_before_torch(tmp_path, "image", "a cat", "--device", "cuda")
    assert "device='cuda', but PyTorch" in said and "is for CPUs only" in said


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "emu3", "--version"]
    done = subprocess.run(command, env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, check=True)
    assert done.stdout == f"{__version__}\n"


def test_no_bars_where_stderr_is_no_terminal() -> None:
    code = (
        "import sys, emu3.cli\ntry: emu3.cli.main(['--version'])\nexcept SystemExit: pass\n"
        "from transformers.utils import logging\nprint(logging.is_progress_bar_enabled())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("command", ["info", "eval"])
def test_an_unknown_checkpoint_is_one_line(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert "unknown checkpoint 'nono': give 'nano'" in one_line_error(capsys, command, "nono")


def test_drawing_with_an_unknown_checkpoint_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "pictures" / "out.png"
    assert "unknown checkpoint 'nono'" in one_line_error(capsys, "image", "a cat", "-o", output, "--model", "nono")
    assert list(tmp_path.iterdir()) == []


def test_other_formats_than_png_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "pictures end in .png" in one_line_error(capsys, "image", "a cat", "-o", tmp_path / "out.jpg")


def test_output_paths(tmp_path: Path) -> None:
    assert files.output_paths(Path("a/out.png"), 1) == [Path("a/out.png")]
    assert files.output_paths(Path("a/out.PNG"), 2) == [Path("a/out-1.PNG"), Path("a/out-2.PNG")]
    assert files.output_paths(Path("new"), 2) == [Path("new/1.png"), Path("new/2.png")]
    folder = tmp_path / "v1.0"
    folder.mkdir()
    assert files.output_paths(folder, 1) == [folder / "1.png"]


def test_an_unreadable_picture_is_one_line(capsys: pytest.CaptureFixture[str], picture: Path) -> None:
    whole = picture.read_bytes()
    assert "no picture at" in one_line_error(capsys, "chat", picture.with_name("none.png"), "What is it?")
    for content in (b"", b"words", whole[:20], whole[:100], whole[: len(whole) // 2]):
        picture.write_bytes(content)
        assert f"cannot read '{picture}' as a picture" in one_line_error(capsys, "chat", picture, "What is it?")
    assert "is a folder; name a picture" in one_line_error(capsys, "chat", picture.parent, "What is it?")


def test_a_picture_is_written_wholly_with_its_settings(tmp_path: Path) -> None:
    path, record = tmp_path / "new" / "out.png", {"prompt": "ein Käfer 🐞", "seed": 7}
    files.write_picture(Image.new("RGB", (4, 2), (10, 20, 30)), path, record)
    with Image.open(path) as written:
        assert json.loads(written.text["emu3"]) == record
        assert (written.size, written.getpixel((3, 1))) == ((4, 2), (10, 20, 30))
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(b"old")

    def break_off(self: Image.Image, target: Path, **_: Any) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", break_off)
    with pytest.raises(ValueError, match=r"cannot write '.*out.png': disk full"):
        files.write_picture(Image.new("RGB", (4, 2)), path, {})
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


SMALL = ("--height", 16, "--width", 24)


@pytest.fixture
def drawn(capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """The JSON records of two prompts drawn with seed 7."""
    arguments = (*SMALL, "--seed", 7, "--model", tiny_checkpoint, "--json", "-o", tmp_path / "out.png")
    code, out, err = run(capsys, "image", "a red car", "a cat <image>", *arguments)
    assert (code, err) == (0, "")
    records = json.loads(out)
    assert isinstance(records, list)
    return records


def test_several_prompts_are_numbered_and_keep_their_settings(
    drawn: list[dict[str, Any]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out-1.png", "out-2.png"]
    settings = {"model": str(tiny_checkpoint), "version": __version__, "negative_prompt": None, "ratio": None}
    settings |= {
        "guidance_scale": 3.0,
        "guidance_floor": 0.0,
        "guidance_agreement": 0.0,
        "top_k": 2048,
        "top_p": 1.0,
        "decoding": "predictive",
        "temperature": 1.0,
        "height": 16,
        "width": 24,
        "image_area": None,
        "dtype": "float32",
        "device": "cpu",
        "int8": False,
        "compiled": False,
        "draft": False,
    }
    for number, (record, prompt) in enumerate(zip(drawn, ["a red car", "a cat <image>"], strict=True)):
        with Image.open(record.pop("path")) as written:
            assert json.loads(written.text["emu3"]) == record == {**settings, "prompt": prompt, "seed": 7 + number}
            assert written.size == (24, 16)


def test_the_recorded_settings_draw_the_picture_again(
    capsys: pytest.CaptureFixture[str], drawn: list[dict[str, Any]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    record, again = drawn[1], tmp_path / "again.png"
    arguments = (*SMALL, "--seed", record["seed"], "--model", tiny_checkpoint, "-o", again)
    code, out, err = run(capsys, "image", record["prompt"], *arguments)
    assert (code, out, err) == (0, f"{again}  seed 8  24x16  a cat <image>\n", "")
    pipeline = Emu3Pipeline.from_pretrained(tiny_checkpoint)
    [expected] = pipeline.image(record["prompt"], seed=8, height=16, width=24)
    for path in (record["path"], again):
        with Image.open(path) as written:
            assert written.tobytes() == expected.tobytes()
    with Image.open(drawn[0]["path"]) as other:
        assert other.tobytes() != expected.tobytes()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--height", 16), "give both height and width"),
        (("--height", 480, "--width", 480), "do not fit the model's context of 512"),
        (("--ratio", "wide"), "such as \"16:9\", got 'wide'"),
    ],
)
def test_a_refused_drawing_writes_nothing(
    capsys: pytest.CaptureFixture[str],
    tiny_checkpoint: Path,
    tmp_path: Path,
    arguments: tuple[object, ...],
    complaint: str,
) -> None:
    output = tmp_path / "pictures" / "out.png"
    error = one_line_error(capsys, "image", "a cat", *arguments, "--model", tiny_checkpoint, "-o", output)
    assert complaint in error
    assert list(tmp_path.iterdir()) == []


def test_chat_prints_the_answer(capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, picture: Path) -> None:
    question = "What color is the cat?"
    with Image.open(picture) as opened:
        expected = Emu3Pipeline.from_pretrained(tiny_checkpoint).chat(question, [opened], max_new_tokens=5)
    arguments = ("chat", picture, question, "--model", tiny_checkpoint, "--max-new-tokens", 5)
    assert run(capsys, *arguments) == (0, f"{expected}\n", "")
    code, out, err = run(capsys, *arguments, "--json")
    record = {"picture": str(picture), "question": question, "answer": expected, "model": str(tiny_checkpoint)}
    assert (code, json.loads(out), err) == (0, record, "")


def test_chat_without_a_question_asks_for_a_description(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, picture: Path
) -> None:
    code, out, _ = run(capsys, "chat", picture, "--model", tiny_checkpoint, "--max-new-tokens", 5, "--json")
    with Image.open(picture) as opened:
        expected = Emu3Pipeline.from_pretrained(tiny_checkpoint).chat(DESCRIBE, [opened], max_new_tokens=5)
    assert (code, json.loads(out)["question"], json.loads(out)["answer"]) == (0, DESCRIBE, expected)


def test_info_says_the_same_to_people_and_to_programs(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path
) -> None:
    code, out, err = run(capsys, "info", tiny_checkpoint, "--json")
    found = json.loads(out)
    assert (code, err, found["layout"], found["codebook_size"]) == (0, "", "documented", 16)
    code, out, err = run(capsys, "info", tiny_checkpoint)
    assert (code, err) == (0, "")
    assert f"{found['parameters']:,} in {found['tensors']} tensors" in out
    assert "4x4 pixels" in out and "512 tokens" in out


def test_eval_says_the_same_to_people_and_to_programs(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    parts = "drawing,answers,reconstruction"
    arguments = ("eval", tiny_checkpoint, "--count", 1, "--seed", 3, "--only", parts)
    code, out, _ = run(capsys, *arguments, "--json", "-o", tmp_path / "report")
    report = json.loads(out)
    assert (code, report["count"], report["seed"]) == (0, 1, 3)
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.html", "report.md"]
    code, table, _ = run(capsys, *arguments)
    assert code == 0
    for name, figure in report["figures"].items():
        assert f"| {name.removeprefix('reconstruction: ')} | {figure['value']:.1f}"[:-2] in table
    for name, score in report["scores"].items():
        right = score["known_right"] + score["held_out_right"]
        assert f"| {name} | {score['share']:.2f} ({right}/{score['known'] + score['held_out']}) |" in table


@pytest.mark.parametrize(
    ("command", "method", "renamed"),
    [
        (generate.image, Emu3Pipeline.image, {"guidance": "guidance_scale", "negative": "negative_prompt"}),
        (generate.chat, Emu3Pipeline.chat, {}),
    ],
)
def test_defaults_are_those_of_the_pipeline(command: Any, method: Any, renamed: dict[str, str]) -> None:
    own, shared = inspect.signature(command).parameters, inspect.signature(method).parameters
    compared = {name: renamed.get(name, name) for name in own if renamed.get(name, name) in shared}
    compared.pop("prompts", None)
    assert {name: own[name].default for name in compared} == {
        name: shared[theirs].default for name, theirs in compared.items()
    }
    assert len(compared) >= 2


def test_train_runs_the_recipe(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "run_recipe", lambda recipe: recipe.parent / "result")
    (tmp_path / "recipe.toml").write_text("")
    assert run(capsys, "train", tmp_path / "recipe.toml") == (0, f"{tmp_path / 'result'}\n", "")


def test_a_missing_recipe_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "is no file" in one_line_error(capsys, "train", tmp_path / "none.toml")


def readme_commands() -> list[str]:
    lines = (line.strip() for line in (ROOT / "README.md").read_text().splitlines())
    return [line for line in lines if line.startswith("emu3 ")]


@pytest.mark.parametrize("line", readme_commands())
def test_commands_in_the_readme_parse(line: str) -> None:
    _, command, *arguments = shlex.split(line, comments=True)
    group = typer.main.get_command(cli.app)
    context = group.commands[command].make_context(command, arguments)  # type: ignore[attr-defined]
    assert context.params


def test_the_readme_shows_every_command() -> None:
    shown = {shlex.split(line)[1] for line in readme_commands()}
    assert shown == set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
