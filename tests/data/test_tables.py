"""Parquet files and data sets of the library `datasets`."""

import pickle
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emu3.data.samples import Broken
from emu3.data.shards import ShardInfo, write_shard
from emu3.data.sources import open_source
from emu3.data.tables import ParquetSource

from .reading import encoded, read, save, told

RED, BLUE = encoded("red"), encoded("blue", format="JPEG")


def write(path: Path, rows: list[dict[str, Any]], row_group_size: int = 100) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def test_drawings(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": RED, "path": "a.png"}, "text": " red "},
        {"image": {"bytes": None, "path": "b.png"}, "text": "b"},
        {"image": {"bytes": None, "path": "../c.png"}, "text": "c"},
        {"image": None, "text": "d"},
        {"image": {"bytes": BLUE, "path": None}, "text": None},
    ]
    save(tmp_path / "b.png")
    source = open_source(write(tmp_path / "x.parquet", rows, 2))
    assert (source.name, source.pieces) == ("x.parquet", 3)
    assert told(pickle.loads(pickle.dumps(source))) == {
        "x:0": ["prompt red", f"draw picture of {len(RED)}"],
        "x:1": ["prompt b", "draw picture b.png"],
        "x:2": "'../c.png' leaves the folder of the data; name a file inside it",
        "x:3": "no picture: the field image has no value",
        "x:4": "no caption: none of the fields text, caption has a value",
    }


def test_keys_and_plain_bytes_and_no_captions(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [{"image": RED, "id": 5}, {"image": RED, "id": 6}])
    write(tmp_path / "b.parquet", [{"image": RED, "key": "k"}])
    assert told(open_source(tmp_path)) == {key: [f"draw picture of {len(RED)}"] for key in ("5", "6", "k")}
    assert list(told(open_source(f"{tmp_path}/{{b,a}}.parquet"))) == ["k", "5", "6"]


def test_conversations(tmp_path: Path) -> None:
    def message(role: str, *parts: Any) -> dict[str, Any]:
        whole = [{"type": "text", "text": each, "image": None} if isinstance(each, str) else each for each in parts]
        return {"role": role, "content": whole}

    picture = {"type": "image", "text": None, "image": {"bytes": RED, "path": None}}
    place = {"type": "image", "text": None, "image": None}
    rows = [
        {"messages": [message("user", picture, "What?"), message("assistant", "red")], "images": None},
        {"messages": [message("user", place), message("assistant", "red")], "images": [{"bytes": RED, "path": None}]},
        {"messages": [message("user", "Hi"), message("assistant", "there")], "images": []},
        {"messages": [message("user", "Hi")], "images": []},
    ]
    assert told(open_source(write(tmp_path / "x.parquet", rows))) == {
        "x:0": [f"read picture of {len(RED)}", "prompt What?", "answer red"],
        "x:1": [f"read picture of {len(RED)}", "answer red"],
        "x:2": ["prompt Hi", "answer there"],
        "x:3": "nothing to learn: no message of the assistant that is trained on",
    }


def test_at_an_address(tmp_path: Path) -> None:
    with fsspec.open("memory://test_tables/x.parquet", "wb") as file:
        file.write(write(tmp_path / "x.parquet", [{"image": RED, "text": "red"}]).read_bytes())
    assert told(open_source("memory://test_tables/*.parquet")) == {"x:0": ["prompt red", f"draw picture of {len(RED)}"]}


def test_damaged_files(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [{"image": RED, "text": "red"}])
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    content = bytearray(
        write(tmp_path / "c.parquet", [{"image": RED + bytes([n]), "text": "x"} for n in range(9)]).read_bytes()
    )
    content[8:60] = bytes(52)
    (tmp_path / "c.parquet").write_bytes(content)
    good, broken, cut = read(open_source(tmp_path))
    assert good.key == "a:0"
    assert broken.key == "b" and broken.reason.startswith("the file is damaged: ")
    assert isinstance(cut, Broken) and cut.key == "c:0" and cut.reason.endswith("; the rest of its row group is lost")


def test_tables_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'x.parquet' has the columns a, b; looked for image, with text or caption, or me"
    ):
        ParquetSource(str(write(tmp_path / "x.parquet", [{"a": 1, "b": 2}])))
    info = ShardInfo(tokenizer="t", codebook_size=8, settings="s", source="x")
    write_shard(tmp_path / "shard.parquet", info, [])
    with pytest.raises(ValueError, match="is a shard, whose samples are tokenized already"):
        open_source(tmp_path / "shard.parquet")
    with pytest.raises(ValueError, match="has no rows"):
        schema = pa.schema([("image", pa.binary())])
        pq.write_table(schema.empty_table(), tmp_path / "empty.parquet")
        open_source(tmp_path / "empty.parquet")


def test_saved_data_sets(tmp_path: Path) -> None:
    import datasets

    rows = {"image": [{"bytes": RED, "path": None}] * 1001, "caption": ["red"] * 1001, "label": [0] * 1001}
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "one")
    source = open_source(tmp_path / "one")
    assert (source.name, source.pieces) == ("one", 2)
    again = pickle.loads(pickle.dumps(source))
    expected = {f"one:{n}": ["prompt red", f"draw picture of {len(RED)}"] for n in range(1001)}
    assert told(again) == expected
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "dict")
    assert open_source(tmp_path / "dict").pieces == 2
    datasets.DatasetDict({"a": made, "b": made}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"has the splits a, b; name one as .*/splits/SPLIT"):
        open_source(tmp_path / "splits")
    assert open_source(tmp_path / "splits" / "a").name == "a"


def test_saved_conversations(tmp_path: Path) -> None:
    import datasets

    messages = [{"role": "user", "content": "<image> What?"}, {"role": "assistant", "content": "red"}]
    made = datasets.Dataset.from_dict({"messages": [messages], "images": [[{"bytes": RED, "path": None}]]})
    made = made.cast_column("images", datasets.List(datasets.Image()))
    made.save_to_disk(tmp_path / "talk")
    parts = [f"read picture of {len(RED)}", "prompt What?", "answer red"]
    assert told(open_source(tmp_path / "talk")) == {"talk:0": parts}


def test_data_sets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(address: str, split: str | None) -> Any:
        asked.append((address, split))
        if split == "gone":
            raise OSError("no network")
        rows = {"image": [{"bytes": RED, "path": None}, {"bytes": None, "path": "/etc/passwd"}], "text": ["red", "x"]}
        made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        return datasets.DatasetDict({"test": made, "train": made}) if split is None else made

    monkeypatch.setattr(datasets, "load_dataset", load)
    for spec, name in (("hub:me/cats", "cats"), ("hub:me/cats:test", "cats:test")):
        source = open_source(spec)
        assert source.name == spec.removeprefix("hub:")
        assert told(source) == {
            f"{name}:0": ["prompt red", f"draw picture of {len(RED)}"],
            f"{name}:1": "'/etc/passwd' leaves the folder of the data; name a file inside it",
        }
    assert asked == [("me/cats", None), ("me/cats", "test")]
    with pytest.raises(ValueError, match="cannot load 'hub:me/cats:gone': no network"):
        open_source("hub:me/cats:gone")


@pytest.mark.parametrize(("name", "spec"), [("pyarrow", "x.parquet"), ("datasets", "hub:me/cats")])
def test_what_is_not_installed(name: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[train\]'"):
        open_source(spec)
