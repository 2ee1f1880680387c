"""Where a network computes."""

from __future__ import annotations

import torch

from backdoorscan.errors import UsageError

KINDS = ("cpu", "cuda", "mps", "xpu")


def find_device(name: str) -> torch.device:
    """The device of this name: ``cpu``, ``cuda``, ``cuda:1``, ...

    Raises:
        UsageError: There is no such device here.
    """
    kind, _, number = name.partition(":")
    if kind not in KINDS or not (number.isdecimal() or name == kind):
        raise UsageError(
            f"--device {name} is no device.", hint=f"Known are {', '.join(KINDS)}, and cuda:1 for the second."
        )
    device = torch.device(name)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"There is no {name} here.",
            why=str(error).strip().partition("\n")[0],
            hint="Leave --device out, or install the PyTorch that your accelerator needs: https://pytorch.org.",
        ) from error
    return device
