"""A pickle as ``torch.save`` writes it, read as data.

The instructions run on a machine of our own: nothing on its stack can be called, imported, subclassed or given
attributes, and what is not on a closed list is refused by name. No torch here.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_MAX_INSTRUCTIONS = 10_000_000
MAX_DIMENSIONS = 64
_MAX_SIZE = 2**48

ITEM_SIZES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "qint8": 1,
    "quint8": 1,
    "qint32": 4,
}
"""Bytes of one element, by torch's name of the dtype."""

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
}


class Refused(Exception):
    """The pickle holds more than tensors and plain containers; the message names it."""


@dataclass(frozen=True)
class Storage:
    """A piece of memory that tensors share.

    Attributes:
        key: Its name in the file.
        dtype: Type of its elements.
        first: Where it begins in the piece of that name, in elements (files before torch 1.6 have views).
        count: Number of its elements.
        whole: Number of elements of the piece of that name.
    """

    key: str
    dtype: str
    first: int
    count: int
    whole: int


@dataclass(frozen=True, eq=False)
class Leaf:
    """A tensor as the pickle describes it; sizes in elements.

    ``storage`` is ``None`` for a sparse tensor, whose numbers are not read.
    """

    storage: Storage | None
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Opaque:
    """Something harmless that is no weight: a device, a numpy scalar. Its value is not read."""


@dataclass(frozen=True, eq=False)
class _Function:
    """What stands for a function or class of the closed list."""

    make: Callable[..., Any]


@dataclass(frozen=True, eq=False)
class _Dtype:
    name: str


@dataclass(frozen=True, eq=False)
class _StorageType:
    dtype: str


def _whole(*numbers: Any) -> bool:
    return all(type(number) is int and 0 <= number <= _MAX_SIZE for number in numbers)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any, dtype: str | None = None) -> Leaf:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor is made of something else than a storage and its sizes")
    if not _whole(offset, *shape, *stride) or len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor has impossible sizes: {shape}, {stride} at {offset}"[:200])
    dtype = dtype or storage.dtype
    capacity = storage.count * ITEM_SIZES[storage.dtype] // ITEM_SIZES[dtype]
    needed = offset + 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if 0 not in shape and needed > capacity:
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage of {capacity} numbers"[:200])
    return Leaf(storage, dtype, offset, shape, stride)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Leaf:
    if not isinstance(dtype, _Dtype):
        raise ValueError("a tensor has no dtype")
    return _tensor(storage, offset, shape, stride, dtype=dtype.name)


def _sparse(_layout: Any, parts: Any) -> Leaf:
    shape = parts[2] if isinstance(parts, tuple) and len(parts) > 2 else ()
    if not isinstance(shape, tuple) or not _whole(*shape):
        raise ValueError("a sparse tensor has impossible sizes")
    return Leaf(None, "sparse", 0, shape, ())


def _parameter(tensor: Any, *_: Any) -> Leaf:
    if not isinstance(tensor, Leaf):
        raise ValueError("a parameter is made of something else than a tensor")
    return tensor


def _from_type(function: Any, kind: Any, arguments: Any, _state: Any) -> Any:
    # A tensor or parameter that was given attributes; these are no weights.
    if not isinstance(function, _Function) or not isinstance(kind, Opaque) or not isinstance(arguments, tuple):
        raise ValueError("a tensor is made by something else than torch")
    return function.make(*arguments)


def _size(items: Any = ()) -> tuple[Any, ...]:
    if not isinstance(items, tuple | list):
        raise ValueError("a size is made of something else than numbers")
    return tuple(items)


def _dict(items: Any = ()) -> dict[Any, Any]:
    # Python 2 hands the items of an OrderedDict over as a list of pairs.
    pairs = list(items.items()) if isinstance(items, dict) else items
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise ValueError("a dictionary is made of something else than pairs")
    return {_key(key): value for key, value in pairs}


def _opaque(*_: Any) -> Opaque:
    return Opaque()


def _key(key: Any) -> Any:
    # Only names and numbers lead to weights; to hash anything else (tuples nested without end) is a risk for nothing.
    return key if isinstance(key, str | int) else Opaque()


