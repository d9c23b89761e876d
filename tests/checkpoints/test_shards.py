import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open
from safetensors.numpy import save_file

from emu3.checkpoints.convert import write_shards
from emu3.checkpoints.files import TensorHeader, read_headers


def write_source(folder: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> dict[str, TensorHeader]:
    """A safetensors file written by hand, so that any bits can stand in it: name -> dtype, shape, bytes."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    encoded = json.dumps(header).encode()
    (folder / "source.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return read_headers(folder)


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in deserialize(file.read_bytes()):
            found[name] = (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
    return found


WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1, "BOOL": 1}
TENSORS = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6),
    st.sampled_from(sorted(WIDTHS)).flatmap(
        lambda dtype: st.lists(st.integers(0, 4), max_size=3).flatmap(
            lambda shape: st.binary(
                min_size=int(np.prod(shape, dtype=int)) * WIDTHS[dtype],
                max_size=int(np.prod(shape, dtype=int)) * WIDTHS[dtype],
            ).map(lambda content: (dtype, tuple(shape), content))
        )
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=50, deadline=None)
@given(tensors=TENSORS, limit=st.integers(1, 300))
def test_every_bit_of_every_dtype_is_kept(tmp_path_factory: pytest.TempPathFactory, tensors, limit: int) -> None:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    headers = write_source(source, tensors)
    told: list[int] = []
    write_shards(target, {f"new.{n}": (h, h.shape) for n, h in headers.items()}, limit, told.append)
    assert contents(target) == {f"new.{name}": tensor for name, tensor in tensors.items()}
    assert sum(told) == sum(len(content) for _, _, content in tensors.values())


def test_a_shape_may_change_and_the_bits_stay(tmp_path: Path) -> None:
    content = np.arange(6, dtype=np.float32).tobytes()
    (header,) = write_source(tmp_path, {"a": ("F32", (2, 3), content)}).values()
    (tmp_path / "out").mkdir()
    write_shards(tmp_path / "out", {"b": (header, (2, 3, 1, 1))})
    assert contents(tmp_path / "out") == {"b": ("F32", (2, 3, 1, 1), content)}


def test_each_tensor_begins_at_a_multiple_of_its_elements_width(tmp_path: Path) -> None:
    mixed = {"a": ("U8", (3,), b"abc"), "b": ("F32", (1,), b"1234"), "c": ("I64", (), b"12345678")}
    headers = write_source(tmp_path, mixed)
    (tmp_path / "out").mkdir()
    write_shards(tmp_path / "out", {name: (header, header.shape) for name, header in headers.items()})
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:start])
    for name, (dtype, _, _) in mixed.items():
        assert (start + entries[name]["data_offsets"][0]) % WIDTHS[dtype] == 0, name


def test_shards_keep_to_their_size_and_have_an_index(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "out").mkdir()
    save_file({f"t{n}": np.full(10, n, np.float32) for n in range(7)}, tmp_path / "source" / "model.safetensors")
    headers = read_headers(tmp_path / "source")
    write_shards(tmp_path / "out", {name: (h, h.shape) for name, h in headers.items()}, max_shard_bytes=100)
    names = [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == names
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 280}
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="numpy") as opened:
            assert opened.get_tensor(name).tolist() == [int(name[1:])] * 10
            assert opened.metadata() == {"format": "pt"}


PEAK = """
import sys, threading, time
from pathlib import Path
from emu3.checkpoints.convert import write_shards
from emu3.checkpoints.files import read_headers

def anonymous():
    return int(Path('/proc/self/status').read_text().split('RssAnon:')[1].split()[0]) * 1024

def watch():
    while True:
        seen.append(anonymous())
        time.sleep(0.002)

source, target, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
seen = [anonymous()]
threading.Thread(target=watch, daemon=True).start()
write_shards(target, {name: (header, header.shape) for name, header in read_headers(source).items()}, limit)
print(max(seen) - seen[0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """Twelve tensors of 64 MiB in one file: what cannot be dropped again, as mapped files can, is less than a shard."""
    (tmp_path / "source").mkdir()
    (tmp_path / "out").mkdir()
    size, count = 2**26, 12
    header = {
        f"t{n}": {"dtype": "U8", "shape": [size], "data_offsets": [n * size, (n + 1) * size]} for n in range(count)
    }
    encoded = json.dumps(header).encode()
    with (tmp_path / "source" / "model.safetensors").open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for _ in range(count):
            stream.write(os.urandom(1024) * (size // 1024))
    command = [sys.executable, "-c", PEAK, str(tmp_path / "source"), str(tmp_path / "out"), str(2 * size)]
    path = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": path})
    mebibytes = [number >> 20 for number in (int(done.stdout), count * size, 2 * size)]
    print("peak {} MiB for {} MiB in shards of {} MiB".format(*mebibytes))
    assert int(done.stdout) < 2 * size
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == count // 2
