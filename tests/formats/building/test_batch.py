"""Where the number of images goes when a file reshapes."""

from __future__ import annotations

import pytest

from backdoorscan.formats.building.batch import BATCH as N
from backdoorscan.formats.building.batch import reshaped


@pytest.mark.parametrize(
    "shape, target, fixed, expected",
    [
        ((N, 4, 3), (N, 12), None, (N, 12)),
        ((N, 4, 3), (-1, 12), None, (N, 12)),
        ((N, 4, 3), (N, -1), None, (N, 12)),
        ((N, 4, 3), (1, 12), None, (N, 12)),
        ((N, 4, 3), (1, -1), 1, (N, 12)),
        ((N, 4, 3), (-1, 12), 1, (N, 12)),
        ((N, 4, 3), (5, 2, 6), 5, (N, 2, 6)),
        ((N, 12), (1, 2, 6), 1, (N, 2, 6)),
        # Attention: (sequence, images, features) to (sequence, images · heads, features of a head), and back.
        ((7, N, 6), (7, 2, 3), 1, (7, 2 * N, 3)),
        ((7, 2 * N, 3), (7, 6), 1, (7 * N, 6)),
        ((7 * N, 6), (7, 1, 6), 1, (7, N, 6)),
        ((2 * N, 7, 3), (1, 2, 7, 3), 1, (N, 2, 7, 3)),
    ],
)
def test_the_images_keep_their_place(shape, target, fixed, expected):
    assert reshaped(shape, target, fixed) == expected


@pytest.mark.parametrize(
    "shape, target, fixed",
    [
        ((N, 4), (3,), None),
        ((N, 4), (-1, -1), None),
        ((N, 4), (-2, 4), None),
        ((N, 4), (0, 4), None),
        ((N, 4), (N, 3), None),
        ((N, N), (1, 1), 1),
        ((4, 3), (12,), 1),
        ((N, 5), (2, 2), 4),
        ((7, N, 6), (6, 7), 1),
    ],
)
def test_what_cannot_be(shape, target, fixed):
    assert reshaped(shape, target, fixed) is None
