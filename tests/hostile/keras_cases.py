"""Hostile Keras files: ``.h5`` and ``.keras``."""

from __future__ import annotations

import base64
import json
import marshal
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import numpy as np
from hostile import good
from hostile.good import CONV, DENSE, FLATTEN, INPUT, KERNEL, h5, keras, keras_members, keras_weights, stack
from hostile.yard import SECRET, Case, Yard

from backdoorscan.errors import ArtifactError, UnsafeModelError, UnsupportedModelError

IN_H5, IN_KERAS = "model_weights/conv/conv/kernel:0", "layers/conv2d/vars/0"
LISTED = (INPUT, CONV, FLATTEN)


def lambda_code(yard: Yard) -> str:
    """A pickled function body, as Keras stores a Lambda, that makes the canary."""
    function = eval(f"lambda x: (open({str(yard.canary)!r}, 'w').close(), x)[1]")
    return base64.b64encode(marshal.dumps(function.__code__)).decode()


def _lambda_2(yard: Yard) -> dict[str, Any]:
    function = [lambda_code(yard), None, None]
    return {"class_name": "Lambda", "config": {"name": "l", "function": function, "function_type": "lambda"}}


def _lambda_3(yard: Yard) -> dict[str, Any]:
    function = {"class_name": "__lambda__", "config": {"code": lambda_code(yard), "defaults": None, "closure": None}}
    return {"class_name": "Lambda", "module": "keras.layers", "config": {"name": "l", "function": function}}


def _system(yard: Yard) -> dict[str, Any]:
    return {"class_name": "function", "module": "os", "config": "system", "registered_name": "system"}


LAYERS: dict[str, Callable[[Yard], dict[str, Any]]] = {
    "a custom class": lambda yard: {"class_name": "Evil", "config": {"name": "l", "command": yard.command}},
    "a class of another module": lambda yard: {"class_name": "Popen", "module": "subprocess", "config": {"name": "l"}},
    "a registered name": lambda yard: {**DENSE, "registered_name": "evil>Dense"},
    "an activation that is a function": lambda yard: {
        "class_name": "Dense", "config": {**DENSE["config"], "activation": _system(yard)},
    },
    "an initialiser of another module": lambda yard: {
        "class_name": "Activation", "module": "os", "config": {"name": "l", "activation": "system"},
    },
    "a module of torch": lambda yard: {
        "class_name": "TorchModuleWrapper", "module": "keras.layers", "config": {"name": "l", "module": "gASVAAAA"},
    },
    "a SavedModel": lambda yard: {
        "class_name": "TFSMLayer", "module": "keras.layers", "config": {"name": "l", "filepath": str(yard.folder)},
    },
    "a vocabulary in a file": lambda yard: {
        "class_name": "StringLookup", "module": "keras.layers", "config": {"name": "l", "vocabulary": str(yard.secret)},
    },
    "a Lambda in a wrapper": lambda yard: {
        "class_name": "TimeDistributed", "config": {"name": "l", "layer": _lambda_2(yard)},
    },
}  # fmt: skip
INNER: dict[str, Callable[[Yard], dict[str, Any]]] = {
    "a Lambda": _lambda_2,
    "a Lambda of Keras 3": _lambda_3,
    "a Lambda in an inner model": lambda yard: {**stack(INPUT, _lambda_2(yard)), "name": "inner"},
}


def _replaced(path: str, make: Callable[[h5py.File], None]) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        del file[path]
        make(file)

    return edit


def _external(file: h5py.File, yard: Yard, path: str) -> None:
    file.create_dataset(path, KERNEL.shape, "f4", external=[(str(yard.secret), 0, KERNEL.nbytes)])


def _virtual(file: h5py.File, yard: Yard, path: str) -> None:
    with h5py.File(yard.folder / "other.h5", "w") as other:
        other["secret"] = SECRET[: KERNEL.size].reshape(KERNEL.shape)
    layout = h5py.VirtualLayout(KERNEL.shape, "f4")
    layout[:] = h5py.VirtualSource(str(yard.folder / "other.h5"), "secret", KERNEL.shape)
    file.create_virtual_dataset(path, layout)


