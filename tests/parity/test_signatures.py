"""Every argument that the installed transformers' own Emu3 takes has the same effect here.

A new release that takes a new argument fails here until an example of it is added: nothing is swallowed by `**kwargs`.
"""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.utils import TransformersKwargs

from emu3.modeling.pretrained import CACHE

MODELS = ["", "model", "model.text_model"]  # attributes of the pair's models
SHOWN = (2, 3)  # rows and columns of the picture in the prompt
# What `TransformersKwargs` offers that only flash attention or other models read.
ELSEWHERE = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "output_router_logits"}
ELSEWHERE |= {"cu_seqlens", "max_seqlen", "seq_idx", "cu_seq_lens"}


def prompt(pair, name: str) -> dict[str, Any]:
    """Arguments to start from: a prompt with a picture in it where a model takes one."""
    if name == "model.text_model":
        return pair.prompts([1, 2, 3, 4, 5, 6, 7, 8])
    return pair.prompts([1, 2, *pair.shown(*SHOWN), 3, 4]) | pair.pixels(SHOWN)


def cached(model, inputs: dict[str, Any], count: int = 2) -> tuple[DynamicCache, dict[str, Any]]:
    """The cache of all but the last `count` tokens, and these tokens."""
    cache = DynamicCache()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    model(**inputs | {"input_ids": ids[:, :-count], "attention_mask": mask[:, :-count], CACHE: cache})
    return cache, {"input_ids": ids[:, -count:], "attention_mask": mask}


def with_argument(argument: str, pair, model, name: str) -> dict[str, Any]:
    """Inputs in which `argument` has a value that matters."""
    inputs = prompt(pair, name)
    length = inputs["input_ids"].shape[1]
    match argument:
        case "input_ids" | "pixel_values" | "image_sizes":
            return inputs
        case "attention_mask":
            mask = torch.ones(1, length, dtype=torch.long)
            mask[:, :2] = 0
            return inputs | {"attention_mask": mask}
        case "position_ids":
            return inputs | {"position_ids": torch.arange(length)[None] * 2}
        case "cache" | "past_key_values":
            cache, rest = cached(model, inputs)
            return rest | {argument: cache}
        case "inputs_embeds":
            ids = inputs.pop("input_ids")
            return inputs | {"inputs_embeds": model.get_input_embeddings()(ids)}
        case "use_cache":
            return inputs | {"use_cache": False}
        case "mm_encoder_outputs":
            pictures = {key: inputs.pop(key) for key in ("pixel_values", "image_sizes")}
            encode = getattr(model, "model", model).get_image_features
            return inputs | {"mm_encoder_outputs": {"image": encode(**pictures)}}
        case "labels":
            return inputs | {"labels": inputs["input_ids"]}
        case "num_items_in_batch":
            return inputs | {"labels": inputs["input_ids"], "num_items_in_batch": torch.tensor(5)}
        case "logits_to_keep":
            return inputs | {"logits_to_keep": 3}
        case "output_hidden_states" | "output_attentions":
            return inputs | {argument: True}
        case "is_causal":
            return inputs | {"is_causal": False}
        case "return_dict":
            return inputs | {"return_dict": False}
    pytest.fail(f"transformers takes {argument}, which has no example here: see what it does, and take it too")


def arguments_of(function: Any) -> list[str]:
    named = [name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD]
    others = set(TransformersKwargs.__annotations__) | {"is_causal", "return_dict"}
    return [name for name in dict.fromkeys([*named, *sorted(others)]) if name not in ELSEWHERE | {"self"}]


def tensors(output: Any) -> list[Tensor]:
    """All that an output holds, in order; a cache as its keys and values."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        return [t for key in sorted(output) for t in tensors(output[key])]
    if isinstance(output, tuple | list):
        return [t for part in output for t in tensors(part)]
    if isinstance(output, DynamicCache):
        return [t for layer in output.layers for t in (layer.keys, layer.values)]
    assert output is None, output
    return []


def same(ours: Any, theirs: Any) -> None:
    assert type(ours).__name__ == type(theirs).__name__
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs)
    ours, theirs = tensors(ours), tensors(theirs)
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, check_dtype=False)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_arguments_of_forward(pair, name):
    models = [model.get_submodule(name) for model in pair.both]
    for model in models:
        model.set_attn_implementation("eager")  # the others have no attentions to return
    taken = arguments_of(models[1].forward)
    assert {"attention_mask", CACHE} <= set(taken)
    for argument in taken:
        if argument in ("labels", "logits_to_keep", "num_items_in_batch") and name:
            continue  # read by heads only
        if argument not in ("input_ids", "pixel_values", "image_sizes"):  # in every call
            outputs = [model(**with_argument(argument, pair, model, name)) for model in models]
            same(*outputs)
            if argument not in ("inputs_embeds", "mm_encoder_outputs", CACHE):
                plain = models[0](**prompt(pair, name))
                changed = [t.shape for t in tensors(plain)] != [t.shape for t in tensors(outputs[0])]
                changed |= type(plain) is not type(outputs[0])
                assert changed or not torch.allclose(tensors(plain)[-1], tensors(outputs[0])[-1]), argument
    for model in models:
        model.set_attn_implementation("sdpa")


@torch.no_grad()
@pytest.mark.parametrize("keep", [torch.tensor([[2, 0], [1, 3]]), torch.eye(2, 8).bool()], ids=["positions", "mask"])
def test_logits_to_keep_for_each_row(pair, keep):
    inputs = pair.prompts([1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1])
    whole = pair.ours(**inputs).logits
    rows = torch.arange(2)[:, None]
    expected = whole[keep] if keep.dtype == torch.bool else whole[rows, keep]
    torch.testing.assert_close(pair.ours(**inputs, logits_to_keep=keep).logits, expected, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_under_two_names_or_a_third(pair, name):
    model = pair.ours.get_submodule(name)
    inputs = pair.prompts([1, 2, 3])
    with pytest.raises(ValueError, match="two names of one argument"):
        model(**inputs, cache=DynamicCache(), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="given as past; give it as cache"):
        model(**inputs, past=DynamicCache())
    cache = DynamicCache()
    assert model(**inputs, cache=cache, past_key_values=cache)[CACHE] is cache
    assert cache.get_seq_length() == 3
