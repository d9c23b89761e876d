"""What a checkpoint needs and what there is, before anything is loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emu3 import cli
from emu3.checkpoints import NANO, memory
from emu3.checkpoints.info import inspect
from emu3.checkpoints.load import load_model
from emu3.checkpoints.memory import check_fits, free_memory, memory_needed
from emu3.pipeline import Emu3Pipeline
from emu3.quantization import Int8Linear


def weights(model: torch.nn.Module) -> int:
    """Bytes of what the files of a checkpoint become."""
    low = [tensor for each in model.modules() if isinstance(each, Int8Linear) for tensor in (each.weight, each.scales)]
    tables = [tensor for name, tensor in model.named_buffers() if "rotary" not in name]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *tables, *low]}.values())


def test_what_is_needed_is_what_loading_takes() -> None:
    needed = memory_needed(NANO)
    assert needed.keys() == {"float32", "bfloat16", "int8"}
    assert needed["float32"] == weights(load_model(NANO, dtype="float32"))
    assert needed["bfloat16"] == weights(load_model(NANO, dtype="bfloat16"))
    assert needed["int8"] == weights(load_model(NANO, dtype="bfloat16", int8=True))
    assert [needed[name] for name in needed] == [
        getattr(inspect(NANO), f"memory_{name}") for name in ("float32", "bfloat16", "int8")
    ]


def test_free_memory_is_some_of_this_machines() -> None:
    assert 0 < free_memory() < 2**50


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        (
            "0::/a/b",
            {
                "a/memory.max": "1000",
                "a/memory.current": "700",
                "a/memory.stat": "anon 1\nactive_file 50\ninactive_file 100\n",
                "a/b/memory.max": "max",
                "a/b/memory.current": "700",
                "a/b/memory.stat": "",
            },
            [450],
        ),
        (
            "4:memory:/a",
            {
                "memory/memory.limit_in_bytes": "9000",
                "memory/memory.usage_in_bytes": "8000",
                "memory/memory.stat": "total_active_file 0",
                "memory/a/memory.limit_in_bytes": "500",
                "memory/a/memory.usage_in_bytes": "100",
                "memory/a/memory.stat": "active_file 3\ntotal_active_file 7",
            },
            [407, 1000],
        ),
        ("3:cpuset:/", {}, []),
    ],
)
def test_limits_of_control_groups_count(tmp_path: Path, line, files, expected) -> None:
    (tmp_path / "groups").write_text(f"{line}\n")
    for name, content in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(content)
    assert list(memory._free_in_groups(tmp_path / "groups", tmp_path / "root")) == expected


GB = 10**9
# float32, bfloat16 and int8, as of the released model.
NEEDED = {("float32", False): 35 * GB, ("bfloat16", False): 18 * GB, ("bfloat16", True): 11 * GB}


@pytest.mark.parametrize(
    ("free", "arguments", "said"),
    [
        (21, {}, "needs 35.0 GB in float32, 21.0 GB are free: --dtype bfloat16 needs 18.0 GB, --int8 needs 11.0 GB"),
        (17, {}, "needs 35.0 GB in float32, 17.0 GB are free: --int8 needs 11.0 GB"),
        (17, {"dtype": torch.bfloat16}, "needs 18.0 GB in bfloat16, 17.0 GB are free: --int8 needs 11.0 GB"),
        (17, {"device": "cuda"}, "35.0 GB in float32, 17.0 GB are free: no other way fits; free some"),
        (
            9,
            {"dtype": "bfloat16", "int8": True},
            "needs 11.0 GB in int8 and bfloat16, 9.0 GB are free: no other way",
        ),
        (36, {}, None),
        (18, {"dtype": "bfloat16"}, None),
    ],
)
def test_what_does_not_fit_is_refused_and_what_does_is_named(monkeypatch, free, arguments, said) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: free * GB)
    monkeypatch.setattr(memory, "_needed", lambda folder, headers, dtype, int8: NEEDED[dtype, int8])
    if said is None:
        check_fits(NANO, **arguments)
    else:
        with pytest.raises(ValueError, match=said):
            check_fits(NANO, **arguments)


def test_the_pipeline_and_the_commands_refuse_too(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**6)
    with pytest.raises(ValueError, match=r"in float32, 0\.0 GB are free: no other way"):
        Emu3Pipeline.from_pretrained("nano")
    with pytest.raises(SystemExit) as stop:
        cli.main(["image", "a cat"])
    assert stop.value.code == 2 and "GB are free" in capsys.readouterr().err


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype 'float8' is unknown; it is one of auto, float32, bfloat16, float16"):
        check_fits(NANO, "float8")


def test_nothing_large_is_imported() -> None:
    code = """
import json, sys
from emu3.checkpoints import NANO
from emu3.checkpoints.memory import check_fits, memory_needed
check_fits(NANO)
memory_needed(NANO)
print(json.dumps([name for name in ("torch", "transformers") if name in sys.modules]))
"""
    path = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": path}
    )
    assert json.loads(done.stdout) == []
