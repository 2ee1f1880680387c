"""Damaged copies of good files: each loads or is refused with one clear error."""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hostile.corpus import mutations
from hostile.good import zipped
from hostile.yard import Yard

from backdoorscan.formats import sandbox

pytestmark = pytest.mark.skipif(not sandbox.available(), reason="this platform has no fork")

COUNT = 95
TARGETS = (
    "h5",
    "keras",
    "onnx",
    "pt2",
    "pt",
    "legacy",
    "safetensors",
    "keras config.json",
    "keras model.weights.h5",
    "pt2 archive/models/model.json",
    "pt2 archive/data/weights/model_weights_config.json",
    "pt model/data.pkl",
)
"""A format, and the member that is damaged where a checksum would tell of it otherwise."""
STRICT = {"keras", "keras config.json", "pt2"}
"""Of these few or none load, whatever is damaged; of all others some do, as a flipped bit of a weight is a weight."""


def damaged(target: str, good: dict[str, bytes]) -> Iterator[bytes]:
    form, _, member = target.partition(" ")
    seed = TARGETS.index(target)
    if not member:
        yield from mutations(good[form], COUNT, seed)
        return
    with zipfile.ZipFile(io.BytesIO(good[form])) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in members if name.endswith(member.removeprefix("model/")))
    for content in mutations(members[name], COUNT, seed):
        yield zipped({**members, name: content})


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_copies(target: str, yard: Yard, record_property: Callable[[str, Any], None]) -> None:
    counts: Counter[str] = Counter()
    yard.model.write_bytes(yard.good[target.partition(" ")[0]])
    options = yard.options()
    for data in damaged(target, yard.good):
        yard.model.write_bytes(data)
        counts["loaded" if yard.meet(options) is None else "refused"] += 1
    record_property("hostile", [(f"damaged: {target.split('/')[-1]}", *item) for item in sorted(counts.items())])
    assert counts["refused"] + counts["loaded"] == COUNT
    assert counts["refused"] > COUNT // 4
    assert counts["loaded"] or target in STRICT


def test_there_are_more_than_a_thousand() -> None:
    assert COUNT * len(TARGETS) >= 1000
