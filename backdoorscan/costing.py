"""What work took, on what it ran, and about how long it will take."""

from __future__ import annotations

import logging
import platform
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy
import torch

import backdoorscan
from backdoorscan.classifier import Classifier
from backdoorscan.plugin.detector import MANY_CLASSES, Detector
from backdoorscan.report import Cost

_log = logging.getLogger(__name__)


@dataclass
class Meter:
    """Measures from its creation on.

    Attributes:
        gradient_samples: Images run forward and backward so far.
        cpu_seconds_elsewhere: Processor time that other machines spent on it.
    """

    gradient_samples: int = 0
    cpu_seconds_elsewhere: float = 0.0
    _wall: float = field(default_factory=time.perf_counter)
    _cpu: float = field(default_factory=time.process_time)

    def read(self) -> Cost:
        """The cost so far."""
        # Linux counts in KiB, macOS in bytes.
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return Cost(
            gradient_samples=self.gradient_samples,
            wall_seconds=round(time.perf_counter() - self._wall, 3),
            cpu_seconds=round(time.process_time() - self._cpu + self.cpu_seconds_elsewhere, 3),
            peak_memory_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1),
        )


def versions() -> dict[str, str]:
    """Versions of everything the figures depend on."""
    return {
        "backdoorscan": backdoorscan.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


@dataclass(frozen=True)
class Forecast:
    """About what a scan will take, said before it begins.

    Attributes:
        gradient_samples: Images run forward and backward.
        seconds: Elapsed time.
        jobs: Units of work at a time.
        at_most: Whether it may well be less.
    """

    gradient_samples: int
    seconds: float
    jobs: int
    at_most: bool = False

    def __str__(self) -> str:
        threads = "1 thread" if self.jobs == 1 else f"{self.jobs} threads"
        return (
            f"{'at most ' if self.at_most else ''}about {_duration(self.seconds)}: "
            f"{self.gradient_samples:,} gradient samples on {threads}"
        )


def forecast(
    classifier: Classifier, planned: Sequence[Detector], usual: Sequence[Detector], labels: int, jobs: int
) -> Forecast | None:
    """About what a scan will take, told from a few batches of the network.

    Nothing is drawn at random and nothing of the network changes, so the scan is the same with or without.

    Args:
        classifier: The network.
        planned: The detectors of the scan.
        usual: Those of the default scan, of which alone the cost is known.
        labels: How many labels are examined.
        jobs: Units of work at a time, each on one thread.

    Returns:
        ``None`` for other detectors or options than the usual ones, and for a network without gradients.
    """
    each = _seconds_per_sample(classifier) if all(detector in usual for detector in planned) else None
    if each is None:
        return None
    samples = _SAMPLES_OF_MANY if labels > MANY_CLASSES else _SAMPLES + _SAMPLES_PER_LABEL * labels
    seconds = samples * each * _OVERHEAD * (1 - _SIDE_BY_SIDE + _SIDE_BY_SIDE / jobs)
    return Forecast(samples, seconds, jobs, at_most=len(planned) < len(usual))


_SAMPLES, _SAMPLES_PER_LABEL, _SAMPLES_OF_MANY = 36_000, 2_000, 59_000
"""Gradient samples of a default scan: see docs/performance.md. Of many labels only a shortlist is searched."""

_OVERHEAD = 1.3
"""Time of a scan over that of its gradient samples: there are passes without gradients as well."""

_SIDE_BY_SIDE = 0.5
"""Part of a scan's time in which there is work for several jobs: two of them take three quarters of the time of one."""

_BATCH = 32
_BATCHES = 3


def _seconds_per_sample(classifier: Classifier) -> float | None:
    pixels = torch.full((_BATCH, *classifier.input_shape), 0.5, requires_grad=True)
    taken = []
    try:
        # A user's own network may draw at random even where it is only used.
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            for _ in range(_BATCHES):
                started = time.perf_counter()
                torch.autograd.grad(classifier(pixels).sum(), pixels)
                taken.append(time.perf_counter() - started)
    except Exception as error:  # it may raise anything as well, and no forecast must end a scan
        _log.debug("cannot tell how long it will take", exc_info=error)
        return None
    return statistics.median(taken[1:]) / _BATCH  # the first one warms up


def _duration(seconds: float) -> str:
    """In two digits at most: nobody knows more beforehand."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.0f} h"