def _external_link(file: h5py.File, yard: Yard, path: str) -> None:
    with h5py.File(yard.folder / "other.h5", "w") as other:
        other["secret"] = SECRET[: KERNEL.size].reshape(KERNEL.shape)
    file[path] = h5py.ExternalLink(str(yard.folder / "other.h5"), "/secret")


def _soft_link(file: h5py.File, yard: Yard, path: str) -> None:
    file[path] = h5py.SoftLink(f"{path}-elsewhere")


def _dataset(shape: tuple[int, ...] = KERNEL.shape, **options: Any) -> Callable[[h5py.File, Yard, str], None]:
    return lambda file, yard, path: file.create_dataset(path, shape, "f4", **options) and None


def _many_names(file: h5py.File, yard: Yard, path: str) -> None:
    group = file[path.rpartition("/")[0]]
    zeros = group.create_dataset("zeros", data=np.zeros(2**22, "f4"), compression="gzip", chunks=(2**22,))
    for number in range(100):
        group[f"again{number}"] = zeros
    file[path] = KERNEL
    owner = file["model_weights/conv"] if "model_weights" in file else group
    owner.attrs["weight_names"] = [f"conv/again{number}" for number in range(100)]


def _text(file: h5py.File, yard: Yard, path: str) -> None:
    file[path] = "31337"


OUTSIDE = {
    "an external link": _external_link,
    "a soft link": _soft_link,
    "external storage": _external,
    "a virtual dataset": _virtual,
}
TOO_MUCH = {
    "10 GB in kilobytes": _dataset((50_000, 50_000)),
    "10 GB in chunks": _dataset((50_000, 50_000), chunks=(1000, 1000)),
    "10 GB, compressed": _dataset((50_000, 50_000), chunks=(1000, 1000), compression="gzip"),
    "one chunk of 3 GB": _dataset((1,), chunks=(2**29 + 2**28,), maxshape=(None,)),
}
ODD = {"an unknown filter": _dataset(scaleoffset=2, chunks=True), "text where numbers belong": _text}


def _bad_number(value: float) -> Callable[[h5py.File, Yard, str], None]:
    return lambda file, yard, path: file.__setitem__(path, np.full(KERNEL.shape, value, "f4"))


def _both(make: Callable[[h5py.File, Yard, str], None]) -> Iterator[tuple[str, Callable[[Yard], bytes]]]:
    """The same in both formats."""

    def old(yard: Yard) -> bytes:
        return h5(edit=_replaced(IN_H5, lambda file: make(file, yard, IN_H5)))

    def new(yard: Yard) -> bytes:
        return keras(weights=keras_weights(_replaced(IN_KERAS, lambda file: make(file, yard, IN_KERAS))))

    yield ".h5", old
    yield ".keras", new


def _cycle(yard: Yard) -> dict[str, Any]:
    start = {"class_name": "InputLayer", "name": "i", "config": {"name": "i", "batch_input_shape": [None, 4]}}
    loop = {"class_name": "Activation", "name": "a", "config": {"name": "a", "activation": "relu"}}
    layers = [{**start, "inbound_nodes": []}, {**loop, "inbound_nodes": [[["a", 0, 0, {}]]]}]
    config = {"name": "m", "layers": layers, "input_layers": [["i", 0, 0]], "output_layers": [["a", 0, 0]]}
    return {"class_name": "Model", "config": config}


def _many_layers(yard: Yard) -> dict[str, Any]:
    more = ({"class_name": "Activation", "config": {"name": f"a{n}", "activation": "relu"}} for n in range(100_000))
    return stack(INPUT, *more)


def _multiplying(yard: Yard) -> dict[str, Any]:
    """A model that calls a model twice that calls a model twice …"""
    name, inner = "m0", {"class_name": "Activation", "name": "m0", "config": {"name": "m0", "activation": "relu"}}
    for depth in range(1, 25):
        start = {"class_name": "InputLayer", "name": "i", "config": {"name": "i", "batch_input_shape": [None, 4]}}
        calls = [[["i", 0, 0, {}]], [[name, 0, 0, {}]]]
        layers = [{**start, "inbound_nodes": []}, {**inner, "inbound_nodes": calls}]
        config = {"name": f"m{depth}", "layers": layers, "input_layers": [["i", 0, 0]], "output_layers": [[name, 1, 0]]}
        name = f"m{depth}"
        inner = {"class_name": "Model", "name": name, "config": config}
    return {"class_name": "Model", "config": inner["config"]}


