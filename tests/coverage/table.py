"""The documented API, item by item, with the test that exercises each.

`documented.txt` is what transformers' page on Emu3 promises (see `page.py`); `table.txt` says which test shows it, and
after "also" what else a user of that page relies on. `python tests/coverage/table.py` prints both with counts.
"""

import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent

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
    """One line of `documented.txt`; what it does not have is None."""

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


def documented() -> list[Item]:
    return [parse(line) for line in (HERE / "documented.txt").read_text().splitlines()]


def rows() -> dict[str, str]:
    """Item -> id of its test; of an item named twice, the last."""
    return dict(line.rsplit(maxsplit=1) for line in (HERE / "table.txt").read_text().splitlines())


def report() -> str:
    """The table, and how many items of each kind a class has."""
    items, tests = documented(), rows()
    width = max(map(len, tests))
    lines = [f"{item:{width}}  {test}" for item, test in tests.items()]
    lines += ["", *(f"{item}: {why}" for item, why in DEVIATIONS.items()), ""]
    kinds = list(dict.fromkeys(item.kind for item in items))
    lines.append("".join([f"{'':32}", *(f"{kind:>15}" for kind in kinds), f"{'all':>15}{'tested':>10}"]))
    owners = list(dict.fromkeys(item.owner for item in items))
    for owner in [*owners, None]:
        mine = [item for item in items if owner in (None, item.owner)]
        counts = Counter(item.kind for item in mine)
        tested = sum(item.text in tests for item in mine)
        numbers = "".join(f"{counts[kind]:>15}" for kind in kinds)
        lines.append(f"{owner or 'all':32}{numbers}{len(mine):>15}{tested:>10}")
    also = sum(item.startswith("also ") for item in tests)
    return "\n".join([*lines, "", f"{also} more rows for what the page relies on"])


if __name__ == "__main__":
    print(report())
    sys.exit(any(item.text not in rows() for item in documented()))
