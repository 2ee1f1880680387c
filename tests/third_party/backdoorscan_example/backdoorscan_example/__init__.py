"""White squares for backdoorscan: a detector, a repair and an output format."""

from collections.abc import Sequence

from backdoorscan import hookimpl
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.repairer import Repairer
from backdoorscan.plugin.reporter import Reporter
from backdoorscan_example.lines import Lines
from backdoorscan_example.mute_channels import MuteChannels
from backdoorscan_example.white_square import WhiteSquare


@hookimpl
def backdoorscan_detectors() -> Sequence[type[Detector]]:
    return [WhiteSquare]


@hookimpl
def backdoorscan_repairers() -> Sequence[type[Repairer]]:
    return [MuteChannels]


@hookimpl
def backdoorscan_reporters() -> Sequence[type[Reporter]]:
    return [Lines]
