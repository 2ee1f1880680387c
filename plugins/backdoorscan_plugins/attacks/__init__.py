"""Attacks: one module per family of triggers. Networks of the bench are trained on what they make of clean images."""

from __future__ import annotations

from collections.abc import Sequence

from backdoorscan import hookimpl
from backdoorscan.plugin.attack import Attack
from backdoorscan_plugins.attacks.clean_label import CleanLabel
from backdoorscan_plugins.attacks.patch import BadNets, LowRate, SinglePixel
from backdoorscan_plugins.attacks.patches import AllToAll, MultiTarget, MultiTrigger, SourceSpecific
from backdoorscan_plugins.attacks.pattern import Blended, Sinusoid
from backdoorscan_plugins.attacks.sample_specific import SampleSpecific
from backdoorscan_plugins.attacks.warp import Warping


@hookimpl
def backdoorscan_attacks() -> Sequence[type[Attack]]:
    """The attacks of these modules."""
    return [
        BadNets,
        SinglePixel,
        LowRate,
        AllToAll,
        SourceSpecific,
        MultiTrigger,
        MultiTarget,
        CleanLabel,
        Blended,
        Sinusoid,
        Warping,
        SampleSpecific,
    ]
