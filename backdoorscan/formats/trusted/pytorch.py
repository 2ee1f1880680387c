"""Conversions with PyTorch, which run in the sandbox: TorchScript and pickled networks to exported programs."""

from __future__ import annotations

import importlib
import importlib.util
import io
import pickle
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from backdoorscan.errors import UnsupportedModelError, UsageError
from backdoorscan.formats.trusted.standing import somewhere

with somewhere():
    import torch
    from torch import Tensor, fx, nn

    # Imported here because it imports much, for which there are no files left to open later.
    from torch._export.converter import TS2EPConverter

    from backdoorscan.formats.pt2.export import export

_BATCH = 3
_TOLERANCE = 1e-3


def from_torchscript(data: bytes, shapes: Sequence[tuple[int, ...]]) -> bytes:
    """Run a TorchScript archive, and export it.

    Args:
        data: The archive.
        shapes: Of one image: those that may fit, the likeliest first.

    Returns:
        A .pt2 file.

    Raises:
        UnsupportedModelError: It takes no such images, or cannot be exported.
    """
    script = torch.jit.load(io.BytesIO(data), map_location="cpu").eval().float()
    example = example_for(script, shapes)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = TS2EPConverter(script, (example,)).convert().module(check_guards=False)
    except Exception as error:  # whatever the converter trips over
        raise _not_exported(error) from error
    # A copy without the ban on eval().
    return exported(script, fx.GraphModule(program, program.graph), example)


def from_pickle(data: bytes, shapes: Sequence[tuple[int, ...]], module: str, file: str) -> bytes:
    """Unpickle a network and export it, or unpickle weights and save them without what is pickled beside them.

    Args:
        data: What ``torch.save`` or ``pickle`` wrote.
        shapes: Of one image: those that may fit, the likeliest first.
        module: The module that has the network's class, or empty: it is found under that name and as ``__main__``.
        file: Where its source is, or empty for an installed one.

    Returns:
        A .pt2 file, or a state dict as ``torch.save`` writes it.

    Raises:
        UsageError: The classes of what is pickled are not at hand.
        UnsupportedModelError: There is no network, or one that cannot be exported.
    """
    if module:
        _offer(module, file)
    content = _unpickled(data)
    values = content.values() if isinstance(content, Mapping) else (content,)
    networks = [value for value in values if isinstance(value, nn.Module)]
    if not networks:
        buffer = io.BytesIO()
        torch.save(_plain(content), buffer)
        return buffer.getvalue()
    if len(networks) > 1:
        raise UnsupportedModelError(
            f"The file holds {len(networks)} networks.", hint="Save the one to scan by itself: torch.save(model, ...)."
        )
    network = networks[0].eval().float()
    example = example_for(network, shapes)
    return exported(network, network, example)


def _offer(module: str, file: str) -> None:
    """Let pickles find what a module defines, also those of a script that defined it itself."""
    try:
        if file and module not in sys.modules:
            spec = importlib.util.spec_from_file_location(module, file)
            if spec is None or spec.loader is None:
                raise ImportError(f"{file} is no Python file")
            found = sys.modules[module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found)
        else:
            found = importlib.import_module(module)
    except Exception as error:  # the user's own code may raise anything
        raise UsageError(
            f"--arch {file or module} cannot be imported in the sandbox.",
            why=f"{type(error).__name__}: {error}",
            hint="It may import what is installed and what lies beside it, and read no other files.",
        ) from error
    main = sys.modules["__main__"]
    for name, value in vars(found).items():
        if not hasattr(main, name):
            setattr(main, name, value)


def _unpickled(data: bytes) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if data.startswith(b"PK") or b"l\xfc\x9cF\xf9 j\xa8P\x19" in data[:16]:
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
            return pickle.loads(data)  # noqa: S301 - the user trusts it, and this is the sandbox
    except (ImportError, AttributeError) as error:
        raise UsageError(
            "The classes of the pickled network are not at hand.",
            why=str(error),
            hint="Pass --arch FILE.py:NAME with the file that defines its class, or install the package that does.",
        ) from error


def _plain(value: Any) -> Any:
    """Numbers, texts and tensors, in dictionaries and lists; nothing else."""
    match value:
        case Tensor():
            return value.detach().cpu().clone()
        case Mapping():
            return {key: _plain(item) for key, item in value.items() if isinstance(key, str | int)}
        case list() | tuple():
            return [_plain(item) for item in value]
        case bool() | int() | float() | str():
            return value
    return None


def example_for(network: nn.Module, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """Random images that the network takes.

    Args:
        network: What will be exported.
        shapes: Of one image: those that may fit, the likeliest first.

    Returns:
        Images (3, *shape) in [0, 1].

    Raises:
        UnsupportedModelError: None of the shapes fits.
    """
    failures = []
    for shape in shapes:
        example = torch.rand(_BATCH, *shape, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                network(example)
        except Exception as error:  # the network is code of its own
            failures.append(f"{tuple(shape)}: {_line(error)}")
        else:
            return example
    raise UnsupportedModelError(
        "The network takes none of these images.",
        why="; ".join(failures),
        hint="Check that these are the images this model was trained for, or pass --layout.",
    )


def exported(original: nn.Module, network: nn.Module, example: Tensor) -> bytes:
    """A .pt2 file of a network that gives the scores of the original.

    Args:
        original: The network that the file holds.
        network: What is exported in its place.
        example: Images that both take.

    Raises:
        UnsupportedModelError: It does not, or cannot be exported.
    """
    try:
        data = export(network, example)
        with torch.no_grad():
            same = torch.allclose(original(example[:2]), network(example[:2]), rtol=_TOLERANCE, atol=_TOLERANCE)
    except Exception as error:  # the network is code of its own
        raise _not_exported(error) from error
    if not same:
        raise UnsupportedModelError(
            "The converted network gives other scores than the original.", hint="Export it where it was trained."
        )
    return data


def _not_exported(error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError(
        "PyTorch cannot export the network.",
        why=getattr(error, "why", "") or _line(error),
        hint="Where it was trained, export it to ONNX or save its state dict, and pass --arch.",
    )


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1][:200]}" if lines else type(error).__name__
