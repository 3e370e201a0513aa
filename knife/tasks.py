"""Finds plugins, and lets the rest of knife see one plugin as a `Task`.

Tasks are entry points of the group `knife`; an entry point's name is the word after --task. Judges (`knife.judges`)
have a group of their own. Each plugin is imported on its own, so that a broken one becomes a row of `knife plugins
list` and never a crash. A task that is asked for by name imports its own plugin alone, so that no other can slow it
down or spoil it.
"""

import json
import math
import os
import re
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import EntryPoint, EntryPoints, distributions
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

import pluggy

from knife import hookspecs
from knife.errors import KnifeError, TaskError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from knife.data import Case
    from knife.ddim import Score
    from knife.image import Image
    from knife.spec import ImageSpec

GROUP = "knife"
JUDGES = "knife.judges"
HOOKS = (*hookspecs.OPTIONAL[:1], *hookspecs.REQUIRED, *hookspecs.OPTIONAL[1:])  # in the order a task lives them
HOOKS_OF = {GROUP: HOOKS, JUDGES: hookspecs.JUDGE}
REQUIRED_OF = {GROUP: hookspecs.REQUIRED, JUDGES: hookspecs.JUDGE[:1]}
NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")  # a task's name is also a file's: models/<dataset>/<task>.safetensors
OWN = "knife-diffusion"  # the distribution whose names no other can take
WANTED = "KNIFE_PLUGINS"  # names the other distributions whose plugins count
LONGEST_REASON = 300  # characters of what a plugin raises that a message quotes
RESERVED = ("diffusion",)  # `knife train diffusion` is the model itself


@dataclass(frozen=True)
class Plugin:
    """A row of `knife plugins list`."""

    task: str  # or a judge's name
    hooks: tuple[str, ...]
    distribution: str
    version: str
    status: str  # "ok", or why it cannot be used
    module: object = None
    error: BaseException | None = None  # what was raised when it was imported

    @property
    def usable(self) -> bool:
        """Tell whether it can be used."""
        return self.status == "ok"


def names() -> list[str]:
    """Return the names of all registered tasks, sorted; nothing is imported."""
    return sorted({point.name for point in registrations(GROUP)})


def registrations(group: str) -> list[EntryPoint]:
    """Return the entry points of a group, knife's own and those of the distributions that the user wants.

    KNIFE_PLUGINS names these, with commas between: "" stands for none, and without it all are wanted. A distribution
    whose metadata cannot be read is passed over.
    """
    told = os.environ.get(WANTED)
    wanted = None if told is None else {OWN, *(normal(name) for name in told.split(","))}
    known = installed(tuple((folder, changed(folder)) for folder in sys.path))
    return [
        point
        for name, points in known.items()
        if wanted is None or name in wanted
        for point in points.select(group=group)
    ]


@lru_cache(4)
def installed(path: tuple[tuple[str, int], ...]) -> dict[str, EntryPoints]:
    """Return the entry points of all distributions by name; of two of a name, those of the first on the path.

    To read them takes long, so that it is done anew only if another path is given: folders, and when they changed last.
    """
    found = dict[str, EntryPoints]()
    for distribution in distributions():
        with suppress(Exception):  # damaged in whatever way; nobody can tell then what it holds
            found.setdefault(normal(distribution.name or "?"), distribution.entry_points)
    return found


def changed(folder: str) -> int:
    """Return when something was last put into a folder or taken out; 0 if there is none."""
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


def normal(distribution: str) -> str:
    """Return a distribution's name as all ways to spell it have it in common."""
    return re.sub(r"[-_.]+", "-", distribution).strip().lower()


def plugins(task: str | None = None, group: str = GROUP) -> list[Plugin]:
    """Import the registered plugins (of one task alone, if it is named) and return a row for each, sorted by task.

    knife's own names are its own. Of two others that claim one name neither is usable: which one is meant is not for
    knife to guess, but for KNIFE_PLUGINS to say.
    """
    points = [point for point in registrations(group) if task in (None, point.name)]
    own = {point.name for point in points if owner(point) == OWN}
    rows = sorted((inspect(point, own) for point in points), key=lambda row: (row.task, row.distribution))
    claims: dict[str, list[str]] = {}
    for row in rows:
        claims.setdefault(row.task, []).append(row.distribution)
    return [
        row
        if row.task in own or len(claims[row.task]) == 1
        else replace(row, status=f"claimed by {' and '.join(claims[row.task])}; uninstall all but one, or set {WANTED}")
        for row in rows
    ]


def owner(point: EntryPoint) -> str:
    """Return the distribution that an entry point belongs to, "?" if nothing tells."""
    try:
        return normal(point.dist.name) if point.dist and point.dist.name else "?"
    except Exception:  # damaged metadata
        return "?"


