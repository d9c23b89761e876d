"""The training loop and its batches."""

import json
import signal
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from emu3.training import loop
from emu3.training.loop import Hook, StepResult, TrainingStopped, prefetch, run_loop
from emu3.training.recipe import RunSettings
from emu3.training.state import read_log, saved_states

pytestmark = pytest.mark.usefixtures("float32")


class Batch(NamedTuple):
    """Rows (B, 3) with weights (B,)."""

    rows: Tensor
    weights: Tensor
    keys: tuple[str, ...]


def make_batch(step, part):
    generator = torch.Generator().manual_seed(100 * step + part)
    count = 1 + (step + part) % 3
    rows = torch.randn(count, 3, generator=generator)
    return Batch(rows, torch.rand(count, generator=generator), tuple(f"{step}-{part}-{row}" for row in range(count)))


class Squares(nn.Module):
    """The weighted squares of a linear layer's results, with a random number that depends on the step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.seen = []

    def forward(self, batch):
        self.seen.append((batch.keys, self.training, float(torch.rand(()))))
        losses = (self.layer(batch.rows).square().sum(1) + 1) * batch.weights
        return StepResult(losses.sum(), batch.weights.sum(), {"size": (losses.sum(), torch.tensor(2.0))}, len(losses))


def adam(model):
    return [torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))]


def run(folder, objective, hooks=(), make=make_batch, **settings):
    settings = RunSettings(**{"steps": 6, "report_every": 2, "save_every": 3} | settings)
    run_loop(settings, folder, objective, adam, lambda step: [0.01 * (step + 1)], make, "rows", hooks)
    return objective


def test_a_step_is_the_weighted_mean_of_its_parts(tmp_path):
    """The same as one optimizer by hand, on the mean over all rows of all parts."""
    objective, by_hand = run(tmp_path, Squares(), parts=3), Squares()
    optimizer = adam(by_hand)[0]
    for step in range(6):
        batches = [make_batch(step, part) for part in range(3)]
        rows, weights = torch.cat([each.rows for each in batches]), torch.cat([each.weights for each in batches])
        loss = ((by_hand.layer(rows).square().sum(1) + 1) * weights).sum() / weights.sum()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
        loss.backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(objective.layer.weight, by_hand.layer.weight)
    keys, modes, randoms = zip(*objective.seen, strict=True)
    assert list(keys) == [make_batch(step, part).keys for step in range(6) for part in range(3)]
    assert all(modes) and not objective.training
    assert len(set(randoms)) == 18


def test_the_log(tmp_path):
    run(tmp_path, Squares())
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line["loss"] > 1 and line["rows_per_second"] > 0 and line["gradient_norm"] > 0 for line in lines)
    assert (tmp_path / "curve.png").stat().st_size > 1000
    page = (tmp_path / "report.html").read_text()
    assert f"{lines[-1]['loss']:.4g}" in page and "data:image/png;base64," in page and "<script" not in page


class Killed(Exception):
    pass


def kill(step, at):
    if step == at:
        raise Killed


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, average):
    whole = run(tmp_path / "whole", Squares(), parts=2, average=average)
    for at in (3, 4, 5):  # right after a state, and between two
        with pytest.raises(Killed):
            run(tmp_path / str(at), Squares(), [Hook(1, partial(kill, at=at))], parts=2, average=average)
        resumed = run(tmp_path / str(at), Squares(), parts=2, average=average)
        assert torch.equal(resumed.layer.weight, whole.layer.weight)
        assert resumed.seen == whole.seen[6:]
        assert read_log(tmp_path / str(at))[-1]["loss"] == read_log(tmp_path / "whole")[-1]["loss"]


def interrupt(step, at):
    if step == at:
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def hears_ctrl_c():
    """As a process at a terminal; one in the background of a script ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_saves_the_step_that_is_being_done(tmp_path, capsys):
    whole = run(tmp_path / "whole", Squares(), parts=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", Squares(), [Hook(1, partial(interrupt, at=3))], parts=2)
    assert "stopped after step 4, which is saved" in capsys.readouterr().out
    assert [path.name for path in saved_states(tmp_path / "a")] == ["step-000004"]
    resumed = run(tmp_path / "a", Squares(), parts=2)
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_that_goes_on_tells_what_was_changed_and_drops_later_reports(tmp_path, capsys):
    with pytest.raises(Killed):
        run(tmp_path, Squares(), [Hook(1, partial(kill, at=5))], report_every=1)
    run(tmp_path, Squares(), report_every=1, gradient_norm=0.5)
    assert "gradient_norm: 1.0 before, 0.5 from here on" in capsys.readouterr().out
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_averages_are_what_hooks_see_and_what_is_left(tmp_path):
    seen, plain = [], []
    objective = Squares()
    watch = Hook(1, lambda step: seen.append(objective.layer.weight.detach().clone()))
    run(tmp_path / "a", objective, [watch], average=0.5)
    other = Squares()
    run(tmp_path / "b", other, [Hook(1, lambda step: plain.append(other.layer.weight.detach().clone()))])
    average = Squares().layer.weight.detach()
    for found, weight in zip(seen, plain, strict=True):
        average = 0.5 * average + 0.5 * weight
        torch.testing.assert_close(found, average)
    assert torch.equal(objective.layer.weight, seen[-1])


def broken(step, part, kind):
    batch = make_batch(step, part)
    return batch._replace(rows=batch.rows * kind) if step == 60 else batch


@pytest.mark.parametrize(("kind", "message"), [(float("nan"), "which is no number"), (100.0, "in the steps before")])
def test_a_loss_that_is_wrong_stops_the_run(tmp_path, kind, message):
    objective = Squares()
    message = rf"step 60, .*{message}; samples: 60-0-0.*; last good state: .*step-000050; lower"
    with pytest.raises(TrainingStopped, match=message):
        run(tmp_path, objective, make=partial(broken, kind=kind), steps=80, save_every=50)
    assert objective.layer.weight.isfinite().all()


def later(step, part):
    batch = make_batch(step, part)
    return batch if step < 60 else batch._replace(rows=batch.rows * 1e3)


def test_other_data_are_no_explosion(tmp_path):
    """A loss that jumps where the data change goes on; the same jump anywhere else stops the run."""
    settings = RunSettings(steps=70, report_every=50, save_every=70)
    rates = lambda step: [1e-9]  # noqa: E731
    run_loop(settings, tmp_path / "a", Squares(), adam, rates, later, "rows", changes={60})
    with pytest.raises(TrainingStopped, match="in step 60, after"):
        run_loop(settings, tmp_path / "b", Squares(), adam, rates, later, "rows", changes={3})


class Cliff(Squares):
    """In step 4 the loss is fine and its gradient is not."""

    def forward(self, batch):
        result = super().forward(batch)
        if batch.keys[0][0] != "4":
            return result
        return result._replace(loss=result.loss + 0 * (self.layer.weight.sum() * 0).abs().sqrt())


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path):
    objective = Cliff()
    with pytest.raises(TrainingStopped, match=r"the gradient is nan in step 4; samples: 4-0-0.*step-000003; lower"):
        run(tmp_path, objective)
    assert objective.layer.weight.isfinite().all()


def test_states_are_kept_as_asked(tmp_path):
    run(tmp_path, Squares(), save_every=1, keep_states=2)
    assert [path.name for path in saved_states(tmp_path)] == ["step-000005", "step-000006"]
    for name in ("step-1000000", "step-999999"):
        (tmp_path / "state" / name).mkdir()
        (tmp_path / "state" / name / "progress.json").write_text("{}")
    assert [path.name for path in saved_states(tmp_path)][-2:] == ["step-999999", "step-1000000"]


def square(step, part):
    return step * step + part


def test_batches_made_by_other_processes_come_in_order(monkeypatch):
    monkeypatch.setattr(loop.os, "cpu_count", lambda: 4)
    assert list(prefetch(square, [(step, 1) for step in range(3, 9)])) == [10, 17, 26, 37, 50, 65]


def test_log_lines_are_json(tmp_path):
    run(tmp_path, Squares())
    assert all(isinstance(json.loads(line), dict) for line in (tmp_path / "log.jsonl").read_text().splitlines())
