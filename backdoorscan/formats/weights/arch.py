"""The architecture that ``--arch`` names.

Unlike a model file, an architecture is the user's own code: it is **trusted and executed**. Never point
``--arch`` at a file that came along with an untrusted model without reading it first.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import TypeVar

from torch import nn

from backdoorscan.errors import UsageError

FORM = (
    "Give --arch timm:NAME or torchvision:NAME, or FILE.py:NAME or package.module:NAME for Python code that you trust, "
    "for it is executed."
)
"""How an architecture is named: the hint of most errors here."""

_KERAS_SUFFIXES = (".h5", ".hdf5", ".keras", ".json")
_SHOWN = 8

_T = TypeVar("_T")


def build(arch: str) -> nn.Module:
    """Build the network that the user names, by executing the user's code.

    Args:
        arch: ``FILE.py:NAME`` or ``package.module:NAME``. NAME is a class or a function called without
            arguments, or a module (which is copied, so that loading weights leaves the original alone).

    Raises:
        UsageError: There is no such file, module or name, the code fails, or the result is no ``nn.Module``.
    """
    where, colon, name = arch.rpartition(":")
    if arch.lower().endswith(_KERAS_SUFFIXES):
        raise UsageError(
            f"--arch {arch} is for Keras weights, not for PyTorch ones.",
            why="A state dict needs the Python code that builds its network.",
            hint=FORM,
        )
    if not colon or not where or not name:
        raise UsageError(f"--arch {arch} names no network.", why="There is no FILE:NAME pair in it.", hint=FORM)
    module = _from_file(Path(where)) if where.endswith(".py") else _from_package(where)
    network = _instantiate(_attribute(module, name, where), arch)
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"--arch {arch} gives a {type(network).__name__}, not a torch.nn.Module.",
            hint="Name a class derived from torch.nn.Module, or a function that returns such a network.",
        )
    return network


class _Source(SourceFileLoader):
    """Compiles the file as it is now and leaves no ``__pycache__`` next to the user's file."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"There is no architecture file {path}.", hint="Check the path given to --arch.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"Cannot read the architecture file {path}.", why=str(error)) from error
    # The name holds the place and the content: two files called net.py stay apart, and objects built from an
    # earlier version of a file keep the module that their pickles name.
    digest = hashlib.sha256(str(path.resolve()).encode() + b"\0" + content).hexdigest()
    name = f"_backdoorscan_arch_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    loader = _Source(name, str(path))
    spec = ModuleSpec(name, loader, origin=str(path))
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs: dataclasses and pickle look their module up there.
    sys.modules[name] = module
    # The file may import its neighbours, as it could when run as a script; at the end of the search path, so
    # that a neighbour called json.py or numpy.py shadows nothing.
    folder = str(path.resolve().parent)
    sys.path.append(folder)
    try:
        _run(lambda: loader.exec_module(module), f"The architecture file {path}")
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        if folder in sys.path:
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]
    return module


def _from_package(where: str) -> ModuleType:
    if not all(part.isidentifier() for part in where.split(".")):
        raise UsageError(f"--arch: '{where}' is neither a .py file nor the name of a Python module.", hint=FORM)
    try:
        missing = importlib.util.find_spec(where) is None
    except ModuleNotFoundError as error:
        # Only the module itself or a package above it; what those import is reported below.
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise UsageError(f"The architecture module {where} fails.", why=_said(error)) from error
        missing = True
    except Exception as error:  # looking a submodule up runs its package, which is the user's code
        raise UsageError(f"The architecture module {where} fails.", why=_said(error)) from error
    if missing:
        raise UsageError(
            f"There is no Python module '{where}'.",
            hint="Install it, add its folder to PYTHONPATH, or give the file itself: --arch FILE.py:NAME.",
        )
    return _run(lambda: importlib.import_module(where), f"The architecture module {where}")


def _attribute(module: ModuleType, name: str, where: str) -> object:
    try:
        return getattr(module, name)
    except AttributeError:
        pass
    public = {key: value for key, value in vars(module).items() if not key.startswith("_") and callable(value)}
    # A package hands on what its modules define; in a file, what it imports is not what the user looks for.
    package = hasattr(module, "__path__")
    own = [
        key
        for key, value in public.items()
        if package or isinstance(value, nn.Module) or getattr(value, "__module__", "") == module.__name__
    ]
    near = difflib.get_close_matches(name, own, n=1, cutoff=0.5)
    known = ", ".join(own[:_SHOWN]) + (", …" if len(own) > _SHOWN else "")
    raise UsageError(
        f"{where} has no '{name}'.",
        hint=f"Did you mean '{near[0]}'?" if near else f"It defines: {known or 'no class or function'}.",
    )


def _instantiate(made: object, arch: str) -> object:
    if isinstance(made, nn.Module):
        return copy.deepcopy(made)
    if not callable(made):
        return made
    needed = _required(made)
    if needed:
        raise UsageError(
            f"--arch {arch} needs arguments: {', '.join(needed)}.",
            why="It is called without any.",
            hint="Write a function without arguments that returns the network, and name that.",
        )
    return _run(made, f"--arch {arch}")


def _required(made: Callable[..., object]) -> list[str]:
    try:
        parameters = inspect.signature(made).parameters.values()
    except (TypeError, ValueError):  # compiled code may have no signature: then the call itself tells
        return []
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def _run(code: Callable[[], _T], what: str) -> _T:
    """Run the user's code; whatever it raises becomes an error that names it."""
    try:
        return code()
    except (Exception, SystemExit) as error:  # a script without a main guard may call sys.exit
        raise UsageError(
            f"{what} fails.", why=_said(error), hint="It must run by itself; try it in a Python shell."
        ) from error


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