def inspect(point: EntryPoint, own: Collection[str] = ()) -> Plugin:
    """Import one plugin and say what it offers, or why it cannot be used; one with a name of knife's `own` is left."""
    row = Plugin(point.name, (), "?", "?", "ok")
    try:
        if point.dist:
            row = replace(row, distribution=point.dist.name or "?", version=point.dist.version or "?")
        if point.name in own and owner(point) != OWN:
            return replace(row, status=f"the name {point.name} is knife's own; rename the entry point")
        with hushed():
            module = point.load()
            hooks = registered(module, HOOKS_OF[point.group])
            return replace(row, hooks=hooks, module=module, status=fault(point, module, hooks) or "ok")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a stranger's module may raise anything, SystemExit included
        return replace(row, status=reason(error), error=error)


_hush, _hushing = threading.Lock(), list[TextIO]()  # the streams that stood there before, one for each that hushes


@contextmanager
def hushed() -> Iterator[None]:
    """Send what plugins print to stderr, in whatever thread: it must not get into the output of --json."""
    with _hush:
        _hushing.append(sys.stdout if not _hushing else _hushing[0])
        sys.stdout = sys.stderr
    try:
        yield
    finally:
        with _hush:
            before = _hushing.pop()
            if not _hushing:
                sys.stdout = before


def reason(error: BaseException) -> str:
    """Return in one line what a plugin raised; a text that cannot be made is left out."""
    try:
        text = str(error)
    except Exception:
        text = "(without a text)"
    return " ".join(f"{type(error).__name__}: {text}".split())[:LONGEST_REASON].rstrip(" .")


def fault(point: EntryPoint, module: object, hooks: Sequence[str]) -> str:
    """Say why a plugin that could be imported cannot be used, or nothing if it can."""
    if point.name in RESERVED:
        return f"the name {point.name} is taken by the model itself; rename the entry point"
    if not NAME.fullmatch(point.name):
        return "the name must be lowercase letters, digits and _, a letter first, 40 at most; rename the entry point"
    unmarked = " (there, but not marked with @hookimpl)"
    missing = [hook + unmarked * hasattr(module, hook) for hook in REQUIRED_OF[point.group] if hook not in hooks]
    return f"lacks {', '.join(missing)}" if missing else ""


def registered(module: object, known: Sequence[str] = HOOKS) -> tuple[str, ...]:
    """Return the hooks a module implements; pluggy raises if one has arguments that the hook does not know."""
    manager = manager_of(module)
    return tuple(hook for hook in known if getattr(manager.hook, hook).get_hookimpls())


