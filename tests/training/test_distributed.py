"""Two processes that share out the weights (FSDP2 on gloo) train as one does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emu3.training.state import read_log

WORKER = Path(__file__).with_name("fsdp_worker.py")


def run(folder, processes, steps, optimizer="adamw", *, killed_after=None):
    """The losses and gradients' lengths of a run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    arguments = [*(launcher if processes > 1 else []), WORKER, folder, steps, optimizer]
    arguments += [] if killed_after is None else [killed_after]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == (killed_after is not None), done.stderr[-3000:]
    return [(line["loss"], line["gradient_norm"]) for line in read_log(folder)]


@pytest.mark.slow
def test_two_processes(tmp_path):
    """The losses of one process, within rounding; killed and resumed, bit for bit; resumed by one, within rounding."""
    one = run(tmp_path / "one", 1, 50)
    two = run(tmp_path / "two", 2, 50)
    assert len(one) == len(two) == 50
    assert one[-1][0] < 0.9 * one[0][0]
    assert two == [pytest.approx(each, rel=1e-4) for each in one]

    run(tmp_path / "killed", 2, 50, killed_after=31)
    shutil.copytree(tmp_path / "killed", tmp_path / "elastic")
    assert run(tmp_path / "killed", 2, 50) == two
    whole, resumed = (load_file(tmp_path / name / "weights.safetensors") for name in ("two", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert run(tmp_path / "elastic", 1, 50) == [pytest.approx(each, rel=1e-4) for each in one]


@pytest.mark.slow
def test_muon_on_two_processes(tmp_path):
    """Muon turns its updates in bfloat16, so rounding is coarser."""
    one, two = run(tmp_path / "one", 1, 10, "muon"), run(tmp_path / "two", 2, 10, "muon")
    assert two == [pytest.approx(each, rel=2e-3) for each in one]
