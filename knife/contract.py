"""The contract of a task, as a check that a plugin's own tests can run.

    from knife.contract import check_task

    def test_contract() -> None:
        check_task("regress")

The task is taken through its life on a dozen small images: it remembers its data, labels them, builds a network, trains
it for a few steps, reads targets and guides towards them. Whatever it breaks raises a TaskError that names the hook,
what was found and what is wanted. knife's own tasks pass the same check.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from knife.data import Case, Form, channels_of, image_of, load, stack
from knife.ddim import slope
from knife.devices import precision
from knife.errors import InputError, KnifeError, SettingsError, TargetError, TaskError
from knife.hookspecs import REQUIRED
from knife.image import Image
from knife.layouts import open_folder
from knife.phantom import write_dataset
from knife.schedule import Schedule, noise, timestep
from knife.spec import ImageSpec
from knife.tasks import GROUP, JUDGES, Task, manager_of, plugins, registered
from knife.tasks import task as task_of
from knife.unet import Architecture

TINY = Architecture(width=8, mult=(1, 2), res_blocks=1, groups=4, pool="mean")
COUNT = 12  # images
REFUSAL = "what it cannot use must raise TargetError (InputError for a file) with a sentence that says what is wanted"


@dataclass(frozen=True)
class Trial:
    """A task and the images it is tried on."""

    task: Task
    spec: ImageSpec
    cases: Sequence[Case]
    image: Image  # the first case as it stands in its file
    mask: Path | None  # the first case's mask
    x: Tensor  # [N, C, H, W] the cases, noised to rising levels
    t: Tensor  # [N] the timesteps of these levels

    def wrong(self, hook: str, found: str, wanted: str) -> TaskError:
        """Return the error for a violation."""
        return TaskError(f"task {self.task.name}: its hook {hook} {found}; {wanted}.")


def check_task(
    task: object,
    *,
    data: Path | None = None,
    label: str | None = None,
    targets: Sequence[str] = (),
    nonsense: str = "no such target",
    size: tuple[int, int] = (16, 16),
    steps: int = 40,
) -> None:
    """Check that a task keeps its contract.

    Args:
        task: the name of a registered task, or a module (any object) with the hooks.
        data: a folder of images to try it on, of which a dozen are used; None: phantoms with masks, sizes and classes.
        label: what --label would say.
        targets: what --target may say; if none are given, what the config holds, some numbers and the first image's
            mask are offered, and the task must accept at least one of them.
        nonsense: what the task must refuse as a target.
        size: height and width that the images are brought to.
        steps: training steps before the guide is tried.

    Raises:
        TaskError: at the first violation.
    """
    with torch.random.fork_rng(devices=[]), trial_of(task, data, size) as trial:
        torch.manual_seed(0)
        config = trial.task.configure(trial.cases, label)
        labels = check_label(trial, config)
        net = check_build(trial, config)
        check_train(trial, net, labels, steps)
        net = net.eval().requires_grad_(False)  # as stored networks are used
        wanted = [labels.roll(1, 0), *check_target(trial, config, labels, targets, nonsense)]
        for target in wanted:
            check_guide(trial, net, target)
        check_bfloat16(trial, net, labels, wanted[0], config)
        check_twins(trial, net, labels)
        check_evaluate(trial, net, wanted[0], config)
        for target in wanted:
            check_error(trial, net, target, config)
        check_value(trial, net, labels, config)


def check_plugin(name: str) -> str:
    """Check what is registered under a name, and say what was found: a task is tried, of a judge the hooks are seen.

    Raises:
        SettingsError: if there is no such plugin.
        TaskError: if it cannot be imported (which is the cause), or breaks its contract.
    """
    said = []
    for group in (GROUP, JUDGES):
        rows = plugins(name, group)
        usable = [row for row in rows if row.usable]
        if rows and not usable:
            raise TaskError(f"plugin {name} ({rows[0].distribution}): {rows[0].status}.") from rows[0].error
        if usable and group == GROUP:
            check_task(name)
        role = "task, keeps its contract" if group == GROUP else "judge, has its hooks"
        said += [f"{name} ({row.distribution} {row.version}): a {role}" for row in usable]
    if not said:
        raise SettingsError(f"NAME {name}: no plugin has it; give one that knife plugins list shows.")
    return "; ".join(said)


@contextmanager
def trial_of(task: object, data: Path | None, size: tuple[int, int]) -> Iterator[Trial]:
    """Provide a task with images to be tried on."""
    known = task_of(task) if isinstance(task, str) else unregistered(task)
    with TemporaryDirectory() as folder:
        if data is None:
            data = Path(folder, "phantoms")
            write_dataset(data, COUNT, size=max(16, *size))
        entries = open_folder(data).entries[:COUNT]
        spec = ImageSpec(channels_of(entries), size, TINY, TINY)
        cases = load(entries, Form(spec.channels, size, spec.value_range)).cases
        if len(cases) < 2:
            raise InputError(f"{data}: {len(cases)} images can be used, too few to try a task on.")
        schedule, x0 = Schedule(), stack(cases)
        level = torch.linspace(1, schedule.T // 2, len(cases)).long()
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        x = noise(x0, eps, schedule.alpha_bar[level])
        yield Trial(known, spec, cases, image_of(entries[0]), entries[0].mask, x, timestep(level))


def unregistered(module: object) -> Task:
    """Return a module as a task that no entry point names.

    Raises:
        TaskError: if it lacks a hook, or one has arguments that the hook does not know.
    """
    name = getattr(module, "__name__", type(module).__name__).rsplit(".", 1)[-1]
    try:
        hooks = registered(module)
    except Exception as error:
        raise TaskError(f"task {name}: its hooks cannot be registered: {' '.join(str(error).split())}.") from error
    missing = [hook for hook in REQUIRED if hook not in hooks]
    if missing:
        raise TaskError(f"task {name}: lacks {', '.join(missing)}; write each and mark it with @hookimpl.")
    return Task(name, manager_of(module), hooks)


def check_label(trial: Trial, config: Mapping[str, Any]) -> Tensor:
    """Check that labels have one form, are finite and not random; return them as one tensor [N, ...]."""
    before = torch.get_rng_state()
    labels = [trial.task.label(case, config) for case in trial.cases]
    forms = sorted({form(label) for label in labels})
    if len(forms) > 1:
        raise trial.wrong("label", f"returned {' and '.join(forms)}", "the labels of all cases must have one form")
    for case, label in zip(trial.cases, labels, strict=True):
        if not bool(label.isfinite().all()):
            raise trial.wrong("label", f"returned {label.tolist()} for {case.name}", "a label must be finite")
        if not torch.equal(label, trial.task.label(case, config)):
            raise trial.wrong("label", f"labelled {case.name} otherwise at the second time", "it must not be random")
    if not torch.equal(torch.get_rng_state(), before):
        wanted = "a network in training draws from them at the same time; give it a torch.Generator of its own"
        raise trial.wrong("label", "drew from torch's own random numbers", wanted)
    return torch.stack(labels)


def check_build(trial: Trial, config: Mapping[str, Any]) -> nn.Module:
    """Check that networks have weights, can be called, and that one can take the weights of another; return one."""
    net, other = trial.task.build(trial.spec, config), trial.task.build(trial.spec, config)
    if not any(p.requires_grad for p in net.parameters()):
        raise trial.wrong("build", "returned a network without weights to train", "it must have some")
    try:
        net(trial.x, trial.t)
    except Exception as error:
        found = f"returned a network that fails on x {list(trial.x.shape)}, t {list(trial.t.shape)} ({error})"
        raise trial.wrong("build", found, "it must be called as net(x, t)") from error
    try:
        other.load_state_dict(net.state_dict())
    except RuntimeError as error:
        wanted = "the same image_spec and config must give the same shapes, or no stored model can be loaded"
        raise trial.wrong("build", "returned another network at the second time", wanted) from error
    return net


def check_train(trial: Trial, net: nn.Module, labels: Tensor, steps: int) -> None:
    """Check that the loss is finite, depends on the weights, and falls when they descend it."""
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses: list[float] = []
    for _ in range(steps):
        torch.manual_seed(0)  # a loss may draw random numbers; here it draws the same ones at each step
        loss = trial.task.train(net.train(), trial.x, trial.t, labels)
        losses.append(loss.item())
        if not bool(loss.isfinite()):
            raise trial.wrong("train", f"returned {losses[-1]} at step {len(losses)}", "the loss must be finite")
        if not loss.requires_grad:
            raise trial.wrong("train", "returned a loss that no weight has a part in", "it must be differentiable")
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if not losses[-1] < losses[0]:
        found = f"returned {losses[0]:g} at first and {losses[-1]:g} after {steps} steps of Adam on the same batch"
        raise trial.wrong("train", found, "the loss must fall")


def check_bfloat16(trial: Trial, net: nn.Module, labels: Tensor, target: Tensor, config: Mapping[str, Any]) -> None:
    """Check that loss, score and numbers are there where networks compute in bfloat16, as on most GPUs and some CPUs.

    It is tried on this CPU, which may not multiply in it, but is much like those that do.
    """

    def trained() -> Tensor:
        training = deepcopy(net).train().requires_grad_()
        with precision("cpu", "bfloat16"):
            loss = trial.task.train(training, trial.x, trial.t, labels)
        torch.autograd.backward(loss)
        return loss

    def score(x: Tensor, t: Tensor) -> Tensor:
        with precision("cpu", "bfloat16"):
            return trial.task.score(net, target)(x, t)

    def guided() -> Tensor:
        return slope(score, trial.x, trial.t).gradient

    wanted = "a network's answer may be bfloat16 there; go on with .float() of it"

    def evaluated() -> Tensor:
        with precision("cpu", "bfloat16"), torch.no_grad():
            numbers = trial.task.evaluate(net, trial.x, trial.t, target, config)
        return torch.cat([torch.zeros(1), *map(Tensor.float, numbers.values())])

    for hook, work in (("train", trained), ("guide", guided), ("evaluate", evaluated)):
        try:
            found = work()
        except (TaskError, RuntimeError) as error:
            raise trial.wrong(hook, f"failed under bfloat16 autocast ({error.__cause__ or error})", wanted) from error
        if not bool(found.isfinite().all()):
            raise trial.wrong(hook, "leads to values that are not finite under bfloat16 autocast", wanted)


def check_target(
    trial: Trial, config: Mapping[str, Any], labels: Tensor, targets: Sequence[str], nonsense: str
) -> list[Tensor]:
    """Check that targets have the form of a label and nonsense is refused; return each as a batch [N, ...]."""
    offered = targets or proposals(config, trial.mask)
    accepted: list[Tensor] = []
    for text in offered:
        value = read_target(trial, config, text)
        if isinstance(value, Tensor):
            if form(value) != form(labels[0]):
                found = f"returned {form(value)} for {text!r}, while labels are {form(labels[0])}"
                raise trial.wrong("target", found, "both must have one form, since guide and evaluate see either")
            accepted.append(value.expand(labels.shape))
        elif targets:
            raise trial.wrong("target", f"refused {text!r} ({value})", "it must accept every target of its own test")
    if not accepted:
        wanted = "name what it accepts: check_task(..., targets=[...])"
        raise trial.wrong("target", f"refused {', '.join(map(repr, offered))}", wanted)
    value = read_target(trial, config, nonsense)
    if isinstance(value, Tensor):
        raise trial.wrong("target", f"accepted {nonsense!r} as {form(value)}", REFUSAL)
    return accepted


def read_target(trial: Trial, config: Mapping[str, Any], text: str) -> Tensor | KnifeError:
    """Return what a target is understood as, or how it is refused, which must be with a sentence."""
    try:
        return trial.task.target(text, trial.image, trial.spec, config)
    except (TargetError, InputError) as error:
        if len(str(error).split()) < 4 or not str(error).endswith("."):
            raise trial.wrong("target", f"refused {text!r} with the words {str(error)!r}", REFUSAL) from error
        return error
    except KnifeError as error:
        raise trial.wrong("target", f"met {text!r} with {error.__cause__ or error!r}", REFUSAL) from error


def proposals(config: Mapping[str, Any], mask: Path | None) -> list[str]:
    """Return what may be worth trying as a target: texts and numbers of the config, + and -, a few numbers, a mask."""

    def leaves(value: object) -> Iterator[str]:
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from leaves(item)
        else:
            yield str(value)

    texts = [*leaves(dict(config)), "+", "-", "0", "0.1", "0.5", "1", *([str(mask)] if mask else [])]
    return list(dict.fromkeys(texts))


def check_guide(trial: Trial, net: nn.Module, target: Tensor) -> None:
    """Check that scores are finite, leave the other images alone, and rise along their gradient."""
    x, t, score = trial.x, trial.t, trial.task.score(net, target)
    value, g = ask(trial, net, x, target)
    if not bool(g.any()):
        raise trial.wrong("guide", "returned a score whose gradient is 0", "it must depend on x, without detaching it")
    changed = torch.cat([x[:1], x[1:].flip(0, 2) + 0.5])
    alone = ask(trial, net, x[:1], target[:1])
    for others, (v, d) in (("are changed", ask(trial, net, changed, target)), ("are left out", alone)):
        if not (near(v[0], value[0]) and near(d[0], g[0])):
            found = f"scored the first image otherwise when the others {others} ({v[0]:g} instead of {value[0]:g})"
            raise trial.wrong("guide", found, "the images of a batch must not see each other")
    step = g / g.square().mean().sqrt()
    with torch.no_grad():
        rises = [score(x + size * step, t).double().sum() - value.double().sum() for size in (0.1, 0.01, 0.001)]
    if not max(rises) > 0:
        found = "returned a score that does not rise when the images take a small step along its gradient"
        raise trial.wrong("guide", found, "it must be differentiable")


def ask(trial: Trial, net: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores [N] and their gradients [N, C, H, W], both finite."""
    score = trial.task.score(net, target)
    with torch.no_grad():
        value = score(x, trial.t[: len(x)])
    try:
        g = slope(score, x, trial.t[: len(x)]).gradient
    except RuntimeError as error:
        raise trial.wrong("guide", f"cannot be differentiated ({error})", "its score must depend on x") from error
    for found in (value, g):
        if not bool(found.isfinite().all()):
            name = "gradients" if found is g else "scores"
            raise trial.wrong("guide", f"returned {name} that are not finite", "climbing needs finite ones")
    return value, g


