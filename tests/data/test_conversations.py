"""Conversations of JSON lines."""

import base64
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3.data.conversations import ConversationSource, read_talk
from emu3.data.samples import Broken, Sample
from emu3.data.sources import open_source

from .reading import encoded, read, save, told

RED = encoded()
BASE64 = base64.b64encode(RED).decode()


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def image(**where: Any) -> dict[str, Any]:
    return {"type": "image", **where}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_conversations(tmp_path: Path) -> None:
    save(tmp_path / "in" / "cat.png")
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, user("Hi <image>"), assistant("Hello!", train=False),
                      user([image(path="in/cat.png"), text("What "), text("is it?")]), assistant("a cat")]},
        [user([text("make it blue"), image(base64=BASE64)]), assistant([image(url=f"data:image/png;base64,{BASE64}")])],
        {"key": "mine",
         "messages": [user([{"type": "image_url", "image_url": {"url": "in/cat.png"}}]), assistant("cat")]},
        "",
        {"key": 7, "messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)]},
    ]  # fmt: skip
    source = open_source(write(tmp_path / "talk.jsonl", *rows))
    assert (source.name, source.pieces) == ("talk.jsonl", 1)
    assert told(pickle.loads(pickle.dumps(source))) == {
        "talk:1": [
            "system Be brief.",
            "prompt Hi <image>",
            "answer* Hello!",
            "read picture cat.png",
            "prompt What is it?",
            "answer a cat",
        ],
        "talk:2": ["prompt make it blue", f"read picture of {len(RED)}", f"draw picture of {len(RED)}"],
        "mine": ["read picture cat.png", "answer cat"],
        "7": ["prompt a", "answer* b", "prompt c", "answer d"],
    }


