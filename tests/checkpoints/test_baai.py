"""What the original layout's weights compute is what they compute after conversion."""

import json
import shutil
from pathlib import Path

import pytest
import tiktoken
import torch
from PIL import Image
from tiktoken.load import load_tiktoken_bpe
from transformers import Emu3ForConditionalGeneration as ReferenceModel
from transformers import PreTrainedTokenizerBase

from emu3.checkpoints.baai import documented_config, original_configs, original_tensor, read_tokenizer
from emu3.checkpoints.convert import convert
from emu3.checkpoints.load import load_model, load_processor
from emu3.configuration import Emu3Config
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.tokenization import RELEASED_TOKENS, SPLIT_PATTERN


@pytest.fixture(scope="module", params=["documented", "legacy"])
def converted(original, request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / request.param
    convert(original.folder, target, to=request.param)
    return target


@pytest.mark.parametrize(
    ("documented", "expected"),
    [
        ("lm_head.weight", ("language", "lm_head.weight", (8, 6))),
        ("model.text_model.norm.weight", ("language", "model.norm.weight", (8, 6))),
        (
            "model.text_model.layers.3.self_attn.q_proj.weight",
            ("language", "model.layers.3.self_attn.q_proj.weight", (8, 6)),
        ),
        ("model.vqmodel.quantize.embedding.weight", ("vision", "quantize.embedding.weight", (8, 6))),
        (
            "model.vqmodel.encoder.down_block.down.3.attn.1.q_proj.weight",
            ("vision", "encoder.down.3.attn.1.q.weight", (8, 6, 1, 1)),
        ),
        (
            "model.vqmodel.decoder.up_block.up.0.attn_norms.2.conv_y.bias",
            ("vision", "decoder.up.0.attn.2.norm.conv_y.bias", (8, 6)),
        ),
        (
            "model.vqmodel.decoder.middle_block.attn_1.out_proj.weight",
            ("vision", "decoder.mid.attn_1.proj_out.weight", (8, 6, 1, 1)),
        ),
        ("model.vqmodel.encoder.middle_block.attn_norm.weight", ("vision", "encoder.mid.attn_1.norm.weight", (8, 6))),
        (
            "model.vqmodel.encoder.down_block.down.0.downsample.conv.bias",
            ("vision", "encoder.down.0.downsample.conv.bias", (8, 6)),
        ),
    ],
)
def test_names_and_shapes(documented: str, expected: tuple[str, str, tuple[int, ...]]) -> None:
    assert original_tensor(documented, (8, 6)) == expected


def test_every_tensor_of_the_original_is_named(original, converted: Path) -> None:
    """The names come from modules written after the original, not from the rules."""
    expected = {("language", name, tuple(t.shape)) for name, t in original.language.state_dict().items()}
    expected |= {("vision", name, tuple(t.shape)) for name, t in original.vision.state_dict().items()}
    ours = load_model(converted).state_dict()
    assert {original_tensor(name, tuple(tensor.shape)) for name, tensor in ours.items()} == expected


def test_every_tensor_of_the_released_model_has_its_own_name() -> None:
    with torch.device("meta"):
        tensors = Emu3ForConditionalGeneration(Emu3Config()).state_dict()
    originals = [original_tensor(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    assert len({(part, name) for part, name, _ in originals}) == 786
    reshaped = [
        name for (_, name, shape), tensor in zip(originals, tensors.values(), strict=True) if shape != tensor.shape
    ]
    assert len(reshaped) == 7 * 4  # three attention blocks of the encoder and four of the decoder
    assert not [name for part, name, _ in originals if part == "vision" and ("_proj" in name or "_block." in name)]


@torch.no_grad()
def test_logits_are_those_of_the_original_language_model(original, converted: Path) -> None:
    ids = torch.randint(0, 262, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = original.language(ids).logits
    for model in (load_model(converted), ReferenceModel.from_pretrained(converted).eval()):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_codes_and_pixels_are_those_of_the_original_vision_tokenizer(original, converted: Path) -> None:
    codes = original.vision.encode(original.pixels)
    assert len(codes.unique()) > 8
    sizes = torch.tensor([original.pixels.shape[-2:]] * len(original.pixels))
    for model in (load_model(converted), ReferenceModel.from_pretrained(converted).eval()):
        vision = model.model.vqmodel
        found = vision.encode(original.pixels, sizes)
        assert torch.equal(torch.stack(list(getattr(found, "image_tokens", found))), codes)
        torch.testing.assert_close(vision.decode(codes), original.vision.decode(codes), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_picture_is_read_as_by_transformers(converted: Path) -> None:
    processor = load_processor(converted)
    picture = Image.effect_noise((16, 12), 64).convert("RGB")
    inputs = processor(images=[picture], text=["the <image> is"], return_tensors="pt")
    ours, theirs = load_model(converted), ReferenceModel.from_pretrained(converted).eval()
    assert (inputs["input_ids"] == ours.model.vocabulary.image_placeholder).sum() == 6 * (8 + 1)
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_text_is_cut_as_by_the_original(original, converted: Path) -> None:
    ranks = load_tiktoken_bpe(str(original.parts[0] / "emu3.tiktoken"))
    visual = (original.parts[0] / "emu3_vision_tokens.txt").read_text().split("\n")[:-1]
    special = {surface: len(ranks) + n for n, surface in enumerate([*RELEASED_TOKENS, *visual])}
    reference = tiktoken.Encoding("tiny", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    tokenizer = load_processor(converted).tokenizer
    for text in (
        "the thesis   of\n\nthe heath",
        "90*90",
        "<|image start|>9*9<|visual token 000015|><|extra_204|>\u00e9",
    ):
        assert tokenizer(text)["input_ids"] == reference.encode(text, allowed_special="all")
    assert len(tokenizer("90*90")["input_ids"]) == 5
    assert tokenizer.image_token_id == special["<|extra_0|>"]


def test_settings_are_those_of_the_original(converted: Path) -> None:
    processor, config = load_processor(converted), load_model(converted).config
    pictures = processor.image_processor
    assert (processor.image_area, pictures.spatial_factor, pictures.max_pixels) == (256, 2, 256)
    assert pictures.image_mean == [0.5] * 3
    assert (config.text_config.max_position_embeddings, config.text_config.rope_parameters["rope_theta"]) == (256, 5000)
    assert (config.vq_config.hidden_size, config.vq_config.num_attention_heads) == (64, 1)
    generation = json.loads((converted / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (468, 469)


def test_remote_code_is_neither_run_nor_passed_on(original, converted: Path, tmp_path: Path) -> None:
    """Either file of code in the source ends the process where it is imported."""
    convert(converted, tmp_path / "back", to="baai")
    written = [file for folder in (converted, tmp_path / "back") for file in folder.rglob("*") if file.is_file()]
    assert not [file for file in written if file.suffix == ".py"]
    assert not [file for file in written if file.suffix == ".json" and "auto_map" in file.read_text()]


def test_the_way_back_gives_the_original_settings(original, converted: Path, tmp_path: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    own = {"drawing": {"guidance_scale": 2.0}, "clips": {"independent_groups": True}}
    shutil.copytree(converted, tmp_path / "own")
    (tmp_path / "own" / "config.json").write_text(json.dumps(config | own))
    convert(tmp_path / "own", tmp_path / "recommends", to="baai")
    assert json.loads((tmp_path / "recommends" / "language" / "config.json").read_text()).items() >= own.items()

    convert(converted, tmp_path / "back", to="baai")
    for part in ("language", "vision"):
        before = json.loads((original.folder / part / "config.json").read_text())
        after = json.loads((tmp_path / "back" / part / "config.json").read_text())
        assert after == {key: value for key, value in before.items() if key != "auto_map"}
    for file in ("emu3.tiktoken", "emu3_vision_tokens.txt"):
        after_file = tmp_path / "back" / "language" / file
        assert after_file.read_bytes() == (original.parts[0] / file).read_bytes()
    settings = json.loads((tmp_path / "back" / "vision" / "preprocessor_config.json").read_text())
    assert (settings["spatial_factor"], settings["max_pixels"], settings["image_mean"]) == (2, 256, [0.5] * 3)


def read(original) -> tuple[dict, dict, PreTrainedTokenizerBase]:
    language, vision = (json.loads((folder / "config.json").read_text()) for folder in original.parts)
    return language, vision, read_tokenizer(original.parts[0])


def test_ids_must_be_those_of_the_tokenizer(original) -> None:
    language, vision, tokenizer = read(original)
    with pytest.raises(ValueError, match=r"config\.json says eol_token_id=9, the tokenizer 465"):
        documented_config(language | {"eol_token_id": 9}, vision, tokenizer)
    with pytest.raises(ValueError, match=r"the tokenizer has 489 ids, but config\.json says vocab_size=400"):
        documented_config(language | {"vocab_size": 400}, vision, tokenizer)


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 4.0}])
def test_rope_scaling_is_kept(original, scaling: dict) -> None:
    language, vision, tokenizer = read(original)
    config = documented_config(language | {"rope_scaling": scaling}, vision, tokenizer)
    rope = config.text_config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == (scaling["type"], scaling["factor"], 5000.0)
    back = original_configs(config, 256)["language"]
    assert (back["rope_scaling"], back["rope_theta"]) == (scaling, 5000.0)


def test_what_the_original_layout_cannot_hold_is_refused(original) -> None:
    language, vision, tokenizer = read(original)
    config = documented_config(language, vision, tokenizer)
    config.text_config.mlp_bias = True
    config.vq_config.num_attention_heads = 2
    with pytest.raises(ValueError, match=r"no place for mlp_bias=True, vq_config\.num_attention_heads=2"):
        original_configs(config, 256)


def test_a_tokenizer_that_is_not_there_is_refused(original, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original.folder, tmp_path / "copy"))
    (folder / "language" / "emu3.tiktoken").unlink()
    with pytest.raises(ValueError, match=r"holds no emu3\.tiktoken"):
        convert(folder, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
