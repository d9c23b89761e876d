"""What training never sees: about a tenth of the (noun, colour) pairs and a tenth of the (noun, noun) pairs.

The rule is a hash of the names alone. It does not depend on a seed or on other nouns: a new icon moves no pair from one
side to the other.
"""

import hashlib
from functools import cache


@cache
def is_held_out(noun: str, color: str) -> bool:
    """Whether no training scene shows this noun in this colour."""
    return _falls_in_held_out_tenth(f"{noun} in {color}")


@cache
def is_held_out_pair(noun_a: str, noun_b: str) -> bool:
    """Whether no training scene shows these two nouns together, in either order."""
    first, second = sorted((noun_a, noun_b))
    return _falls_in_held_out_tenth(f"{first} with {second}")


def _falls_in_held_out_tenth(key: str) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10 == 0