def test_clips(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    row = [user([{"type": "video", "path": "a.mp4"}, {"type": "video", "video": "a.mp4"}]), assistant("x")]
    other = [user([{"type": "video_url", "video_url": {"url": "a.mp4"}}, image(path="a.mp4")]), assistant("x")]
    found = told(ConversationSource(str(write(tmp_path / "t.jsonl", row, other))))
    assert set(found) == {"t:1", "t:2"}
    assert all(parts == ["read clip a.mp4", "read clip a.mp4", "answer x"] for parts in found.values())


def test_the_spelling_with_places_for_images(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / f"{name}.png")
    asked = {"from": "human", "value": "<image>\nWhat is it? <image> And this?"}
    said = {"from": "gpt", "value": "a cat"}
    rows = [
        {"image": ["a.png", "b.png"], "conversations": [asked, said]},
        {"images": ["a.png"], "messages": [user("Look: <image>"), assistant("yes")]},
        {"images": ["a.png"], "messages": [user([image(), text("What?")]), assistant("yes")]},
        {"images": ["a.png"], "conversations": [asked, said]},
        {"images": ["a.png", "b.png", "a.png"], "conversations": [asked, said]},
        {"conversations": [asked, said]},
    ]
    assert told(ConversationSource(str(write(tmp_path / "t.jsonl", *rows)))) == {
        "t:1": ["read picture a.png", "prompt What is it?", "read picture b.png", "prompt And this?", "answer a cat"],
        "t:2": ["prompt Look:", "read picture a.png", "answer yes"],
        "t:3": ["read picture a.png", "prompt What?", "answer yes"],
        "t:4": 'more places for pictures than pictures; give {"type": "image", "path": ...} or more images',
        "t:5": "1 of 3 pictures have no place in the messages; put <image> where they go",
        "t:6": ["prompt <image>\nWhat is it? <image> And this?", "answer a cat"],
    }


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("[", "not JSON"),
        ('"x"', "is no conversation"),
        ("[]", "the conversation is empty"),
        ({"messages": None}, "is no conversation"),
        ({"messages": ["x"]}, "is no conversation"),
        ([{"role": "user"}], "is no message"),
        ([user("x")], "nothing to learn"),
        ([user("x"), assistant("y", train=False)], "nothing to learn"),
        ([user("x"), assistant("y", train="no")], "train is 'no'"),
        ([user("x"), user("y"), assistant("z")], "two messages of the user follow each other"),
        ([user("x"), {"role": "system", "content": "y"}], "the role 'system' is out of place"),
        ([user("x"), {"role": "tool", "content": "y"}], "the role 'tool' is out of place"),
        ([{"role": "system", "content": [image(base64=BASE64)]}], "the system's message holds a picture"),
        ([user(" "), assistant("x")], "message 1 is empty"),
        ([user([]), assistant("x")], "message 1 is empty"),
        ([user([{"type": "audio"}]), assistant("x")], "is no content"),
        ([user([image(url="http://localhost/x.png")]), assistant("x")], "is an address, and nothing is fetched"),
        ([user([image(url="file:///etc/passwd")]), assistant("x")], "is an address, and nothing is fetched"),
        ([user([image(path="../out.png")]), assistant("x")], "leaves the folder"),
        ([user([image(path="/etc/passwd")]), assistant("x")], "leaves the folder"),
        ([user([image(path="link.png")]), assistant("x")], "leaves the folder"),
        ([user([image(path="gone.png")]), assistant("x")], "there is no such file"),
        ([user([image(path="a\0b")]), assistant("x")], "there is no such file"),
        ([user([image(url="data:image/png;base64,?")]), assistant("x")], "is no picture"),
        ([user([image(image=3)]), assistant("x")], "is no picture"),
        ([user([image(path="a.png", url="b.png")]), assistant("x")], "it has 2 pictures"),
        ([user("half \ud800"), assistant("x")], "half of a character"),
        ({"key": [], "messages": [user("x"), assistant("y")]}, "is no key"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_broken(tmp_path: Path, row: Any, reason: str) -> None:
    save(tmp_path / "out.png")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    (broken,) = read(ConversationSource(str(write(folder / "t.jsonl", row))))
    assert isinstance(broken, Broken) and broken.key == "t:1"
    assert reason in broken.reason


def test_pieces_are_runs_of_a_thousand_lines(tmp_path: Path) -> None:
    for name, count in (("a", 1000), ("b", 2001), ("c", 0)):
        rows = [[user("x" * (number % 7)), assistant("y" * 3000)] for number in range(count)]
        write(tmp_path / f"{name}.jsonl", *rows)
    source = open_source(tmp_path)
    assert source.pieces == 5
    firsts = [next(iter(source.read(piece)), None) for piece in range(4)]
    assert [first.key for first in firsts] == ["a:1", "b:1", "b:1001", "b:2001"]
    assert [each.key for each in read(source)] == [f"a:{n + 1}" for n in range(1000)] + [
        f"b:{n + 1}" for n in range(2001)
    ]


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(ValueError, match="holds no conversations"):
        open_source(tmp_path / "x.jsonl")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)
PARTS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image", "video", "image_url", "video_url"])},
        optional=dict.fromkeys(("text", "image", "url", "path", "video", "image_url", "video_url"), JSON),
    )
    | JSON,
    max_size=3,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system"]) | JSON,
            "content": PARTS | st.text() | JSON,
            "from": st.sampled_from(["human", "gpt"]) | JSON,
            "value": st.text() | JSON,
            "train": JSON,
        },
    ),
    max_size=4,
)
ROWS = st.fixed_dictionaries(
    {}, optional={"messages": MESSAGES, "conversations": MESSAGES | JSON, "images": JSON, "key": JSON}
)


@given(
    st.lists(st.binary() | (JSON | ROWS | MESSAGES).map(lambda row: json.dumps(row).encode()), min_size=1, max_size=8)
)
@settings(max_examples=60)
def test_any_line_is_a_sample_or_broken(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("any") / "t.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    for each in read(ConversationSource(str(path))):
        assert isinstance(each, Sample | Broken)
        each.key.encode()
        if isinstance(each, Broken):
            each.reason.encode()


def test_rows_nested_too_deeply() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        read_talk([user(deep), assistant("x")], "k", ())
