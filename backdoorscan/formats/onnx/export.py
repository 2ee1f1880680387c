"""From a network to the bytes of a new ONNX file, and that file run by onnxruntime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnxruntime
import torch
from google.protobuf.message import Message
from torch import Tensor, nn

from backdoorscan.errors import UnsupportedModelError

SCORES = "scores"
"""Name of the first output of every file."""

_INPUT = "input"


def export(
    network: nn.Module, example: Tensor, more: Sequence[str] = (), extra: Mapping[str, str] | None = None
) -> bytes:
    """Export a network with an open batch.

    The same network gives the same bytes, and nothing in them tells of the machine they were made on.

    Args:
        network: Takes a tensor ``(N, ...)`` and returns scores ``(N, K)``, or a tuple that starts with them.
        example: At least two inputs; only their shape and type matter.
        more: Names of the outputs behind the scores.
        extra: Texts to store as the file's metadata, by name.

    Raises:
        UnsupportedModelError: The exporter cannot follow the network.
    """
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network.eval(),
                (example,),
                dynamo=True,
                input_names=[_INPUT],
                output_names=[SCORES, *more],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except Exception as error:  # whatever the network's own code and the exporter's may raise
        raise UnsupportedModelError(
            "The network cannot be exported as an ONNX file.",
            why=(str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0][:200],
            hint="Write it in its own format instead.",
        ) from error
    if program is None:
        raise UnsupportedModelError("The network cannot be exported as an ONNX file.")
    model = program.model_proto
    _forget_origin(model)
    for key, value in (extra or {}).items():
        model.metadata_props.add(key=key, value=value)
    return bytes(model.SerializeToString())


def _forget_origin(message: Message) -> None:
    """Remove what the exporter notes in passing.

    It is where in the sources each node comes from, with paths of this machine and a running number: nobody's business,
    and different in every run.
    """
    for field, value in message.ListFields():
        if field.name == "metadata_props":
            message.ClearField(field.name)
        elif field.type == field.TYPE_MESSAGE:
            for part in value if field.is_repeated else (value,):
                _forget_origin(part)


def run_with_onnxruntime(data: bytes) -> Callable[[Tensor], Tensor]:
    """A function from inputs ``(N, ...)`` as a file that ``export`` made takes them to its scores ``(N, K)``."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Falling back means to print to stdout and to try the same again.
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    return lambda inputs: torch.from_numpy(session.run([SCORES], {_INPUT: inputs.numpy()})[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's advice to its own developers from users."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