def _vast(yard: Yard) -> dict[str, Any]:
    return stack(INPUT, {"class_name": "UpSampling2D", "config": {"name": "up", "size": 2**20}}, FLATTEN)


def _renamed(layer: str) -> Callable[[Yard], bytes]:
    """The good file whose dense layer has another name."""

    def write(yard: Yard) -> bytes:
        def edit(file: h5py.File) -> None:
            weights = file["model_weights"]
            weights.attrs["layer_names"] = [b"in", b"conv", b"flatten", layer.encode()]
            if layer != "dense":
                weights.create_group(layer).attrs["weight_names"] = weights["dense"].attrs["weight_names"]
                weights.move("dense/dense", f"{layer}/dense")

        return h5(stack(*LISTED, {"class_name": "Dense", "config": {**DENSE["config"], "name": layer}}), edit)

    return write


def _training_config(yard: Yard) -> bytes:
    training = {"optimizer_config": {"class_name": "Evil", "config": lambda_code(yard)}, "loss": _system(yard)}
    return h5(edit=lambda file: file.attrs.__setitem__("training_config", json.dumps(training)))


CONFIGS: dict[str, tuple[type[ArtifactError], Callable[[Yard], Any]]] = {
    "a cycle": (ArtifactError, _cycle),
    "no layers": (ArtifactError, lambda yard: stack()),
    "a layer that is a number": (ArtifactError, lambda yard: stack(INPUT, 3)),
    "half a JSON": (ArtifactError, lambda yard: '{"class_name": "Seq'),
    "a JSON without end": (ArtifactError, lambda yard: "[" * 100_000),
    "a deep JSON": (
        UnsafeModelError, lambda yard: '{"class_name": "Sequential", "config": ' + "[" * 500 + "]" * 500 + "}",
    ),
    "sizes that are no numbers": (
        UnsupportedModelError,
        lambda yard: stack(*LISTED, {"class_name": "Dense", "config": {"name": "dense", "units": float("nan")}}),
    ),
    "a width of 10^400": (
        UnsupportedModelError,
        lambda yard: stack(*LISTED, {"class_name": "Dense", "config": {"name": "dense", "units": 10**400}}),
    ),
}  # fmt: skip
HEAVY: dict[str, tuple[type[ArtifactError], Callable[[Yard], Any]]] = {
    "100,000 layers": (UnsafeModelError, _many_layers),
    "models that multiply": (UnsafeModelError, _multiplying),
    "an image of terabytes": (UnsafeModelError, _vast),
    "a layer of gigabytes": (
        ArtifactError,
        lambda yard: stack(*LISTED, {"class_name": "Dense", "config": {"name": "dense", "units": 2**27}}),
    ),
}
NAMES = ["forward", "_modules", "training", "__class__", "state_dict", "lambda", 'a"]; import os #', "ünï", " ", "0"]


def _entry(data: bytes, name: str) -> int:
    """Where the table of contents has a member."""
    return data.rindex(name.encode()) - 46


def _patched(data: bytes, position: int, form: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, position, value)
    return bytes(changed)


def _bomb(member: str, size: int = 200 * 2**20) -> bytes:
    return good.zipped({**keras_members(), member: bytes(size)}, zipfile.ZIP_DEFLATED)


def _lying_bomb(yard: Yard) -> bytes:
    data = _bomb("config.json")
    return _patched(data, _entry(data, "config.json") + 24, "<I", 100)


def _stored_bomb(yard: Yard) -> bytes:
    data = keras()
    at = _entry(data, "model.weights.h5")
    return _patched(_patched(data, at + 20, "<I", 2**31 + 1), at + 24, "<I", 2**31 + 1)