def manager_of(module: object) -> pluggy.PluginManager:
    """Return a plugin manager that knows one plugin alone, so that none can spoil another."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(module)
    manager.check_pending()
    return manager


def task(name: str) -> "Task":
    """Return a usable task by name.

    Raises:
        TaskError: if no plugin of that name is registered, or it is broken.
    """
    found = plugins(name)
    if not found:
        known = ", ".join(names()) or "none: reinstall knife"
        raise TaskError(f"task {name}: no plugin offers it; choose from {known} (knife plugins list).")
    usable = [row for row in found if row.usable]
    if not usable:
        owners = " and ".join(row.distribution for row in found)
        raise TaskError(f"task {name}: its plugin ({owners}) cannot be used: {found[0].status} (knife plugins list).")
    return Task(name, manager_of(usable[0].module), usable[0].hooks)


@contextmanager
def contained(who: str) -> Iterator[None]:
    """Turn what a stranger's code raises of its own into a TaskError that begins with `who`."""
    try:
        with hushed():
            yield
    except (KnifeError, MemoryError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        if type(error).__name__ == "OutOfMemoryError":  # the device's fault, not the plugin's
            raise
        raise TaskError(f"{who} failed: {reason(error)}.") from error


@dataclass(frozen=True)
class Seen:
    """One plugin seen through its hooks; what they return is checked here, so that callers can rely on its form."""

    name: str
    manager: pluggy.PluginManager
    hooks: tuple[str, ...]
    role: ClassVar[str] = "plugin"

    def call(self, hook: str, **arguments: object) -> Any:
        """Call a hook; what a plugin raises of its own becomes a TaskError that names plugin and hook."""
        with contained(f"{self.role} {self.name}: its hook {hook}"):
            return getattr(self.manager.hook, hook)(**arguments)

    def violation(self, hook: str, value: object, wanted: str) -> TaskError:
        """Return the error that says what a hook returned and what it must return."""
        return TaskError(
            f"{self.role} {self.name}: its hook {hook} returned {describe(value)}; it must return {wanted}."
        )


@dataclass(frozen=True)
class Task(Seen):
    """A plugin that guides."""

    role: ClassVar[str] = "task"

    def tensor(self, hook: str, **arguments: object) -> "Tensor":
        """Call a hook that returns a tensor."""
        from torch import Tensor

        value = self.call(hook, **arguments)
        if not isinstance(value, Tensor):
            raise self.violation(hook, value, "a tensor")
        return value

    def configure(self, cases: "Sequence[Case]", label: str | None = None) -> dict[str, Any]:
        """Return what the task remembers of its training data."""
        config = self.call("configure", cases=cases, label=label)
        if config is None:
            return {}
        if not isinstance(config, dict) or not survives_json(config):
            wanted = "a dict that JSON gives back as it was: text as keys; text, finite numbers, lists and dicts in it"
            raise self.violation("configure", config, wanted)
        return config

    def label(self, case: "Case", config: Mapping[str, Any]) -> "Tensor":
        """Return the training label of a case."""
        return self.tensor("label", case=case, config=config)

    def build(self, image_spec: "ImageSpec", config: Mapping[str, Any]) -> "nn.Module":
        """Return a new network of the task."""
        from torch.nn import Module

        net = self.call("build", image_spec=image_spec, config=config)
        if not isinstance(net, Module):
            raise self.violation("build", net, "a torch.nn.Module, called as net(x, t)")
        return net

    def train(self, net: "nn.Module", x: "Tensor", t: "Tensor", label: "Tensor") -> "Tensor":
        """Return the training loss over a batch, a scalar."""
        loss = self.tensor("train", net=net, x=x, t=t, label=label)
        if loss.ndim != 0:
            raise self.violation("train", loss, "one scalar loss, as a tensor of shape []")
        return loss

    def target(self, text: str, image: "Image", image_spec: "ImageSpec", config: Mapping[str, Any]) -> "Tensor":
        """Return the wanted value as a tensor, in the form of a label."""
        return self.tensor("target", text=text, image=image, image_spec=image_spec, config=config)

    def score(self, net: "nn.Module", target: "Tensor") -> "Score":
        """Return the score to climb towards a batch of targets [N, ...]."""
        return partial(self.scored, net, target)

    def scored(self, net: "nn.Module", target: "Tensor", x: "Tensor", t: "Tensor") -> "Tensor":
        """Return how well noised images x [N, C, H, W] at timesteps t [N] fit their targets [N, ...], [N]."""
        value = self.tensor("guide", net=net, x=x, t=t, target=target)
        if value.shape != x.shape[:1]:
            raise self.violation("guide", value, f"one score for each image, here of shape [{len(x)}]")
        return value

    def evaluate(
        self, net: "nn.Module", x: "Tensor", t: "Tensor", target: "Tensor | None", config: Mapping[str, Any]
    ) -> "dict[str, Tensor]":
        """Return the task's named numbers for each image, or nothing if it has none."""
        numbers = self.call("evaluate", net=net, x=x, t=t, target=target, config=config)
        if numbers is None:
            return {}
        if not isinstance(numbers, dict) or not all(isinstance(name, str) for name in numbers):
            raise self.violation("evaluate", numbers, "a dict from names to tensors")
        for name, values in numbers.items():
            if getattr(values, "shape", None) != x.shape[:1] or not bool(values.isfinite().all()):
                wanted = f"for {name!r} a tensor of shape [{len(x)}], one finite number for each image"
                raise self.violation("evaluate", values, wanted)
        return numbers

    def error(
        self, net: "nn.Module", x: "Tensor", t: "Tensor", target: "Tensor", config: Mapping[str, Any]
    ) -> "Tensor | None":
        """Return how far each image is from its target, [N], 0 where it is reached; None if the task does not tell."""
        if "error" not in self.hooks:
            return None
        values = self.tensor("error", net=net, x=x, t=t, target=target, config=config)
        if values.shape != x.shape[:1] or not bool((values >= 0).all()):  # which NaN is not either
            raise self.violation("error", values, f"a distance for each image, 0 or more, here of shape [{len(x)}]")
        return values

    def value(self, case: "Case", config: Mapping[str, Any]) -> float | None:
        """Return a case's label as a number in the user's units; None if it has none, or the task does not tell."""
        number = self.call("value", case=case, config=config)
        if number is not None and (not isinstance(number, (int, float)) or not math.isfinite(number)):
            raise self.violation("value", number, "a finite number, or None")
        return number


def survives_json(value: object) -> bool:
    """Tell whether a value is the same after it was stored as JSON and read again."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError):
        return False


def describe(value: object) -> str:
    """Describe what a hook returned, for a message."""
    from torch import Tensor

    if isinstance(value, Tensor):
        flaw = "" if bool(value.isfinite().all()) else ", not all finite"
        return f"a tensor of shape {list(value.shape)} and type {str(value.dtype).removeprefix('torch.')}{flaw}"
    text = repr(value)
    return "nothing" if value is None else f"a {type(value).__name__}" + f" ({text})" * (len(text) <= 80)
