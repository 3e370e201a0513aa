"""The 3x3 convolution of the networks: torch's while a network learns, by a quarter of the products once it is frozen.

Frozen weights are transformed once, at the first call (`knife.ops.winograd`), and kept beside the weights: four times
their memory, and as much again where a gradient is asked for. What a network answers, and its gradient over the pixels,
are the same up to rounding. Weights that change in place are noticed, but for what is done to `weight.data`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from knife.ops import LANES, TILE, needs_gradient, status, winograd, winograd_weight

FEWEST_TILES = 16  # of fewer, fetching four times the weights takes longer than the products that are saved
FEWEST_CHANNELS = 32


class Convolution(nn.Conv2d):
    """A 3x3 convolution that keeps the grid: [N, C, H, W] -> [N, K, H, W]; an `nn.Conv2d` but for how it computes."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__(channels, outputs, 3, padding=1)
        self.transformed: dict[tuple[Any, ...], Tensor] = {}  # by the state of the weights that they were made of

    def forward(self, x: Tensor) -> Tensor:
        if needs_gradient(self.bias) or not pays(x, self.weight):
            return super().forward(x)
        if needs_gradient(x):
            differentiable: Any = _Frozen
            convolved: Tensor = differentiable.apply(x, self)
            return convolved
        return winograd(x, self.transform(), self.bias)

    def transform(self, backwards: bool = False) -> Tensor:
        """Return the weights as `winograd` wants them, or those that lead backwards: from dy to dx."""
        state = (self.weight.data_ptr(), self.weight._version)
        if any(key[:2] != state for key in tuple(self.transformed)):  # a tuple, as other threads may add to it
            self.transformed.clear()
        key = (*state, backwards)
        transformed = self.transformed.get(key)
        if transformed is None:
            weight = self.weight.detach()
            transformed = winograd_weight(weight.flip(2, 3).transpose(0, 1) if backwards else weight)
            self.transformed[key] = transformed
        return transformed

    def __getstate__(self) -> dict[str, Any]:
        """Leave what was made of the weights out of copies and pickles, whose weights lie elsewhere."""
        return {**self.__dict__, "transformed": {}}


class _Frozen(torch.autograd.Function):
    """The convolution as a function of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, convolution: Convolution) -> Tensor:
        ctx.convolution = convolution
        return winograd(x, convolution.transform(), convolution.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return winograd(grad, ctx.convolution.transform(backwards=True)), None


def forget(net: nn.Module) -> None:
    """Free the transformed weights of a network that learns on, and is asked again only when they have changed."""
    for module in net.modules():
        if isinstance(module, Convolution):
            module.transformed.clear()


def pays(x: Tensor, weight: Tensor) -> bool:
    """Tell whether a convolution of x [N, C, H, W] by weights [K, C, 3, 3] can be done faster, by fewer products."""
    if weight.requires_grad or weight.is_inference() or torch.compiler.is_compiling():
        return False
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    outputs, channels = weight.shape[:2]
    tiles = len(x) * -(-x.shape[2] // TILE) * -(-x.shape[3] // TILE)
    if min(outputs, channels) < FEWEST_CHANNELS or outputs % LANES or channels % LANES or tiles < FEWEST_TILES:
        return False
    return status("cpu").path == "native"