def _twice(yard: Yard) -> bytes:
    data = keras(**{"CONFIG.JSON": b"{}"})
    return data.replace(b"CONFIG.JSON", b"config.json")


def _overlapping(yard: Yard) -> bytes:
    data = keras(**{"assets/x": keras_weights()})
    inside = data.index(b"PK\x03\x04", 4)
    return _patched(data, _entry(data, "assets/x") + 42, "<I", inside)


ZIPS: dict[str, tuple[str, type[ArtifactError], Callable[[Yard], bytes]]] = {
    **{
        f"a member called {name}": ("other files", UnsafeModelError, lambda yard, name=name: keras(**{name: b"x"}))
        for name in ("../evil", "/etc/evil", "assets/../../evil", "..\\evil", "C:/evil")
    },
    "a bomb in the architecture": ("exhaustion", UnsafeModelError, lambda yard: _bomb("config.json")),
    "a bomb in the weights": ("exhaustion", UnsafeModelError, lambda yard: _bomb("model.weights.h5")),
    "a bomb that lies about its size": ("exhaustion", ArtifactError, _lying_bomb),
    "2 GB said to be stored": ("exhaustion", UnsafeModelError, _stored_bomb),
    "more members than any model": (
        "exhaustion", UnsafeModelError, lambda yard: keras(**{f"assets/{n}": b"" for n in range(1000)}),
    ),
    "two members of one name": ("disguise", UnsafeModelError, _twice),
    "members that overlap": ("disguise", ArtifactError, _overlapping),
    "bytes behind the archive": ("disguise", ArtifactError, lambda yard: keras() + b"more"),
    "encrypted": ("disguise", UnsafeModelError, lambda yard: _encrypted(keras())),
    "HDF5 and zip at once": ("disguise", UnsafeModelError, lambda yard: h5() + keras()),
    "another compression": ("disguise", UnsupportedModelError, lambda yard: keras(method=zipfile.ZIP_BZIP2)),
}  # fmt: skip


def _encrypted(data: bytes) -> bytes:
    return _patched(data, _entry(data, "config.json") + 8, "<H", 1)


def cases() -> Iterator[Case]:
    """All of them."""
    for name, layer in INNER.items():
        yield Case("code", f".h5: {name}", UnsafeModelError, lambda yard, layer=layer: h5(stack(*LISTED, layer(yard))))
        yield Case(
            "code", f".keras: {name}", UnsafeModelError, lambda yard, layer=layer: keras(stack(*LISTED, layer(yard)))
        )
    for name, layer in LAYERS.items():
        for form, write in ((".h5", h5), (".keras", keras)):
            yield Case(
                "code", f"{form}: {name}", ArtifactError,
                lambda yard, layer=layer, write=write: write(stack(*LISTED, layer(yard))),
            )  # fmt: skip
    yield Case("code", ".h5: a training configuration", None, _training_config)
    for family, table, error in (
        ("other files", OUTSIDE, UnsafeModelError),
        ("exhaustion", TOO_MUCH, ArtifactError),
        ("exhaustion", {"one array under a hundred names": _many_names}, ArtifactError),
        ("malformed", ODD, UnsafeModelError),
        ("malformed", {str(value): _bad_number(value) for value in (np.nan, np.inf, 3e38)}, UnsupportedModelError),
    ):
        for name, make in table.items():
            for form, put in _both(make):
                yield Case(family, f"{form}: {name}", error, put)
    for family, table in (("malformed", CONFIGS), ("exhaustion", HEAVY)):
        for name, (error, config) in table.items():
            for form, write in ((".h5", h5), (".keras", keras)):
                yield Case(
                    family, f"{form}: {name}", error, lambda yard, config=config, write=write: write(config(yard))
                )
    for name in NAMES:
        yield Case("names", f".h5: {name}", None, _renamed(name))
    for name, (family, error, make) in ZIPS.items():
        yield Case(family, f".keras: {name}", error, make)
    yield Case("malformed", ".h5: a web page", ArtifactError, lambda yard: b"<html>404 Not Found</html>")
    yield Case("malformed", ".h5: only a signature", ArtifactError, lambda yard: b"\x89HDF\r\n\x1a\n" + bytes(100))
