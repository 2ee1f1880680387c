"""Hostile pickles inside otherwise whole archives: each is refused, and none of them runs anything."""

import io
import json
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from backdoorscan.errors import ArtifactError, UnsafeModelError, UnsupportedModelError
from backdoorscan.formats.weights import pickles
from backdoorscan.formats.weights.checkpoint import parse
from backdoorscan.formats.weights.store import Store

TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOOKS = b"\x89ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str = "0", count: int = 6, kind: bytes = b"ctorch\nFloatStorage\n") -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, of: bytes = storage()) -> bytes:
    return TENSOR + b"(" + of + number(offset) + numbers(shape) + numbers(stride) + HOOKS + b"tR"


def state(value: bytes) -> bytes:
    return b"\x80\x02}" + text("w") + value + b"s."


def archive(program: bytes, pieces: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("a/data.pkl", program)
        for key, piece in (pieces or {"data/0": np.arange(6, dtype="<f4").tobytes()}).items():
            file.writestr(f"a/{key}", piece)
    return buffer.getvalue()


def call(target: Path, way: str) -> bytes:
    """A program that makes ``target`` if anything of it is ever executed."""
    command = f"touch {target}"
    system = b"cposix\nsystem\n"
    return {
        "reduce": system + b"(" + text(command) + b"tR",
        "eval": b"c__builtin__\neval\n(" + text(f"open({str(target)!r}, 'w')") + b"tR",
        "getattr": b"c__builtin__\ngetattr\n(cposix\nsystem\n" + text("__call__") + b"tR",
        "inst": b"(" + text(command) + b"iposix\nsystem\n",
        "obj": b"(" + system + text(command) + b"o",
        "newobj": system + b"(" + text(command) + b"t\x81",
        "newobj of a known name": b"ccollections\nOrderedDict\n)\x81",
        "newobj_ex": system + b"(" + text(command) + b"t}\x92",
        "stack global": text("posix") + text("system") + b"\x93(" + text(command) + b"tR",
        "extension": b"\x82\x01(" + text(command) + b"tR",
        "extension 4": b"\x84\x01\0\0\0(" + text(command) + b"tR",
        "dotted": b"ctorch\nSize.__class__\n(" + text(command) + b"tR",
        "a longer name": b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n)R",
        "module of a module": b"ctorch._utils.os\nsystem\n(" + text(command) + b"tR",
        "build a function": TENSOR + b"}" + text("make") + system + b"sb",
        "build a class": b"ccollections\nOrderedDict\n}" + text("__setstate__") + system + b"sb",
        "setstate": b"ccollections\nOrderedDict\n)R}" + text("__reduce__") + system + b"sb",
        "reduce a string": text("os.system") + b"(" + text(command) + b"tR",
        "reduce a tensor": tensor((6,), (1,)) + b")R",
        "from type": b"ctorch._tensor\n_rebuild_from_type_v2\n("
        + system
        + b"ctorch\nTensor\n("
        + text(command)
        + b"t}tR",
        "persistent": system + b"Q",
        "persistent text": b"P" + command.encode() + b"\n",
        "namespace": b"cargparse\nNamespace\n)R}b",
        "script": b"ctorch.jit._script\nunpackage_script_module\n)R",
    }[way]


WAYS = [
    *("reduce", "eval", "getattr", "inst", "obj", "newobj", "newobj of a known name", "newobj_ex", "stack global"),
    *("extension", "extension 4", "dotted", "a longer name", "module of a module", "build a function", "build a class"),
    *("setstate", "reduce a string", "reduce a tensor", "from type", "persistent", "persistent text", "namespace"),
    "script",
]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_called(tmp_path: Path, way: str) -> None:
    target = tmp_path / "touched"
    for program in (
        state(call(target, way)),
        b"\x80\x02" + call(target, way) + b".",
        b"\x80\x02}(" + text("w") + tensor((6,), (1,)) + text("x") + call(target, way) + b"u.",
    ):
        with pytest.raises(ArtifactError):
            parse(archive(program), "file")
    assert not target.exists()


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("reduce", "posix.system"),
        ("eval", "eval"),
        ("inst", "posix system"),
        ("namespace", "argparse.Namespace"),
        ("newobj of a known name", "NEWOBJ"),
        ("extension", "EXT1"),
        ("build a function", "posix.system"),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, way: str, name: str) -> None:
    with pytest.raises(UnsafeModelError, match="holds more than weights") as caught:
        parse(archive(state(call(tmp_path / "touched", way))), "file")
    assert name in caught.value.what


def test_the_words_of_an_archive_are_those_of_torch() -> None:
    (found,) = parse(archive(state(tensor((2, 3), (3, 1)))), "file").states
    assert found.tensors["w"].shape == (2, 3) and found.tensors["w"].dtype == "float32"


