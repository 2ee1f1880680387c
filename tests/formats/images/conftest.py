from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from backdoorscan.errors import ImagesError
from backdoorscan.formats import sandbox
from backdoorscan.formats.images import load_images, reading

SHARED = Path(__file__).parents[3] / "../shared"


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    return SHARED


@pytest.fixture
def images() -> np.ndarray:
    """Shape (6, 3, 5, 7), uint8, reaching 255."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 5, 7), dtype=np.uint8)
    pixels[0, 0, 0, 0] = 255
    return pixels


@pytest.fixture
def labels() -> np.ndarray:
    return np.array([0, 1, 2, 0, 1, 2])


@pytest.fixture
def refused() -> Callable[..., ImagesError]:
    """Load something that must be refused, in one message of at most three lines; returns the error."""

    def load(source: str | Path, *fragments: str, **options: int) -> ImagesError:
        with pytest.raises(ImagesError) as caught:
            load_images(source, **options)
        message = str(caught.value)
        assert message.count("\n") <= 2, message
        for fragment in fragments:
            assert fragment in message, message
        return caught.value

    return load


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(reading, "MAX_BYTES", 10_000)
    monkeypatch.setattr(sandbox, "available", lambda: False)  # a child has its own modules
    return 10_000
