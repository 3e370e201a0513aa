"""CUDA graphs: a network's hundreds of launches recorded once for each shape, then replayed as one.

At batch 1 a GPU waits for the launches of a network longer than it computes. torch's `make_graphed_callables` records
the call and its gradient; what is added here is when to record, what to do with a network that cannot be recorded, and
that answers outlive the next call.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from knife.devices import ran_out_of_memory
from knife.errors import SettingsError

CHOICES = ("off", "on")  # KNIFE_GRAPHS
MOST = 8  # shapes of one network that are recorded: each keeps the memory of a call


def wanted() -> bool:
    """Tell whether calls shall be recorded, as KNIFE_GRAPHS says.

    Raises:
        SettingsError: if that is none of off, on.
    """
    choice = os.environ.get("KNIFE_GRAPHS", "off")
    if choice not in CHOICES:
        raise SettingsError(f"KNIFE_GRAPHS={choice}: give off or on.")
    return choice == "on"


def in_words() -> str:
    """Say whether calls are recorded.

    Raises:
        SettingsError: as `wanted`.
    """
    return "calls on a GPU are recorded, because KNIFE_GRAPHS=on" if wanted() else "off; KNIFE_GRAPHS=on records calls"


def replay(net: nn.Module) -> None:
    """Let a frozen network's calls on a GPU be replayed, if that is wanted; one thread alone may call it then.

    The module stays the same object with the same attributes. It must compute the same operations on every call, of the
    same weights: those that change are not noticed.

    Raises:
        SettingsError: as `wanted`.
    """
    if wanted() and not isinstance(net.forward, Replayed):
        net.forward = Replayed(weakly(net.forward))


def forget(net: nn.Module) -> None:
    """Give up what was recorded of a network, and the memory that it keeps."""
    if isinstance(net.forward, Replayed):
        net.forward.graphs.clear()


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that does not keep its object alive, so that the object may hold it."""
    held = WeakMethod(method)

    def call(*inputs: Any, **named: Any) -> Any:
        living = held()
        assert living is not None, "its object is gone"
        return living(*inputs, **named)

    return call


class Replayed:
    """The forward of a network; calls whose arguments are all tensors on a GPU are recorded, then replayed.

    A replay writes where the one before it did. So its answer is copied, and while the gradient of one call is still to
    come, others of that shape are computed anew.

    Args:
        forward: what to record; of tensors it makes a tensor.
        kind: the type of the devices that are recorded on.
    """

    def __init__(self, forward: Callable[..., Any], kind: str = "cuda") -> None:
        self.forward, self.kind = forward, kind
        self.graphs: dict[object, Callable[..., Tensor]] = {}
        self.awaited = set[object]()  # the shapes of calls whose gradient is still to come
        self.refused: str | None = None  # why the network cannot be recorded

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if named or self.refused or not all(isinstance(x, Tensor) and x.device.type == self.kind for x in inputs):
            return self.forward(*inputs, **named)
        shape = (torch.is_grad_enabled(), computed_in(self.kind), *map(look, inputs))
        if shape in self.awaited or not self.recorded(shape, inputs):
            return self.forward(*inputs)
        answer = self.graphs[shape](*inputs).clone()
        if answer.requires_grad:
            self.awaited.add(shape)
            answer.register_hook(lambda gradient: self.awaited.discard(shape))
        return answer

    def recorded(self, shape: object, inputs: tuple[Tensor, ...]) -> bool:
        """Tell whether there is a recording for a shape, or can be now."""
        if shape not in self.graphs and len(self.graphs) < MOST:
            try:
                self.graphs[shape] = record(self.forward, inputs)
            except RuntimeError as error:
                if ran_out_of_memory(error):
                    raise
                cause = error.__context__ or error  # what ends a recording comes after what broke it
                self.refused = f"{type(cause).__name__}: {cause}"
                warnings.warn(f"KNIFE_GRAPHS=on: a network cannot be recorded ({self.refused})", stacklevel=3)
        return shape in self.graphs


def record(forward: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """Return a replay of a call with such inputs, and of its gradient where one of them requires it."""
    samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)

    def plain(*tensors: Tensor) -> Tensor:  # recorded is the call as the network makes it, and nothing of the module
        made = forward(*tensors)
        if not isinstance(made, Tensor):
            raise RuntimeError(f"the network answers with a {type(made).__name__}, not a tensor")
        return made

    capture: Any = torch.cuda.make_graphed_callables  # the declared types know modules and functions as one
    where = {x.device for x in samples if x.is_cuda}
    with torch.cuda.stream(torch.cuda.current_stream(where.pop()) if where else None):  # on the GPU of the inputs,
        replayed: Callable[..., Tensor] = capture(plain, samples)  # and back on this stream if it fails
    return replayed


def look(x: Tensor) -> tuple[object, ...]:
    """Return all of a tensor that a recording depends on, but for its values."""
    return (x.shape, x.stride(), x.dtype, x.device, x.requires_grad)


def computed_in(kind: str) -> torch.dtype | None:
    """Return the precision of autocast; None if there is none."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
