"""Fine-tuning in one command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from emu3.checkpoints.load import load_model
from emu3.cli import app
from emu3.data.shards import open_shards
from emu3.pipeline import Emu3Pipeline
from emu3.training.replay import QUESTION, make_replay, neighbours
from emu3.training.state import read_log

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures with captions, and one that is broken."""
    made = tmp_path_factory.mktemp("pets")
    rng = np.random.default_rng(0)
    for number in range(6):
        color = tuple(rng.integers(256, size=3).tolist())
        Image.new("RGB", (48, 48), color).save(made / f"{number}.png")
        (made / f"{number}.txt").write_text(f"a picture of {'cats' if number % 2 else 'dogs'}")
    (made / "broken.png").write_bytes(b"no picture")
    (made / "broken.txt").write_text("nothing")
    return made


def finetune(*arguments):
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)])


def test_adapters_from_a_folder(folder, tiny_checkpoint, tmp_path):
    """The command tells what it does, and leaves what draws by its name; again, it goes on; with --steps, further."""
    out = tmp_path / "mine"
    arguments = (tiny_checkpoint, "--data", folder, "--lora", "-o", out, "--replay", 2, "--rank", 2)
    told = finetune(*arguments, "--steps", 8)
    assert told.exit_code == 0, told.output
    assert "1 samples cannot be used" in told.output
    assert "6 samples of" in told.output
    assert "adapters of rank 2 of" in told.output
    assert "emu3 image" in told.output
    log = read_log(out)
    assert log[-1]["step"] == 8
    assert log[-1]["draw"] < log[0]["draw"]
    assert log[-1]["held"] >= 0
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["steps"], recipe["rank"], recipe["seed"]) == (8, 2, 0)
    assert [path.name for path in sorted((out / "drawings").glob("*.png"))][-1] == "step-000008.png"
    before = (out / "adapter_model.safetensors").read_bytes()
    assert finetune(*arguments, "--steps", 8).exit_code == 0
    assert (out / "adapter_model.safetensors").read_bytes() == before
    pipeline = Emu3Pipeline.from_pretrained(out)
    assert pipeline.image("a picture of cats", seed=0)[0].size == (48, 48)


def test_all_weights_from_a_folder(folder, tiny_checkpoint, tmp_path):
    told = finetune(tiny_checkpoint, "--data", folder, "-o", tmp_path / "mine", "--steps", 20, "--task", "draw")
    assert told.exit_code == 0, told.output
    assert "all weights of" in told.output
    assert not (tmp_path / "mine" / "replay").exists()
    before, after = load_model(tiny_checkpoint), load_model(tmp_path / "mine")
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "paint"], "--task 'paint' is unknown; give draw, chat or both"),
        (["--task", "chat"], "holds nothing for task='chat'; give other data, or leave --task out"),
    ],
)
def test_mistakes(folder, tiny_checkpoint, tmp_path, arguments, message):
    told = finetune(tiny_checkpoint, "--data", folder, "-o", tmp_path / "mine", *arguments)
    assert message in str(told.exception)
    assert not (tmp_path / "mine" / "config.json").exists()


