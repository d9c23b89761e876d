"""Checkpoints: what either library saves, the other loads, from both layouts of names, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Emu3ForCausalLM as ReferenceTextModel
from transformers import Emu3ForConditionalGeneration as ReferenceModel
from transformers import Emu3Model as ReferenceBaseModel
from transformers import Emu3VQVAE as ReferenceVQVAE

from emu3.modeling.multimodal import Emu3ForConditionalGeneration, Emu3Model
from emu3.modeling.text import Emu3ForCausalLM
from emu3.modeling.vision import Emu3VQVAE

OLD = {"model.text_model.": "text_model.model.", "lm_head.": "text_model.lm_head.", "model.vqmodel.": "vqmodel."}


def assert_same_weights(ours, theirs):
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def old_name(name):
    prefix = next(prefix for prefix in OLD if name.startswith(prefix))
    return OLD[prefix] + name.removeprefix(prefix)


@pytest.fixture(scope="module", params=["old", "new"])
def layout(request, pair, tmp_path_factory):
    """A folder with our weights, written without either library, in one of the two layouts of names."""
    folder = tmp_path_factory.mktemp(request.param)
    weights = {
        old_name(name) if request.param == "old" else name: tensor for name, tensor in pair.ours.state_dict().items()
    }
    assert ("text_model.model.layers.0.mlp.up_proj.weight" in weights) == (request.param == "old")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(pair.ours.config.to_dict() | {"dtype": "float32"}))
    return folder


def test_both_layouts_load(pair, layout):
    assert_same_weights(Emu3ForConditionalGeneration.from_pretrained(layout), pair.ours)
    assert_same_weights(ReferenceModel.from_pretrained(layout), pair.ours)


@pytest.mark.parametrize(
    ("saver", "loader"),
    [(ReferenceModel, Emu3ForConditionalGeneration), (Emu3ForConditionalGeneration, ReferenceModel)],
    ids=["theirs to ours", "ours to theirs"],
)
@torch.no_grad()
def test_whole_model(pair, tmp_path, saver, loader):
    source = pair.ours if saver is Emu3ForConditionalGeneration else pair.theirs
    source.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert_same_weights(loaded, source)
    inputs = pair.prompts([2, *pair.shown(4, 3), 5]) | pair.pixels((4, 3))
    torch.testing.assert_close(loaded(**inputs).logits, source(**inputs).logits, atol=1e-5, rtol=0)


def test_what_was_loaded_is_saved_under_the_same_names(pair, layout, tmp_path):
    Emu3ForConditionalGeneration.from_pretrained(layout).save_pretrained(tmp_path)
    names = [load_file(folder / "model.safetensors").keys() for folder in (layout, tmp_path)]
    assert names[0] == names[1]
    assert_same_weights(Emu3ForConditionalGeneration.from_pretrained(tmp_path), pair.ours)
    assert_same_weights(ReferenceModel.from_pretrained(tmp_path), pair.ours)


def test_language_model_of_a_whole_checkpoint(pair, layout):
    """transformers' own class leaves most of it random here."""
    loaded = Emu3ForCausalLM.from_pretrained(layout)
    assert torch.equal(loaded.lm_head.weight, pair.ours.lm_head.weight)
    assert_same_weights(loaded.model, pair.ours.model.text_model)


def test_base_model_of_a_whole_checkpoint(pair, layout):
    assert_same_weights(Emu3Model.from_pretrained(layout), pair.ours.model)
    assert_same_weights(ReferenceBaseModel.from_pretrained(layout), pair.ours.model)


def test_ours_to_ours_with_a_tied_head(build, tmp_path):
    pair = build({"tie_word_embeddings": True}, tie_word_embeddings=True)
    pair.ours.save_pretrained(tmp_path)
    loaded = Emu3ForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert_same_weights(loaded, pair.ours)
    assert_same_weights(ReferenceModel.from_pretrained(tmp_path), pair.ours)


@pytest.mark.parametrize("kind", ["vision", "language", "base"])
def test_parts(pair, tmp_path, kind):
    """The vision tokenizer, the language model and the model without its head, saved and loaded alone."""
    ours, theirs = {
        "vision": (Emu3VQVAE, ReferenceVQVAE),
        "language": (Emu3ForCausalLM, ReferenceTextModel),
        "base": (Emu3Model, ReferenceBaseModel),
    }[kind]
    config = {"vision": pair.ours.config.vq_config, "language": pair.ours.config.text_config, "base": pair.ours.config}
    part = ours(config[kind])
    part.save_pretrained(tmp_path / "ours")
    loaded = theirs.from_pretrained(tmp_path / "ours")
    assert_same_weights(loaded, part)
    loaded.save_pretrained(tmp_path / "theirs")
    assert_same_weights(ours.from_pretrained(tmp_path / "theirs"), part)
