"""Training language models on shards: from scratch, all weights of a checkpoint, adapters."""

import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from emu3.checkpoints.load import load_model, load_processor
from emu3.checkpoints.opened import read_learned
from emu3.configuration import Emu3TextConfig
from emu3.data.samples import Part, Sample
from emu3.data.shards import ShardInfo, write_shard
from emu3.data.tokenize import tokenizer_hash
from emu3.modeling.text import Emu3ForCausalLM
from emu3.options import Draw
from emu3.pipeline import Emu3Pipeline
from emu3.segments import Text, Visual
from emu3.tokenization import train_tokenizer, vocabulary_map
from emu3.training.language import (
    DrawingSettings,
    FinetuneRecipe,
    LanguageRecipe,
    LoraRecipe,
    MixedShards,
    PictureSettings,
    PretrainRecipe,
    captions,
    finetune,
    learning_rates,
    lora,
    make_optimizers,
    open_mixture,
    pretrain,
    share_factors,
)
from emu3.training.state import read_log
from emu3.vocabulary import Vocabulary

pytestmark = pytest.mark.usefixtures("float32")

MODEL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_dropout": 0.0,
}


@pytest.fixture(scope="module")
def pets(tmp_path_factory, tiny_checkpoint):
    """Shards of two drawings and a conversation, of 16 codes."""
    rng = np.random.default_rng(0)
    codes = [rng.integers(16, size=(1, 12, 12)) for _ in range(2)]
    samples = [
        Sample("cat", (Part("prompt", Text("a red cat")), Part("draw", Visual(codes[0])))),
        Sample("dog", (Part("prompt", Text("a big dog")), Part("draw", Visual(codes[1])))),
        Sample("talk", (Part("read", Visual(codes[0])), Part("prompt", Text("what")), Part("answer", Text("a cat")))),
    ]
    folder = tmp_path_factory.mktemp("pets")
    own = tokenizer_hash(load_model(tiny_checkpoint).model.vqmodel)
    info = ShardInfo(tokenizer=own, codebook_size=16, settings="s", source="pets")
    write_shard(folder / "00000.parquet", info, samples)
    return folder


def test_rate():
    """Up over the warm-up, flat, down over the last part."""
    recipe = LanguageRecipe(
        data=(), steps=100, warmup=10, decay_share=0.2, learning_rate=1.0, embedding_learning_rate=2.0
    )
    expected = {0: 0.1, 4: 0.5, 9: 1.0, 50: 1.0, 80: 1.0, 90: 0.5, 95: 0.25, 99: 0.05}
    for step, rate in expected.items():
        assert learning_rates(recipe, step) == pytest.approx([rate, 2 * rate])


def test_visual_ids_start_as_sums_of_their_factors():
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a photo of a red car"], 260, 24)
    vocabulary = Vocabulary.from_map(vocabulary_map(tokenizer))
    model = Emu3ForCausalLM(Emu3TextConfig(**MODEL, vocab_size=len(tokenizer), pad_token_id=vocabulary.pad))
    tables = (model.model.embed_tokens.weight.data, model.lm_head.weight.data)
    before = [table.clone() for table in tables]
    share_factors(model, vocabulary, [4, 3, 2])
    lo, hi = vocabulary.visual_span
    for table, old in zip(tables, before, strict=True):
        assert torch.equal(table[:lo], old[:lo])
        assert torch.equal(table[hi:], old[hi:])
        grid = table[lo:hi].unflatten(0, (4, 3, 2))
        for axis in range(3):  # a step along one factor is the same whatever the others are
            steps = grid.diff(dim=axis).movedim(axis, 0).flatten(1, 2)
            torch.testing.assert_close(steps, steps[:, :1].expand_as(steps), atol=1e-6, rtol=0)
        assert len(table[lo:hi].unique(dim=0)) == 24
        assert float(table[lo:hi].std() / old[lo:hi].std()) == pytest.approx(1.0, abs=0.25)
    with pytest.raises(ValueError, match=r"\[5, 5\] do not multiply to the 24 codes"):
        share_factors(model, vocabulary, [5, 5])


@pytest.mark.parametrize(("name", "kind"), [("muon", torch.optim.Muon), ("adamw", torch.optim.AdamW)])
def test_optimizers_share_the_parameters_out(name, kind):
    model = Emu3ForCausalLM(Emu3TextConfig(**MODEL, vocab_size=30, pad_token_id=0))
    model.model.norm.weight.requires_grad_(False)
    of_matrices, of_rest = make_optimizers(LanguageRecipe(data=(), optimizer=name), model)
    assert type(of_matrices) is kind
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    first, rest = ({names[id(p)] for p in o.param_groups[0]["params"]} for o in (of_matrices, of_rest))
    assert first | rest == set(names.values()) - {"model.norm.weight"}
    assert not first & rest
    assert rest == {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    }


def settings(pets, **values):
    return {
        "data": (MixedShards(path=pets),),
        "steps": 30,
        "length": 600,
        "warmup": 2,
        "report_every": 10,
        "learning_rate": 0.02,
        "null_prompt": 0.0,
        "draw_every": 30,
    } | values


