"""Checkpoints in 8 and 4 bits: what is written, that it loads by every way, and what happens when it is cut off."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from emu3 import Emu3ForConditionalGeneration, Emu3Pipeline, cli, kernels, quantization
from emu3.checkpoints import NANO
from emu3.checkpoints import quantize as module
from emu3.checkpoints.files import read_headers
from emu3.checkpoints.info import inspect
from emu3.checkpoints.load import load_model
from emu3.checkpoints.quantize import quantize
from emu3.generation.events import Finished
from emu3.generation.grammar import TextGrammar
from emu3.generation.request import Request
from emu3.generation.sampling import Sampling
from emu3.quantization import Int8Linear, QuantizedHead, QuantizedLinear

IDS = torch.arange(300, 340)[None]
SCHEMES = [(8, None), (4, 32), (4, 128)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder of each scheme."""
    folder = tmp_path_factory.mktemp("quantized")
    for bits, group in SCHEMES:
        quantize(NANO, folder / f"{bits}-{group}", bits, group)
    return {(bits, group): folder / f"{bits}-{group}" for bits, group in SCHEMES}


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_it_loads_by_every_way(written, scheme, capfd):
    model = load_model(written[scheme])
    layers = [each for each in model.modules() if isinstance(each, QuantizedLinear)]
    assert len(layers) == 42 and {(each.bits, each.scheme.group) for each in layers} == {scheme}
    logits = model(input_ids=IDS).logits
    for dtype in (torch.float32, torch.bfloat16):
        theirs = Emu3ForConditionalGeneration.from_pretrained(written[scheme], dtype=dtype).eval()
        assert "quantization type" not in capfd.readouterr().err
        ours = load_model(written[scheme], dtype=dtype)
        assert torch.equal(theirs(input_ids=IDS).logits, ours(input_ids=IDS).logits)
        for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)
    exact = load_model(NANO)(input_ids=IDS).logits
    distance = float((exact.softmax(-1) - logits.softmax(-1)).abs().sum(-1).mean()) / 2
    assert distance < {8: 0.025, 4: 0.35}[scheme[0]]


@torch.no_grad()
def test_eight_bits_are_those_of_int8_bit_for_bit(written, monkeypatch):
    monkeypatch.setattr(quantization, "_LARGEST_UNPACKED", 0)
    with monkeypatch.context() as without:
        without.setattr(kernels, "library", lambda: None)
        theirs = load_model(NANO, int8=True)
    ours = load_model(written[8, None])
    theirs.lm_head = ours.lm_head  # which `int8=True` leaves as it is
    assert any(isinstance(each, Int8Linear) for each in theirs.modules())
    assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nano_draws_and_reads(written, scheme):
    pipeline = Emu3Pipeline.from_pretrained(written[scheme])
    bits = f"layers in {scheme[0]} bits, head in 8 bits"
    assert repr(pipeline) == f"Emu3Pipeline(9,004,191 parameters, torch.float32, {bits}, on cpu)"
    prompts = ["a photo of a red car", "a photo of a purple cat", "a photo of two dogs"]
    for decoding in ("predictive", "zipar"):
        pictures = pipeline.image(prompts, seed=3, decoding=decoding)
        said = pipeline.chat([("Describe the picture.", [each]) for each in pictures])
        assert sum(a == b for a, b in zip(said, prompts, strict=True)) >= 2
    assert pipeline.image(prompts[0], seed=3)[0].tobytes() == pipeline.image(prompts, seed=[3, 8, 9])[0].tobytes()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_but_the_matrices_of_layers_and_the_head_keeps_its_bits(written, scheme):
    before, after = read_headers(NANO), read_headers(written[scheme])
    changed = {name for name, header in after.items() if header.dtype in ("U8", "I8") or name.endswith(".scales")}
    assert len(changed) == 2 * 43
    for name in set(after) - changed:
        with safe_open(before[name].file, "pt") as one, safe_open(after[name].file, "pt") as other:
            assert torch.equal(one.get_tensor(name), other.get_tensor(name))
    found = inspect(written[scheme])
    assert found.parameters == inspect(NANO).parameters
    layers = {8: "8 bits, a scale for each output", 4: f"4 bits, groups of {scheme[1]}"}[scheme[0]]
    assert found.quantized == f"{layers}, the head in 8 bits"
    assert (written[scheme] / "words.txt").read_text() == (NANO / "words.txt").read_text()


