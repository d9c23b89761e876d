"""The items of a documentation page: what it promises, one line each.

    Emu3Config                              a class
    Emu3Config(vq_config=None)              an argument and its default; without "=" there is none
    Emu3TextConfig(rope_scaling[factor])    a key of an argument that is a dictionary
    Emu3Model.forward                       a method
    Emu3Model.forward -> logits             a field of what it returns
    Emu3Model.forward example               a block of code

`python tests/documented/page.py PAGE.md` prints them. `items.txt` beside this file is its output for the page of
transformers 4.56.2 on Emu3.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

BRACKETS = {"[": 1, "(": 1, "<": 1, "]": -1, ")": -1, ">": -1}


def words(signature: str) -> Iterator[str]:
    """The words of a signature; spaces inside brackets do not part."""
    word, depth = "", 0
    for character in signature + " ":
        depth += BRACKETS.get(character, 0)
        if character != " " or depth:
            word += character
        elif word:
            yield word
            word = ""


def arguments(signature: str) -> dict[str, str | None]:
    """Argument -> default as written, None where there is none; types are dropped."""
    found: dict[str, str | None] = {}
    name, parts = "", words(signature)
    for word in parts:
        if word == "=":
            found[name] = next(parts)
            continue
        if word.endswith(":"):
            next(parts)
        name = word.rstrip(":")
        found[name] = None
    return found


def items(page: str) -> Iterator[str]:
    """The items of a page in the markdown of transformers' documentation, in order."""
    owner, returns, listed, code = "", False, set[str](), False
    for raw in page.splitlines():
        line = raw.replace("\\_", "_").replace("\\*", "*")
        if line.startswith("```"):
            code = not code
            if code:
                yield f"{owner} example"
        elif code:
            continue
        elif heading := re.fullmatch(r"### class transformers\.(\w+)", line):
            owner, returns, listed = heading[1], False, set()
            yield owner
        elif heading := re.fullmatch(r"#### (\w+)", line):
            owner, returns, listed = f"{owner.split('.')[0]}.{heading[1]}", False, set()
            yield owner
        elif heading := re.fullmatch(r"### (.+)", line):
            owner = heading[1]
        elif line.startswith("( "):
            for name, default in arguments(line[2 : line.rindex("  )")]).items():
                listed.add(name)
                yield f"{owner}({name})" if default is None else f"{owner}({name}={default})"
        elif line == "Returns":
            returns = True
        elif match := re.match(r"\* \*\*(\w+)\*\* ", line):
            argument = match[1]
            if returns:
                yield f"{owner} -> {argument}"
            elif argument not in listed:
                yield f"{owner}({argument})"
        elif match := re.match(r"  `(\w+)` \(`", line):
            yield f"{owner}({argument}[{match[1]}])"


if __name__ == "__main__":
    print("\n".join(items(Path(sys.argv[1]).read_text())))
