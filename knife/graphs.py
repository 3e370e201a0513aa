"""CUDA graphs: the hundreds of launches of a step, recorded once for each form of its arguments, replayed as one.

At batch 1 a GPU waits for the launches of a network longer than it computes. So all of a step, the diffusion model, the
gradients of the guides and the update, is launched at once. A recording reads and writes the same memory every time:
what changes is copied to where it reads, and what it makes is copied before the next.
"""

import os
import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from knife.ddim import Play, called
from knife.devices import ran_out_of_memory
from knife.errors import SettingsError, TaskError
from knife.layers import Seen

CHOICES = ("off", "on")  # KNIFE_GRAPHS
MOST = 8  # forms of arguments that are remembered, those used last
WARM = 2  # calls before one is recorded, in which libraries take their memory and weights are made ready


def wanted() -> bool:
    """Tell whether steps shall be recorded, as KNIFE_GRAPHS says.

    Raises:
        SettingsError: if that is none of off, on.
    """
    choice = os.environ.get("KNIFE_GRAPHS", "off")
    if choice not in CHOICES:
        raise SettingsError(f"KNIFE_GRAPHS={choice}: give off or on.")
    return choice == "on"


def in_words() -> str:
    """Say whether steps are recorded.

    Raises:
        SettingsError: as `wanted`.
    """
    return "steps on a GPU are recorded, because KNIFE_GRAPHS=on" if wanted() else "off; KNIFE_GRAPHS=on records steps"


def player() -> Play:
    """Return what takes the steps of one job: a recorder of its own, if that is wanted.

    Raises:
        SettingsError: as `wanted`.
    """
    return Recorder() if wanted() else called


def forget(play: Play) -> None:
    """Give up what was recorded, and the memory that it keeps."""
    if isinstance(play, Recorder):
        play.forget()


class Recorder:
    """Calls works on tensors; those on a GPU are recorded, then replayed. One thread alone may call it.

    A work must do the same with all tensors of one form, and not look at what they hold. All that changes from call to
    call must be among its arguments: tensors, and tuples, lists and `functools.partial` of them, are looked into; any
    other object is taken for what it was, and so are the weights of a network.

    Args:
        kind: the type of the devices that are recorded on.
    """

    def __init__(self, kind: str = "cuda") -> None:
        self.kind = kind
        self.recordings: dict[Hashable, Recording] = {}  # those used last come last
        self.refused: str | None = None  # why no more is recorded
        self.pool: Any = None  # the memory in which all compute, as no two do at once

    def __call__(self, work: Callable[..., Any], *arguments: Any) -> Any:
        tensors = tensors_in(arguments)
        if not tensors or any(x.device.type != self.kind or x.requires_grad for x in tensors):
            return work(*arguments)
        key = (work, computed_in(self.kind), form(arguments))
        recording = self.recordings.pop(key, None) or self.record(work, arguments)
        if recording is None:
            return work(*arguments)
        self.recordings[key] = recording
        return recording.play(tensors)

    def record(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> "Recording | None":
        """Return a new recording, None if there can be none; one that was not used for long is given up for it."""
        if self.refused:
            return None
        while len(self.recordings) >= MOST:
            del self.recordings[next(iter(self.recordings))]
        own = mapped(lambda x: x.detach().clone(), arguments)
        inputs = tensors_in(own)
        warm(partial(work, *own), inputs[0].device)  # what is wrong with the work itself is not caught
        try:
            self.pool = self.pool or new_pool()
            replay, made = capture(partial(work, *own), inputs[0].device, self.pool)
        except (RuntimeError, TaskError) as error:
            if ran_out_of_memory(error):
                raise
            cause = error.__context__ or error  # what ends a recording comes after what broke it
            self.refused = f"{type(cause).__name__}: {cause}"
            warnings.warn(f"KNIFE_GRAPHS=on: a step cannot be recorded ({self.refused})", stacklevel=4)
            return None
        return Recording(replay, inputs, [None] * len(inputs), made)

    def forget(self) -> None:
        """Give up all recordings, and their memory."""
        self.recordings.clear()
        self.pool = None


class Recording(NamedTuple):
    """What was recorded once, and the memory that it reads and writes."""

    replay: Callable[[], object]
    inputs: list[Tensor]
    holds: list[Seen | None]  # of each input what was last copied to it, if its changes are counted
    made: Any

    def play(self, tensors: list[Tensor]) -> Any:
        """Replay it on other tensors; what it returns outlives the next time."""
        new = [i for i, (held, x) in enumerate(zip(self.holds, tensors, strict=True)) if not (held and held.still(x))]
        if new:
            torch._foreach_copy_([self.inputs[i] for i in new], [tensors[i] for i in new])
        for i in new:
            self.holds[i] = None if tensors[i].is_inference() else Seen.now(tensors[i])
        self.replay()
        given = {id(own): x for own, x in zip(self.inputs, tensors, strict=True)}
        return mapped(lambda x: given[id(x)] if id(x) in given else x.clone(), self.made)


def warm(work: Callable[[], Any], device: torch.device) -> None:
    """Call a work on a GPU as often as it takes until it takes nothing new, on the side, as it is recorded."""
    with torch.cuda.device(device):
        now, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(now)
        with torch.cuda.stream(beside):
            for _ in range(WARM):
                work()
        now.wait_stream(beside)


def capture(work: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Callable[[], object], Any]:
    """Return what replays a work on a GPU, and what the work makes, in memory that every replay writes anew."""
    with torch.cuda.device(device):
        graph: Any = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool, torch.cuda.Stream())
        with torch.cuda.stream(torch.cuda.current_stream()), recording:  # back on this stream if it fails
            made = work()
    return graph.replay, made


def new_pool() -> Any:
    """Return what stands for memory that recordings share."""
    return torch.cuda.graph_pool_handle()


# ----------------------------------------------------------------------------------------------------------- arguments


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a value in which tensors are changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, partial):
        named = {name: mapped(change, one) for name, one in value.keywords.items()}
        return partial(mapped(change, value.func), *mapped(change, value.args), **named)
    if isinstance(value, tuple | list):
        parts = [mapped(change, one) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a value, in the order of `mapped`."""
    found = list[Tensor]()

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    mapped(note, value)
    return found


def form(value: Any) -> Hashable:
    """Return all of a value that a recording depends on, but for what its tensors hold."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, partial):
        return (partial, form(value.func), form(value.args), form(tuple(value.keywords.items())))
    if isinstance(value, tuple | list):
        return (type(value), *map(form, value))
    try:
        hash(value)
    except TypeError:
        return Same(value)
    found: Hashable = value
    return found


class Same:
    """Stands for an object that cannot be hashed: equal to nothing but itself, whatever it holds."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def computed_in(kind: str) -> torch.dtype | None:
    """Return the precision of autocast; None if there is none."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
