"""GoodNets as files: one ONNX graph that takes the original network's input and returns N+1 scores and the class."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import onnx
import onnxruntime
import torch
from google.protobuf.message import Message
from torch import Tensor, nn

from backdoorscan.artifact import Artifact
from backdoorscan.classifier import Classifier, InputConvention
from backdoorscan.errors import ArtifactError, MethodError, UnsafeModelError
from backdoorscan.files import whole_file
from backdoorscan.goodnet import GoodNet, RejectingNet

_KEY = "backdoorscan.goodnet"
"""The metadata entry by which a GoodNet file is known; its value describes the input."""

_TOLERANCE = 1e-4


class _FromFile(nn.Module):
    """A GoodNet that takes its input as the original file did."""

    def __init__(self, goodnet: GoodNet | RejectingNet) -> None:
        super().__init__()
        self.goodnet = goodnet
        self.channels_last = is_channels_last(goodnet.classifier)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        if self.channels_last:
            inputs = inputs.permute(0, 3, 1, 2)
        scores = self.goodnet.from_native(inputs)
        return scores, scores.argmax(1)


def is_channels_last(classifier: Classifier) -> bool:
    """Whether the classifier's file takes images as N×H×W×C."""
    return len(classifier.native_shape) == 3 and classifier.convention.layout == "NHWC"


def write_goodnet(goodnet: GoodNet | RejectingNet, path: Path) -> None:
    """Write a GoodNet as ONNX with a dynamic batch, and check the file in onnxruntime.

    The file is written under a temporary name and renamed, so it is whole or not there.

    Raises:
        MethodError: The file's answers differ from the network's.
    """
    module = _FromFile(goodnet).eval()
    classifier = goodnet.classifier
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(3, *classifier.input_shape, generator=generator)
    inputs = file_input(classifier.convention, classifier.native_shape, pixels)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            (inputs,),
            dynamo=True,
            input_names=["input"],
            output_names=["scores", "class"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        expected = module(inputs)[0]
    if program is None:
        raise MethodError("The GoodNet could not be exported to ONNX.")
    model = program.model_proto
    _forget_origin(model)
    description = {
        "num_classes": goodnet.num_classes,
        "input_shape": classifier.input_shape,
        "native_shape": classifier.native_shape,
        "convention": asdict(classifier.convention),
    }
    model.metadata_props.add(key=_KEY, value=json.dumps(description))
    data = model.SerializeToString()
    scores = _session(data).run(["scores"], {"input": inputs.numpy()})[0]
    difference = float((torch.from_numpy(scores) - expected).abs().max())
    if not difference <= _TOLERANCE:
        raise MethodError(
            "The GoodNet's ONNX file does not compute what the network computes.",
            why=f"The largest difference is {difference:.3g}.",
            hint="Please report this with the model's architecture.",
        )
    with whole_file(path) as place:
        place.write_bytes(data)


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


def file_input(convention: InputConvention, native_shape: tuple[int, ...], pixels: Tensor) -> Tensor:
    """Images (N, C, H, W) in [0, 1] as the file of a network takes them."""
    inputs = convention.apply(pixels)
    if convention.layout == "NHWC":
        inputs = inputs.permute(0, 2, 3, 1)
    return inputs.contiguous() if len(native_shape) == 3 else inputs.reshape(-1, *native_shape)


class GoodNetFile(nn.Module):
    """A GoodNet read from its file: images ``(N, C, H, W)`` in [0, 1] -> scores ``(N, K+1)``.

    Args:
        artifact: A file that ``write_goodnet`` wrote.

    Raises:
        ArtifactError: It is broken.
        UnsafeModelError: It refers to other files.
    """

    def __init__(self, artifact: Artifact) -> None:
        super().__init__()
        model = _parse(artifact)
        if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(model)):
            raise UnsafeModelError(f"{artifact.path} refers to tensors in other files.", hint="Export it anew.")
        try:
            facts = json.loads(_description(model) or "")
            self.num_classes = int(facts["num_classes"])
            self.input_shape: tuple[int, int, int] = tuple(facts["input_shape"])
            self.native_shape: tuple[int, ...] = tuple(facts["native_shape"])
            self.convention = InputConvention.from_json(facts["convention"])
            self._run = _session(artifact.data)
            shape = tuple(self(torch.zeros(2, *self.input_shape)).shape)
            if shape != (2, self.num_classes + 1):
                raise ValueError(f"it gives scores of shape {shape} for two images")
        except Exception as error:
            raise ArtifactError(
                f"{artifact.path} is not a usable GoodNet.", why=f"{type(error).__name__}: {error}"
            ) from error

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores (N, K+1) of images (N, C, H, W) in [0, 1]."""
        inputs = file_input(self.convention, self.native_shape, pixels)
        return torch.from_numpy(self._run.run(["scores"], {"input": inputs.numpy()})[0])


def is_goodnet(artifact: Artifact) -> bool:
    """Whether the file is a GoodNet that this program wrote."""
    return _KEY.encode() in artifact.data and _description(_parse(artifact)) is not None


def _parse(artifact: Artifact) -> onnx.ModelProto:
    try:
        return onnx.load_model_from_string(artifact.data)
    except Exception as error:
        raise ArtifactError(f"{artifact.path} is not a readable ONNX file.", why=str(error)) from error


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """All tensors in a message, wherever they hide: initialisers, attributes, subgraphs."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in value if field.is_repeated else (value,):
                yield from _tensors(part)


def _description(model: onnx.ModelProto) -> str | None:
    return next((entry.value for entry in model.metadata_props if entry.key == _KEY), None)


def _session(data: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


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
