"""Losses."""

import pytest
import torch
import torch.nn.functional as F

from emu3.configuration import Emu3TextConfig
from emu3.modeling.text import Emu3ForCausalLM
from emu3.training.losses import next_token_loss, psnr

pytestmark = pytest.mark.usefixtures("float32")

MODEL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_dropout": 0.0,
}


def test_next_token_loss_is_the_weighted_mean_of_the_models_own():
    torch.manual_seed(0)
    model = Emu3ForCausalLM(Emu3TextConfig(**MODEL, vocab_size=30, pad_token_id=0, initializer_range=0.3)).eval()
    ids = torch.randint(1, 30, (2, 6))
    weights = torch.tensor([[0.0, 0.0, 2.0, 1.0, 1.0, 0.0], [0.0, 0.5, 0.5, 0.0, 0.0, 0.0]])
    loss, losses, targets = next_token_loss(model, model.model.run_layers, ids, weights)
    each = F.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(loss, (each * weights[:, 1:]).sum() / weights.sum())
    counts = weights[:, 1:] > 0
    torch.testing.assert_close(losses, each[counts])
    assert targets.tolist() == ids[:, 1:][counts].tolist()


def test_psnr():
    target = torch.zeros(2, 3, 4, 4)
    assert psnr(target + 0.2, target) == pytest.approx(20.0, abs=1e-4)  # 2 is the peak: 20 log10(2 / 0.2)
    assert psnr(target + 5.0, target) == pytest.approx(20 * 0.30103, abs=1e-3)  # pixels are clipped to 1
