"""Pictures that look alike."""

import random

import numpy as np
from PIL import Image

from emu3.data.duplicates import ALIKE, alike, difference_hash


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((140, 120), Image.Resampling.BICUBIC)


def test_the_hash_of_a_ramp() -> None:
    ramp = np.arange(90, dtype=np.uint8)[None].repeat(80, 0)
    assert difference_hash(Image.fromarray(ramp)) == 0
    assert difference_hash(Image.fromarray(ramp[:, ::-1])) == 2**64 - 1
    assert difference_hash(Image.new("RGB", (9, 8), "red")) is None


def test_the_hash_survives_another_size_and_compression() -> None:
    hashes = [difference_hash(noise(seed)) for seed in range(20)]
    smaller = [difference_hash(noise(seed).resize((61, 53))) for seed in range(20)]
    assert all((one ^ other).bit_count() <= ALIKE for one, other in zip(hashes, smaller, strict=True))
    assert alike([*hashes, *smaller]) == [[number, 20 + number] for number in range(20)]


def test_groups_are_those_of_comparing_all() -> None:
    chance = random.Random(0)
    hashes = [chance.getrandbits(64) for _ in range(300)]
    for _ in range(300):
        hashes.append(chance.choice(hashes) ^ sum(1 << bit for bit in chance.sample(range(64), chance.randint(0, 5))))
    groups = [{number} for number in range(len(hashes))]
    for one in range(len(hashes)):
        for other in range(one):
            if (hashes[one] ^ hashes[other]).bit_count() <= ALIKE and groups[one] is not groups[other]:
                groups[one] |= groups[other]
                for number in groups[other]:
                    groups[number] = groups[one]
    expected = {tuple(sorted(group)) for group in groups if len(group) > 1}
    assert len(expected) > 100
    assert {tuple(group) for group in alike(hashes)} == expected
    assert alike([]) == []
