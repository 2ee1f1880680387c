"""GoodNets as files: an ONNX graph or an exported program (.pt2).

Either takes the original network's input and returns N+1 scores and the class.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from backdoorscan.artifact import Artifact
from backdoorscan.classifier import Classifier, InputConvention
from backdoorscan.errors import ArtifactError, MethodError, UnsafeModelError, UnsupportedModelError
from backdoorscan.files import write_whole
from backdoorscan.formats.onnx import reference
from backdoorscan.formats.onnx.export import export as export_onnx
from backdoorscan.formats.onnx.export import run_with_onnxruntime
from backdoorscan.formats.onnx.parse import companions, parse
from backdoorscan.formats.onnx.plain import GOODNET, ParsedOnnx
from backdoorscan.formats.onnx.verify import excerpt_of
from backdoorscan.formats.pt2.export import export as export_pt2
from backdoorscan.formats.pt2.parse import extra, is_pt2
from backdoorscan.formats.pt2.reading import read
from backdoorscan.formats.sandbox import run_apart
from backdoorscan.goodnet import GoodNet, RejectingNet

_TOLERANCE = 1e-4

_Run: TypeAlias = Callable[[Tensor], Tensor]
"""Scores (N, K+1) of inputs as the file takes them."""


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
    """Write a GoodNet with a dynamic batch, and check that the file computes what the network does.

    The file is written under a temporary name and renamed, so it is whole or not there.

    Args:
        goodnet: The network.
        path: The new file: an exported program if its name ends in ``.pt2``, else ONNX.

    Raises:
        UnsupportedModelError: The network cannot be exported.
        MethodError: The file's answers differ from the network's.
        OutputError: The file cannot be written.
    """
    module = _FromFile(goodnet).eval()
    classifier = goodnet.classifier
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(3, *classifier.input_shape, generator=generator)
    inputs = file_input(classifier.convention, classifier.native_shape, pixels)
    facts = {
        "num_classes": goodnet.num_classes,
        "input_shape": classifier.input_shape,
        "native_shape": classifier.native_shape,
        "convention": asdict(classifier.convention),
    }
    description = json.dumps(facts)
    if path.suffix == ".pt2":
        data = export_pt2(module, inputs, {GOODNET: description})
        run = _program(Artifact(path, data, ""))
    else:
        data = export_onnx(module, inputs, ["class"], {GOODNET: description})
        run = run_with_onnxruntime(data)
    with torch.no_grad():
        difference = float((run(inputs) - module(inputs)[0]).abs().max())
    if not difference <= _TOLERANCE:
        raise MethodError(
            f"The GoodNet's {path.suffix} file does not compute what the network computes.",
            why=f"The largest difference is {difference:.3g}.",
            hint="Please report this with the model's architecture.",
        )
    write_whole(path, data, hint="Check the folder and the free space.")


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
        description, open_file = _opened(artifact)
        try:
            facts = json.loads(description or "")
            self.num_classes = int(facts["num_classes"])
            self.input_shape: tuple[int, int, int] = tuple(facts["input_shape"])
            self.native_shape: tuple[int, ...] = tuple(facts["native_shape"])
            self.convention = InputConvention.from_json(facts["convention"])
            self.format = "goodnet-pt2" if is_pt2(artifact.data) else "goodnet-onnx"
            self._run = open_file()
            shape = tuple(self(torch.zeros(2, *self.input_shape)).shape)
            if shape != (2, self.num_classes + 1):
                raise ValueError(f"it gives scores of shape {shape} for two images")
        except UnsafeModelError:
            raise
        except Exception as error:
            raise ArtifactError(
                f"{artifact.path} is not a usable GoodNet.", why=f"{type(error).__name__}: {error}"
            ) from error

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores (N, K+1) of images (N, C, H, W) in [0, 1]."""
        with torch.no_grad():
            return self._run(file_input(self.convention, self.native_shape, pixels))


def is_goodnet(artifact: Artifact) -> bool:
    """Whether the file is a GoodNet that this program wrote."""
    return GOODNET.encode() in artifact.data and _opened(artifact)[0] is not None


def no_network(artifact: Artifact) -> UnsupportedModelError:
    """The refusal of a GoodNet where a network is wanted."""
    return UnsupportedModelError(
        f"{artifact.path} is a GoodNet that backdoorscan wrote.",
        why="It is made of a network and its repaired twin.",
        hint="Use `backdoorscan evaluate` or `backdoorscan predict` on it; scan the repaired network instead.",
    )


def _opened(artifact: Artifact) -> tuple[str | None, Callable[[], _Run]]:
    """What a file says of its input, if it is a GoodNet, and a way to run it.

    Raises:
        ArtifactError: It is broken.
        UnsafeModelError: It is made to mislead, or refers to other files.
    """
    if is_pt2(artifact.data):
        return extra(artifact.data, GOODNET), lambda: _program(artifact)
    name = str(artifact.path)
    if run_apart(companions, artifact.data, name, name=name):
        raise UnsafeModelError(f"{artifact.path} refers to tensors in other files.", hint="Export it anew.")
    parsed = run_apart(parse, artifact.data, {}, name, name=name)
    return parsed.metadata.get(GOODNET), lambda: _graph(artifact, parsed)


def _program(artifact: Artifact) -> _Run:
    """An exported program, read as data."""
    built = read(artifact).built
    return lambda inputs: built.network(inputs.permute(0, 3, 1, 2) if built.layout == "NHWC" else inputs)


def _graph(artifact: Artifact, parsed: ParsedOnnx) -> _Run:
    """An ONNX graph, run by onnxruntime in the sandbox."""
    excerpt, name = excerpt_of(parsed, [parsed.output]), str(artifact.path)

    def run(inputs: Tensor) -> Tensor:
        ((scores,),) = run_apart(reference.run, artifact.data, {}, excerpt, [inputs.numpy()], name=name)
        return torch.from_numpy(scores)

    return run
