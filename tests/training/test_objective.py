"""The loss of packed samples."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emu3.configuration import Emu3TextConfig
from emu3.modeling.text import Emu3ForCausalLM
from emu3.training import objective
from emu3.training.objective import NextTokenLoss, PackedAttention, attend_causally, pack
from emu3.training.sequences import TokenSequence

MODEL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
LENGTHS = (5, 17, 16, 33, 2, 9, 1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Emu3ForCausalLM(Emu3TextConfig(**MODEL)).double()


@pytest.fixture
def sequences():
    rng = np.random.default_rng(0)
    made = []
    for length in LENGTHS:
        weights = rng.choice(np.array([0, 0.5, 1], np.float32), size=length)
        weights[0] = 0
        kinds = rng.integers(0, 4, size=length).astype(np.uint8)
        made.append(TokenSequence(rng.integers(1, 60, size=length), weights, kinds))
    return made


def run(loss, rows):
    loss.zero_grad()
    results = [loss(row) for row in rows]
    sum(result.loss for result in results).backward()
    total = sum(float(result.loss.detach()) for result in results)
    return total, sum(float(result.weight) for result in results), [each.grad for each in loss.parameters()]


@pytest.mark.parametrize("room", [0, 30])
@pytest.mark.parametrize("at_once", [2**27, 60 * 8])
def test_packed_samples_are_the_samples_apart(model, sequences, room, at_once, monkeypatch):
    """Loss and all gradients, in float64; with logits of all targets at once, and of eight."""
    loss = NextTokenLoss(model)
    apart = run(loss, [pack([each], len(each), 0) for each in sequences])
    monkeypatch.setattr(objective, "LOGITS_AT_ONCE", at_once)
    packed = run(loss, [pack(sequences, sum(LENGTHS) + room, 0)])
    assert packed[:2] == pytest.approx(apart[:2], rel=1e-14)
    for a, b in zip(packed[2], apart[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_the_loss_is_that_of_the_documented_forward(model, sequences):
    loss = NextTokenLoss(model)
    result = loss(pack(sequences, 90, 0))
    expected, sums = torch.zeros((), dtype=torch.float64), dict.fromkeys(["prompt", "answer", "draw", "read"], 0.0)
    for each in sequences:
        if len(each) < 2:
            continue
        logits = model(torch.from_numpy(each.ids)[None]).logits[0, :-1]
        losses = F.cross_entropy(logits, torch.from_numpy(each.ids[1:]), reduction="none").detach()
        expected = expected + (losses * torch.from_numpy(each.weights[1:])).sum()
        for kind, name in enumerate(sums):
            sums[name] += float(losses[torch.from_numpy((each.kinds[1:] == kind) & (each.weights[1:] > 0))].sum())
    torch.testing.assert_close(result.loss.detach(), expected)
    assert {name: float(total) for name, (total, _) in result.metrics.items()} == pytest.approx(sums | {"held": 0.0})
    counted = sum(int(count) for _, count in result.metrics.values())
    assert counted == sum((each.weights > 0).sum() for each in sequences)
    assert result.size == sum(LENGTHS)


def test_attending_causally_is_that_of_sdpa():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(attend_causally(query, key, value, 0.3), expected.transpose(1, 2))


def test_packed_attention_is_that_of_a_block_diagonal_mask():
    torch.manual_seed(0)
    size = sum(LENGTHS) + 6
    query, key, value = torch.randn(1, 4, size, 8), torch.randn(1, 2, size, 8), torch.randn(1, 2, size, 8)
    of = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    mask = (of[:, None] == of) & torch.ones(len(of), len(of), dtype=torch.bool).tril()
    used = (slice(None), slice(None), slice(len(of)))
    expected = F.scaled_dot_product_attention(query[used], key[used], value[used], mask, scale=0.3, enable_gqa=True)
    mixed, _ = PackedAttention(LENGTHS, size, query.device)(torch.nn.Module(), query, key, value, None, scaling=0.3)
    torch.testing.assert_close(mixed[:, : len(of)], expected.transpose(1, 2))
    assert mixed.isfinite().all()


def test_held_samples_are_held_to_the_checkpoint_without_its_adapters(sequences):
    """The divergence of each of their targets, by hand; the other samples count as before."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    base = Emu3ForCausalLM(Emu3TextConfig(**MODEL)).eval()
    adapted = Emu3ForCausalLM(Emu3TextConfig(**MODEL)).eval()
    adapted.load_state_dict(base.state_dict())
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False), adapted)
    own = [each for each in sequences if len(each) > 1]
    held = [0.0, 3.0, 0.0, 3.0, 0.0, 3.0]
    result = NextTokenLoss(adapted)(pack(own, 100, 0, held=held))
    expected, weight = 0.0, 0.0
    for each, factor in zip(own, held, strict=True):
        ids = torch.from_numpy(each.ids)[None]
        with torch.no_grad():
            found, before = (model(ids).logits[0, :-1].log_softmax(-1) for model in (adapted, base))
        losses = F.kl_div(found, before, reduction="none", log_target=True).sum(-1)
        if not factor:
            losses = F.nll_loss(found, ids[0, 1:], reduction="none")
        weights = torch.from_numpy(each.weights[1:]) * (factor or 1.0)
        expected, weight = expected + float((losses * weights).sum()), weight + float(weights.sum())
    assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert float(result.weight) == pytest.approx(weight)
    total, count = result.metrics["held"]
    assert int(count) == sum(int((each.weights > 0).sum()) for each, factor in zip(own, held, strict=True) if factor)
    assert float(total) > 0
    with pytest.raises(ValueError, match="no adapters to switch off; train adapters"):
        NextTokenLoss(base)(pack(own, 100, 0, held=held))


