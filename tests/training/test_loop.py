"""The training loop and its batches."""

import json

import pytest
import torch
from torch import nn

from emu3.training import loop
from emu3.training.loop import StepResult, average, prefetch, run_loop
from emu3.training.recipe import RunSettings


def square(step):
    return step * step


def test_average_of_the_steps_that_have_a_metric():
    assert average([{"a": 1.0}, {"a": 3.0, "b": 5.0}]) == {"a": 2.0, "b": 5.0}


@pytest.mark.parametrize(("report_means", "losses"), [(True, [0.5, 2.5]), (False, [1.0, 3.0])])
def test_reports_rates_and_modes(tmp_path, report_means, losses):
    model = nn.Linear(2, 1)
    optimizers = [torch.optim.SGD([model.weight]), torch.optim.SGD([model.bias])]
    seen = []

    def compute(batch, step):
        seen.append((batch, step, model.training, [each.param_groups[0]["lr"] for each in optimizers]))
        return StepResult(model(torch.ones(1, 2)).sum(), {"loss": float(step)}, size=3)

    run_loop(
        RunSettings(steps=4, report_every=2, save_every=3),
        tmp_path,
        model,
        optimizers,
        learning_rates=lambda step: [0.1 * step, 0.2],
        make_batch=square,
        compute=compute,
        unit="words",
        report_means=report_means,
    )
    assert seen == [(step * step, step, True, [0.1 * step, 0.2]) for step in range(4)]
    assert not model.training
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(2, losses[0]), (4, losses[1])]
    assert all(line["words_per_second"] > 0 for line in lines)
    assert json.loads((tmp_path / "state" / "progress.json").read_text()) == {"step": 4}


def test_batches_made_by_other_processes_come_in_order(monkeypatch):
    monkeypatch.setattr(loop.os, "cpu_count", lambda: 4)
    assert list(prefetch(square, range(3, 9))) == [9, 16, 25, 36, 49, 64]