def folder_with(source, target, **scheme):
    """A copy with another `quantization_config`; None leaves a key out."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    changed = config["quantization_config"] | scheme
    config["quantization_config"] = {name: value for name, value in changed.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


@torch.no_grad()
def test_each_weight_of_the_head_is_the_nearest_of_its_output(written):
    head, weight = load_model(written[4, 32]).lm_head, load_model(NANO).lm_head.weight
    step = weight.abs().amax(1) / 127
    assert type(head) is QuantizedHead and torch.equal(head.scales, step)
    assert torch.equal(head.weight, (weight / step[:, None]).round().to(torch.int8))


def test_a_head_as_it_is_stored_loads_beside_quantized_layers(written, tmp_path):
    """As checkpoints have it that say nothing of their head."""
    older = folder_with(written[4, 32], tmp_path / "older", head_bits=None)
    with pytest.raises(ValueError, match=r"lm_head\.scales \(unknown to config\.json\)"):
        load_model(older)
    for file in older.glob("*.safetensors*"):
        file.unlink()
    tensors = {}
    for folder, is_head in ((NANO, True), (written[4, 32], False)):
        for name, header in read_headers(folder).items():
            if name.startswith("lm_head.") == is_head:
                with safe_open(header.file, "pt") as opened:
                    tensors[name] = opened.get_tensor(name)
    save_file(tensors, older / "model.safetensors", metadata={"format": "pt"})
    model = load_model(older)
    assert torch.equal(model.lm_head.weight, load_model(NANO).lm_head.weight)
    assert type(model.model.text_model.layers[0].mlp.up_proj) is QuantizedLinear
    assert inspect(older).quantized == "4 bits, groups of 32"


@pytest.mark.parametrize("bits", [4, "8", 8.0, True])
def test_a_head_of_other_bits_is_refused(written, tmp_path, bits):
    with pytest.raises(ValueError, match=r"head_bits=.* must be one of 8, or null"):
        load_model(folder_with(written[8, None], tmp_path / "odd", head_bits=bits))


def test_a_head_that_is_tied_or_does_not_fit_stays(tiny_config, tmp_path):
    for name, text, whole in (("tied", {}, {"tie_word_embeddings": True}), ("narrow", {"hidden_size": 40}, {})):
        torch.manual_seed(0)
        model = Emu3ForConditionalGeneration(tiny_config(text, **whole))
        model.save_pretrained(tmp_path / name)
        report = quantize(tmp_path / name, tmp_path / f"{name}-8", 8)
        config = json.loads((tmp_path / f"{name}-8" / "config.json").read_text())
        assert report.head_bits is None and "head_bits" not in config["quantization_config"]
        loaded = load_model(tmp_path / f"{name}-8")
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
        assert (loaded.lm_head.weight is loaded.model.text_model.embed_tokens.weight) == (name == "tied")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_says_what_generate_says(written, dtype):
    model = Emu3ForConditionalGeneration.from_pretrained(written[8, None], dtype=dtype).eval()
    pipeline = Emu3Pipeline.from_pretrained(written[8, None], dtype=dtype)
    prompt = pipeline.processor.tokenizer("a photo of a red car", return_tensors="pt").input_ids
    grammar = TextGrammar(model.lm_head.out_features, (pipeline.layout.vocabulary.eos,))
    request = Request(tuple(prompt[0].tolist()), grammar, Sampling(0.0), max_new_tokens=12)
    (found,) = [event.ids for event in pipeline.engine.stream([request]) if isinstance(event, Finished)]
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert list(found) == expected.tolist() and len(set(found)) > 1


def test_it_goes_on_where_it_was_cut_off(tmp_path, written, monkeypatch):
    monkeypatch.setattr(module, "_SHARD_BYTES", 10**6)
    save, saved = module.save_file, []

    def cut(tensors, file, **options):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(file.name)
        save(tensors, file, **options)

    monkeypatch.setattr(module, "save_file", cut)
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(NANO, target, 4)
    assert not target.exists()
    monkeypatch.setattr(module, "save_file", lambda *a, **o: saved.append(a[1].name) or save(*a, **o))
    seen = []
    report = quantize(NANO, target, 4, on_progress=lambda done, total: seen.append((done, total)))
    assert len(saved) == len(set(saved)) == len(list(target.glob("*.safetensors"))) > 5
    assert seen[-1] == (report.bytes_after, report.bytes_after) and len(seen) == len(saved)
    assert {each.name for each in target.iterdir()} >= {"config.json", "model.safetensors.index.json"}
    assert not [each for each in target.iterdir() if "plan" in each.name or each.suffix == ".part"]
    for one, other in zip(load_model(target).buffers(), load_model(written[4, 32]).buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_that_are_not_finite_are_refused(tmp_path, bits):
    shutil.copytree(NANO, tmp_path / "source")
    file, name = tmp_path / "source/model.safetensors", "model.text_model.layers.3.self_attn.q_proj.weight"
    tensors = load_file(file)
    tensors[name][2, 5] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"{re.escape(name)} holds NaN or infinite values; get the checkpoint again"):
        quantize(tmp_path / "source", tmp_path / "out", bits)
    assert not (tmp_path / "out").exists()


def test_another_scheme_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SHARD_BYTES", 10**6)
    target = tmp_path / "out"

    def cut(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(NANO, target, 8, on_progress=cut)
    quantize(NANO, target, 4)
    assert json.loads((target / "config.json").read_text())["quantization_config"]["bits"] == 4
    load_model(target)


def test_a_source_that_changed_meanwhile_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SHARD_BYTES", 10**6)
    source, target = shutil.copytree(NANO, tmp_path / "source"), tmp_path / "out"

    def cut(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, target, 4, on_progress=cut)
    file = source / "model.safetensors"
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file({name: 2 * tensor if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}, file)
    quantize(source, target, 4)
    expected = 2 * load_model(NANO).model.text_model.embed_tokens.weight
    assert torch.equal(load_model(target).model.text_model.embed_tokens.weight, expected)
    layers = [load_model(each).model.text_model.layers[0].mlp.down_proj for each in (target, quantized_nano(tmp_path))]
    assert torch.equal(layers[0].dequantized(), 2 * layers[1].dequantized())


def quantized_nano(folder):
    quantize(NANO, folder / "nano", 4)
    return folder / "nano"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(each) for each in arguments])
    return ended.value.code, capsys.readouterr()


def test_the_command(tmp_path, capsys):
    code, said = run(capsys, "quantize", "nano", tmp_path / "q", "--bits", "4", "--json")
    assert code == 0
    report = json.loads(said.out)
    assert report["matrices"] == 42 and report["group"] == 32 and report["kept"] == [] and report["head_bits"] == 8
    assert report["bytes_after"] < 0.6 * report["bytes_before"]
    assert (tmp_path / "q/draft/head.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nano", "{new}", "--bits", "3"), "--bits must be one of 8, 4, got '3'"),
        (("nano", "{new}", "--bits", "4", "--group", "64"), "--group must be one of 32, 128, got '64'"),
        (("nano", "{new}", "--group", "32"), "--group is for 4 bits"),
        (("nano", "{there}"), "is there already"),
        (("{quantized}", "{new}"), "is quantized already"),
        (("{there}", "{new}"), "holds no config.json"),
    ],
)
def test_what_is_refused(written, tmp_path, capsys, arguments, words):
    places = {"new": tmp_path / "new", "there": tmp_path, "quantized": written[8, None]}
    code, said = run(capsys, "quantize", *(each.format(**places) for each in arguments))
    assert code == 2 and words in said.err
    assert list(tmp_path.iterdir()) == []


def test_quantized_layers_are_not_quantized_again(written):
    with pytest.raises(ValueError, match="is quantized already; load it without int8"):
        load_model(written[8, None], int8=True)
    with pytest.raises(ValueError, match="group_size=64, which must be one of"):
        settings = json.loads((written[4, 32] / "config.json").read_text())
        settings["quantization_config"]["group_size"] = 64
        broken = written[4, 32].with_name("broken")
        broken.mkdir()
        (broken / "config.json").write_text(json.dumps(settings))
        load_model(broken)
