"""Adapters of PEFT: loaded as PEFT merges them, converted, quantized, told of, and refused where they do not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from emu3 import Emu3ForConditionalGeneration, Emu3Pipeline, cli
from emu3.checkpoints import NANO, resolve
from emu3.checkpoints.convert import convert
from emu3.checkpoints.info import AdapterInfo, inspect
from emu3.checkpoints.load import load_model, load_processor
from emu3.checkpoints.memory import memory_needed
from emu3.checkpoints.opened import open_checkpoint
from emu3.checkpoints.quantize import quantize

# PEFT warns of tied and of targeted embeddings, and asks models for what transformers calls otherwise now.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning")]

IDS = torch.arange(30, 60)[None]
PROJECTION = "model.text_model.layers.0.mlp.up_proj.weight"
TEXT = r".*text_model.*_proj"
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.\d+\.mlp\.up_proj": 5},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 3, ".*down_proj": 20},
    },
    "whole modules": {"modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "by names, in both networks": {"target_modules": ["q_proj", "up_proj"]},
    "all layers": {"target_modules": "all-linear", "layers_to_transform": None},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "lengths apart": {"use_dora": True},
}


def train(base: Path, folder: Path, **settings: Any) -> torch.nn.Module:
    """Write an adapter of random numbers to `folder`; return PEFT's own model, in which it stands beside the base."""
    from peft import LoraConfig, get_peft_model

    model = Emu3ForConditionalGeneration.from_pretrained(base)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TEXT, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = get_peft_model(model, config).eval()
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return adapted


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("base") / "tiny"))


@pytest.fixture(scope="module")
def plain(base: Path) -> Path:
    """An adapter in the folder `plain` beside its base."""
    train(base, base.parent / "plain")
    return base.parent / "plain"


