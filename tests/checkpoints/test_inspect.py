import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from emu3.checkpoints import NANO
from emu3.checkpoints.headers import read_headers
from emu3.checkpoints.inspect import check_tensors, documented_name, inspect, read_config

CURRENT = {
    "model.text_model.embed_tokens.weight": (6, 4),
    "model.text_model.norm.weight": (4,),
    "model.vqmodel.quantize.embedding.weight": (3, 2),
    "lm_head.weight": (6, 4),
}
LEGACY = {
    "text_model.model.embed_tokens.weight": (6, 4),
    "text_model.model.norm.weight": (4,),
    "vqmodel.quantize.embedding.weight": (3, 2),
    "text_model.lm_head.weight": (6, 4),
}


def test_legacy_names_become_current_ones_and_current_ones_stay() -> None:
    assert [documented_name(name) for name in LEGACY] == list(CURRENT)
    assert [documented_name(name) for name in CURRENT] == list(CURRENT)


@pytest.mark.parametrize(("shapes", "layout"), [(CURRENT, "documented"), (LEGACY, "legacy")])
def test_inspect_counts_parts_and_memory(make_checkpoint, shapes, layout) -> None:
    folder = make_checkpoint(shapes)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "processor_config.json").write_text('{"image_processor": {"min_pixels": 16, "max_pixels": 64}}')
    info = inspect(folder)
    assert (info.layout, info.tensors, info.parameters) == (layout, 4, 58)
    assert info.parameters_by_part == {"embedding": 24, "language model": 4, "vision tokenizer": 6, "head": 24}
    assert info.parameters_by_dtype == {"F32": 58}
    assert (info.memory_float32, info.memory_bfloat16) == (232, 116 + 12)
    assert info.bytes_on_disk == sum(file.stat().st_size for file in folder.iterdir())
    assert (info.context, info.vocabulary_size, info.codebook_size, info.pixels_per_token_side) == (32, 6, 3, 2)
    assert (info.min_pixels, info.max_pixels, info.tokenizer_files) == (16, 64, ("tokenizer.json",))
    assert json.loads(json.dumps(info.to_dict()))["parameters"] == 58


def test_a_copy_of_nano_is_known_by_its_numbers(tmp_path) -> None:
    shutil.copytree(NANO, tmp_path / "copy")
    found = inspect(tmp_path / "copy")
    assert (found.kind, found.abilities) == ("unified", ("draw", "read"))


def test_integer_tensors_take_the_same_memory_in_every_dtype(make_checkpoint) -> None:
    folder = make_checkpoint(CURRENT)
    counter = {"model.vqmodel.encoder.norm.num_batches_tracked": np.zeros((), np.int64)}
    (folder / "more.safetensors").write_bytes(save(counter))
    info = inspect(folder)
    assert (info.memory_float32, info.memory_bfloat16) == (232 + 8, 128 + 8)
    assert info.parameters_by_dtype == {"F32": 58, "I64": 1}


def test_quantized_memory_counts_matrices_and_their_scales(make_checkpoint) -> None:
    """A matrix of 256x128 has 256 scales of two bytes in 8 bits, and as many of scale and zero in 4 bits."""
    info = inspect(make_checkpoint(CURRENT | {"model.text_model.layers.0.mlp.up_proj.weight": (256, 128)}))
    rest, weights = 128, 256 * 128
    assert (info.memory_bfloat16, info.memory_int8) == (rest + 2 * weights, rest + weights + 512)
    assert info.memory_int4 == rest + weights // 2 + 1024


def test_shards_are_those_of_the_index(make_checkpoint) -> None:
    folder = make_checkpoint({"lm_head.weight": (6, 4)})
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"lm_head.weight": "model-00001-of-00002.safetensors", "model.text_model.norm.weight": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ValueError, match=r"two\.safetensors is missing"):
        read_headers(folder)
    save_file({"model.text_model.norm.weight": np.zeros(4, np.float32)}, folder / "two.safetensors")
    (folder / "optimizer.safetensors").write_bytes(b"not looked at")
    assert {name: header.shape for name, header in read_headers(folder).items()} == {
        "lm_head.weight": (6, 4),
        "model.text_model.norm.weight": (4,),
    }


def test_a_tensor_in_two_files_is_refused(make_checkpoint) -> None:
    folder = make_checkpoint(CURRENT)
    (folder / "again.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="in another file of the folder"):
        read_headers(folder)


@pytest.mark.parametrize("shapes", [CURRENT, LEGACY])
def test_matching_tensors_pass(make_checkpoint, shapes) -> None:
    check_tensors(make_checkpoint(shapes), CURRENT)


def test_missing_extra_and_reshaped_tensors_are_named(make_checkpoint) -> None:
    shapes = dict(LEGACY) | {"vqmodel.quantize.embedding.weight": (5, 2)}
    shapes |= {f"text_model.model.layers.{index}.extra": (1,) for index in range(5)}
    del shapes["text_model.model.norm.weight"]
    with pytest.raises(ValueError) as caught:
        check_tensors(make_checkpoint(shapes), CURRENT)
    message = str(caught.value)
    assert "1 missing: model.text_model.norm.weight;" in message
    names = ", ".join(f"model.text_model.layers.{index}.extra" for index in range(3))
    assert f"5 extra: {names}, ...;" in message
    assert "1 of another shape: model.vqmodel.quantize.embedding.weight is [5, 2], config.json says [3, 2])" in message


def test_optional_tensors_may_be_missing_but_not_misshapen(make_checkpoint) -> None:
    without_head = {name: shape for name, shape in CURRENT.items() if name != "lm_head.weight"}
    check_tensors(make_checkpoint(without_head), CURRENT, optional={"lm_head.weight"})
    with pytest.raises(ValueError, match=r"lm_head\.weight is \[1, 4\]"):
        check_tensors(make_checkpoint(without_head | {"lm_head.weight": (1, 4)}), CURRENT, optional={"lm_head.weight"})


WHOLE = save({name: np.zeros(shape, np.float32) for name, shape in CURRENT.items()})


@settings(max_examples=50)
@given(length=st.integers(0, len(WHOLE) - 1))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    (folder / "model.safetensors").write_bytes(WHOLE[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        read_headers(folder)


@pytest.mark.parametrize(
    "header", [b"[]", b"{", b'{"a": 1}', b'{"a": {"shape": [1], "data_offsets": [0, 4]}}', b"\xff\xfe"]
)
def test_a_header_of_another_kind_is_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="no readable safetensors header"):
        read_headers(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="other formats are not read"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "holds no config.json"),
        ("{", "is not JSON"),
        ("[]", "a JSON list, not an object"),
        ('{"model_type": "llama"}', "describes a 'llama' model"),
    ],
)
def test_a_bad_config_is_refused(tmp_path: Path, content: str | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=complaint):
        read_config(tmp_path)


def test_tensors_of_neither_layout_are_refused(make_checkpoint) -> None:
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.weight', which is in no layout"):
        inspect(make_checkpoint({"model.layers.0.weight": (2, 2)}))
