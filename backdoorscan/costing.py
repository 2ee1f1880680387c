"""What work took, and on what it ran."""

from __future__ import annotations

import platform
import resource
import sys
import time
from dataclasses import dataclass, field

import numpy
import torch

import backdoorscan
from backdoorscan.report import Cost


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
