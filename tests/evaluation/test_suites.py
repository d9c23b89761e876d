"""Prompt files of the suites: read as they are published; malformed ones are refused with place and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emu3.evaluation.suites import SUITES, Prompt, read_prompts, suite_named

GENEVAL = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
EDIT = {"id": "animal/cat.png", "prompt": "make the cat blue", "edit_type": "adjust"}


def prompts_of(suite: str, file: Path, text: str, encoding: str = "utf-8") -> list[Prompt]:
    file.write_bytes(text.encode(encoding, "surrogatepass"))
    return read_prompts(suite_named(suite), file)


def test_geneval_keeps_each_line_as_metadata(tmp_path: Path) -> None:
    first, second = prompts_of("geneval", tmp_path / "a.jsonl", f"{json.dumps(GENEVAL)}\n{json.dumps(GENEVAL)}")
    assert (first.words, first.name, first.samples, first.metadata) == ("a photo of a dog", "00000", 4, GENEVAL)
    assert second.name == "00001"


def test_dpg_bench_reads_a_folder_in_order_of_names(tmp_path: Path) -> None:
    for name in ("2", "10", "partiprompts3"):
        (tmp_path / f"{name}.txt").write_text(f"prompt {name}\n")
    (tmp_path / "notes.md").write_text("no prompt")
    prompts = read_prompts(SUITES["dpg-bench"], tmp_path)
    assert [(prompt.name, prompt.words) for prompt in prompts] == [
        (name, f"prompt {name}") for name in ("10", "2", "partiprompts3")
    ]


def test_t2i_compbench_reads_what_is_before_a_tab(tmp_path: Path) -> None:
    prompts = prompts_of("t2i-compbench", tmp_path / "a.txt", "a red car\tseen\r\na dog, a cat.")
    assert [(prompt.words, prompt.samples) for prompt in prompts] == [("a red car", 10), ("a dog, a cat.", 10)]


def test_vbench_asks_for_more_of_what_may_flicker_and_joins_what_comes_twice(tmp_path: Path) -> None:
    entries = [("a", ["color"]), ("b", ["temporal_flickering"]), ("a", ["scene", "dynamic_degree"])]
    text = json.dumps([{"prompt_en": words, "dimension": names} for words, names in entries])
    prompts = prompts_of("vbench", tmp_path / "a.json", text)
    assert [(prompt.words, prompt.samples) for prompt in prompts] == [("a", 5), ("b", 25)]
    assert all(len(suite_named("vbench").counted(prompts, 2)) == 2 for _ in prompts)


def test_imgedit_finds_pictures_beside_the_file_or_in_a_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "pictures"):
        (folder / "animal").mkdir(parents=True)
        (folder / "animal" / "cat.png").write_bytes(b"")
    (prompt,) = prompts_of("imgedit", tmp_path / "a.json", json.dumps({"1082": EDIT}))
    assert (prompt.name, prompt.words, prompt.picture) == ("1082", EDIT["prompt"], tmp_path / "animal/cat.png")
    (prompt,) = read_prompts(SUITES["imgedit"], tmp_path / "a.json", tmp_path / "pictures")
    assert prompt.picture == tmp_path / "pictures/animal/cat.png"


MALFORMED = [
    ("geneval", "", ": there are no prompts"),
    ("geneval", "\n\n", ": there are no prompts"),
    ("geneval", json.dumps(GENEVAL) + "\n{", ", line 2: this is not JSON"),
    ("geneval", json.dumps(GENEVAL) + "\n\n" + json.dumps(GENEVAL), ", line 2: this is not JSON"),
    ("geneval", "[1]", ", line 1: '[1]' is no JSON object"),
    ("geneval", '{"prompt": "a dog"}', ", line 1: tag must be a string"),
    ("geneval", '{"tag": "counting", "prompt": " "}', ", line 1: prompt must not be empty"),
    ("geneval", "[" * 100_000, ", line 1: this JSON cannot be read"),
    ("geneval", '{"tag": ' + "9" * 5000 + "}", ", line 1: this JSON cannot be read"),
    ("t2i-compbench", "a dog\n\na cat", ", line 2: prompt must not be empty"),
    ("t2i-compbench", "a dog\na_cat", ", line 2: 'a_cat' has an underscore"),
    ("t2i-compbench", "a dog/a cat", ", line 1: 'a dog/a cat' has a sign that no file's name can have"),
    ("t2i-compbench", "very " * 60 + "red", ", line 1: 'very"),
    ("t2i-compbench", "\ud800", ", byte 0: this is no UTF-8"),
    ("vbench", "{}", ": a JSON dict is no list"),
    ("vbench", '[\n{"prompt_en": 1},\n]', ", line 3: this is not JSON"),
    ("vbench", "[3]", ", entry 1: 3 is no JSON object"),
    ("vbench", '[{"prompt_en": "a", "dimension": ["color"]}, {"dimension": []}]', ", entry 2: prompt_en must be"),
    ("vbench", '[{"prompt_en": "a", "dimension": "color"}]', ", entry 1: dimension must be a list"),
    ("vbench", '[{"prompt_en": "\\ud800", "dimension": []}]', ", entry 1: prompt_en '\\ud800' is not valid Unicode"),
    ("vbench", '[{"prompt_en": "a\\u0000", "dimension": []}]', ", entry 1: 'a\\x00' has a sign"),
    ("imgedit", "[]", ": a JSON list is no object"),
    ("imgedit", "{}", ": there are no prompts"),
    ("imgedit", '{"1": {"id": "none.png", "prompt": "a", "edit_type": "add"}}', ", key '1': there is no picture"),
    ("imgedit", '{"1": {"id": "a\\u0000", "prompt": "a", "edit_type": "add"}}', ", key '1': there is no picture"),
    ("imgedit", '{"1": {"prompt": "a", "edit_type": "add"}}', ", key '1': id must be a string"),
    ("imgedit", '{"1": null}', ", key '1': None is no JSON object"),
]


@pytest.mark.parametrize(("suite", "text", "problem"), MALFORMED)
def test_malformed_files_are_refused_with_place_and_remedy(suite: str, text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    with pytest.raises(ValueError) as refused:
        prompts_of(suite, file, text)
    assert str(refused.value).startswith(f"{file}{problem}")
    assert "; " in str(refused.value)


def test_files_that_are_missing_are_refused(tmp_path: Path) -> None:
    for suite in SUITES.values():
        with pytest.raises(ValueError, match=r"is no folder|there is no file"):
            read_prompts(suite, tmp_path / "none")
    with pytest.raises(ValueError, match="there are no prompts"):
        read_prompts(SUITES["dpg-bench"], tmp_path)
    (tmp_path / "a.b.txt").write_text("a dog")
    with pytest.raises(ValueError, match=r"a\.b\.txt: a name with a full stop .*; rename the file"):
        read_prompts(SUITES["dpg-bench"], tmp_path)
    with pytest.raises(ValueError, match="suite must be one of geneval, dpg-bench"):
        suite_named("nope")
    with pytest.raises(ValueError, match=r"leave --pictures '.*' out"):
        read_prompts(SUITES["geneval"], tmp_path, tmp_path)


@pytest.mark.parametrize(("suite", "most"), [("dpg-bench", 4), ("imgedit", 1)])
def test_more_samples_than_a_script_tells_apart_are_refused(suite: str, most: int) -> None:
    prompt = Prompt("a dog", "1", most)
    assert len(SUITES[suite].files(SUITES[suite].counted([prompt], most))) == 1
    for number in (0, most + 1):
        with pytest.raises(ValueError, match=f"per_prompt must be a whole number, from 1 to {most}, got {number}"):
            SUITES[suite].counted([prompt], number)


JSON: Any = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "tag", "prompt_en", "dimension", "id", "edit_type", "1"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)
TEXTS = (
    st.text(st.characters(codec=None), max_size=40)
    | JSON.map(json.dumps)
    | st.lists(JSON.map(json.dumps)).map("\n".join)
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(suite=st.sampled_from(sorted(SUITES)), text=TEXTS)
def test_any_file_is_read_or_refused(suite: str, text: str, tmp_path: Path) -> None:
    """What is read can be laid out: every path is one inside the folder, and no two are the same."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    source = tmp_path if suite == "dpg-bench" else file
    try:
        prompts = read_prompts(suite_named(suite), source)
    except ValueError as error:
        assert str(error).startswith(str(source))
        assert "; " in str(error)
        return
    paths = [each.path for each in suite_named(suite).files(prompts)]
    assert len(set(paths)) == len(paths)
    for path in paths:
        assert (tmp_path / path).resolve().is_relative_to(tmp_path)
        assert all(len(part.encode()) <= 255 and "\0" not in part for part in Path(path).parts)