def check_twins(trial: Trial, net: nn.Module, labels: Tensor) -> None:
    """Check that what training descends is what guiding climbs: the own label scores higher than another's."""
    others = labels.roll(1, 0)
    if torch.equal(labels, others):
        return
    with torch.no_grad():
        own, other = (float(trial.task.score(net, wanted)(trial.x, trial.t).mean()) for wanted in (labels, others))
    if not own > other:
        found = f"scores images {own:g} for the labels they were trained on, and {other:g} for those of others"
        raise trial.wrong("guide", found, "a better fit must score higher: is the sign that of a loss?")


def check_evaluate(trial: Trial, net: nn.Module, target: Tensor, config: Mapping[str, Any]) -> None:
    """Check that there are numbers to report, if the hook is there; `Task.evaluate` checks their form."""
    with torch.no_grad():
        numbers = trial.task.evaluate(net, trial.x, trial.t, target, config)
        trial.task.evaluate(net, trial.x, trial.t, None, config)  # as while another task guides
    if "evaluate" in trial.task.hooks and not numbers:
        raise trial.wrong("evaluate", "returned no numbers", "leave it out if there are none")
    if "level" in numbers:
        raise trial.wrong("evaluate", "named a number level", "choose another name: a record has its own")


def check_error(trial: Trial, net: nn.Module, target: Tensor, config: Mapping[str, Any]) -> None:
    """Check that the distance of an image from its target depends on nothing but the two, if the hook is there."""
    with torch.no_grad():
        errors = trial.task.error(net, trial.x, trial.t, target, config)
        alone = trial.task.error(net, trial.x[:1], trial.t[:1], target[:1], config)
    if errors is not None and alone is not None and not near(alone[0], errors[0]):
        found = f"returned {errors[0]:g} for the first image, and {alone[0]:g} when the others are left out"
        raise trial.wrong("error", found, "the images of a batch must not see each other")


def check_value(trial: Trial, net: nn.Module, labels: Tensor, config: Mapping[str, Any]) -> None:
    """Check that values are in the unit of what the network tells: their distance is the error, if both are there."""
    values = [trial.task.value(case, config) for case in trial.cases]
    with torch.no_grad():
        numbers = trial.task.evaluate(net, trial.x, trial.t, None, config)
        errors = trial.task.error(net, trial.x, trial.t, labels, config)
    if len(numbers) != 1 or errors is None:
        return
    [(name, seen)] = numbers.items()
    for value, number, error in zip(values, seen, errors, strict=True):
        if value is not None and not near((number - value).abs(), error):
            found = f"returned {value:g} for an image of which {name} is {number:g} and the error {error:g}"
            raise trial.wrong("value", found, "it must be the label, in the unit that evaluate tells it in")


def near(a: Tensor, b: Tensor) -> bool:
    """Tell whether two results are the same up to the order of summation."""
    return bool(((a == b) | ((a - b).abs() <= 1e-3 * b.abs().max() + 1e-7)).all())  # two infinities are the same


def form(value: Tensor) -> str:
    """Say shape and type of a tensor."""
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