def test_a_folder_of_something_else_stays(folder, tiny_checkpoint, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    told = finetune(tiny_checkpoint, "--data", folder, "-o", tmp_path)
    assert "is not empty, and holds no run to go on with; name another folder" in str(told.exception)
    out = tmp_path / "run"
    assert finetune(tiny_checkpoint, "--data", folder, "--lora", "-o", out, "--replay", 0, "--steps", 1).exit_code == 0
    (tmp_path / "other").mkdir()
    Image.new("RGB", (48, 48)).save(tmp_path / "other" / "one.png")
    told = finetune(tiny_checkpoint, "--data", tmp_path / "other", "--lora", "-o", out, "--replay", 0)
    assert f"holds a run with --data {folder}, not with --data {tmp_path / 'other'}; name another" in str(
        told.exception
    )
    told = finetune(tiny_checkpoint, "--data", folder, "--lora", "-o", out, "--replay", 0, "--rank", 3)
    assert "holds a run without --rank, not with --rank 3; name another folder" in str(told.exception)
    told = finetune(tiny_checkpoint, "--data", folder, "-o", out)
    assert "holds a run with --lora, not without --lora" in str(told.exception)
    for options, reason in (
        (["--rank", 3], "--rank is of adapters; add --lora"),
        (["--replay", 3], "--replay is of adapters; add --lora"),
        (["--learning-rate", 0], "give one above 0"),
    ):
        assert reason in str(finetune(tiny_checkpoint, "--data", folder, "-o", tmp_path / "b", *options).exception)
    told = finetune(tiny_checkpoint, "--data", folder, "-o", folder / "within")
    assert "lies within the data" in str(told.exception)
    assert not (folder / "within").exists()


def test_what_a_checkpoint_draws_by_itself(tiny_checkpoint):
    """Codes as drawn without words; each with its description as prompt and as answer; again the same."""
    pipeline = Emu3Pipeline.from_pretrained(tiny_checkpoint)
    samples = make_replay(pipeline, 3, seed=5)
    keys = [sample.key for sample in samples]
    assert keys[:1] == ["0-alone"]
    assert {key.split("-")[0] for key in keys} == {"0", "1", "2"}
    by_key = {sample.key: sample for sample in samples}
    for number in range(3):
        codes = by_key[f"{number}-alone"].parts[0].content.codes_THW
        if f"{number}-drawn" in by_key:
            words, drawn = by_key[f"{number}-drawn"].parts
            shown, question, answer = by_key[f"{number}-said"].parts
            assert np.array_equal(drawn.content.codes_THW, codes)
            assert np.array_equal(shown.content.codes_THW, codes)
            assert (question.content.text, answer.content) == (QUESTION, words.content)
    again = make_replay(pipeline, 3, seed=5)
    assert [each.key for each in again] == keys
    assert make_replay(pipeline, 1, seed=5, can_read=False)[0].key == "0-alone"
    other = make_replay(pipeline, 1, seed=6, can_read=False)[0]
    assert not np.array_equal(other.parts[0].content.codes_THW, by_key["0-alone"].parts[0].content.codes_THW)


KNOWN = ["a red cat and a blue dog", "two pink dogs"]


def test_neighbours_have_known_words_in_place_of_new_ones():
    """What stands behind the same word: a rocket is red, so it becomes what is red elsewhere."""
    made = neighbours(["a red rocket", "a blue rocket and a rocket", "a red cat", "shiny rocket"], KNOWN, 50, 3)
    assert set(made) == {"a red cat", *(f"a blue dog and a {word}" for word in ("red", "blue"))}
    assert len(made) == 50 and made == neighbours(
        ["a red rocket", "a blue rocket and a rocket", "a red cat", "shiny rocket"], KNOWN, 50, 3
    )
    assert neighbours(["a red cat", "rocket", "a green rocket"], KNOWN, 5, 0) == []
    assert set(neighbours(["A red Rocket."], KNOWN, 5, 0)) == {"A red cat."}
    assert neighbours([], KNOWN, 5, 0) == neighbours(["a red rocket"], [], 5, 0) == []


def test_neighbours_are_drawn():
    samples = make_replay(Emu3Pipeline.from_pretrained("nano"), 4, seed=5, captions=["a photo of a rocket"])
    like = [sample for sample in samples if sample.key.endswith("-like")]
    known = {
        word for sample in samples if sample.key.endswith("-drawn") for word in sample.parts[0].content.text.split()
    }
    assert like and {part.role for sample in like for part in sample.parts} == {"prompt", "draw"}
    for sample in like:
        words = sample.parts[0].content.text.split()
        assert words[:4] == ["a", "photo", "of", "a"] and len(words) == 5 and set(words) <= known


def test_replay_stays_a_shard_of_its_own(folder, tiny_checkpoint, tmp_path):
    finetune(tiny_checkpoint, "--data", folder, "--lora", "-o", tmp_path / "a", "--replay", 2, "--steps", 1)
    own, data = (open_shards(tmp_path / "a" / name)[0].info for name in ("replay", "data"))
    assert own.tokenizer == data.tokenizer
    assert own.source == "replay"


def test_bad_data_is_told_and_left_out(tiny_checkpoint, tmp_path):
    """Each bad sample has a line of the report or of the command; the good ones are trained on."""
    data = tmp_path / "data"
    data.mkdir()
    pictures = {name: Image.new("RGB", (48, 48), "red") for name in ("good", "long", "control", "twice")}
    pictures |= {"tiny": Image.new("RGB", (1, 1)), "print": Image.new("CMYK", (48, 48), (0, 99, 99, 0))}
    for name, picture in pictures.items():
        picture.save(data / f"{name}.{'jpg' if name == 'print' else 'png'}")
        (data / f"{name}.txt").write_text("a cat")
    pictures["twice"].save(data / "twice.jpg")
    (data / "long.txt").write_text("cat " * 25_000)
    (data / "control.txt").write_text("<|image start|><|extra_204|><image>")
    (data / "alone.txt").write_text("no picture")
    out = tmp_path / "mine"
    told = finetune(tiny_checkpoint, "--data", data, "--lora", "-o", out, "--steps", 2, "--replay", 0)
    assert told.exit_code == 0, told.output
    assert "1 samples are longer than the context of" in told.output
    report = json.loads((out / "data" / "report.json").read_text())
    broken = {each["key"]: each["reason"] for each in report["broken"]}
    assert broken.keys() == {"tiny", "twice.png", "alone.txt"}
    assert report["samples"] == 5
    assert "4 samples of" in told.output  # the long one is none


def test_shards_of_another_tokenizer(folder, tiny_checkpoint, tmp_path):
    finetune(tiny_checkpoint, "--data", folder, "--lora", "-o", tmp_path / "mine", "--replay", 0, "--steps", 1)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('kind = "lora"\noutput = "out"\ncheckpoint = "nano"\n[[data]]\npath = "mine/data"\n')
    told = CliRunner().invoke(app, ["train", str(recipe)])
    assert "holds shards of another tokenizer" in str(told.exception)
    assert not (tmp_path / "out").exists()


def test_an_empty_folder(tiny_checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    told = finetune(tiny_checkpoint, "--data", tmp_path / "empty", "-o", tmp_path / "mine")
    assert isinstance(told.exception, ValueError)
    assert not (tmp_path / "mine").exists()
