"""Saving and loading as `PreTrainedModel` documents it: shards, precisions, devices, offloading, another vocabulary."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import flex_attention
from transformers import Emu3ForConditionalGeneration as ReferenceModel

from emu3.checkpoints import NANO
from emu3.checkpoints.load import load_model
from emu3.modeling.multimodal import Emu3ForConditionalGeneration, Emu3Model
from emu3.modeling.text import Emu3ForCausalLM, Emu3TextModel
from emu3.modeling.vision import Emu3VQVAE

IDS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def weights(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "num_batches_tracked" not in name}


def assert_same(a, b):
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@torch.no_grad()
def test_sharded(model, shown, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    stored = {name for shard in shards for name in load_file(shard)}
    assert stored == set(index["weight_map"]) == set(model.state_dict())
    for kind in (Emu3ForConditionalGeneration, ReferenceModel):
        assert_same(kind.from_pretrained(tmp_path), model)
    assert torch.equal(Emu3ForConditionalGeneration.from_pretrained(tmp_path)(**shown).logits, model(**shown).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float16, "auto", None], ids=str)
def test_dtype(folder, model, dtype):
    """The vision tokenizer stays in float32, whatever the language model is loaded in."""
    loaded = Emu3ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    expected = {"bfloat16": torch.bfloat16, "auto": torch.float32, None: torch.float32}.get(dtype, dtype)
    assert loaded.dtype == loaded.lm_head.weight.dtype == expected
    assert loaded.model.vqmodel.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(expected))


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, torch.device("cpu"), "sequential"], ids=str)
def test_device_map(folder, model, shown, device_map):
    loaded = Emu3ForConditionalGeneration.from_pretrained(folder, device_map=device_map)
    assert loaded.device.type == "cpu"
    assert_same(loaded, model)
    assert torch.equal(loaded(**shown).logits, model(**shown).logits)


PLACES = {
    "model.text_model.embed_tokens": "cpu",
    "model.text_model.layers.0": "cpu",
    "model.text_model.layers.1": "disk",
    "model.text_model.norm": "cpu",
    "model.text_model.rotary_emb": "cpu",
    "model.vqmodel": "disk",
    "lm_head": "disk",
}


def assert_offloaded_works(loaded, model, shown):
    """Logits of words and of a picture, what is written, and the picture that tokens decode to."""
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert torch.equal(loaded(**shown).logits, model(**shown).logits)
    written = [each.generate(**shown, max_new_tokens=5, do_sample=False).tolist() for each in (loaded, model)]
    assert written[0] == written[1]
    codes = torch.arange(12).view(1, 3, 4)
    decoded = [each.model.vqmodel.decode(codes) for each in (loaded, model)]
    torch.testing.assert_close(*decoded)


@torch.no_grad()
def test_disk_offload(folder, model, shown, tmp_path):
    loaded = Emu3ForConditionalGeneration.from_pretrained(
        folder, device_map=PLACES, offload_folder=tmp_path / "offloaded"
    )
    away = {name for name, parameter in loaded.named_parameters() if parameter.device.type == "meta"}
    places = tuple(place for place, device in PLACES.items() if device == "disk")
    assert away == {name for name, _ in loaded.named_parameters() if name.startswith(places)}
    assert_offloaded_works(loaded, model, shown)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # older releases do not see the offloading
def test_cpu_offload(folder, model, shown):
    accelerate = pytest.importorskip("accelerate")
    loaded = accelerate.cpu_offload(Emu3ForConditionalGeneration.from_pretrained(folder), torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in loaded.parameters())
    assert_offloaded_works(loaded, model, shown)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, which transformers asks by old names
def test_attn_implementation(folder, model, attention, monkeypatch):
    loaded = Emu3ForConditionalGeneration.from_pretrained(folder, attn_implementation=attention)
    assert loaded.config._attn_implementation == attention
    # Compiling flex attention takes a minute; its uncompiled form computes the same.
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    with torch.compiler.set_stance("force_eager"):
        logits = loaded(input_ids=IDS).logits
    torch.testing.assert_close(logits, model(input_ids=IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [Emu3ForConditionalGeneration, Emu3Model, Emu3ForCausalLM])
def test_flash_attention_that_is_not_installed(folder, kind):
    with pytest.raises((ImportError, ValueError), match=r"(?i)flash.?attention.*not.*install|install.*flash"):
        kind.from_pretrained(folder, attn_implementation="flash_attention_2")


@torch.no_grad()
@pytest.mark.parametrize("kind", [Emu3ForConditionalGeneration, Emu3ForCausalLM])
@pytest.mark.parametrize("change", [7, -3])
def test_resize_token_embeddings(folder, tmp_path, kind, change):
    model = kind.from_pretrained(folder)
    before = model.config.get_text_config().vocab_size
    logits = model(input_ids=IDS).logits
    size, kept = before + change, min(before, before + change)
    embedding = model.resize_token_embeddings(size)
    assert embedding is model.get_input_embeddings()
    assert embedding.weight.shape == model.get_output_embeddings().weight.shape == (size, 32)
    assert model.config.get_text_config().vocab_size == size
    output = model(input_ids=IDS, labels=torch.full_like(IDS, size - 1))
    assert output.logits.shape[-1] == size
    assert torch.isfinite(output.loss)
    torch.testing.assert_close(output.logits[..., :kept], logits[..., :kept])
    model.save_pretrained(tmp_path / "resized")
    assert_same(kind.from_pretrained(tmp_path / "resized"), model)


def test_resizing_equals_transformers(folder):
    models = [kind.from_pretrained(folder) for kind in (Emu3ForConditionalGeneration, ReferenceModel)]
    for model in models:
        torch.manual_seed(0)
        model.resize_token_embeddings(200, mean_resizing=False, pad_to_multiple_of=64)
    assert_same(*models)
    assert models[0].config.text_config.vocab_size == models[1].config.text_config.vocab_size == 256


@pytest.mark.parametrize("kind", [Emu3Model, Emu3ForCausalLM, Emu3TextModel, Emu3VQVAE])
def test_a_part_of_a_whole_checkpoint(folder, model, kind):
    """Each documented class finds its own weights; none is left as it was drawn."""
    part = {
        Emu3Model: model.model,
        Emu3ForCausalLM: nn.ModuleDict({"model": model.model.text_model, "lm_head": model.lm_head}),
        Emu3TextModel: model.model.text_model,
        Emu3VQVAE: model.model.vqmodel,
    }[kind]
    assert_same(kind.from_pretrained(folder), part)


@pytest.mark.parametrize("kind", [Emu3ForCausalLM, Emu3TextModel, Emu3VQVAE, Emu3Model])
def test_a_part_of_a_whole_checkpoint_loads_without_surprise(folder, kind):
    """The rest of the checkpoint is not reported; in a whole model, what does not belong is."""
    _, found = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found


def test_what_does_not_belong_to_a_whole_model_is_reported(folder, model, tmp_path):
    extra = {"model.text_model.layers.9.mlp.up_proj.weight": torch.ones(2), "model.vqmodel.more.weight": torch.ones(2)}
    model.save_pretrained(tmp_path, state_dict=model.state_dict() | extra)
    _, found = Emu3ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert set(found["unexpected_keys"]) == set(extra)


def test_what_is_loaded_in_16_bits_and_saved_loads_again(tmp_path):
    """Also where transformers saved the counters of the vision tokenizer as floats."""
    Emu3ForConditionalGeneration.from_pretrained(NANO, dtype=torch.bfloat16).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    counters = [name for name in saved if name.endswith("num_batches_tracked")]
    assert counters and all(saved[name].dtype == torch.int64 for name in counters)
    save_file(saved | {name: saved[name].float() for name in counters}, tmp_path / "model.safetensors")
    expected = load_model(NANO, dtype=torch.bfloat16).state_dict()
    for name, tensor in load_model(tmp_path).state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
