"""What transformers' page on Emu3 promises is in our classes: names, order of arguments, defaults, fields of results.

`items.txt` holds the items, one a line; `page.py` says what a line means.
"""

import ast
import inspect
import re
import runpy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import emu3

HERE = Path(__file__).parent
PAGE_ITEMS = runpy.run_path(str(HERE / "page.py"))["items"]
CONFIGS = ("Emu3Config", "Emu3VQVAEConfig", "Emu3TextConfig")

DEVIATIONS = {
    "Emu3ImageProcessor.preprocess(do_pad=True)": "None here: the constructor's value, which is True unless changed",
    "Emu3Model.forward -> loss": "a slip of the page: the class has no head, in transformers neither",
    "Emu3Model.forward -> logits": "a slip of the page: the class has no head, in transformers neither",
    "Emu3TextConfig(rope_theta=1000000.0)": "lies in rope_parameters, as in transformers since version 5",
    "Emu3TextConfig(rope_scaling=None)": "lies in rope_parameters, as in transformers since version 5",
}
"""Items that our classes keep in another way than the page's words say."""

_ITEM = re.compile(
    r"(?P<owner>\w+)(\.(?P<method>\w+))?"
    r"(\((?P<argument>\*{0,2}\w+)(\[(?P<key>\w+)\])?(=(?P<default>.+))?\))?( -> (?P<field>\w+))?"
)


class Item(NamedTuple):
    """One line of `items.txt`; what it does not have is None."""

    text: str
    owner: str
    method: str | None = None
    argument: str | None = None
    key: str | None = None
    default: str | None = None
    field: str | None = None

    @property
    def kind(self) -> str:
        if self.text.endswith(" example"):
            return "examples"
        if self.key:
            return "keys"
        if self.argument:
            return "arguments"
        if self.field:
            return "return fields"
        return "methods" if self.method else "classes"


def parse(text: str) -> Item:
    if text.endswith(" example"):
        return Item(text, text.removesuffix(" example").split(".")[0])
    match = _ITEM.fullmatch(text)
    assert match is not None, text
    return Item(text, **match.groupdict())


ITEMS = [parse(line) for line in (HERE / "items.txt").read_text().splitlines()]


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


def test_items_are_named_once():
    texts = {item.text for item in ITEMS}
    assert len(texts) == len(ITEMS)
    assert set(DEVIATIONS) <= texts


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
    elif item.text in DEVIATIONS:
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
    if item.text in DEVIATIONS:
        assert item.field not in outputs[item.owner]
        assert outputs[item.owner].last_hidden_state is not None
    else:
        assert outputs[item.owner][item.field] is not None


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
    assert list(PAGE_ITEMS(page)) == [
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