@pytest.fixture
def adapter(plain: Path, base: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    folder = Path(shutil.copytree(plain, tmp_path / "adapter"))
    say(folder, base_model_name_or_path=str(base))
    return folder


@pytest.fixture(scope="module")
def on_nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "chatty"
    train(NANO, folder, modules_to_save=["lm_head"])
    say(folder, base_model_name_or_path="nano")
    (folder / "words.txt").write_text("purple cat")
    return folder


def say(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def edit(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models have the same weights, bit for bit."""
    ours, theirs = (dict([*model.named_parameters(), *model.named_buffers()]) for model in (one, other))
    assert ours.keys() == theirs.keys()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_it_is_merged_as_peft_does(base: Path, tmp_path: Path, name: str) -> None:
    from peft import PeftModel

    adapted = train(base, tmp_path / "out", **CASES[name])
    fresh = Emu3ForConditionalGeneration.from_pretrained(base)
    merged = PeftModel.from_pretrained(fresh, tmp_path / "out").merge_and_unload()
    ours = load_model(tmp_path / "out")
    assert same(ours, merged) and not same(ours, load_model(base))
    torch.testing.assert_close(ours(input_ids=IDS).logits, adapted(input_ids=IDS).logits, rtol=0, atol=1e-4)
    assert not any(parameter.is_inference() for parameter in ours.parameters())


@pytest.mark.parametrize(
    ("settings", "is_tied"),
    [
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, False),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({}, True),
    ],
    ids=str,
)
@torch.no_grad()
def test_of_tied_embedding_and_head_each_is_what_was_trained(base: Path, tmp_path: Path, settings, is_tied) -> None:
    tied = Path(shutil.copytree(base, tmp_path / "tied"))
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(tied / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    adapted = train(tied, tmp_path / "out", **settings)
    ours = load_model(tmp_path / "out")
    assert (ours.lm_head.weight is ours.model.text_model.embed_tokens.weight) == is_tied
    torch.testing.assert_close(ours(input_ids=IDS).logits, adapted(input_ids=IDS).logits, rtol=0, atol=1e-4)
    convert(tmp_path / "out", tmp_path / "merged")
    assert same(load_model(tmp_path / "merged"), ours)


def test_it_is_merged_in_float32_and_rounded_once(plain: Path) -> None:
    exact, rounded = load_model(plain), load_model(plain, dtype=torch.bfloat16)
    for name, parameter in rounded.named_parameters():
        expected = exact.get_parameter(name)
        assert torch.equal(parameter, expected if "vqmodel" in name else expected.bfloat16())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells which file is mapped where")
def test_what_it_does_not_touch_stays_in_the_file_of_the_base(plain: Path, base: Path) -> None:
    model = load_model(plain)
    mapped = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(base) in line
    ]
    places = [range(int(start, 16), int(end, 16)) for start, end in mapped]
    copied = {name for name, each in model.named_parameters() if not any(each.data_ptr() in place for place in places)}
    adapter = open_checkpoint(plain).adapter
    assert adapter is not None and copied == set(adapter.updates)


def test_it_is_merged_before_it_is_quantized(plain: Path, base: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "merged")
    one, other = (load_model(folder, int8=True) for folder in (plain, tmp_path / "merged"))
    assert same(one, other) and not same(one, load_model(base, int8=True))


def test_transformers_may_spread_the_layers(plain: Path, base: Path, tmp_path: Path) -> None:
    assert same(load_model(plain, device_map={"": "cpu"}), load_model(plain))
    train(base, tmp_path / "whole", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"replaces whole tensors .* `emu3 convert .*whole TARGET`"):
        load_model(tmp_path / "whole", device_map={"": "cpu"})


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_conversion_keeps_what_loading_gives(base: Path, tmp_path: Path, stored: torch.dtype) -> None:
    """Though it rounds to the dtype of the checkpoint, as loading does."""
    small = Path(shutil.copytree(base, tmp_path / "small"))
    tensors = load_file(small / "model.safetensors")
    kept = {name: each.to(stored) if each.is_floating_point() else each for name, each in tensors.items()}
    save_file(kept, small / "model.safetensors", metadata={"format": "pt"})
    train(base, tmp_path / "out", modules_to_save=["lm_head"])
    say(tmp_path / "out", base_model_name_or_path=str(small))
    for said in ("float32", "bfloat16", None):
        config = json.loads((small / "config.json").read_text())
        (small / "config.json").write_text(json.dumps(config | {"dtype": said}))
        folder = tmp_path / f"merged in {said}"
        report = convert(tmp_path / "out", folder)
        # A CPU has no float16, so that it rounds a second time.
        dtype = stored if said is None else "auto"
        loaded, merged = (load_model(each, dtype=dtype) for each in (tmp_path / "out", folder))
        assert same(loaded, merged) and loaded.lm_head.weight.dtype == merged.lm_head.weight.dtype
        assert (report.merged, report.source_layout, report.target_layout) == (15, "documented", "documented")
        headers = open_checkpoint(folder).headers
        by_torch = {torch.float16: "F16", torch.bfloat16: "BF16"}
        expected = {"float32": "F32", "bfloat16": "BF16", None: by_torch[stored]}[said]
        assert headers["lm_head.weight"].dtype == headers[PROJECTION].dtype == expected
        assert report.bytes == sum(header.bytes for header in headers.values())


def test_the_legacy_layout_is_written_and_is_a_base(plain: Path, base: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "once", to="legacy")
    assert same(load_model(tmp_path / "once"), load_model(plain))
    adapter = Path(shutil.copytree(plain, tmp_path / "again"))
    say(adapter, base_model_name_or_path="../once")
    convert(adapter, tmp_path / "twice")
    zero, one, two = (load_model(each).get_parameter(PROJECTION) for each in (base, tmp_path / "once", adapter))
    torch.testing.assert_close(two - one, one - zero, rtol=0, atol=1e-6)
    assert same(load_model(tmp_path / "twice"), load_model(adapter))


def test_the_original_layout_is_written(original: Any, tmp_path: Path) -> None:
    """With the layers of the vision tokenizer, which have other shapes there."""
    convert(original.folder, tmp_path / "base")
    train(tmp_path / "base", tmp_path / "out", target_modules=["q_proj", "up_proj"])
    convert(tmp_path / "out", tmp_path / "written", to="baai")
    convert(tmp_path / "written", tmp_path / "back")
    assert same(load_model(tmp_path / "back"), load_model(tmp_path / "out"))


def test_quantize_merges_first(plain: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "merged")
    for folder in (plain, tmp_path / "merged"):
        quantize(folder, tmp_path / f"{folder.name}-8")
    one, other = (
        load_file(tmp_path / f"{name}-8" / "model-00001-of-00001.safetensors") for name in ("plain", "merged")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "plain-8" / "adapter_config.json").exists()
    adapter = Path(shutil.copytree(plain, tmp_path / "adapter"))
    say(adapter, base_model_name_or_path=str(tmp_path / "plain-8"))
    with pytest.raises(ValueError, match=r"is quantized, and a merge would round it again; name the checkpoint"):
        load_model(adapter)


def test_the_base_is_found_beside_the_adapter_or_as_given(plain, base, tmp_path, monkeypatch) -> None:
    expected = load_model(plain)
    folder = Path(shutil.copytree(plain, tmp_path / "run" / "adapter"))
    shutil.copytree(base, tmp_path / "run" / "model")
    say(folder, base_model_name_or_path="../model")
    assert same(load_model(folder), expected)
    monkeypatch.chdir(tmp_path)
    say(folder, base_model_name_or_path="run/model")
    assert same(load_model(folder), expected)


def test_a_hub_id_is_fetched_with_its_base(plain: Path, base: Path, tmp_path: Path, monkeypatch) -> None:
    adapter = Path(shutil.copytree(plain, tmp_path / "adapter"))
    say(adapter, base_model_name_or_path="owner/base")
    asked = []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, not options["local_files_only"]))
        return str({"owner/base": base, "owner/adapter": adapter}[name])

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert resolve("owner/adapter", download=True) == adapter
    assert asked == [("owner/adapter", True), ("owner/base", True)]
    assert same(load_model(adapter), load_model(plain))
    assert ("owner/base", True) not in asked[2:]
    say(adapter, revision="abc")
    with pytest.raises(ValueError, match="names the revision 'abc' of its base; download that to a folder"):
        load_model(adapter)


def test_what_is_beside_the_weights_comes_from_the_base(on_nano: Path, tmp_path: Path) -> None:
    pipeline = Emu3Pipeline.from_pretrained(on_nano)
    assert pipeline.model.name_or_path == str(on_nano)
    assert pipeline.processor.image_area == load_processor(NANO).image_area
    assert pipeline.draft is not None and Emu3Pipeline.from_pretrained(on_nano, draft=False).draft is None
    pictures = [
        Emu3Pipeline.from_pretrained(on_nano, draft=draft).image("a cat", height=16, width=16, temperature=0)[0]
        for draft in (True, False)
    ]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    convert(on_nano, tmp_path / "merged")
    written = {str(file.relative_to(tmp_path / "merged")) for file in (tmp_path / "merged").rglob("*")}
    assert written == {str(file.relative_to(NANO)) for file in NANO.rglob("*")}
    assert (tmp_path / "merged" / "words.txt").read_text() == "purple cat"
    assert Emu3Pipeline.from_pretrained(tmp_path / "merged").draft is not None
    with pytest.raises(ValueError, match="this checkpoint does not draw pictures"):
        config = json.loads((NANO / "config.json").read_text())
        shutil.copytree(NANO, tmp_path / "reader")
        (tmp_path / "reader" / "config.json").write_text(json.dumps(config | {"abilities": ["read"]}))
        adapter = Path(shutil.copytree(on_nano, tmp_path / "out"))
        say(adapter, base_model_name_or_path=str(tmp_path / "reader"))
        Emu3Pipeline.from_pretrained(adapter).image("a cat")


def test_an_own_processor_comes_first(adapter: Path, tmp_path: Path) -> None:
    processor = load_processor(adapter)
    processor.image_area = 32 * 32
    processor.save_pretrained(adapter)
    assert load_processor(adapter).image_area == 32 * 32
    convert(adapter, tmp_path / "merged")
    assert load_processor(tmp_path / "merged").image_area == 32 * 32
    for file in adapter.glob("*processor_config.json"):
        file.unlink()  # what a trainer of language models leaves: the tokenizer
    assert load_processor(adapter).image_area == 48 * 48


def test_info_tells_of_the_adapter_and_of_its_base(on_nano: Path, plain: Path, capsys) -> None:
    info, nano = inspect(on_nano), inspect(NANO)
    with safe_open(on_nano / "adapter_model.safetensors", framework="pt") as file:
        count = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    own = sum(file.stat().st_size for file in on_nano.iterdir())
    assert info.adapter == AdapterInfo("nano", (4,), 42, 1, count, own)
    assert (info.path, info.parameters, info.abilities) == (str(on_nano), nano.parameters, nano.abilities)
    assert info.tokenizer_files == nano.tokenizer_files and info.bytes_on_disk == nano.bytes_on_disk + own
    assert info.draft_parameters == nano.draft_parameters == 727_296 and nano.adapter is None
    assert memory_needed(on_nano) == memory_needed(NANO)
    cli.app(["info", str(on_nano)], standalone_mode=False)
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:3])
    assert rows["adapter"].startswith(f"LoRA of rank 4 on 42 matrices and 1 tensor replaced: {count:,} parameters")
    assert rows["base"] == "nano"
    assert inspect(plain).draft_parameters is None
    cli.app(["info", str(plain), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["adapter"]["ranks"] == [4]


def test_the_shell_reads_it_by_name(on_nano: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(on_nano.parent)
    picture = tmp_path / "cat.png"
    cli.app(
        ["image", "a photo of a cat", "--model", "chatty", "-o", str(picture), "--seed", "1"], standalone_mode=False
    )
    drawn = Image.open(picture)
    assert json.loads(drawn.info["emu3"])["model"] == "chatty"
    assert drawn.tobytes() == Emu3Pipeline.from_pretrained("chatty").image("a photo of a cat", seed=1)[0].tobytes()
    assert drawn.tobytes() != Emu3Pipeline.from_pretrained("nano").image("a photo of a cat", seed=1)[0].tobytes()
    capsys.readouterr()
    cli.app(["convert", "chatty", str(tmp_path / "merged")], standalone_mode=False)
    assert "documented to documented: 322 tensors, 0 renamed, 0 reshaped, 43 merged" in capsys.readouterr().out
    again = Emu3Pipeline.from_pretrained(tmp_path / "merged").image("a photo of a cat", seed=1)[0]
    assert drawn.tobytes() == again.tobytes()


def _other(name: str, value: Any) -> Any:
    return lambda folder, base: say(folder, **{name: value})


def _rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def _overflow(folder: Path, base: Path) -> None:
    edit(folder, lambda tensors: tensors | {UP: tensors[UP] * 1e37})
    say(folder, lora_alpha=1e9)


UP = "base_model.model.model.text_model.layers.0.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_other("base_model_name_or_path", None), "names no base; write the folder or hub id"),
        (_other("base_model_name_or_path", "no-such"), "the base 'no-such' .* cannot be had: unknown checkpoint"),
        (_other("base_model_name_or_path", "a/b"), r"the base 'a/b' .* cannot be had: .*emu3 pull a/b"),
        (_other("base_model_name_or_path", "x" * 5000), "cannot be had"),
        (_other("base_model_name_or_path", "~nobody-here/x"), "cannot be had"),
        (_other("base_model_name_or_path", "."), "is an adapter itself; merge that one first"),
        (_other("base_model_name_or_path", "nano"), r"does not fit its base .* is \[\d+, \d+\] there and \[.*\] here"),
        (_other("peft_type", "LOKR"), "peft_type='LOKR', and only LORA is read; merge it into its base with PEFT"),
        (_other("r", 0), "says r=0, which must be a whole number from 1"),
        (_other("r", 3), r"A is \[4, \d+\] and B \[\d+, 4\] of .*, and adapter_config.json says rank 3"),
        (_other("lora_alpha", "high"), "lora_alpha='high', which must be a number"),
        (_other("rank_pattern", {"q_proj": 0}), "rank_pattern=.* an object whose values are each a whole number"),
        (_other("alpha_pattern", {"(a+)+": 1}), "too intricate; write names of modules"),
        (_other("alpha_pattern", {"[": 1}), "which is no pattern of names"),
        (_other("init_lora_weights", "pissa"), "its base is not the one that was trained on"),
        (_other("trainable_token_indices", [1]), r"trainable_token_indices=\[1\], which is not read here"),
        (_other("some_later_invention", {"on": True}), "some_later_invention=.*, which is not read here"),
        (_other("use_dora", True), "use_dora=True, which adapter_model.safetensors contradicts"),
        (
            _other("target_modules", ["up_proj", "conv1"]),
            "holds nothing for model.vqmodel.*conv1.weight, which target_m",
        ),
        (
            lambda folder, base: shutil.copy(base / "model.safetensors", folder),
            "holds model.safetensors and adapter_config.json; move the adapter to a folder of its own",
        ),
        (lambda folder, base: (folder / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (
            lambda folder, base: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
            "no pickle is read; save the adapter again",
        ),
        (lambda folder, base: (folder / "adapter_model.safetensors").write_bytes(b"{}"), "is damaged, cut short or no"),
        (lambda folder, base: edit(folder, lambda _: {}), "holds no tensor"),
        (lambda folder, base: edit(folder, lambda t: {n: x for n, x in t.items() if n != UP}), "holds no B of"),
        (
            lambda folder, base: edit(folder, lambda t: _rename(t, "text_model.", "")),
            r"which has no model\.layers\.0.*; name the base that it was trained on",
        ),
        (
            lambda folder, base: edit(folder, lambda t: t | {UP.replace("B.weight", "B.bias"): torch.zeros(48)}),
            "which has no .*lora_B.bias",
        ),
        (lambda folder, base: edit(folder, lambda t: _rename(t, "base_model.", "")), "which is no tensor of a LoRA"),
        (lambda folder, base: edit(folder, lambda t: t | {UP: t[UP].int()}), "as I32, which is no floating-point"),
        (lambda folder, base: edit(folder, lambda t: t | {UP: t[UP][None]}), "which is no adapter of a matrix"),
        (lambda folder, base: edit(folder, lambda t: t | {UP: t[UP] * torch.nan}), "NaN or infinite .*; train the ada"),
        (_overflow, "NaN or infinite values as torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(adapter: Path, base: Path, damage: Any, complaint: str) -> None:
    damage(adapter, base)
    with pytest.raises(ValueError, match=complaint):
        load_model(adapter)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=50)
@given(data=st.data())
def test_damaged_settings_load_or_are_refused(plain: Path, tmp_path_factory: pytest.TempPathFactory, data) -> None:
    config = json.loads((plain / "adapter_config.json").read_text())
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(config)), ANYTHING, min_size=1, max_size=2))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "adapter_model.safetensors").symlink_to(plain / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config | changed))
    try:
        opened = open_checkpoint(folder)
    except ValueError:
        return
    assert opened.adapter is not None and opened.adapter.ranks == (4,)


@settings(max_examples=50)
@given(pattern=st.text("q_proj.*+?()[]{}|\\^$1,", max_size=12))
def test_any_pattern_is_matched_as_peft_does_or_refused(plain: Path, tmp_path_factory, pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    config = json.loads((plain / "adapter_config.json").read_text()) | {"alpha_pattern": {pattern: 800}}
    folder = tmp_path_factory.mktemp("pattern")
    (folder / "adapter_model.safetensors").symlink_to(plain / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    try:
        opened = open_checkpoint(folder)
    except ValueError:
        return
    assert opened.adapter is not None
    for name, update in opened.adapter.updates.items():
        is_met = get_pattern_key([pattern], name.removesuffix(".weight")) == pattern
        assert update.scale == (200 if is_met else 2)
