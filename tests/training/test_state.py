"""What a run keeps on disk."""

import json

import pytest
import torch
from torch import nn

from emu3.training.state import load_state, read_log, save_state, saved_states, write_log


def trained(steps):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizers = [torch.optim.Muon([model.weight]), torch.optim.AdamW([model.bias])]
    averages = {"weight": model.weight.detach() + steps}
    for step in range(steps):
        model(torch.full((1, 3), step + 1.0)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return model, optimizers, averages


def everything(model, optimizers, averages):
    tensors = [*model.parameters(), *averages.values()]
    for optimizer in optimizers:
        for values in optimizer.state_dict()["state"].values():
            tensors += [torch.as_tensor(value) for _, value in sorted(values.items())]
    return tensors


def test_round_trip(tmp_path):
    before = trained(3)
    assert save_state(tmp_path, 3, *before, keep=1) == tmp_path / "state" / "step-000003"
    after = trained(0)
    after[0].frozen.data.fill_(5.0)
    assert load_state(tmp_path, *after) == 3
    assert after[0].frozen.tolist() == [5.0, 5.0]  # what is frozen is the checkpoint's
    after[0].frozen.data.fill_(1.0)
    tensors = everything(*before)
    assert len(tensors) == 3 + 1 + 1 + 3
    assert all(torch.equal(a, b) for a, b in zip(everything(*after), tensors, strict=True))


def test_nothing_saved(tmp_path):
    assert load_state(tmp_path, *trained(0)) == 0


def test_only_safetensors_and_json(tmp_path):
    folder = save_state(tmp_path, 3, *trained(3), keep=1)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_killed_while_saving(tmp_path):
    """Whatever a killed save leaves behind, the run goes on from a whole state."""
    save_state(tmp_path, 4, *trained(4), keep=1)
    half = tmp_path / "state" / "step-000005.new"
    half.mkdir()
    (half / "progress.json").write_text("{}")
    assert load_state(tmp_path, *trained(0)) == 4
    save_state(tmp_path, 5, *trained(5), keep=1)
    assert load_state(tmp_path, *trained(0)) == 5
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-000005"]


def test_a_state_of_another_model_is_refused(tmp_path):
    save_state(tmp_path, 1, *trained(1), keep=1)
    with pytest.raises(ValueError, match=r"step-000001 is of another model or recipe .*; give another output folder"):
        load_state(tmp_path, nn.Linear(4, 2), [], {})


def test_log(tmp_path):
    assert write_log(tmp_path / "run", step=1, loss=0.123456789) == "step 1  loss 0.12346"
    write_log(tmp_path / "run", step=2, loss=0.5)
    write_log(tmp_path / "run", step=2, loss=0.25)  # once more, after a kill
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "loss": 0.12346}
    assert read_log(tmp_path / "run") == [{"step": 1, "loss": 0.12346}, {"step": 2, "loss": 0.25}]
    assert saved_states(tmp_path) == []
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # cut by a kill
    write_log(tmp_path / "run", step=4, loss=0.125)
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 4]
