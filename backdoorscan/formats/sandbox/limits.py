"""How much a child process may use to read a file."""

from __future__ import annotations

from dataclasses import dataclass

_MEGABYTE = 2**20


@dataclass(frozen=True)
class Limits:
    """What a child may use.

    Attributes:
        seconds: Of processor time.
        memory: Bytes that it may take beyond what its program does.
        output: Bytes of what it returns.
        deadline: Seconds until its parent gives up.
        threads: That it may start.
    """

    seconds: int
    memory: int
    output: int
    deadline: float
    threads: int = 0

    @classmethod
    def of(cls, size: int) -> Limits:
        """What honest files need several times over.

        Measured, a reader of HDF5 takes three times the size of a file at once, one of ONNX five, onnxruntime seven.
        Compressed arrays, and values that onnxruntime computes for one image, come on top, whatever the size.

        Args:
            size: Bytes of what the child is given.
        """
        memory = 4096 * _MEGABYTE + 8 * size
        seconds = 60 + size // _MEGABYTE
        # Several programs may share a core.
        return cls(seconds, memory, memory, 10.0 * seconds)
