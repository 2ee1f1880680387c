"""What the sandbox costs: reading a file in a child process, beside reading it in this one.

    python benchmarks/sandbox.py

Median of ten for Keras ``.h5`` files of 1 MB and 100 MB, made here, and for a function that does nothing.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from backdoorscan.formats.keras.parse import parse
from backdoorscan.formats.onnx.recognise import is_onnx
from backdoorscan.formats.sandbox import run_apart

ROUNDS = 10


def keras_file(path: Path, size: int) -> bytes:
    """One dense layer of so many bytes."""
    units = size // 4 // 1024
    layers = [
        {"class_name": "InputLayer", "config": {"name": "in", "batch_input_shape": [None, 1024]}},
        {"class_name": "Dense", "config": {"name": "dense", "units": units, "use_bias": False}},
    ]
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": {"name": "s", "layers": layers}})
        file.attrs["keras_version"] = "2.15.0"
        store = file.create_group("model_weights")
        store.attrs["layer_names"] = [b"in", b"dense"]
        store.create_group("in").attrs["weight_names"] = np.zeros(0, "S1")
        group = store.create_group("dense")
        group.attrs["weight_names"] = [b"dense/kernel:0"]
        kernel = np.random.default_rng(0).standard_normal((1024, units), np.float32)
        group.create_dataset("dense/kernel:0", data=kernel)
    return path.read_bytes()


def median(work: Callable[[], object]) -> float:
    """Milliseconds."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def main() -> None:
    started = time.perf_counter()
    run_apart(is_onnx, b"", name="nothing")
    print(f"{'start of the helper':24}{1000 * (time.perf_counter() - started):10.1f} ms, once in a program")
    print(f"{'':24}{'here':>10}{'apart':>10}  (ms)")
    print(
        f"{'nothing':24}{median(lambda: is_onnx(b'')):10.1f}{median(lambda: run_apart(is_onnx, b'', name='x')):10.1f}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in (1, 100):
            data = keras_file(Path(folder) / "model.h5", megabytes * 10**6)
            here = median(partial(parse, data, "model.h5"))
            apart = median(partial(run_apart, parse, data, "model.h5", name="model.h5"))
            print(f"{f'.h5 of {len(data) / 1e6:.0f} MB':24}{here:10.1f}{apart:10.1f}")


if __name__ == "__main__":
    main()
