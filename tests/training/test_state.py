"""What a run keeps on disk."""

import json

import pytest
import torch
from torch import nn

from emu3.training.state import load_state, save_state, write_log


def trained(steps):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizers = [torch.optim.AdamW([model.weight]), torch.optim.Muon([model.weight]), torch.optim.SGD([model.bias])]
    for step in range(steps):
        model(torch.full((1, 3), step + 1.0)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return model, optimizers


def everything(model, optimizers):
    tensors = list(model.parameters())
    for optimizer in optimizers:
        for values in optimizer.state_dict()["state"].values():
            tensors += [torch.as_tensor(value) for _, value in sorted(values.items())]
    return tensors


def test_round_trip(tmp_path):
    before = trained(3)
    save_state(tmp_path, 3, *before)
    after = trained(0)
    assert load_state(tmp_path, *after) == 3
    tensors = everything(*before)
    assert len(tensors) == 2 + 3 + 1
    assert all(torch.equal(a, b) for a, b in zip(everything(*after), tensors, strict=True))


def test_nothing_saved(tmp_path):
    assert load_state(tmp_path, *trained(0)) == 0


def test_a_save_replaces_the_last_one(tmp_path):
    save_state(tmp_path, 1, *trained(1))
    save_state(tmp_path, 2, *trained(2))
    assert load_state(tmp_path, *trained(0)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("left", [("state", "state.new"), ("state.old", "state.new"), ("state", "state.old")], ids=str)
def test_killed_while_saving(tmp_path, left):
    """Whatever a killed save leaves behind, the run goes on from a whole state."""
    save_state(tmp_path, 4, *trained(4))
    (tmp_path / "state").rename(tmp_path / left[0])
    (tmp_path / left[1]).mkdir()
    assert load_state(tmp_path, *trained(0)) == 4
    save_state(tmp_path, 5, *trained(5))
    assert load_state(tmp_path, *trained(0)) == 5


def test_a_state_of_another_model_is_refused(tmp_path):
    save_state(tmp_path, 1, *trained(1))
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_state(tmp_path, nn.Linear(4, 2), [])


def test_log(tmp_path, capsys):
    write_log(tmp_path / "run", step=1, loss=0.123456789)
    write_log(tmp_path / "run", step=2, loss=0.5)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.12346}, {"step": 2, "loss": 0.5}]
    assert capsys.readouterr().out == "step 1  loss 0.12346\nstep 2  loss 0.5\n"
