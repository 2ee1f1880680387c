from collections.abc import Sequence
from dataclasses import dataclass

import torch

from backdoorscan import Classifier, Finding, LabelledImages, graph
from backdoorscan.classifier import to_tensor
from backdoorscan.errors import MethodError
from backdoorscan.plugin.method import Context, option
from backdoorscan.plugin.repairer import Candidate, Repairer


@dataclass(frozen=True, kw_only=True)
class MuteChannels(Repairer):
    """Silences the channels of the last convolution that the reversed triggers wake most."""

    id = "mute-channels"
    needs_triggers = True

    channels: int = option(1, help="How many channels to silence.", minimum=1)

    def repair(
        self, classifier: Classifier, images: LabelledImages, findings: Sequence[Finding], context: Context
    ) -> Sequence[Candidate]:
        triggers = [finding.trigger for finding in findings if finding.trigger is not None]
        if not triggers:
            raise MethodError(f"{self.id} needs reversed triggers.", hint="Give the report of a scan that found one.")
        repaired = classifier.clone()
        convolution = graph.last_conv_node(repaired.graph_module)

        def channels(pixels: torch.Tensor) -> torch.Tensor:
            """The channels (N, C, H, W) that come out of the last convolution."""
            return graph.values(repaired.graph_module, repaired.native(pixels), [convolution])[convolution]

        clean = to_tensor(images.pixels)
        woken = sum((channels(trigger.stamp(clean)) - channels(clean)).amax((2, 3)).mean(0) for trigger in triggers)
        loudest = torch.as_tensor(woken).argsort(descending=True)[: self.channels]
        layer = repaired.network.get_submodule(repaired.last_conv)
        with torch.no_grad():
            for parameter in layer.parameters():  # weight and bias, one row per channel
                parameter[loudest] = 0
        return [Candidate("muted", repaired, facts={"channels": loudest.tolist()})]
