"""All hostile files, and mutations of all good ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hostile import keras_cases, onnx_cases, pt2_cases, torch_cases
from hostile.yard import Case

CASES: tuple[Case, ...] = tuple(
    case for module in (keras_cases, onnx_cases, pt2_cases, torch_cases) for case in module.cases()
)


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Damaged copies of a file: cut off, bits flipped, bytes replaced, pieces repeated, left out or exchanged.

    Args:
        data: A good file.
        count: How many copies.
        seed: Which ones.
    """
    chance = np.random.default_rng(seed)
    for number in range(count):
        copy = bytearray(data)
        first, second = sorted(int(place) for place in chance.integers(0, len(data), 2))
        match number % 6:
            case 0:
                del copy[first:]
            case 1 | 2:
                for place in chance.integers(0, len(data), chance.integers(1, 4)):
                    copy[place] ^= 1 << int(chance.integers(8))
            case 3:
                for place in chance.integers(0, len(data), chance.integers(1, 9)):
                    copy[place] = int(chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.integers(256)]))
            case 4:
                length = int(chance.integers(1, 33))
                copy[second:second] = copy[first : first + length]
            case _:
                length = int(chance.integers(1, 33))
                copy[first : first + length] = bytes(chance.integers(0, 256, chance.integers(0, 33), np.uint8))
        yield bytes(copy)
