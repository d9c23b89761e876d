import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from itertools import permutations
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import deserialize
from safetensors.torch import load_file, save_file
from transformers import Emu3ForConditionalGeneration as ReferenceModel

from emu3 import cli
from emu3.checkpoints import resolve
from emu3.checkpoints.config import RefusedTensorsError
from emu3.checkpoints.convert import convert
from emu3.checkpoints.info import inspect
from emu3.checkpoints.load import load_model
from emu3.checkpoints.settings import read_config

LAYOUTS = ("documented", "legacy", "baai")
OLD = {"model.text_model.": "text_model.model.", "lm_head.": "text_model.lm_head.", "model.vqmodel.": "vqmodel."}


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder and those below it, as bytes."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        for name, tensor in deserialize(file.read_bytes()):
            key = str(file.parent.relative_to(folder) / name)
            assert key not in found
            found[key] = (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
    return found


@pytest.fixture(scope="module")
def checkpoints(original, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One in each layout. The legacy one is renamed here, as transformers would have saved it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    convert(original.folder, folder / "documented")
    shutil.copytree(folder / "documented", folder / "legacy")
    weights = load_file(folder / "legacy" / "model.safetensors")
    renamed = {}
    for name, tensor in weights.items():
        prefix = next(prefix for prefix in OLD if name.startswith(prefix))
        renamed[OLD[prefix] + name.removeprefix(prefix)] = tensor
    save_file(renamed, folder / "legacy" / "model.safetensors", metadata={"format": "pt"})
    return {"documented": folder / "documented", "legacy": folder / "legacy", "baai": original.folder}


@pytest.mark.parametrize(("start", "via"), list(permutations(LAYOUTS, 2)))
def test_there_and_back_every_tensor_is_bit_equal(checkpoints, tmp_path: Path, start: str, via: str) -> None:
    there = convert(checkpoints[start], tmp_path / "there", to=via)
    back = convert(tmp_path / "there", tmp_path / "back", to=start)
    assert tensors(tmp_path / "there") == tensors(checkpoints[via])
    assert tensors(tmp_path / "back") == tensors(checkpoints[start])
    assert (there.source_layout, there.target_layout) == (start, via) == (back.target_layout, back.source_layout)


@pytest.mark.parametrize(("start", "via"), list(permutations(LAYOUTS, 2)))
@torch.no_grad()
def test_logits_stay_the_same(checkpoints, tmp_path: Path, start: str, via: str) -> None:
    """Of ours, and of transformers' own model loaded from what was written."""
    ids = torch.randint(0, 262, (1, 24), generator=torch.Generator().manual_seed(1))
    expected = load_model(checkpoints["documented"])(input_ids=ids).logits
    convert(checkpoints[start], tmp_path / "there", to=via)
    last = tmp_path / "there"
    if via == "baai":
        convert(last, tmp_path / "back", to=start)
        last = tmp_path / "back"
    assert torch.equal(load_model(last)(input_ids=ids).logits, expected)
    theirs = ReferenceModel.from_pretrained(last).eval()(input_ids=ids).logits
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)


def test_what_transformers_saved_is_converted(checkpoints, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    shutil.copytree(checkpoints["documented"], saved)
    (saved / "model.safetensors").unlink()
    ReferenceModel.from_pretrained(checkpoints["documented"]).save_pretrained(saved, max_shard_size="200KB")
    assert (saved / "model.safetensors.index.json").is_file()
    convert(saved, tmp_path / "back", to="baai")
    assert tensors(tmp_path / "back") == tensors(checkpoints["baai"])


def test_dtypes_and_odd_bits_are_kept(original, tmp_path: Path) -> None:
    """A language model in bfloat16 with every kind of NaN, infinity and zero, beside a vision tokenizer in float32."""
    folder = Path(shutil.copytree(original.folder, tmp_path / "source"))
    for file in sorted((folder / "language").glob("*.safetensors")):
        weights = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
        for tensor in weights.values():
            odd = torch.tensor([0x7FC1, 0xFFC1, 0x7F81, 0x7F80, 0xFF80, 0x8000, 0x0001], dtype=torch.int32).short()
            tensor.view(torch.int16).flatten()[:7] = odd
        save_file(weights, file)
    convert(folder, tmp_path / "there", to="legacy")
    convert(tmp_path / "there", tmp_path / "back", to="baai")
    before = tensors(folder)
    assert tensors(tmp_path / "back") == before
    assert {dtype for dtype, _, _ in before.values()} == {"BF16", "F32", "I64"}


def test_the_report_names_every_tensor(original, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    report = convert(original.folder, tmp_path / "there", on_progress=lambda done, total: told.append((done, total)))
    moves = {move.source: move for move in report.moves}
    assert moves.keys() == tensors(original.folder).keys()
    assert {move.target for move in report.moves} == tensors(tmp_path / "there").keys()
    query = moves["vision/decoder.mid.attn_1.q.weight"]
    assert query.target == "model.vqmodel.decoder.middle_block.attn_1.q_proj.weight"
    assert (query.source_shape, query.target_shape, query.bytes) == ((64, 64, 1, 1), (64, 64), 64 * 64 * 4)
    assert (report.reshaped, report.renamed) == (20, len(moves))  # 5 attention blocks of 4 projections
    assert json.loads(json.dumps(report.to_dict()))["moves"][0]["source"] == report.moves[0].source
    assert told == sorted(told) and told[-1] == (report.bytes, report.bytes)


def test_large_weights_are_sharded(checkpoints, tmp_path: Path) -> None:
    convert(checkpoints["baai"], tmp_path / "there", max_shard_bytes=100_000)
    files = list((tmp_path / "there").glob("model-*.safetensors"))
    assert len(files) > 5
    assert max(file.stat().st_size for file in files) < 64 * 64 * 9 * 4 + 20_000
    assert tensors(tmp_path / "there") == tensors(checkpoints["documented"])
    expected = load_model(checkpoints["documented"]).state_dict()
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in load_model(tmp_path / "there").state_dict().items()
    )


def test_two_repositories_are_given_apart(original, tmp_path: Path) -> None:
    language, vision = (shutil.copytree(folder, tmp_path / f"repo{n}") for n, folder in enumerate(original.parts))
    convert(language, tmp_path / "there", vision=vision)
    convert(original.folder, tmp_path / "expected")
    assert tensors(tmp_path / "there") == tensors(tmp_path / "expected")


def edited(source: Path, folder: Path, edit) -> Path:
    """A copy with its weights in one file, as `edit` changed them."""
    shutil.copytree(source, folder)
    files = sorted(folder.glob("*.safetensors"))
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for file in (*files, folder / "model.safetensors.index.json"):
        file.unlink(missing_ok=True)
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_tensors_that_do_not_fit_are_refused_before_anything_is_written(checkpoints, tmp_path: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.text_model.norm.weight"]
        weights["model.layers.0.rotary_emb.inv_freq"] = torch.zeros(4)
        weights["lm_head.weight"] = weights["lm_head.weight"][:-1].contiguous()

    source = edited(checkpoints["documented"], tmp_path / "source", spoil)
    for to in ("legacy", "baai"):
        with pytest.raises(RefusedTensorsError, match="3 tensors are refused") as caught:
            convert(source, tmp_path / "target", to=to)
        assert caught.value.refused == {
            "model.text_model.norm.weight": "missing",
            "lm_head.weight": "shape [488, 32], config.json says [489, 32]",
            "model.layers.0.rotary_emb.inv_freq": "unknown to config.json",
        }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_mixture_of_layouts_is_refused(checkpoints, tmp_path: Path) -> None:
    def mix(weights: dict[str, torch.Tensor]) -> None:
        weights["text_model.lm_head.weight"] = weights.pop("lm_head.weight")

    source = edited(checkpoints["documented"], tmp_path / "source", mix)
    with pytest.raises(RefusedTensorsError, match=r"model\.text_model\.model\.|missing"):
        convert(source, tmp_path / "target", to="baai")


def test_a_tied_head_need_not_be_stored(checkpoints, tmp_path: Path) -> None:
    source = edited(checkpoints["documented"], tmp_path / "source", lambda weights: weights.pop("lm_head.weight"))
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "there", to="baai")
    convert(tmp_path / "there", tmp_path / "back")
    assert tensors(tmp_path / "back") == tensors(source)
    model = load_model(tmp_path / "back")
    assert torch.equal(model.lm_head.weight, model.model.text_model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("source", "options", "complaint"),
    [
        ("documented", {}, "is in the documented layout already"),
        ("documented", {"to": "gguf"}, "unknown layout 'gguf'; convert to documented, legacy, baai"),
        ("documented", {"to": "baai", "vision": "."}, "is not needed"),
        ("baai/language", {}, "is only BAAI's language model; give the folder of the other repository as --vision"),
        ("baai/vision", {}, "is only BAAI's vision tokenizer"),
        ("baai/language", {"vision": "baai/language"}, "is not the vision part"),
        ("", {}, "holds no config.json"),
    ],
)
def test_what_cannot_be_is_refused(checkpoints, tmp_path: Path, source: str, options: dict, complaint: str) -> None:
    def place(name: str) -> Path:
        layout, _, part = name.partition("/")
        return checkpoints[layout] / part if layout in checkpoints else checkpoints["documented"].parent

    if "vision" in options:
        options = options | {"vision": place(options["vision"])}
    with pytest.raises(ValueError, match=complaint.replace(".", r"\.")):
        convert(place(source), tmp_path / "target", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_with_another_vocabulary_has_no_place_in_the_original_layout(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"cannot be written as emu3\.tiktoken"):
        convert(tiny_checkpoint, tmp_path / "target", to="baai")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_left_alone(checkpoints, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with pytest.raises(ValueError, match="is there already"):
        convert(checkpoints["documented"], tmp_path / "target", to="legacy")
    assert list((tmp_path / "target").iterdir()) == []


def test_pickled_weights_are_never_read(checkpoints, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoints["documented"], source)
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"cposix\nabort\n(tR.")
    with pytest.raises(ValueError, match="weights in other formats are not read"):
        convert(source, tmp_path / "target", to="legacy")


def test_a_damaged_file_is_refused(checkpoints, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoints["documented"], source)
    file = source / "model.safetensors"
    content = file.read_bytes()
    assert content.count(b'"dtype":"I64"') > 0
    file.write_bytes(content.replace(b'"dtype":"I64"', b'"dtype":"I32"'))
    with pytest.raises(ValueError, match="is damaged"):
        convert(source, tmp_path / "target", to="legacy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_the_original_layout_is_not_loaded_but_explained(original) -> None:
    with pytest.raises(ValueError, match="BAAI's original layout; `emu3 convert` writes one that loads"):
        read_config(original.parts[0])


def test_info_of_the_original_layout(original, checkpoints) -> None:
    whole, same = inspect(original.folder), inspect(checkpoints["documented"])
    assert (whole.layout, same.layout) == ("baai", "documented")
    for field in ("tensors", "parameters", "parameters_by_part", "memory_bfloat16", "context", "vocabulary_size"):
        assert getattr(whole, field) == getattr(same, field), field
    assert (whole.codebook_size, whole.pixels_per_token_side, whole.max_pixels, whole.missing) == (16, 2, 256, ())
    language, vision = (inspect(folder) for folder in original.parts)
    assert (language.missing, vision.missing) == (("vision tokenizer",), ("language model",))
    assert (language.codebook_size, vision.context) == (None, None)
    assert language.parameters + vision.parameters == whole.parameters
    assert language.tokenizer_files == ("emu3.tiktoken", "emu3_vision_tokens.txt")


@pytest.mark.parametrize("to", ["legacy", "baai"])
def test_abilities_are_written_and_kept(checkpoints, tmp_path: Path, to: str) -> None:
    assert inspect(checkpoints["documented"]).abilities is None
    convert(checkpoints["documented"], tmp_path / "there", to=to, abilities=["draw"])
    convert(tmp_path / "there", tmp_path / "back")
    assert inspect(tmp_path / "there").abilities == inspect(tmp_path / "back").abilities == ("draw",)
    assert load_model(tmp_path / "back").config.abilities == ["draw"]
    ReferenceModel.from_pretrained(tmp_path / "back").save_pretrained(tmp_path / "theirs")
    assert inspect(tmp_path / "theirs").abilities == ("draw",)
    with pytest.raises(ValueError, match=r"abilities=\['fly'\] must be a list of one or more of draw, read"):
        convert(checkpoints["documented"], tmp_path / "target", to=to, abilities=["fly"])


def test_the_command_converts_and_reports(original, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    language, vision = original.parts
    target = tmp_path / "there"
    options = ["--vision", str(vision), "--abilities", "draw,read"]
    cli.app(["convert", str(language), str(target), *options], standalone_mode=False)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith(f"{target}  baai to documented: ") and "20 reshaped, none refused" in printed.out
    assert inspect(target).abilities == ("draw", "read")
    cli.app(["convert", str(target), str(tmp_path / "back"), "--to", "baai", "--json"], standalone_mode=False)
    report = json.loads(capsys.readouterr().out)
    assert (report["target_layout"], len(report["moves"])) == ("baai", len(tensors(original.folder)))


def test_the_command_prints_what_it_refused(checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = edited(checkpoints["documented"], tmp_path / "source", lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", str(source), str(tmp_path / "target"), "--to", "legacy", "--json"])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert json.loads(printed.out) == {"refused": {"lm_head.weight": "missing"}}
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1


@pytest.mark.parametrize(("error", "code"), [(None, 0), (LocalEntryNotFoundError("absent"), 2)])
def test_pull_downloads_weights_and_settings_but_no_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], error, code: int
) -> None:
    calls: list[dict] = []

    def download(name: str, **arguments) -> str:
        calls.append(arguments)
        if error:
            raise error
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(SystemExit) as stop:
        cli.main(["pull", "BAAI/Emu3-Gen"])
    assert (stop.value.code or 0) == code
    assert capsys.readouterr().out == ("" if code else f"{tmp_path / 'BAAI/Emu3-Gen'}\n")
    assert not calls[0]["local_files_only"]
    patterns = calls[0]["allow_patterns"]
    wanted = ["model-00001-of-00007.safetensors", "config.json", "emu3.tiktoken", "emu3_vision_tokens.txt"]
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in wanted)
    assert not any(fnmatch(name, pattern) for name in ("modeling_emu3.py", "weights.bin") for pattern in patterns)


# Converts in child processes, slowed down piece by piece, and kills each at a random moment.
KILLER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from emu3.checkpoints.convert import convert
from emu3.checkpoints.info import inspect
from emu3.checkpoints.load import load_model

source, target, layout = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def run():
    convert(source, target, to=layout, max_shard_bytes=100_000, on_progress=lambda done, total: time.sleep(0.005))

def content(folder=target):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}

def loads(folder):
    try:
        load_model(folder) if layout == "documented" else inspect(folder)
    except ValueError:
        return False
    return True

run()
shutil.rmtree(target)
start = time.monotonic()
run()
length, whole = time.monotonic() - start, content()
shutil.rmtree(target)
numbers = random.Random(0)
for _ in range(20):
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    delay = numbers.uniform(0, length)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left = [folder for folder in target.parent.iterdir()]
    halves = [folder.name for folder in left if loads(folder) and content(folder) != whole]
    finished = target.exists()
    if not finished:
        run()
    completed = content() == whole and loads(target) and [target] == list(target.parent.iterdir())
    shutil.rmtree(target)
    print(json.dumps({"delay": delay, "left": [folder.name for folder in left], "finished": finished,
                      "halves": halves, "completed": completed}), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("start", "to"), [("baai", "documented"), ("documented", "baai")])
def test_a_killed_conversion_leaves_nothing_that_loads(checkpoints, tmp_path: Path, start: str, to: str) -> None:
    (tmp_path / "place").mkdir()
    command = [sys.executable, "-c", KILLER, str(checkpoints[start]), str(tmp_path / "place" / "target"), to]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    midway = [result for result in rounds if result["left"] and not result["finished"]]
    print(f"{len(rounds)} kills: {len(midway)} midway, {sum(result['finished'] for result in rounds)} after the end")
    assert len(rounds) == 20 and len(midway) >= 3  # how many depends on what else runs
    for result in rounds:
        assert result["halves"] == [] and result["completed"], result


def test_what_a_checkpoint_recommends_goes_along(tmp_path: Path) -> None:
    for layout in ("legacy", "documented"):
        convert(resolve("nano") if layout == "legacy" else tmp_path / "legacy", tmp_path / layout, to=layout)
        assert read_config(tmp_path / layout)["drawing"] == read_config(resolve("nano"))["drawing"]
        assert read_config(tmp_path / layout)["clips"]["frames"] == 12
