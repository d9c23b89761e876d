"""A model whose layers are split over two processes, against the same model in one: the same ids, and close logits.

The processes are forks of the test's own, which has imported everything. gloo connects them.
"""

import os
import socket
import time

import pytest
import torch
from torch import multiprocessing
from transformers import Emu3TextConfig as ReferenceTextConfig
from transformers.distributed import DistributedConfig

from emu3 import Emu3Pipeline, Emu3Processor
from emu3.checkpoints.quantize import quantize
from emu3.configuration import Emu3TextConfig
from emu3.generation.decoders.named import decoder_named
from emu3.generation.engine import Engine
from emu3.generation.events import Finished
from emu3.generation.grammar import GridGrammar, TextGrammar
from emu3.generation.request import Guidance, Request
from emu3.generation.sampling import GREEDY, Sampling
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.modeling.parallel import least, own_part
from emu3.modeling.text import Emu3ForCausalLM
from emu3.testing import write_tiny_checkpoint

PROCESSES = 2
DECODERS = ("raster", "predictive", "jacobi", "zipar")
# What differs from the tiny model of `conftest.py`: 4 query heads, 2 key-value heads, 2 layers of width 32.
SHAPES = {
    "grouped heads": {},
    "as many key-value heads": {"num_key_value_heads": 4, "num_hidden_layers": 1},
    # and an odd width of the feed-forward layer, and one matrix for head and embedding
    "wide heads and biases": {
        "num_attention_heads": 8,
        "head_dim": 16,
        "attention_bias": True,
        "mlp_bias": True,
        "intermediate_size": 51,
        "tie_word_embeddings": True,
    },
}
SECONDS = 100

