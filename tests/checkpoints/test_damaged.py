"""A damaged or hostile checkpoint is refused by one ValueError, before it costs time or memory; or it works.

`damage.py` edits nano's files at random. Here are some of its edits, and by name those that once ended otherwise.
"""

import json
import os
import re
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from emu3 import Emu3Pipeline, cli
from emu3.checkpoints import NANO
from emu3.checkpoints.convert import convert
from emu3.checkpoints.files import read_headers
from emu3.checkpoints.info import inspect
from emu3.checkpoints.load import load_model, load_processor
from emu3.checkpoints.settings import TEXT, VISION

DAMAGE = Path(__file__).parent / "damage.py"
DEEP = "[" * 100_000


def run_damage(*arguments: object) -> list[dict[str, Any]]:
    """What became of each edit."""
    done = subprocess.run(
        [sys.executable, str(DAMAGE), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    # The tokenizers library prints on stdout too.
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"number"')]


def assert_sound(found: list[dict[str, Any]], count: int) -> None:
    assert [each["number"] for each in found] == list(range(count))
    assert [each for each in found if each["outcome"] not in ("drawn", "refused")] == []
    outcomes = Counter(each["outcome"] for each in found)
    assert min(outcomes["drawn"], outcomes["refused"]) > count // 10
    assert {each["file"] for each in found} == {file.name for file in NANO.iterdir() if file.is_file()}


@pytest.mark.slow
def test_an_edit_is_refused_or_works() -> None:
    assert_sound(run_damage("--edits", 42, "--seed", 7), 42)


@pytest.mark.slow
@pytest.mark.skipif("EMU3_EDITS" not in os.environ, reason="takes minutes; EMU3_EDITS=500 runs as many edits")
@pytest.mark.parametrize("seed", [1, 2])
def test_many_edits_are_refused_or_work(seed: int) -> None:
    count = int(os.environ["EMU3_EDITS"])
    assert_sound(run_damage("--edits", count, "--seed", seed), count)


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, of links: `write` replaces one."""
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    for file in tiny_checkpoint.iterdir():
        (copy / file.name).symlink_to(file)
    return copy


def write(file: Path, content: str | bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the object in a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    write(file, json.dumps(content))


def assert_refused(folder: Path, complaint: str, capsys: pytest.CaptureFixture[str], info: bool = True) -> None:
    """By loading, and with `info` by `emu3 info` too: with exit code 2 and one line."""
    with pytest.raises(ValueError, match=complaint):
        Emu3Pipeline.from_pretrained(folder)
    if not info:
        inspect(folder)
        return
    with pytest.raises(ValueError, match=complaint):
        inspect(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["info", str(folder)])
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", printed.err)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (DEEP, r"config\.json is not JSON \(nested deeper than 32 levels\)"),
        ('{"a":' * 100_000, "nested deeper than 32 levels"),
        (json.dumps({"model_type": "emu3", "x": json.loads("[" * 200 + "]" * 200)}), "nested deeper than 32 levels"),
        ('{"model_type": NaN}', "NaN is no number"),
        ("{}".encode("utf-16"), "is not JSON"),
        (b"\xff", "is not JSON"),
        ('{"model_type": ["emu3"]}', r"describes a \['emu3'\] model"),
        ('{"model_type": {}}', "describes a {} model"),
    ],
    ids=["arrays", "objects", "200 levels", "NaN", "UTF-16", "byte", "list as a type", "object as a type"],
)
def test_config_that_is_no_settings(folder, capsys, content, complaint) -> None:
    write(folder / "config.json", content)
    assert_refused(folder, complaint, capsys)


WRONG = (0, -1, 1.5, 10**9, 10**30, "8", True, None, [], {}, [8])


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize(
    ("part", "field"),
    [
        *(("text_config", field) for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")),
        ("text_config", "num_attention_heads"),
        *(("vq_config", field) for field in ("codebook_size", "embed_dim", "latent_channels", "base_channels")),
        *(("vq_config", field) for field in ("num_res_blocks", "hidden_size", "in_channels", "channel_multiplier")),
    ],
)
def test_sizes(folder, part, field, value) -> None:
    edit(folder / "config.json", lambda config: config[part].update({field: value}))
    with pytest.raises(
        ValueError,
        match=r"config\.json.*(must be|tensors are refused|cannot be built|the tensors are|no multiple|be the)",
    ):
        load_model(folder)
    if value != 10**9 and (field, value) != ("channel_multiplier", [8]):  # which some checkpoint might have
        with pytest.raises(ValueError, match=rf"{part}\.{field}=.*must be"):
            inspect(folder)


def test_layers_are_counted_before_a_module_is_built(folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emu3.checkpoints.config.Emu3ForConditionalGeneration", None)
    for part, field, complaint in (
        ("text_config", "num_hidden_layers", "the tensors are those of 2"),
        ("vq_config", "num_res_blocks", "the tensors are those of 1"),
    ):
        original = json.loads((folder / "config.json").read_text())
        edit(folder / "config.json", lambda config, part=part, field=field: config[part].update({field: 10**9}))
        with pytest.raises(ValueError, match=complaint):
            load_model(folder)
        write(folder / "config.json", json.dumps(original))


@pytest.mark.parametrize(
    ("part", "changed", "complaint", "info"),
    [
        ("text_config", {"hidden_act": "x"}, "hidden_act='x' is unknown; it is one of gelu", False),
        ("text_config", {"hidden_act": 0}, "hidden_act=0, which must be a string", True),
        ("text_config", {"rope_parameters": {"rope_type": "x", "rope_theta": 1e4}}, "rope_type='x' is unknown", False),
        ("text_config", {"rope_parameters": {"rope_theta": 0}}, "rope_theta=0, which must be a number from 1", True),
        ("text_config", {"rope_parameters": {"rope_theta": -1e4}}, r"rope_theta=-10000\.0, which must be", True),
        ("text_config", {"rope_parameters": {"rope_theta": 1e400}}, "is not JSON|rope_theta=inf, which must be", True),
        ("text_config", {"rope_parameters": []}, r"rope_parameters=\[\], which must be an object", True),
        ("text_config", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "built|Missing", False),
        ("text_config", {"rms_norm_eps": -1e-5}, r"rms_norm_eps=-1e-05, which must be a number from 0 to 1", True),
        ("text_config", {"rms_norm_eps": float("nan")}, "NaN is no number", True),
        ("text_config", {"rms_norm_eps": float("inf")}, "Infinity is no number", True),
        ("text_config", {"pad_token_id": 10**6}, "vocab_size=287 is too small for the ids of", False),
        ("text_config", {"num_key_value_heads": 3}, "no multiple of num_key_value_heads=3", False),
        ("text_config", {"validate": 1}, "sets 'validate' of text_config, which is no setting", False),
        (
            "text_config",
            {"quantization_config": {"quant_method": "x"}},
            "quantization_config=.* must be left out",
            True,
        ),
        ("vq_config", {"base_channels": 33}, "must be multiples of 32", False),
        ("vq_config", {"attn_resolutions": [7]}, "the stages in attn_resolutions", False),
        ("vq_config", {"temporal_downsample_factor": 3}, "must be one of 1, 2, 4", True),
        ("vq_config", {"channel_multiplier": [1] * 1000}, "must be a list of 1 to 12 entries", True),
        ("vq_config", {"codebook_size": 15}, "codebook_size=15, but the vocabulary has visual tokens up to", False),
        (None, {"text_config": []}, r"text_config=\[\], which must be an object", True),
        (None, {"vq_config": "x"}, "vq_config='x', which must be an object", True),
        (None, {"vocabulary_map": {"<image>": "x"}}, "vocabulary_map=.* must be an object of whole numbers", True),
        (None, {"vocabulary_map": {"<image>": 10**9}}, "its vocabulary_map has the id 1000000000", False),
        (None, {"dtype": "x"}, "dtype='x', which must be one of float64", True),
        (None, {"id2label": ""}, "id2label='', which must be an object", True),
        (None, {"attn_implementation": "owner/kernel"}, "attn_implementation='owner/kernel', which must be", True),
        (None, {"transformers_weights": "other.safetensors"}, "transformers_weights=.* must be left out", True),
    ],
)
def test_settings(folder, capsys, part, changed, complaint, info) -> None:
    edit(folder / "config.json", lambda config: (config[part] if part else config).update(changed))
    assert_refused(folder, complaint, capsys, info)


def test_the_fields_are_all_documented_ones() -> None:
    from emu3.configuration import Emu3TextConfig, Emu3VQVAEConfig

    for kind, settings in ((Emu3TextConfig, TEXT), (Emu3VQVAEConfig, VISION)):
        assert {
            name for name in kind.__annotations__ if "ClassVar" not in kind.__annotations__[name]
        } <= settings.keys()


def edit_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file, and nothing behind it."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    changed = json.dumps(header).encode()
    write(file, struct.pack("<Q", len(changed)) + changed + content[8 + length :])


NORM = "model.text_model.norm.weight"


def overlap(header: dict[str, Any]) -> None:
    """Two tensors of one size share one span, and leave another to nobody."""
    first, second = (f"model.text_model.layers.{n}.input_layernorm.weight" for n in (0, 1))
    header[first]["data_offsets"] = header[second]["data_offsets"]


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[NORM].update(dtype="x"),
        lambda header: header[NORM].update(dtype=["F32"]),
        lambda header: header[NORM].update(dtype="F16"),
        lambda header: header[NORM].update(shape=["32"]),
        lambda header: header[NORM].update(shape=[-32]),
        lambda header: header[NORM].update(shape=[10**30]),
        lambda header: header[NORM].update(shape=[2**62, 2**62]),
        lambda header: header[NORM].update(shape=[2] * 10**5),
        lambda header: header[NORM].update(data_offsets=[1e30, 0]),
        lambda header: header[NORM].update(data_offsets=[0]),
        lambda header: header.update({NORM: []}),
        lambda header: header.update(__metadata__=[]),
        lambda header: header.pop(NORM),
        overlap,
    ],
)
def test_headers(folder, capsys, change) -> None:
    edit_header(folder / "model.safetensors", change)
    assert_refused(folder, r"model\.safetensors is damaged.*; get the checkpoint again", capsys)


def test_a_header_of_gigabytes(folder, capsys) -> None:
    file = folder / "model.safetensors"
    write(file, struct.pack("<Q", 2**32))
    os.truncate(file, 2**32 + 8)  # a hole, which takes no room
    assert_refused(folder, r"model\.safetensors is damaged.*header too large", capsys)


def test_weights_of_another_kind_of_number(folder, tmp_path: Path) -> None:
    edit_header(folder / "model.safetensors", lambda header: header[NORM].update(dtype="I32"))
    with pytest.raises(
        ValueError, match=r"1 tensors are refused: model\.text_model\.norm\.weight \(dtype I32, which is another kind"
    ):
        load_model(folder)
    with pytest.raises(ValueError, match=r"norm\.weight \(dtype I32, which is another kind of number\)"):
        convert(folder, tmp_path / "target", to="legacy")


def test_a_tensor_under_both_of_its_names(folder) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights | {"text_model.lm_head.weight": weights["lm_head.weight"].clone()}, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"'text_model\.lm_head\.weight' and 'lm_head\.weight', two names of one tensor"
    ):
        load_model(folder)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [NORM, "model.vqmodel.decoder.conv_out.bias"])
def test_a_weight_that_is_no_number(folder, name, number) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name][1] = number
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{re.escape(name)} holds NaN or infinite values as torch\.float32"):
        load_model(folder)


def test_large_weights_are_no_infinite_ones(folder) -> None:
    """Their sum is infinite, they are not."""
    weights = load_file(folder / "model.safetensors")
    weights[NORM].fill_(3e38)
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors")
    assert torch.equal(load_model(folder).model.text_model.norm.weight, weights[NORM])
    with pytest.raises(
        ValueError, match=r"norm\.weight holds NaN or infinite values as torch\.float16; .* wider dtype"
    ):
        load_model(folder, dtype=torch.float16)


@pytest.fixture
def sharded(folder: Path) -> Path:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: weights[name] for name in own}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in shards.items() for name in own}}
    write(folder / "model.safetensors.index.json", json.dumps(index))
    return folder


def test_shards_load(sharded) -> None:
    assert load_model(sharded).lm_head.weight.shape[0] == 287


@pytest.mark.parametrize(
    ("change", "complaint", "info"),
    [
        (lambda index: index.pop("weight_map"), 'has no "weight_map"', True),
        (lambda index: index.update(weight_map=[]), 'has no "weight_map"', True),
        (lambda index: index.update(weight_map={}), 'has no "weight_map"', True),
        (lambda index: index["weight_map"].update(x=1), "names 1, which is no", True),
        (lambda index: index["weight_map"].update(x="../model-1.safetensors"), "no \\*.safetensors file of its", True),
        (lambda index: index["weight_map"].update({NORM: "model-2.safetensors"}), "which does not hold it", True),
        (lambda index: index.pop("metadata"), 'has no "metadata"', False),
    ],
)
def test_index(sharded, capsys, change, complaint, info) -> None:
    edit(sharded / "model.safetensors.index.json", change)
    assert_refused(sharded, complaint, capsys, info)


def test_weights_that_transformers_would_not_find(sharded, tiny_checkpoint: Path) -> None:
    (sharded / "model.safetensors").symlink_to(tiny_checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"keep no model\.safetensors beside them"):
        load_model(sharded)
    (sharded / "model.safetensors").unlink()
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"in model-1\.safetensors, model-2\.safetensors; name a single file"):
        load_model(sharded)


@pytest.mark.parametrize(
    ("file", "change", "complaint"),
    [
        ("processor_config.json", {"image_processor": {"spatial_factor": 8}}, "spatial_factor=8, but .* has 4 pixels"),
        ("processor_config.json", {"image_processor": {"spatial_factor": None}}, "spatial_factor=None, which must be"),
        ("processor_config.json", {"image_processor": {"max_pixels": False}}, "max_pixels=False, which must be"),
        ("processor_config.json", {"image_processor": {"max_pixels": 1}}, "min_pixels=2304 and max_pixels=1; give"),
        (
            "processor_config.json",
            {"image_processor": {"min_pixels": 10**9, "max_pixels": 10**9}},
            "min_pixels=1000000000, which is more than the 512 tokens of the context",
        ),
        ("processor_config.json", {"image_processor": {"image_std": [0]}}, r"image_std=\[0\], which must be"),
        ("processor_config.json", {"image_processor": {"resample": "x"}}, "resample='x', which must be one of 0, 1"),
        ("processor_config.json", {"image_area": [9]}, r"image_area=\[9\], which must be"),
        ("tokenizer_config.json", {"model_max_length": "x"}, "model_max_length='x', which must be a number above 0"),
        ("tokenizer_config.json", {"padding_side": 1}, "padding_side=1, which must be one of left, right"),
        ("tokenizer_config.json", {"bos_token": "a"}, r"bos_token='a' with id \d+, config\.json has"),
        ("tokenizer.json", {"pre_tokenizer": None}, r"tokenizer\.json and tokenizer_config\.json cannot encode"),
        ("tokenizer.json", {"decoder": [0]}, r"tokenizer\.json or tokenizer_config\.json is missing or damaged"),
        ("tokenizer.json", {"model": None}, r"tokenizer\.json or tokenizer_config\.json is missing or damaged"),
    ],
)
def test_processor(folder, file, change, complaint) -> None:
    def merge(content: dict[str, Any]) -> None:
        for key, value in change.items():
            content[key] = {**content[key], **value} if isinstance(value, dict) else value

    edit(folder / file, merge)
    for load in (load_processor, Emu3Pipeline.from_pretrained):
        with pytest.raises(ValueError, match=complaint):
            load(folder)


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_processor_files_that_nest_deeply(folder, name) -> None:
    write(folder / name, DEEP)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is not JSON \(nested deeper than 32 levels\)"):
        load_processor(folder)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{% if %}", "the chat template of .* fails"),
        ("{{ 1 / 0 }}", "the chat template of .* fails"),
        ("{{ 'a' - 'b' }}", "the chat template of .* fails"),
        (b"\xff", "no complete processor"),
    ],
)
def test_chat_template(folder, template, complaint) -> None:
    write(folder / "chat_template.jinja", template)
    with pytest.raises(ValueError, match=complaint):
        load_processor(folder)


def test_a_chat_template_may_refuse(folder) -> None:
    write(folder / "chat_template.jinja", "{{ raise_exception('not today') }}")
    processor = load_processor(folder)
    with pytest.raises(ValueError, match="not today"):
        processor.apply_chat_template([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "content",
    ["[]", "{", DEEP, '{"pad_token_id": {}}', '{"pad_token_id": "x"}', '{"eos_token_id": -1}', '{"bos_token_id": 1e9}'],
)
def test_generation_config(folder, content) -> None:
    write(folder / "generation_config.json", content)
    with pytest.raises(ValueError, match=r"generation_config\.json (is not JSON|holds a JSON list|cannot be used)"):
        load_model(folder)


@pytest.mark.parametrize(
    ("part", "file", "changed", "complaint"),
    [
        ("vision", "config.json", {"codebook_size": 8}, r"codebook_size=8, but emu3_vision_tokens\.txt .* 16 visual"),
        ("vision", "config.json", {"codebook_size": 32}, r"codebook_size=32, but emu3_vision_tokens\.txt .* 16 visual"),
        ("vision", "preprocessor_config.json", {"spatial_factor": 8}, "spatial_factor=8, but .* has 2 pixels per"),
        ("vision", "preprocessor_config.json", {"min_pixels": "x"}, "min_pixels='x', which must be"),
        ("vision", "config.json", {"ch_mult": 2}, "ch_mult=2, which must be a list"),
        ("vision", "config.json", {"num_res_blocks": 10**9}, "num_res_blocks=1000000000, the tensors are those of 1"),
        (
            "language",
            "config.json",
            {"hidden_size": 10**9},
            r"shape \[489, 32\], config\.json says \[489, 1000000000\]",
        ),
        ("language", "config.json", {"num_hidden_layers": "2"}, "num_hidden_layers='2', which must be"),
        ("language", "config.json", {"rope_scaling": [1]}, r"rope_scaling=\[1\], which must be an object"),
    ],
)
def test_conversion_of_parts_that_do_not_fit(original, tmp_path: Path, part, file, changed, complaint) -> None:
    source = tmp_path / "source"
    for folder in ("language", "vision"):
        (source / folder).mkdir(parents=True)
        for each in (original.folder / folder).iterdir():
            (source / folder / each.name).symlink_to(each)
    edit(source / part / file, lambda content: content.update(changed))
    with pytest.raises(ValueError, match=complaint):
        convert(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_an_empty_tensor_may_have_any_width(folder) -> None:
    """Its header is sound, and its width says nothing about the model's."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights | {"x": torch.zeros(0, 10**9)}, folder / "model.safetensors")
    assert read_headers(folder)["x"].shape == (0, 10**9)
    edit(folder / "config.json", lambda config: config["text_config"].update(hidden_size=10**8))
    with pytest.raises(ValueError, match=r"x \(unknown to config\.json\)|and \d+ more"):
        load_model(folder)
