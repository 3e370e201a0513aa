"""The layers of the networks: torch's while a network learns; once frozen, from weights that were made ready once.

In float32 on the CPU, 3x3 convolutions take a quarter of the products (`knife.ops.winograd`). Under bfloat16 autocast
weights are halved once instead of at every call. On the CPU those in bfloat16, and large ones in float32, are packed as
oneDNN reads them. What is made of weights is kept beside them: up to five times their memory in float32, half of it in
bfloat16, as much again where a gradient is asked for. What a network answers, and its gradient over the pixels, are the
same up to rounding. Weights that change in place are noticed, but for what is done to `weight.data`.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula

from knife.ops import LANES, TILE, needs_gradient, status, winograd, winograd_weight

FEWEST_TILES = 16  # of fewer, fetching four times the weights takes longer than the products that are saved
FEWEST_CHANNELS = 32
MANY = 2**18  # weights in float32 that are packed; fewer are as quickly read as they are


class Made:
    """Keeps what was made of a layer's weights, until these change; a base of layers beside one of torch's."""

    weight: Tensor
    bias: Any  # a tensor or None
    made: tuple[tuple["Seen", ...], Mapping[str, Tensor]] = ((), {})  # of which weights; what, by name

    def once(self, what: str, make: Callable[[], Tensor]) -> Tensor:
        """Return what was made of the weights under a name, or make it."""
        weights = [tensor for tensor in (self.weight, self.bias) if tensor is not None]
        of, made = self.made
        if len(of) != len(weights) or not all(map(Seen.still, of, weights)):
            of, made = tuple(map(Seen.now, weights)), {}
        if what not in made:
            with torch.inference_mode(False):  # whose tensors no later gradient could use
                made = {**made, what: make()}  # a new one, as other threads may read the old
            self.made = of, made
        return made[what]

    def halved(self) -> Tensor:
        """Return the weight in bfloat16."""
        return self.once("halved", lambda: self.weight.detach().bfloat16())

    def halved_bias(self) -> Tensor | None:
        """Return the bias in bfloat16."""
        return None if self.bias is None else self.once("halved bias", lambda: self.bias.detach().bfloat16())

    def halves(self, x: Tensor) -> bool:
        """Tell whether autocast would halve these weights for x, and once is enough, as they are frozen."""
        kind = x.device.type
        if not autocast_on(kind) or torch.get_autocast_dtype(kind) != torch.bfloat16:
            return False
        return self.weight.dtype == torch.float32 and frozen(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave what was made of the weights out of copies and pickles, whose weights lie elsewhere."""
        return {**self.__dict__, "made": ((), {})}


