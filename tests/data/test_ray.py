"""Tokenizing on a Ray cluster of two workers: the shards are those of one machine, even where a worker dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

RUN = """
import json, os, signal, sys
from pathlib import Path
import numpy as np
from PIL import Image
from emu3.data import job, ray
from emu3.data.samples import Broken, Media, Part, Sample
from emu3.segments import Text

class Noise:
    # Pieces of generated pictures. The process that reads the second piece first is killed in the middle of it.
    name, pieces = "noise", 4

    def __init__(self, mark):
        self.mark = mark

    def read(self, piece):
        numbers = np.random.default_rng(piece)
        for index in range(12):
            if piece == 1 and index == 8 and not Path(self.mark).exists():
                Path(self.mark).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            path = Path(self.mark).parent / f"{piece}-{index}.png"
            Image.fromarray(numbers.integers(0, 256, (48 + 4 * (index % 2), 48, 3), np.uint8)).save(path)
            yield Sample(f"{piece}-{index}", (Part("prompt", Text("noise")), Part("draw", Media("picture", str(path)))))
        yield Broken(f"{piece}-x", "on purpose")

if __name__ == "__main__":
    here = Path(sys.argv[1])
    (here / "there").touch()
    job.tokenize(Noise(str(here / "there")), here / "one", processes=1)
    seen = []
    source = Noise(str(here / "mark"))
    report = ray.tokenize(source, f"file://{here}/two", processes=2, device="cpu", on_progress=seen.append)
    again = ray.tokenize(source, here / "two", processes=2)
    print(json.dumps({"done": seen[-1].done, "seen": seen[-1].pictures, "samples": report.samples,
                      "broken": len(report.broken), "killed": Path(source.mark).exists(), "again": again.new_pictures}))
"""


@pytest.mark.slow
def test_the_same_shards_although_a_worker_was_killed(tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts == {"done": 4, "seen": 48, "samples": 48, "broken": 4, "killed": True, "again": 0}
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.parquet")} for name in ("one", "two")
    )
    assert len(one) == 4 and one == two
    assert sorted(os.listdir(tmp_path / "two")) == [*sorted(one), "report.json"]


def test_what_no_worker_can_reach_is_refused(tmp_path):
    from emu3.data.ray import tokenize

    with pytest.raises(ValueError, match="in the memory of one process"):
        tokenize(None, "memory://shards")
    with pytest.raises(ValueError, match="with Ray it is auto, cpu or cuda"):
        tokenize(None, tmp_path, device="cuda:1")
