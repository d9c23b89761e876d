"""Every documented argument and return field of `forward`, of all four models, against transformers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention
from transformers import DynamicCache, StaticCache
from transformers import Emu3ForCausalLM as ReferenceForCausalLM
from transformers import Emu3TextConfig as ReferenceTextConfig

from emu3.modeling.pretrained import CACHE
from emu3.modeling.text import Emu3ForCausalLM

LENGTH = 9
IDS = torch.randint(0, 40, (2, LENGTH), generator=torch.Generator().manual_seed(1))
MODELS = ["Emu3TextModel", "Emu3Model", "Emu3ForCausalLM", "Emu3ForConditionalGeneration"]
HEADS = MODELS[2:]
Models = tuple[nn.Module, nn.Module]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.1, "values too small for their difference to mean something"
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def both(models: Models, **inputs: Any) -> Any:
    """The output of ours, whose first field is that of theirs."""
    ours, theirs = (model(**inputs) for model in models)
    assert_close(ours[0], theirs[0])
    return ours


@contextmanager
def attention(models: Models, implementation: str) -> Iterator[None]:
    for model in models:
        model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        for model in models:
            model.set_attn_implementation("sdpa")


@pytest.fixture(scope="module")
def make(build: Callable[..., Any]) -> Callable[..., Models]:
    """Builds the two models of a class with the same weights."""

    def make(name: str, **text: Any) -> Models:
        pair = build(text)
        if name == "Emu3ForConditionalGeneration":
            return pair.both
        if name == "Emu3Model":
            return pair.ours.model, pair.theirs.model
        if name == "Emu3TextModel":
            return pair.ours.model.text_model, pair.theirs.model.text_model
        weights = {f"model.{key}": tensor for key, tensor in pair.ours.model.text_model.state_dict().items()}
        weights["lm_head.weight"] = pair.ours.lm_head.weight
        config = pair.ours.config.text_config
        models = Emu3ForCausalLM(config), ReferenceForCausalLM(ReferenceTextConfig(**config.to_dict()))
        for model in models:
            model.load_state_dict(weights)
        return models[0].eval(), models[1].eval()

    return make


@pytest.fixture(scope="module", params=MODELS)
def models(request: pytest.FixtureRequest, make: Callable[..., Models]) -> Models:
    return make(request.param)


@pytest.fixture(scope="module", params=HEADS)
def heads(request: pytest.FixtureRequest, make: Callable[..., Models]) -> Models:
    """The models that have a head."""
    return make(request.param)


@torch.no_grad()
def test_input_ids_or_inputs_embeds(models):
    by_ids = both(models, input_ids=IDS)
    by_embeddings = both(models, inputs_embeds=models[0].get_input_embeddings()(IDS))
    assert torch.equal(by_ids[0], by_embeddings[0])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        models[0](input_ids=IDS, inputs_embeds=by_embeddings[0])


@torch.no_grad()
def test_attention_mask(models):
    """The second row's first four tokens are padding: the rest is as without them."""
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    real = mask.bool()
    ours, theirs = (model(input_ids=IDS, attention_mask=mask)[0] for model in models)
    assert_close(ours[real], theirs[real])
    torch.testing.assert_close(ours[1:, 4:], models[0](input_ids=IDS[1:, 4:])[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_position_ids(models):
    stretched = both(models, input_ids=IDS, position_ids=torch.arange(LENGTH)[None] * 3)
    counted = both(models, input_ids=IDS, position_ids=torch.arange(LENGTH)[None])
    assert torch.equal(counted[0], models[0](input_ids=IDS)[0])
    assert (stretched[0] - counted[0]).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cache(models, kind, name):
    """Under either name; the reference knows that of its version."""
    whole = models[0](input_ids=IDS)[0]
    config = models[0].config.get_text_config()
    caches = [StaticCache(config=config, max_cache_len=16) if kind == "static" else DynamicCache() for _ in models]
    for start, end in [(0, 5), (5, 6), (6, LENGTH)]:
        ours, theirs = (
            model(input_ids=IDS[:, start:end], **{key: cache}, use_cache=True)
            for model, key, cache in zip(models, (name, CACHE), caches, strict=True)
        )
        assert ours[CACHE] is caches[0]
        assert ours[CACHE].get_seq_length() == end
        assert_close(ours[0], theirs[0])
        torch.testing.assert_close(ours[0], whole[:, start:end], atol=1e-5, rtol=0)


@torch.no_grad()
def test_cache_position(models):
    model = models[0]
    whole = model(input_ids=IDS)[0]
    for cache in (DynamicCache(), StaticCache(config=model.config.get_text_config(), max_cache_len=16)):
        for positions in torch.arange(LENGTH).split([5, 1, 3]):
            part = model(input_ids=IDS[:, positions], past_key_values=cache, cache_position=positions, use_cache=True)
            torch.testing.assert_close(part[0], whole[:, positions], atol=1e-5, rtol=0)
    # It gives the positions where there are none, and yields to those that are given.
    stretched = torch.arange(LENGTH) * 3
    expected = model(input_ids=IDS, position_ids=stretched[None])[0]
    assert torch.equal(model(input_ids=IDS, cache_position=stretched)[0], expected)
    given = model(input_ids=IDS, position_ids=torch.arange(LENGTH)[None], cache_position=stretched)[0]
    assert torch.equal(given, whole)


@torch.no_grad()
def test_use_cache(models, monkeypatch):
    cache = both(models, input_ids=IDS, use_cache=True)[CACHE]
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == LENGTH
    assert both(models, input_ids=IDS, use_cache=False).get(CACHE) is None
    assert both(models, input_ids=IDS).get(CACHE) is not None
    monkeypatch.setattr(models[0].config.get_text_config(), "use_cache", False)
    assert models[0](input_ids=IDS).get(CACHE) is None


@torch.no_grad()
@pytest.mark.parametrize("where", ["argument", "config"])
@pytest.mark.parametrize("field", ["hidden_states", "attentions"])
def test_hidden_states_and_attentions(models, monkeypatch, where, field):
    switch = f"output_{field}"  # output_hidden_states, output_attentions
    with attention(models, "eager"):
        assert getattr(models[0](input_ids=IDS), field) is None
        arguments = {switch: True}
        if where == "config":
            arguments = {}
            for model in models:
                monkeypatch.setattr(model.config.get_text_config(), switch, True)
        ours, theirs = (getattr(model(input_ids=IDS, **arguments), field) for model in models)
        assert len(ours) == len(theirs) == (3 if field == "hidden_states" else 2)
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)
        if field == "attentions":
            assert ours[0].shape == (2, 4, LENGTH, LENGTH)
            torch.testing.assert_close(ours[0].sum(-1), torch.ones(2, 4, LENGTH))
            assert ours[0].triu(1).count_nonzero() == 0
        else:
            assert torch.equal(ours[0], models[0].get_input_embeddings()(IDS))


@torch.no_grad()
def test_last_hidden_state(make):
    """What the head reads is the last of the hidden states."""
    model = make("Emu3ForCausalLM")[0]
    output = model.model(input_ids=IDS, output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
    assert torch.equal(model.lm_head(output.last_hidden_state), model(input_ids=IDS).logits)


@torch.no_grad()
def test_the_model_without_a_head_has_no_logits(make):
    """The page lists `loss` and `logits` for Emu3Model too; transformers' class, like ours, returns hidden states."""
    for model in make("Emu3Model"):
        output = model(input_ids=IDS)
        assert output.last_hidden_state.shape == (2, LENGTH, 32)
        assert not {"loss", "logits"} & set(output.keys())


@torch.no_grad()
def test_return_dict(models, monkeypatch):
    ours, theirs = (model(input_ids=IDS, return_dict=False) for model in models)
    assert isinstance(ours, tuple)
    assert len(ours) == len(theirs) == 2
    assert_close(ours[0], theirs[0])
    assert ours[1].get_seq_length() == LENGTH
    monkeypatch.setattr(models[0].config, "return_dict", False)
    configured = models[0](input_ids=IDS, use_cache=False)
    assert isinstance(configured, tuple)
    assert len(configured) == 1
    assert torch.equal(configured[0], ours[0])
    assert torch.equal(models[0](input_ids=IDS, return_dict=True)[0], ours[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, which transformers asks by old names
@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_attn_implementation(models, implementation, monkeypatch):
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    real = mask.bool()
    expected = models[1](input_ids=IDS, attention_mask=mask)[0][real]
    # Compiling flex attention takes a minute; its uncompiled form computes the same.
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    with attention(models[:1], implementation), torch.compiler.set_stance("force_eager"):
        assert_close(models[0](input_ids=IDS, attention_mask=mask)[0][real], expected)


def test_flash_attention_that_is_not_installed(models):
    for implementation in ("flash_attention_2", "flash_attention_3"):
        with pytest.raises((ImportError, ValueError), match=r"(?i)flash.?attention|flash.?attn"):
            models[0].set_attn_implementation(implementation)
    both(models, input_ids=IDS)


def test_labels(heads):
    labels = IDS.clone()
    labels[0, :4] = -100
    ours, theirs = (model(input_ids=IDS, labels=labels) for model in heads)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-6, rtol=0)
    targets = labels[:, 1:].flatten()
    logits = ours.logits[:, :-1].flatten(0, 1)[targets != -100]
    torch.testing.assert_close(ours.loss, F.cross_entropy(logits, targets[targets != -100]))
    ignored = heads[0](input_ids=IDS, labels=IDS).loss
    assert (ignored - ours.loss).abs() > 1e-3
    assert torch.equal(ours.logits, heads[0](input_ids=IDS).logits)
    assert heads[0](input_ids=IDS).loss is None


@torch.no_grad()
@pytest.mark.parametrize("keep", [0, 1, 4, torch.tensor([8, 0, 3])], ids=str)
def test_logits_to_keep(heads, keep):
    whole = heads[0](input_ids=IDS).logits
    kept = both(heads, input_ids=IDS, logits_to_keep=keep).logits
    positions = keep if isinstance(keep, Tensor) else torch.arange(LENGTH - (keep or LENGTH), LENGTH)
    torch.testing.assert_close(kept, whole[:, positions], atol=1e-6, rtol=0)


def gradients(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs)[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # newer releases of transformers call it otherwise
def test_gradient_checkpointing(models):
    expected = gradients(models[1], input_ids=IDS, use_cache=False)
    model = models[0]
    model.train()
    for name, module in model.named_modules():
        if name.endswith("dropout"):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    found = gradients(model, input_ids=IDS, use_cache=False)
    model.gradient_checkpointing_disable()
    model.eval()
    assert found.keys() == expected.keys()
    assert max(gradient.abs().max() for gradient in found.values()) > 1e-3
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_attention_dropout(make, name, implementation):
    """Attention weights and both residual branches are dropped in training: same draws, same values."""
    models = make(name, attention_dropout=0.4)
    seen = []
    with attention(models, implementation):
        for model in models:
            model.train()
            torch.manual_seed(0)
            seen.append(model(input_ids=IDS)[0])
        assert_close(*seen)
        assert (seen[0] - models[0](input_ids=IDS)[0]).abs().max() > 0.1
        models[0].eval()
        assert torch.equal(models[0](input_ids=IDS)[0], models[0](input_ids=IDS)[0])