@pytest.mark.parametrize(
    "of",
    [
        storage(key="1"),
        storage(count=7),
        storage(count=2**62),
        storage(count=-1),
        storage(kind=b"ctorch\nfloat32\n"),
        storage(kind=text("FloatStorage")),
        storage(key="../0"),
        b"(" + text("module") + text("cpu") + b"tQ",
        b"()tQ",
        text("storage") + b"Q",
        b"NQ",
        b"(" + text("storage") + b"ctorch\nFloatStorage\nK\x00" + text("cpu") + number(6) + b"tQ",
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"G" + bytes(8) + b"tQ",
        b"("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text("0")
        + text("cpu")
        + number(6)
        + b"K\x01K\x02K\x03ttQ",
        b"N",
    ],
)
def test_storages_that_are_not_there(of: bytes) -> None:
    with pytest.raises(ArtifactError):
        parse(archive(state(tensor((6,), (1,), of=of))), "file")


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((7,), (1,), 0),
        ((6,), (1,), 1),
        ((6,), (-1,), 5),
        ((6,), (1,), -1),
        ((-6,), (1,), 0),
        ((2, 3), (4, 1), 0),
        ((6,), (), 0),
        ((2**62,), (0,), 0),
        ((2**40, 2**40), (1, 1), 0),
        ((1,), (1,), 2**60),
        ((1,) * 65, (1,) * 65, 0),
    ],
)
def test_tensors_that_reach_beyond_their_storage(shape: Any, stride: Any, offset: int) -> None:
    with pytest.raises(ArtifactError):
        parse(archive(state(tensor(shape, stride, offset))), "file")


def test_one_storage_of_two_types() -> None:
    other = tensor((3,), (1,), of=storage(count=3, kind=b"ctorch\nDoubleStorage\n"))
    with pytest.raises(ArtifactError, match="file"):
        parse(archive(b"\x80\x02](" + tensor((6,), (1,)) + other + b"e."), "file")


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02" + b")" + b"\x85" * 100_000 + b".",
        b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns.",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02}q\x00" + text("self") + b"h\x00s.",
        b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(100)) + b".",
        b"\x80\x02r\xff\xff\xff\xff.",
        b"\x80\x02Nr\xff\xff\xff\xff.",
        b"\x80\x02j\xff\xff\xff\xff.",
        b"\x80\x02.",
        b"\x80\x02N",
        b"\x80\x02t.",
        b"\x80\x02u.",
        b"\x80\x02}Ns.",
        b"\x80\x02NNs.",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02I" + b"9" * 10_000 + b"\n.",
        b"\x80\x02ccollections\nOrderedDict\n(K\x01tR.",
        b"\x80\x02ctorch\nSize\n(K\x01tR.",
        b"",
    ],
)  # fmt: skip
def test_nests_loops_and_stumps_are_no_weights(program: bytes) -> None:
    with suppress(ArtifactError):
        assert not parse(archive(program), "file").states


def test_a_program_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "_MAX_INSTRUCTIONS", 10_000)
    with pytest.raises(ArtifactError, match="instructions"):
        parse(archive(b"\x80\x02" + b"K\x01\x85" * 5_500 + b"."), "file")


@pytest.mark.parametrize("key", [text("k" * 5000), text("\x1b[2J"), b"X\x03\0\0\0\xed\xa0\x80"])
def test_impossible_names(key: bytes) -> None:
    with pytest.raises(ArtifactError, match="impossible name"):
        parse(archive(b"\x80\x02}" + key + tensor((6,), (1,)) + b"s."), "file")


def test_the_file_s_own_words_reach_no_terminal() -> None:
    with pytest.raises(UnsafeModelError) as caught:
        parse(archive(b"\x80\x02cos\n\x1b[2Jsystem\n."), "file")
    assert caught.value.what.isprintable()


def renamed(data: bytes) -> bytes:
    return data.replace(b"a/data/1", b"a/data/0")


