"""What every search over inputs shares: the network stands still, images are drawn at random, Adam takes the steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.optim.adam import adam

from backdoorscan import graph
from backdoorscan.classifier import Classifier
from backdoorscan.ops.slopes import quick_slopes


class Descent:
    """Adam (Kingma, Ba 2015) on what a search varies.

    The step is torch's. ``torch.optim.Adam`` would import torch's compiler when it is first made, which costs every
    process two seconds.

    Args:
        parameters: Tensors that require gradients.
        rate: The learning rate, above 0.
        betas: The weights of the past in the running means of the gradient and of its square.
    """

    def __init__(self, parameters: Sequence[Tensor], rate: float, betas: tuple[float, float] = (0.5, 0.9)) -> None:
        self.parameters = list(parameters)
        self.rate = rate
        self.betas = betas
        self._means = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._squares = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._steps = [torch.tensor(0.0) for _ in self.parameters]

    def step(self, loss: Tensor) -> None:
        """Go down the slope of ``loss``, a scalar."""
        slopes = list(torch.autograd.grad(loss, self.parameters))
        with torch.no_grad():
            adam(
                self.parameters,
                slopes,
                self._means,
                self._squares,
                [],
                self._steps,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=self.rate,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )


@contextmanager
def frozen(classifier: nn.Module) -> Iterator[None]:
    """Without gradients for the weights; those for the input then take fewer steps. All is undone afterwards."""
    trainable = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    network = classifier.network if isinstance(classifier, Classifier) else None
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        if isinstance(network, fx.GraphModule):
            classifier.network = graph.pool_first(network)
        with quick_slopes(classifier):
            yield
    finally:
        if network is not None:
            classifier.network = network
        for parameter in trainable:
            parameter.requires_grad_(True)


def draw(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` entries of ``pool`` (N,), with repetition."""
    return pool[torch.randint(len(pool), (count,), generator=generator)]
