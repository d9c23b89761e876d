import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from emu3.checkpoints import NANO
from emu3.checkpoints.files import read_headers
from emu3.checkpoints.info import inspect
from emu3.checkpoints.settings import read_config
from emu3.modeling.legacy import documented_name, legacy_name

CONFIG = {
    "model_type": "emu3",
    "text_config": {"max_position_embeddings": 32, "vocab_size": 6},
    "vq_config": {"codebook_size": 3, "channel_multiplier": [1, 2]},
}
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
    assert [legacy_name(name) for name in CURRENT] == list(LEGACY)


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


@pytest.mark.parametrize("abilities", [None, ["draw"], ["draw", "read"]])
def test_abilities_are_what_the_config_says(make_checkpoint, abilities) -> None:
    folder = make_checkpoint(CURRENT)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"abilities": abilities}))
    assert inspect(folder).abilities == (tuple(abilities) if abilities else None)


@pytest.mark.parametrize("abilities", [[], ["fly"], "draw", [1]])
def test_other_abilities_are_refused(make_checkpoint, abilities) -> None:
    folder = make_checkpoint(CURRENT)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"abilities": abilities}))
    with pytest.raises(ValueError, match=r"abilities=.*, which must be a list of 1 to 5 entries, .* draw, read"):
        inspect(folder)


def test_nano_goes_in_every_direction() -> None:
    assert inspect(NANO).abilities == ("draw", "read", "edit", "film", "tell")


def test_integer_tensors_take_the_same_memory_in_every_dtype(make_checkpoint) -> None:
    folder = make_checkpoint(CURRENT)
    counter = {"model.vqmodel.encoder.norm.num_batches_tracked": np.zeros((), np.int64)}
    (folder / "more.safetensors").write_bytes(save(counter))
    info = inspect(folder)
    assert (info.memory_float32, info.memory_bfloat16) == (232 + 8, 128 + 8)
    assert info.parameters_by_dtype == {"F32": 58, "I64": 1}


def test_quantized_memory_counts_matrices_and_their_scales(make_checkpoint) -> None:
    """A matrix of 256x128 has 256 scales of four bytes."""
    info = inspect(make_checkpoint(CURRENT | {"model.text_model.layers.0.mlp.up_proj.weight": (256, 128)}))
    rest, weights = 128, 256 * 128
    assert (info.memory_bfloat16, info.memory_int8) == (rest + 2 * weights, rest + weights + 1024)


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
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged.*header"):
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