def overlapping(data: bytes) -> bytes:
    """Two entries of the table of contents that lead to one member."""
    copy = bytearray(data)
    first, second = (i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02" and b"a/data/" in data[i : i + 60])
    copy[second + 42 : second + 46] = copy[first + 42 : first + 46]
    return bytes(copy)


def beyond(data: bytes) -> bytes:
    copy = bytearray(data)
    at = data.rindex(b"PK\x01\x02")
    copy[at + 42 : at + 46] = struct.pack("<I", len(data) - 5)
    return bytes(copy)


def encrypted(data: bytes) -> bytes:
    copy = bytearray(data)
    copy[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(copy)


@pytest.mark.parametrize("damage", [renamed, overlapping, beyond, encrypted])
def test_archives_that_lie(damage: Callable[[bytes], bytes]) -> None:
    piece = np.arange(6, dtype="<f4").tobytes()
    good = archive(state(tensor((6,), (1,))), {"data/0": piece, "data/1": piece})
    parse(good, "file")
    with pytest.raises(ArtifactError):
        parse(damage(good), "file")


def test_a_big_endian_archive() -> None:
    piece = np.arange(6, dtype=">f4").tobytes()
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        parse(archive(state(tensor((6,), (1,))), {"byteorder": b"big", "data/0": piece}), "file")


def test_numpy_numbers_beside_the_weights(workshop: Any) -> None:
    state_dict = workshop.net("Net").state_dict()
    content = {"state_dict": state_dict, "best": np.float64(0.5), "steps": np.arange(3), "at": torch.device("cpu")}
    content |= {"raw": b"\xff", "tags": {1}, "kind": torch.float16, "size": torch.Size([3]), "z": 1j}
    (found,) = parse(workshop.save(content).data, "file").states
    assert list(found.tensors) == list(state_dict) and found.where == ("state_dict",)


def test_tensors_of_every_dtype_are_found(workshop: Any) -> None:
    names = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16"]
    names += ["uint32", "uint64", "bool", "float8_e4m3fn", "complex64"]
    content = {name: torch.zeros(3, dtype=getattr(torch, name)) for name in names}
    (found,) = parse(workshop.save(content).data, "file").states
    assert {name: spec.dtype for name, spec in found.tensors.items()} == {name: name for name in names}


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_flipped_bits_never_surprise(workshop: Any, options: dict[str, Any]) -> None:
    """Whatever is flipped, anywhere, the answer is a list of tensors within the file or an ``ArtifactError``."""
    data = workshop.save(workshop.net("Tied").state_dict(), **options).data
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(1500):
        broken = bytearray(data)
        for place in generator.integers(20, len(data), generator.integers(1, 4)):
            broken[place] ^= 1 << generator.integers(8)
        try:
            parsed = parse(bytes(broken), "file")
        except ArtifactError:
            refused += 1
            continue
        spans = [spec.storage for found in parsed.states for spec in found.tensors.values()]
        assert all(0 <= span.start <= span.stop <= len(data) for span in spans)
    assert refused > 100


def test_a_storage_of_old_files_that_is_a_view_on_another() -> None:
    """Before torch 1.0 a storage could begin inside another; tensors of both still share their memory."""
    view = storage()[:-2] + b"(" + text("1") + number(2) + number(3) + b"ttQ"
    content = b"\x80\x02}(" + text("a") + tensor((6,), (1,)) + text("b") + tensor((2,), (1,), 1, of=view) + b"u."
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    machine = b"\x80\x02}" + text("little_endian") + b"\x88s."
    keys = b"\x80\x02]" + text("0") + b"a."
    numbers = struct.pack("<q", 6) + np.arange(6, dtype="<f4").tobytes()
    data = magic + b"\x80\x02M\xe9\x03." + machine + content + keys + numbers
    (found,) = parse(data, "file").states
    first, second = found.tensors["a"], found.tensors["b"]
    assert first.storage == second.storage and (first.offset, second.offset) == (0, 3)
    assert torch.equal(Store({"": data}).tensor("b", second), torch.tensor([3.0, 4.0]))
    beyond = data.replace(number(2) + number(3), number(4) + number(3))
    for broken in (data[:-1], beyond, data.replace(keys, b"\x80\x02].")):
        with pytest.raises(ArtifactError):
            parse(broken, "file")


def header(**entries: Any) -> bytes:
    content = json.dumps(entries).encode()
    return struct.pack("<Q", len(content)) + content


def entry(*offsets: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "data",
    [
        header(w=entry(0, 8)) + bytes(7),
        header(w=entry(0, 8)) + bytes(9),
        header(w=entry(1, 9)) + bytes(9),
        header(w=entry(0, 4)) + bytes(4),
        header(w=entry(8, 0)) + bytes(8),
        header(w=entry(-8, 0)) + bytes(8),
        header(w=entry(0, 8, shape=(-2,))) + bytes(8),
        header(w=entry(0, 8, shape=(2.0,))) + bytes(8),
        header(w=entry(0, 8, shape=(True, 2))) + bytes(8),
        header(w=entry(0, 8, shape=(2**62, 2**62))) + bytes(8),
        header(w=entry(0, 8, shape=(1,) * 64 + (2,))) + bytes(8),
        header(w=entry(0, 8, dtype="F4")) + bytes(8),
        header(w=entry(0, 8, dtype=["F32"])) + bytes(8),
        header(w=entry(0, 8, 8)) + bytes(8),
        header(w=entry(0, 8), v=entry(0, 8)) + bytes(8),
        header(w=entry(0, 8), v=entry(4, 12)) + bytes(12),
        header(**{"\x1b[2J": entry(0, 8)}) + bytes(8),
        header(w=3),
        header(w=[0]),
        struct.pack("<Q", 30) + b'{"w":{},"w":{}}' + b" " * 15,
        struct.pack("<Q", 200_000) + b'{"w":' + b"[" * 199_995,
    ],
)
def test_safetensors_that_lie(data: bytes) -> None:
    with pytest.raises(ArtifactError, match="safetensors file"):
        parse(data, "file")


def test_flipped_bits_in_safetensors_never_surprise(workshop: Any) -> None:
    data = safetensors.torch.save(workshop.net("Net").state_dict())
    generator = np.random.default_rng(0)
    for _ in range(500):
        broken = bytearray(data)
        for place in generator.integers(8, 300, generator.integers(1, 4)):
            broken[place] ^= 1 << generator.integers(8)
        with suppress(ArtifactError):
            (found,) = parse(bytes(broken), "file").states
            store = Store({"": bytes(broken)})
            assert all(store.tensor(name, spec).shape == spec.shape for name, spec in found.tensors.items())