def losses(folder, name):
    return [line[name] for line in read_log(folder) if name in line]


def test_captions_are_what_is_drawn_to_watch(pets, tiny_checkpoint):
    shards = open_mixture(LanguageRecipe(data=(MixedShards(path=pets),)), load_model(tiny_checkpoint).model.vqmodel)
    assert captions(shards) == ["a red cat", "a big dog"]


def test_groups_of_frames_are_as_the_checkpoint_says(tiny_checkpoint, tmp_path):
    model = load_model(tiny_checkpoint)
    size, own = model.config.vq_config.codebook_size, tokenizer_hash(model.model.vqmodel)
    clip = Sample("a", (Part("prompt", Text("a dog")), Part("draw", Visual(np.zeros((2, 3, 3), int), 8.0))))
    for settings in ("", "independent groups, x"):
        path = tmp_path / (settings or "joint")
        info = ShardInfo(tokenizer=own, codebook_size=size, settings=settings, source="a")
        write_shard(path / "00000.parquet", info, [clip])
        recipe = LanguageRecipe(data=(MixedShards(path=path),))
        open_mixture(recipe, model.model.vqmodel, {"independent_groups": bool(settings)})
        with pytest.raises(ValueError, match="set independent_groups to"):
            open_mixture(recipe, model.model.vqmodel, {"independent_groups": not settings})


def test_from_scratch(pets, tiny_checkpoint, tmp_path):
    load_model(tiny_checkpoint).model.vqmodel.save_pretrained(tmp_path / "vision")
    recipe = PretrainRecipe(
        **settings(pets, optimizer="muon", embedding_learning_rate=0.05),
        model=MODEL,
        vision=tmp_path / "vision",
        text_entries=258,
        image_area=2304,
        drawing=DrawingSettings(guidance_scale=1.5),
        image_processor=PictureSettings(min_pixels=64, max_pixels=2304),
    )
    pretrain(recipe, tmp_path / "run")
    assert losses(tmp_path / "run", "draw")[-1] < 0.75 * losses(tmp_path / "run", "draw")[0]
    assert losses(tmp_path / "run", "answer")[-1] < 0.75 * losses(tmp_path / "run", "answer")[0]
    assert (tmp_path / "run" / "drawings" / "step-000030.png").is_file()
    pipeline = Emu3Pipeline.from_pretrained(tmp_path / "run")
    assert pipeline.image("a red cat", seed=0)[0].size == (48, 48)
    assert pipeline.settled(Draw()).guidance_scale == 1.5
    tokenizer = load_processor(tmp_path / "run").tokenizer
    assert tokenizer.encode("a red cat", add_special_tokens=False) != list(b"a red cat")


def test_all_weights_of_a_checkpoint(pets, tiny_checkpoint, tmp_path):
    (tmp_path / "run").mkdir()
    knows = shutil.copytree(tiny_checkpoint, tmp_path / "knows")
    (knows / "words.txt").write_text("cat a")
    finetune(FinetuneRecipe(**settings(pets), checkpoint=str(knows)), tmp_path / "run")
    assert read_learned(tmp_path / "run").words == ("cat", "a", "red", "big", "dog")
    assert losses(tmp_path / "run", "draw")[-1] < 0.75 * losses(tmp_path / "run", "draw")[0]
    before, after = load_model(tiny_checkpoint), load_model(tmp_path / "run")
    changed = {name for name, each in after.state_dict().items() if not torch.equal(each, before.state_dict()[name])}
    assert changed
    assert not [name for name in changed if "vqmodel" in name]
    assert load_processor(tmp_path / "run").image_area == load_processor(tiny_checkpoint).image_area


def test_only_the_asked_task_is_trained(pets, tiny_checkpoint, tmp_path):
    recipe = FinetuneRecipe(**settings(pets, task="chat", steps=10), checkpoint=str(tiny_checkpoint))
    finetune(recipe, tmp_path)
    assert losses(tmp_path, "answer")
    assert not losses(tmp_path, "draw")
    assert not (tmp_path / "drawings").exists()


def test_adapters(pets, tiny_checkpoint, tmp_path):
    """They learn; the checkpoint stays as it is; what is left loads by name, as PEFT would load it."""
    recipe = LoraRecipe(**settings(pets, learning_rate=0.05), checkpoint=str(tiny_checkpoint), rank=4)
    lora(recipe, tmp_path)
    assert losses(tmp_path, "draw")[-1] < 0.95 * losses(tmp_path, "draw")[0]
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert all("text_model.layers." in name and "lora_" in name for name in weights)
    assert len(weights) == 2 * 7 * load_model(tiny_checkpoint).config.text_config.num_hidden_layers
    merged = load_model(tmp_path)
    by_peft = PeftModel.from_pretrained(load_model(tiny_checkpoint), tmp_path).merge_and_unload()
    for name, weight in by_peft.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], weight)
    assert not {"README.md", "words.txt"} & {path.name for path in tmp_path.iterdir()}