_KNOWN: dict[str, Any] = {
    "collections OrderedDict": _Function(_dict),
    "collections Counter": _Function(_dict),
    "torch._utils _rebuild_tensor": _Function(_tensor),
    "torch._utils _rebuild_tensor_v2": _Function(_tensor),
    "torch._utils _rebuild_tensor_v3": _Function(_tensor_v3),
    "torch._utils _rebuild_qtensor": _Function(_tensor),
    "torch._utils _rebuild_sparse_tensor": _Function(_sparse),
    "torch._utils _rebuild_parameter": _Function(_parameter),
    "torch._utils _rebuild_parameter_with_state": _Function(_parameter),
    "torch._tensor _rebuild_from_type_v2": _Function(_from_type),
    "torch Size": _Function(_size),
    "torch Tensor": Opaque(),
    "torch.nn.parameter Parameter": Opaque(),
    "torch.storage UntypedStorage": _StorageType("uint8"),
    **{f"torch {name}": _StorageType(dtype) for name, dtype in _STORAGES.items()},
    **{f"torch {dtype}": _Dtype(dtype) for dtype in ITEM_SIZES},
    **{f"torch per_{kind}": Opaque() for kind in ("tensor_affine", "tensor_symmetric", "channel_affine")},
    "torch device": _Function(_opaque),
    "torch.serialization _get_layout": _Function(_opaque),
    "_codecs encode": _Function(_opaque),  # bytes
    **{f"__builtin__ {name}": _Function(_opaque) for name in ("set", "bytearray", "complex")},
    **{f"builtins {name}": _Function(_opaque) for name in ("set", "bytearray", "complex")},
    "numpy dtype": _Function(_opaque),
    "numpy ndarray": Opaque(),
    **{
        f"numpy.{core}.multiarray {name}": _Function(_opaque)
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    },
}
"""All that a pickle may name, as pickles name it; the values are inert and are never changed."""


class _Machine:
    """The stack and memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self, stream: io.BytesIO) -> Any:
        """Read one pickle; the stream is left behind its end."""
        for count, (code, argument, _) in enumerate(pickletools.genops(stream)):
            if count > _MAX_INSTRUCTIONS:
                raise ValueError(f"more than {_MAX_INSTRUCTIONS} instructions")
            if code.name in _CONSTANTS:
                self.stack.append(argument)
            elif code.name in _INSTRUCTIONS:
                _INSTRUCTIONS[code.name](self, argument)
            elif code.name in _MAKING:
                raise Refused(str(argument) if code.name == "INST" else f"an object of the instruction {code.name}")
            else:
                raise ValueError(f"Unsupported operand {code.name}")
        return self.stack.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def take(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("the stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("appending to something else than a list")
        self.stack[-1].extend(items)

    def set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("setting items of something else than a dictionary")
        target.update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))

    def find(self, name: str) -> None:
        if name not in _KNOWN:
            raise Refused(name.replace(" ", ".").removeprefix("__builtin__.").removeprefix("builtins."))
        self.stack.append(_KNOWN[name])

    def reduce(self, _: Any) -> None:
        function, arguments = self.take(2)
        if not isinstance(function, _Function) or not isinstance(arguments, tuple):
            raise Refused("an object of the instruction REDUCE")
        self.stack.append(function.make(*arguments))

    def build(self, _: Any) -> None:
        # The state of what is kept says nothing about weights: `_metadata` of a state dict, a numpy dtype.
        target, _state = self.take(2)
        if not isinstance(target, dict | Opaque):
            raise Refused("an object of the instruction BUILD")
        self.stack.append(target)

    def storage(self, _: Any) -> None:
        (pid,) = self.take(1)
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] not in ("storage", b"storage"):
            raise Refused("a persistent object that is no storage")
        kind, key, _location, count = pid[1:5]
        if not isinstance(kind, _StorageType) or not isinstance(key, str) or not _whole(count):
            raise Refused("a persistent object that is no storage")
        first, size = 0, count
        if len(pid) == 6 and pid[5] is not None:
            if not isinstance(pid[5], tuple) or len(pid[5]) != 3:
                raise ValueError("a storage is a view on nothing")
            _, first, size = pid[5]
        if not _whole(first, size) or first + size > count:
            raise ValueError("a storage reaches beyond the one it is a view on")
        storage = Storage(key, kind.dtype, first, size, count)
        known = self.storages.setdefault(key, storage)
        if (known.dtype, known.whole) != (storage.dtype, storage.whole):
            raise ValueError("one storage has two sizes")
        self.stack.append(storage)


_CONSTANTS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE"),
    *("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
}
_MAKING = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "STOP": lambda machine, _: None,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "MARK": _Machine.mark,
    "TUPLE": lambda machine, _: machine.push(tuple(machine.to_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.take(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.take(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.take(3))),
    "APPEND": lambda machine, _: machine.append(machine.take(1)),
    "APPENDS": lambda machine, _: machine.append(machine.to_mark()),
    "SETITEM": lambda machine, _: machine.set(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.set(machine.to_mark()),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": lambda machine, index: machine.push(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine.push(machine.memo[index]),
    "GLOBAL": _Machine.find,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}


def read(stream: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """Read one pickle.

    Returns:
        Dictionaries, lists, tuples, plain values, and ``Leaf`` for tensors; a container may hold itself. And one
        storage of each name in it.

    Raises:
        Refused: It holds something else, e.g. a call.
        ValueError: It is broken.
    """
    machine = _Machine()
    try:
        return machine.run(stream), machine.storages
    except (IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
        # Whatever instructions in the wrong place lead to.
        raise ValueError(f"{type(error).__name__}: {error}") from error
