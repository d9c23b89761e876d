"""Every documented item is in our classes, with its default, and in the table, with a test that exists."""

import ast
import inspect
import re
import runpy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import emu3

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TABLE = SimpleNamespace(**runpy.run_path(str(HERE / "table.py")))
PAGE = SimpleNamespace(**runpy.run_path(str(HERE / "page.py")))
ITEMS = TABLE.documented()
TESTS = TABLE.rows()
CONFIGS = ("Emu3Config", "Emu3VQVAEConfig", "Emu3TextConfig")


def of_kind(*kinds: str) -> Any:
    chosen = [item for item in ITEMS if item.kind in kinds]
    return pytest.mark.parametrize("item", chosen, ids=[item.text for item in chosen])


def callee(item: Any) -> Any:
    """The class or method that an item belongs to."""
    owner = getattr(emu3, item.owner)
    # The page calls a class without a `forward` by what torch puts in its place.
    return owner.forward if item.method == "_forward_unimplemented" else getattr(owner, item.method or "__init__")


def is_default(found: Any, written: str) -> bool:
    """Whether a value is the one that the page writes; an enumeration's member is written <Kind.MEMBER: value>."""
    if member := re.match(r"<\w+\.(\w+): ", written):
        return bool(found.name == member[1])
    expected = ast.literal_eval(written)
    found = list(found) if isinstance(found, tuple) else found
    return bool(found == expected) and isinstance(found, bool) == isinstance(expected, bool)


@cache
def functions(path: str) -> dict[str, str]:
    """Test function -> its source, of a file."""
    tree = ast.parse((ROOT / path).read_text())
    return {node.name: ast.unparse(node) for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("item", ITEMS, ids=[item.text for item in ITEMS])
def test_every_item_has_a_row(item):
    assert item.text in TESTS, f"add '{item.text}' and its test to table.txt"


@pytest.mark.parametrize(("item", "test"), TESTS.items(), ids=list(TESTS))
def test_every_row_has_an_item_and_a_test(item, test):
    assert item.startswith("also ") or item in {each.text for each in ITEMS}, f"{item} is not in documented.txt"
    path, _, function = test.partition("::")
    assert function in functions(path), f"{test} does not exist"
    assert not re.search(r"pytest\.skip|mark\.(skip|xfail)", functions(path)[function])


@of_kind("arguments", "keys", "return fields")
def test_a_rows_test_names_what_it_exercises(item):
    """In its own lines or in the tables and fixtures of its file."""
    name = item.key or item.argument or item.field
    if not name.startswith("*"):
        assert re.search(rf"\b{name}\b", (ROOT / TESTS[item.text].partition("::")[0]).read_text())


def test_one_row_for_each_item():
    lines = (HERE / "table.txt").read_text().splitlines()
    assert len(lines) == len(TESTS)
    assert len({item.text for item in ITEMS}) == len(ITEMS)
    assert set(TABLE.DEVIATIONS) <= {item.text for item in ITEMS}


@of_kind("classes", "methods")
def test_classes_and_methods(item):
    assert callable(getattr(emu3, item.owner) if item.method is None else callee(item))


@of_kind("arguments")
def test_arguments_and_defaults(item):
    if item.owner in CONFIGS:
        config = getattr(emu3, item.owner)()
        if item.argument == "**kwargs":
            assert getattr(emu3, item.owner)(output_attentions=True, note=1).note == 1
        elif item.argument == "rope_theta":
            assert is_default(config.rope_parameters["rope_theta"], item.default)
        elif item.argument == "rope_scaling":
            assert config.rope_parameters["rope_type"] == "default"
        elif item.owner == "Emu3Config" and item.argument != "vocabulary_map":
            # Without them the parts are those of the released model.
            kind = {"vq_config": emu3.Emu3VQVAEConfig, "text_config": emu3.Emu3TextConfig}[item.argument]
            given = getattr(emu3.Emu3Config(**{item.argument: ast.literal_eval(item.default)}), item.argument)
            assert isinstance(given, kind)
        else:
            assert is_default(getattr(config, item.argument), item.default)
        return
    parameters = inspect.signature(callee(item)).parameters
    parameter = parameters[item.argument.lstrip("*")]
    if item.argument.startswith("**"):
        assert parameter.kind is inspect.Parameter.VAR_KEYWORD
    elif item.argument.startswith("*"):
        assert parameter.kind is inspect.Parameter.VAR_POSITIONAL
    elif item.text in TABLE.DEVIATIONS:
        assert parameter.default is None
    elif item.default is not None:
        assert is_default(parameter.default, item.default)


POSITIONAL = list(
    dict.fromkeys((item.owner, item.method) for item in ITEMS if item.kind == "arguments" and item.owner not in CONFIGS)
)


@pytest.mark.parametrize(("owner", "method"), POSITIONAL, ids=str)
def test_arguments_come_in_the_documented_order(owner, method):
    """So that they may be given by position; of a configuration they go by name, as in transformers since version 5."""
    listed = [item for item in ITEMS if (item.owner, item.method, item.kind) == (owner, method, "arguments")]
    names = [item.argument for item in listed if not item.argument.startswith("*")]
    found = [name for name in inspect.signature(callee(listed[0])).parameters if name != "self"]
    assert found[: len(names)] == names


@pytest.fixture(scope="module")
def outputs(tiny_checkpoint):
    """What `forward` of each class returns when asked for everything."""
    found = {}
    for owner in {item.owner for item in ITEMS if item.field}:
        model = getattr(emu3, owner).from_pretrained(tiny_checkpoint, attn_implementation="eager")
        ids = torch.tensor([[1, 2, 3]])
        labels = {"labels": ids} if owner.startswith("Emu3For") else {}
        with torch.no_grad():
            found[owner] = model(ids, output_hidden_states=True, output_attentions=True, use_cache=True, **labels)
    return found


@of_kind("return fields")
def test_return_fields(item, outputs):
    if item.text in TABLE.DEVIATIONS:
        assert item.field not in outputs[item.owner]
        assert outputs[item.owner].last_hidden_state is not None
    else:
        assert outputs[item.owner][item.field] is not None


def test_report_counts_every_item():
    lines = TABLE.report().splitlines()
    total = next(line for line in lines if line.startswith("all "))
    assert total.split()[-2:] == [str(len(ITEMS))] * 2
    assert sum(line.startswith(("Emu3", "Text", "Image", "also ")) for line in lines) >= len(TESTS)


def test_items_of_a_page():
    page = r"""
### class transformers.Emu3Thing

( size: typing.Union[int, dict[str, int]] = 3 sides: list = [1, 2] config \*\*kwargs  )

* **size** (`int`) —
  Expected contents:
  `factor` (`float`):
* **hidden** (`int`, defaults to 2) —

#### for\_ward

( input\_ids: Tensor = None kind: Kind = <Kind.ONE: 1>  ) → `tuple`

* **input\_ids** (`Tensor`) —

Returns

* **logits** (`Tensor`) — Scores.

```
### class transformers.Printed
```
"""
    assert list(PAGE.items(page)) == [
        "Emu3Thing",
        "Emu3Thing(size=3)",
        "Emu3Thing(sides=[1, 2])",
        "Emu3Thing(config)",
        "Emu3Thing(**kwargs)",
        "Emu3Thing(size[factor])",
        "Emu3Thing(hidden)",
        "Emu3Thing.for_ward",
        "Emu3Thing.for_ward(input_ids=None)",
        "Emu3Thing.for_ward(kind=<Kind.ONE: 1>)",
        "Emu3Thing.for_ward -> logits",
        "Emu3Thing.for_ward example",
    ]
