import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emu3.checkpoints.load import load_model, load_processor
from emu3.image_processing import Emu3ImageProcessor


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def legacy_name(name: str) -> str:
    for current, legacy in (
        ("model.text_model.", "text_model.model."),
        ("model.vqmodel.", "vqmodel."),
        ("lm_head.", "text_model.lm_head."),
    ):
        if name.startswith(current):
            return legacy + name.removeprefix(current)
    raise AssertionError(name)


def edit_tensors(folder: Path, edit) -> None:
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def test_both_layouts_load_every_tensor_as_it_was_saved(folder: Path) -> None:
    saved = load_file(folder / "model.safetensors")
    current = load_model(folder)
    edit_tensors(folder, lambda tensors: {legacy_name(name): tensor for name, tensor in tensors.items()})
    legacy = load_model(folder)
    for model in (current, legacy):
        assert not model.training
        state = model.state_dict()
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[name], saved[name]) for name in saved)


def test_the_vision_tokenizer_stays_in_float32(folder: Path) -> None:
    model = load_model(folder, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    vision = {tensor.dtype for tensor in model.model.vqmodel.state_dict().values() if tensor.is_floating_point()}
    assert vision == {torch.float32}


def test_a_tied_head_need_not_be_stored(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: {name: t for name, t in tensors.items() if name != "lm_head.weight"})
    with pytest.raises(ValueError, match=r"1 tensors are refused: lm_head\.weight \(missing\)"):
        load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = load_model(folder)
    assert torch.equal(model.lm_head.weight, model.model.text_model.embed_tokens.weight)


def test_missing_and_extra_tensors_are_refused(folder: Path) -> None:
    norm = "model.text_model.norm.weight"
    edit_tensors(folder, lambda tensors: {"lm_head.bias" if name == norm else name: t for name, t in tensors.items()})
    with pytest.raises(
        ValueError, match=r"2 tensors .*: model\.text_model\.norm\.weight \(missing\), lm_head\.bias \(unk"
    ):
        load_model(folder)


def test_another_config_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError,
        match=r"6 tensors .*down_proj\.weight \(shape \[32, 48\], config\.json says \[32, 49\]\)",
    ):
        load_model(folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(folder)


def test_the_processor_is_ours_and_keeps_its_settings(tiny_checkpoint: Path) -> None:
    processor = load_processor(tiny_checkpoint)
    assert type(processor.image_processor) is Emu3ImageProcessor
    assert (processor.image_processor.spatial_factor, processor.image_processor.max_pixels) == (4, 48 * 48)


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_processor_without_its_files_is_refused(folder: Path, name: str, content: str | None) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match="no complete processor and tokenizer"):
        load_processor(folder)