def plain_varlen(query, key, value, ends, key_ends, longest, key_longest, scale, window_size):
    """What PyTorch's kernel for GPUs computes, sample by sample."""
    assert window_size == (-1, 0) and longest == key_longest and longest >= ends.diff().max()
    spans = list(zip(ends.tolist(), ends[1:].tolist(), strict=False))
    mixed = [attend_causally(*(x[a:b].transpose(0, 1)[None] for x in (query, key, value)), scale) for a, b in spans]
    return torch.cat([each[0] for each in mixed])


def test_attention_over_a_whole_row_is_that_of_samples_apart(model, sequences, monkeypatch):
    """With the kernel's stand-in: padding is a sample of its own, and groups of heads are filled up."""
    monkeypatch.setattr(objective, "CAUSAL", {"window_size": (-1, 0)})
    monkeypatch.setattr(objective, "varlen_attn", plain_varlen, raising=False)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float64)
    loss = NextTokenLoss(model)
    row = pack(sequences, sum(LENGTHS) + 30, pad=0)
    expected = run(loss, [row])
    monkeypatch.setattr(objective, "attention_of", objective.VarlenAttention)
    found = run(loss, [row])
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    for mine, own in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(mine, own)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_attends_over_a_whole_row_as_over_samples_apart(sequences, monkeypatch):
    torch.manual_seed(0)
    model = Emu3ForCausalLM(Emu3TextConfig(**MODEL | {"hidden_size": 64})).cuda()
    loss = NextTokenLoss(model)
    row = pack(sequences, sum(LENGTHS) + 30, pad=0)
    with torch.autocast("cuda", torch.bfloat16):
        assert isinstance(objective.attention_of((5,), 5, torch.device("cuda")), objective.VarlenAttention)
        found = run(loss, [row])
        monkeypatch.setattr(objective, "attention_of", PackedAttention)
        expected = run(loss, [row])
    assert found[0] == pytest.approx(expected[0], rel=1e-2)
    for mine, own in zip(found[2], expected[2], strict=True):
        assert (mine - own).norm() <= 0.05 * own.norm()
