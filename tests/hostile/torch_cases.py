"""Hostile files of weights: what ``torch.save`` writes, TorchScript, safetensors and folders of Hugging Face."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from hostile.good import network, saved, zipped
from hostile.yard import SECRET, Case, Yard

from backdoorscan.errors import ArtifactError, BackdoorscanError, UnsafeModelError, UnsupportedModelError

TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
NAMES = ["forward", "training", "_modules", "graph", "lambda", "a/b", '"]; x = 1 #', "__class__", "ü"]
SCRIPT = """
import torch

class Evil(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))

    @torch.jit.export
    def __getstate__(self) -> torch.Tensor:
        return torch.ones(1)

    @torch.jit.export
    def __setstate__(self, state: torch.Tensor):
        self.training = False
        torch.save(state, {path!r})
"""


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def _numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


def _storage(key: str = "0", count: int = 6) -> bytes:
    return b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(key) + _text("cpu") + _number(count) + b"tQ"


def _tensor(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, of: bytes | None = None) -> bytes:
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return TENSOR + b"(" + (of or _storage()) + _number(offset) + _numbers(shape) + _numbers(stride) + hooks + b"tR"


def program_of(value: bytes, key: str = "w") -> bytes:
    """A pickle of a dictionary with one entry, which is what some instructions make."""
    return b"\x80\x02}" + _text(key) + value + b"s."


def torch_zip(program: bytes, **more: bytes) -> bytes:
    """An archive of ``torch.save`` around a pickle."""
    pieces = {"archive/data.pkl": program, "archive/data/0": np.arange(6, dtype="<f4").tobytes()}
    pieces["archive/version"] = b"3\n"  # torch.load insists on it
    return zipped({**pieces, **{f"archive/{name}": content for name, content in more.items()}})


WAYS: dict[str, Callable[[str, str], bytes]] = {
    "reduce": lambda shell, path: b"cposix\nsystem\n(" + _text(shell) + b"tR",
    "eval": lambda shell, path: b"c__builtin__\neval\n(" + _text(f"open({path!r}, 'w').close()") + b"tR",
    "exec": lambda shell, path: b"cbuiltins\nexec\n(" + _text(f"open({path!r}, 'w').close()") + b"tR",
    "getattr": lambda shell, path: b"c__builtin__\ngetattr\n(cposix\nsystem\n" + _text("__call__") + b"tR",
    "inst": lambda shell, path: b"(" + _text(shell) + b"iposix\nsystem\n",
    "obj": lambda shell, path: b"(cposix\nsystem\n" + _text(shell) + b"o",
    "newobj": lambda shell, path: b"cposix\nsystem\n(" + _text(shell) + b"t\x81",
    "newobj_ex": lambda shell, path: b"cposix\nsystem\n(" + _text(shell) + b"t}\x92",
    "stack global": lambda shell, path: _text("posix") + _text("system") + b"\x93(" + _text(shell) + b"tR",
    "extension": lambda shell, path: b"\x82\x01(" + _text(shell) + b"tR",
    "a dotted name": lambda shell, path: b"ctorch\nSize.__class__\n(" + _text(shell) + b"tR",
    "a module of a module": lambda shell, path: b"ctorch._utils.os\nsystem\n(" + _text(shell) + b"tR",
    "build a class": lambda shell, path: (
        b"ccollections\nOrderedDict\n}" + _text("__setstate__") + b"cposix\nsystem\nsb"
    ),
    "from type": lambda shell, path: (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nctorch\nTensor\n(" + _text(shell) + b"t}tR"
    ),
    "a file": lambda shell, path: b"cio\nopen\n(" + _text(path) + _text("w") + b"tR",
    "torch.load": lambda shell, path: b"ctorch.serialization\nload\n(" + _text(path) + b"tR",
    "a storage in a file": lambda shell, path: b"ctorch\nfrom_file\n(" + _text(path) + b"tR",
    "persistent": lambda shell, path: b"cposix\nsystem\nQ",
    "script": lambda shell, path: b"ctorch.jit._script\nunpackage_script_module\n)R",
    "protocol 0": lambda shell, path: b"cos\nsystem\n(S" + repr(shell).encode() + b"\ntR",
}  # fmt: skip


def payload(yard: Yard, way: str) -> bytes:
    """Instructions of a pickle that make the canary if anything of them is ever executed."""
    return WAYS[way](yard.command, str(yard.canary))


def _legacy(program: bytes) -> bytes:
    """The form of ``torch.save`` before PyTorch 1.6 around a pickle."""
    start = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}" + _text("little_endian") + b"\x88s."
    keys = b"\x80\x02]" + _text("0") + b"a."
    return start + program + keys + struct.pack("<q", 6) + np.arange(6, dtype="<f4").tobytes()


class _Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (self.command,)


def torchscript(yard: Yard) -> bytes:
    """An archive that writes the canary when ``torch.jit.load`` restores it."""
    source = yard.folder / "script.py"
    source.write_text(SCRIPT.format(path=str(yard.canary)))
    spec = importlib.util.spec_from_file_location("script", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module.Evil()), buffer)
    return buffer.getvalue()


def _tar(yard: Yard) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("../escape", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(content := pickle.dumps(_Evil(yard.command)))
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


PICKLES: dict[str, tuple[str, bytes]] = {
    "a list in itself": ("malformed", b"\x80\x02]q\x00h\x00a."),
    "a dictionary in itself": ("malformed", b"\x80\x02}q\x00" + _text("self") + b"h\x00s."),
    "tuples without end": ("exhaustion", b"\x80\x02)" + b"\x85" * 100_000 + b"."),
    "lists that multiply": (
        "exhaustion", b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(100)) + b".",
    ),
    "a memo of 4 billion": ("exhaustion", b"\x80\x02Nr\xff\xff\xff\xff."),
    "a text of 4 GB": ("exhaustion", b"\x80\x02X\xff\xff\xff\xff."),
    "a number of 2 GB": ("exhaustion", b"\x80\x02\x8b\xff\xff\xff\x7f."),
    "a storage of exabytes": ("exhaustion", program_of(_tensor((6,), (1,), of=_storage(count=2**62)))),
    "a tensor of exabytes": ("exhaustion", program_of(_tensor((2**62,), (0,)))),
    "a tensor of gigabytes": ("exhaustion", program_of(_tensor((2**31,), (0,)))),
    "a tensor behind its end": ("malformed", program_of(_tensor((7,), (1,)))),
    "a tensor from before": ("malformed", program_of(_tensor((6,), (1,), -1))),
    "a negative step": ("malformed", program_of(_tensor((6,), (-1,), 5))),
    "another storage": ("other files", program_of(_tensor((6,), (1,), of=_storage("../../secret")))),
    "a storage that is a path": ("other files", program_of(_tensor((6,), (1,), of=_storage("/etc/passwd")))),
    "a name with escape codes": ("names", program_of(_tensor((6,), (1,)), "\x1b[2Jw")),
    "an empty stack": ("malformed", b"\x80\x02."),
    "no end": ("malformed", b"\x80\x02N"),
}  # fmt: skip


def _header(yard: Yard, change: Callable[[dict[str, Any]], Any]) -> bytes:
    data = yard.good["safetensors"]
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


HEADERS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "beyond the end": ("malformed", lambda header: header["0.weight"].update(data_offsets=[0, 2**40])),
    "exabytes": ("exhaustion", lambda header: header["0.weight"].update(shape=[2**31, 2**31])),
    "negative": ("malformed", lambda header: header["0.weight"].update(data_offsets=[-8, 64])),
    "two in one place": (
        "disguise", lambda header: header["0.weight"].update(data_offsets=header["3.weight"]["data_offsets"]),
    ),
    "an unknown type": ("malformed", lambda header: header["0.weight"].update(dtype="PICKLE")),
    "escape codes": ("names", lambda header: header.update({"\x1b[2J": header.pop("0.weight")})),
}  # fmt: skip


def _bad_numbers(value: float) -> Callable[[Yard], bytes]:
    def write(yard: Yard) -> bytes:
        state = network().state_dict()
        state["0.weight"].fill_(value)
        return saved(state)

    return write


def _shadowing(name: str) -> Callable[[Yard], bytes]:
    """Names beside those of the architecture that attributes of a module have."""
    return lambda yard: saved({**network().state_dict(), f"{name}.weight": torch.ones(3)})


def _wrapped(yard: Yard) -> bytes:
    """A training checkpoint: the weights, and much beside them."""
    return saved({"model": network().state_dict(), "epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 1}]}})


def _folder(**files: str) -> Callable[[Yard], None]:
    def write(yard: Yard) -> None:
        yard.model.mkdir()
        (yard.model / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
        for name, content in files.items():
            (yard.model / name.replace("__", ".")).write_text(content)

    return write


def _index(place: str) -> Callable[[Yard], None]:
    def write(yard: Yard) -> None:
        index = json.dumps({"weight_map": {"conv1.weight": place.format(secret=yard.secret)}})
        _folder(model__safetensors__index__json=index)(yard)

    return write


def _linked_folder(yard: Yard) -> None:
    _folder()(yard)
    (yard.model / "model.safetensors").symlink_to(yard.secret)


def _remote_code(yard: Yard) -> None:
    config = {"architectures": ["Evil"], "auto_map": {"AutoModel": "evil.Evil"}, "trust_remote_code": True}
    _folder(config__json=json.dumps(config), evil__py=f"open({str(yard.canary)!r}, 'w')")(yard)
    (yard.model / "model.safetensors").write_bytes(yard.good["safetensors"])


def _pickled_folder(yard: Yard) -> None:
    _folder()(yard)
    (yard.model / "pytorch_model.bin").write_bytes(torch_zip(program_of(payload(yard, "reduce"))))


def cases() -> Iterator[Case]:
    """All of them."""
    for way in WAYS:
        yield Case(
            "code", f".pt: a pickle: {way}", ArtifactError,
            lambda yard, way=way: torch_zip(program_of(payload(yard, way))),
        )  # fmt: skip
        yield Case(
            "code", f".pt before 1.6: a pickle: {way}", ArtifactError,
            lambda yard, way=way: _legacy(program_of(payload(yard, way))),
        )  # fmt: skip
    for protocol in range(6):
        yield Case(
            "code", f".pt: a bare pickle of protocol {protocol}", ArtifactError,
            lambda yard, protocol=protocol: pickle.dumps(_Evil(yard.command), protocol),
        )  # fmt: skip
    yield Case("code", ".pt: a whole model", UnsafeModelError, lambda yard: saved(network()))
    yield Case("code", ".pt: a tar archive of old", ArtifactError, _tar)
    yield Case("code", "TorchScript: a state that writes", UnsafeModelError, torchscript)
    yield Case("code", "folder: remote code", None, _remote_code)
    yield Case("code", "folder: a pickle", ArtifactError, _pickled_folder)
    for name, (family, program) in PICKLES.items():
        yield Case(family, f".pt: {name}", BackdoorscanError, lambda yard, program=program: torch_zip(program))
    for name in ("../secret", "/etc/passwd", "archive/../../secret"):
        yield Case(
            "other files", f".pt: a member called {name}", None,
            lambda yard, name=name: _with_member(yard, name),
        )  # fmt: skip
    yield Case("exhaustion", ".pt: a zip bomb", UnsupportedModelError, lambda yard: zipped(
        {"archive/data.pkl": bytes(10**8), "archive/data/0": b""}, zipfile.ZIP_DEFLATED
    ))  # fmt: skip
    yield Case("disguise", ".pt: two members of one name", ArtifactError, lambda yard: _with_member(
        yard, "archive/dXta.pkl"
    ).replace(b"dXta.pkl", b"data.pkl"))  # fmt: skip
    yield Case("disguise", ".pt: big-endian", UnsupportedModelError, lambda yard: torch_zip(
        program_of(_tensor((6,), (1,))), byteorder=b"big"
    ))  # fmt: skip
    for name, (family, change) in HEADERS.items():
        yield Case(family, f".safetensors: {name}", ArtifactError, lambda yard, change=change: _header(yard, change))
    for size in (2**62, 2**63, 10**8):
        yield Case("exhaustion", f".safetensors: a head of {size:,} bytes", ArtifactError, lambda yard, size=size: (
            struct.pack("<Q", size) + yard.good["safetensors"][8:]
        ))  # fmt: skip
    yield Case("malformed", ".safetensors: a deep head", ArtifactError, lambda yard: (
        struct.pack("<Q", 200_000) + b'{"w":' + b"[" * 199_995
    ))  # fmt: skip
    for value in (np.nan, np.inf):
        yield Case("malformed", f".pt: {value}", UnsupportedModelError, _bad_numbers(value))
    for name in NAMES:
        yield Case("names", f".pt: {name}", ArtifactError, _shadowing(name))
    yield Case("other files", "folder: weights behind a link", UnsafeModelError, _linked_folder)
    for place in ("../secret", "{secret}", "/etc/passwd"):
        yield Case("other files", f"folder: weights at {place}", ArtifactError, _index(place))
    yield Case("malformed", "empty", ArtifactError, lambda yard: b"")
    yield Case("malformed", "nothing but zeros", ArtifactError, lambda yard: bytes(4096))
    yield Case("malformed", "a folder with nothing in it", ArtifactError, lambda yard: yard.model.mkdir())
    yield Case("other files", "the secret itself", ArtifactError, lambda yard: SECRET.tobytes())
    yield Case("harmless", ".pt: a checkpoint of a training", None, _wrapped)


def _with_member(yard: Yard, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(yard.good["pt"])) as archive:
        return zipped({**{key: archive.read(key) for key in archive.namelist()}, name: b"x"})