class Seen(NamedTuple):
    """A tensor as it was: which one, where its values lay, and how often they had been written to."""

    tensor: "ref[Tensor]"
    place: int
    version: int

    @classmethod
    def now(cls, tensor: Tensor) -> "Seen":
        """Look at a tensor."""
        return cls(ref(tensor), tensor.data_ptr(), tensor._version)

    def still(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is the one seen, and unchanged; another may have come to lie in its place."""
        return self.tensor() is tensor and (self.place, self.version) == (tensor.data_ptr(), tensor._version)


class Linear(Made, nn.Linear):
    """An `nn.Linear` but for how it computes."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.halves(x):
            return super().forward(x)
        if x.device.type == "cpu" and x.ndim == 2 and self.bias is not None:
            return self.one_by_one(x.float()).bfloat16()
        return F.linear(x.bfloat16(), self.halved(), self.halved_bias())

    def one_by_one(self, x: Tensor) -> Tensor:
        """Map each image's vector, [N, C] -> [N, K], by products of its own: their bits do not depend on the others.

        And as oneDNN takes longer to be called than to multiply so little, they are in float32.
        """
        count = len(x)
        with torch.autocast("cpu", enabled=False):
            bias, weight = self.bias.expand(count, 1, -1), self.weight.t().expand(count, -1, -1)
            return torch.baddbmm(bias, x[:, None], weight)[:, 0]


class Convolution(Made, nn.Conv2d):
    """A convolution of odd width: [N, C, H, W] -> [N, K, H, W], or with stride 2 half of the grid.

    An `nn.Conv2d` but for how it computes.
    """

    def __init__(self, channels: int, outputs: int, width: int = 3, stride: int = 1) -> None:
        super().__init__(channels, outputs, width, stride, padding=width // 2)

    def forward(self, x: Tensor) -> Tensor:
        halved = self.halves(x)
        x = x.bfloat16() if halved else x
        if not is_ready(x, self):
            return self._conv_forward(x, self.halved(), self.halved_bias()) if halved else super().forward(x)
        if needs_gradient(x):
            differentiable: Any = _Frozen
            convolved: Tensor = differentiable.apply(x, self)
            return convolved
        return self.convolve(x)

    def convolve(self, x: Tensor) -> Tensor:
        """Convolve features by frozen weights, in float32 or bfloat16."""
        if pays(x, self):
            return winograd(x, self.once("winograd", lambda: winograd_weight(self.weight.detach())), self.bias)
        bias = self.bias if x.dtype == torch.float32 else self.halved_bias()
        return packed(x, self.once(f"packed {x.dtype}", lambda: pack(self.weight.detach().to(x.dtype), x)), bias)

    def descend(self, grad: Tensor) -> Tensor:
        """Return the gradient over x, of that over y: again a convolution, by the weights turned around."""
        if pays(grad, self):
            return winograd(grad, self.once("winograd back", lambda: winograd_weight(self.turned())), None)
        turned = self.once(f"packed {grad.dtype} back", lambda: pack(self.turned().to(grad.dtype), grad))
        return packed(grad, turned, None)

    def turned(self) -> Tensor:
        """Return the weights that lead backwards, [C, K, w, w]."""
        return self.weight.detach().flip(2, 3).transpose(0, 1)


class _Frozen(torch.autograd.Function):
    """The convolution as a function of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, convolution: Convolution) -> Tensor:
        ctx.convolution = convolution
        return convolution.convolve(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.convolution.descend(grad), None


def forget(net: nn.Module) -> None:
    """Free what was made of the weights of a network that learns on, and is asked again only when they have changed."""
    for module in net.modules():
        if isinstance(module, Made):
            module.made = (), {}


def frozen(layer: Made) -> bool:
    """Tell whether something may be made of a layer's weights: they do not learn, and their changes are counted."""
    if layer.weight.requires_grad or needs_gradient(layer.bias) or layer.weight.is_inference():
        return False
    return not torch.compiler.is_compiling()


def autocast_on(kind: str) -> bool:
    """Tell whether torch chooses the precision on devices of a kind."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def is_ready(x: Tensor, convolution: Convolution) -> bool:
    """Tell whether x [N, C, H, W] is convolved by weights that were made ready; those of a stride are not."""
    weight, halved = convolution.weight, x.dtype == torch.bfloat16
    if x.device.type != "cpu" or convolution.stride != (1, 1) or weight.dtype != torch.float32:
        return False
    if not frozen(convolution) or not (halved or (x.dtype == torch.float32 and not autocast_on("cpu"))):
        return False
    return pays(x, convolution) or (packs() and (halved or weight.numel() >= MANY))


def pays(x: Tensor, convolution: Convolution) -> bool:
    """Tell whether a convolution of x [N, C, H, W] that is ready can be done faster, by fewer products."""
    outputs, channels, width, _ = convolution.weight.shape
    tiles = len(x) * -(-x.shape[2] // TILE) * -(-x.shape[3] // TILE)
    if x.dtype != torch.float32 or width != 3 or tiles < FEWEST_TILES:
        return False
    if min(outputs, channels) < FEWEST_CHANNELS or outputs % LANES or channels % LANES:
        return False
    return status("cpu").path == "native"


# -------------------------------------------------------------------------------------------------------------- oneDNN

ONEDNN: Any = torch.ops.mkldnn  # what torch.compile makes of frozen convolutions


@functools.cache
def has_packing() -> bool:
    """Tell whether this torch packs weights for oneDNN, and this processor has what its bfloat16 needs."""
    ops = ("_convolution_pointwise", "_reorder_convolution_weight", "_is_mkldnn_bf16_supported")
    there = torch.backends.mkldnn.is_available() and all(hasattr(ONEDNN, name) for name in ops)
    return there and bool(ONEDNN._is_mkldnn_bf16_supported())


def packs() -> bool:
    """Tell whether oneDNN convolves, so that weights can be packed for it."""
    return has_packing() and bool(torch.backends.mkldnn.enabled)


def pack(weight: Tensor, x: Tensor) -> Tensor:
    """Return weights [K, C, w, w] as oneDNN reads them; they serve any size of x [N, C, H, W]."""
    ready: Tensor = ONEDNN._reorder_convolution_weight(weight.contiguous(), *keeping(weight.shape[-1]), list(x.shape))
    return ready


def packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve x by packed weights, padded so that the grid stays."""
    x = x.contiguous(memory_format=torch.channels_last)
    form = keeping(weight.shape[-1])
    convolved: Tensor = ONEDNN._convolution_pointwise(x, weight, bias, *form, "none", [], None)
    return convolved


@functools.cache
def keeping(width: int) -> tuple[list[int], list[int], list[int], int]:
    """Return padding, stride, dilation and groups of a convolution that keeps the grid."""
    return [width // 2] * 2, [1, 1], [1, 1], 1


def packed_operations(x: Any, weight: Any, *others: Any, out_shape: Any, **more: Any) -> int:
    """Count as torch counts a convolution: two operations for each product."""
    return 2 * math.prod(weight) * math.prod(out_shape) // int(out_shape[1])


if has_packing() and ONEDNN._convolution_pointwise not in flop_registry:
    register_flop_formula(ONEDNN._convolution_pointwise)(packed_operations)