pytestmark = [
    pytest.mark.skipif(torch.accelerator.is_available(), reason="transformers would put the model on the accelerator"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of PyTorch has no gloo"),
    # Python 3.12 warns of forks where there are threads. The forks only compute, with one thread.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def text_config():
    """One of transformers' own, as a dict."""
    theirs = ReferenceTextConfig(
        vocab_size=70,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=69,
        initializer_range=0.3,
    )
    return Emu3TextConfig(**theirs.to_dict())


def from_generate(model):
    """Logits of two prompts, and what follows them: the likeliest ids, and drawn ones."""
    ids_BS = torch.tensor([[1, 5, 6, 7], [1, 9, 9, 2]])
    arguments = {"attention_mask": torch.ones_like(ids_BS), "max_new_tokens": 12}
    with torch.no_grad():
        found = {"logits": model(ids_BS).logits, "greedy": model.generate(ids_BS, do_sample=False, **arguments)}
    torch.manual_seed(3)
    found["drawn"] = model.generate(ids_BS, do_sample=True, temperature=1.3, **arguments)
    return found


def from_engine(model):
    """Pictures under guidance by every decoder, greedy and drawn, beside a text: name -> ids."""
    vocabulary, size = model.model.vocabulary, model.config.text_config.vocab_size
    requests = {"text": Request((vocabulary.bos, 3), TextGrammar(size, (vocabulary.eos,)), seed=2, max_new_tokens=9)}
    negative = (vocabulary.bos, vocabulary.boi, 1, vocabulary.img)
    for decoder in DECODERS:
        for name, sampling in {"greedy": GREEDY, "drawn": Sampling(1.3, top_k=12, top_p=0.95)}.items():
            requests[f"{decoder} {name}"] = Request(
                (vocabulary.bos, 5, 6, 7, vocabulary.boi, 1, vocabulary.img),
                GridGrammar(3, 4, vocabulary=vocabulary),
                sampling,
                Guidance(negative, 3.0),
                seed=1,
                decoder=decoder_named(decoder),
            )
    events = [each for each in Engine(model).stream(list(requests.values())) if isinstance(each, Finished)]
    ids = {each.request: each.ids for each in events}
    return {name: ids[number] for number, name in enumerate(requests)}


def from_pipeline(model, folder):
    """The ids of a drawn picture, how likely they were, and what is read in it."""
    pipeline = Emu3Pipeline(model, Emu3Processor.from_pretrained(folder))
    (request,) = pipeline.draw_requests("a red car", seed=4)
    (ids,) = (event.ids for event in pipeline.engine.stream(request) if isinstance(event, Finished))
    answer = pipeline.chat("What color?", [pipeline.read(request, ids)], max_new_tokens=8)
    return {"ids": ids, "answer": answer, "likely": torch.from_numpy(pipeline.probabilities(request, ids))}


def sizes(model):
    """Of this process: numbers in the layers' matrices, the pieces of memory in which they lie after the engine fused
    them, and bytes that it keeps for a token."""
    matrices = [own_part(weight) for weight in model.model.text_model.layers.parameters() if weight.ndim == 2]
    pieces = {weight.untyped_storage().data_ptr() for weight in matrices}
    numbers = sum(weight.numel() for weight in matrices)
    return {"in layers": numbers, "pieces": len(pieces), "a token": Engine(model).bytes_per_token}


def load(kind, folder):
    """A model of which this process holds its part."""
    return kind.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto")).eval()


def refusal(kind, folder):
    """Why a checkpoint is not loaded."""
    with pytest.raises(ValueError) as caught:
        load(kind, folder)
    return str(caught.value)


def run_one(rank, port, folder, checkpoint):
    """One of the processes: what the models say that are split over all of them."""
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES)}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
    found = {}
    for name in SHAPES:
        model = load(Emu3ForConditionalGeneration, folder / name)
        found[name] = from_generate(model) | from_engine(model) | sizes(model)
    found["text"] = from_generate(load(Emu3ForCausalLM, folder / "text"))
    model = load(Emu3ForConditionalGeneration, checkpoint)
    found["pipeline"] = from_pipeline(model, checkpoint)
    found["least"] = least(7 - rank, model.lm_head.weight)
    found["odd"] = refusal(Emu3ForCausalLM, folder / "odd")
    found["quantized"] = refusal(Emu3ForConditionalGeneration, folder / "quantized")
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def whole(tiny_config):
    """The models in one process. Older releases of transformers split even vocabularies only: these have 74 ids."""
    torch.manual_seed(0)
    vision = {"codebook_size": 25, "channel_multiplier": [1, 1], "hidden_size": 32, "attn_resolutions": []}
    models = {}
    for name, shape in SHAPES.items():
        config = tiny_config({"initializer_range": 0.3} | shape, vision)
        models[name] = Emu3ForConditionalGeneration(config)
    models["text"] = Emu3ForCausalLM(text_config())
    config = text_config()
    config.num_key_value_heads = 3
    models["odd"] = Emu3ForCausalLM(config)
    return {name: model.eval() for name, model in models.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A complete one, of 288 ids."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), codes=17)


@pytest.fixture(scope="module")
def split(whole, checkpoint, tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("split")
    for name, model in whole.items():
        model.save_pretrained(folder / name)
    quantize(checkpoint, folder / "quantized")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = multiprocessing.start_processes(
        run_one, (port, folder, checkpoint), nprocs=PROCESSES, join=False, start_method="fork"
    )
    deadline = time.monotonic() + SECONDS
    try:
        while not running.join(timeout=1):
            assert time.monotonic() < deadline, "the processes wait for each other"
    finally:
        for process in running.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", [*SHAPES, "text"])
def test_generate_gives_the_same_ids_in_all_processes(whole, split, name):
    expected = from_generate(whole[name])
    for found in split:
        for kind in ("greedy", "drawn"):
            assert found[name][kind].tolist() == expected[kind].tolist()
        torch.testing.assert_close(found[name]["logits"], expected["logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_the_engine_gives_the_same_ids_in_all_processes(whole, split, name):
    expected = from_engine(whole[name])
    assert len({tuple(ids) for ids in expected.values()}) > len(DECODERS)
    for found in split:
        assert {kind: found[name][kind] for kind in expected} == expected


@pytest.mark.parametrize("name", SHAPES)
def test_each_process_holds_its_part_only(whole, split, name):
    from_engine(whole[name])
    expected, parts = sizes(whole[name]), [found[name] for found in split]
    assert sum(part["in layers"] for part in parts) == expected["in layers"]
    for part in parts:
        assert (part["pieces"], PROCESSES * part["a token"]) == (expected["pieces"], expected["a token"])


def test_the_pipeline_says_the_same_in_all_processes(split, checkpoint):
    model = Emu3ForConditionalGeneration.from_pretrained(checkpoint).eval()
    expected = from_pipeline(model, checkpoint)
    for found in split:
        assert found["pipeline"]["ids"] == expected["ids"]
        assert found["pipeline"]["answer"] == expected["answer"]
        torch.testing.assert_close(found["pipeline"]["likely"], expected["likely"], atol=1e-4, rtol=1e-3)
        assert found["least"] == 6  # of 7 and 6: where memory counts, all admit what fits in each
    assert least(7, model.lm_head.weight) == 7


def test_what_cannot_be_split_is_refused(split):
    for found in split:
        assert found["odd"] == "3 key-value heads cannot be split over 2 processes; start as many as divide them"
        assert found["quantized"] == (
            "quantized layers cannot be split over 2 processes; load the checkpoint they were made of"
        )
