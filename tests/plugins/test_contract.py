"""Every registered task keeps the contract, and the contract notices each way to break it."""

import itertools
import sys
from types import ModuleType

import pytest
import torch
from knife_plugins import classify, regress
from torch import nn
from torch.nn import functional as F

from knife import hookimpl
from knife.contract import check_task, proposals
from knife.errors import TargetError, TaskError
from knife.phantom import write_dataset
from knife.tasks import HOOKS, plugins

STEPS = 10  # enough for the loss to fall
COUNT = itertools.count(1)
TARGETS = {"guide": ["0.1"]}  # not + and -, which only the guide of regress understands


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "phantoms"
    write_dataset(folder, 6, size=16)
    return folder


@pytest.mark.parametrize("row", plugins(), ids=lambda row: row.task)
def test_every_registered_task(row, phantoms):
    assert row.status == "ok"
    check_task(row.task, data=phantoms)


@pytest.mark.parametrize(
    ("task", "label"),
    [("regress", regress.TUMOUR), ("regress", regress.PIXELS), ("classify", "mask"), ("classify", classify.PIXELS)],
)
def test_labels_read_from_the_mask(task, label, phantoms):
    check_task(task, data=phantoms, label=label)


def test_phantoms_of_its_own_and_given_targets():
    check_task("regress", targets=["0.1", "+", "-"], nonsense="0.9")


def test_a_module_that_no_entry_point_names(phantoms):
    check_task(regress, data=phantoms)


def variant(**hooks):
    """Return regress with some hooks replaced; None leaves one out."""
    module = ModuleType("variant")
    for name in HOOKS:
        hook = hooks.get(name, getattr(regress, name))
        if hook:
            setattr(module, name, hookimpl(hook))
    return module


def drawing(case, config):
    torch.rand(())
    return regress.label(case, config)


def growing(case, config):
    return torch.zeros(int(case.pixels.sum()) % 7)


class Scaled(nn.Linear):
    """A network that is called as net(x, t), with weights of any shape."""

    def forward(self, x, t):
        return self.bias * x.mean((1, 2, 3))[:, None]


def unlike(image_spec):
    return Scaled(next(COUNT), 1)


def strict(net, x, t, target):
    told = F.linear(net(x, t)[:, :1], torch.ones(1, 1))[:, 0]  # of the precision that autocast says
    return -((torch.lerp(torch.zeros(len(x)), torch.ones(len(x)), told) - target) ** 2)


def blown_up(net, x, t, label):
    return F.mse_loss(net(x, t)[:, 0], label) / (not torch.is_autocast_enabled("cpu"))


def detached(net, x, t, target):
    return -((net(x.detach() if torch.is_autocast_enabled("cpu") else x, t)[:, 0] - target) ** 2)


def refuse_shortly(text, config):
    raise TargetError("no")


def by_the_batch(net, x, t, target):
    found = net(x, t)[:, 0]
    return -((found - found.mean() - target) ** 2)


VIOLATIONS = {
    "configure: no dict": (lambda cases: ["a"], r"returned a list \(\['a'\]\)"),
    "configure: tensor": (lambda cases: {"mean": torch.ones(1)}, "returned a dict.*JSON"),
    "configure: tuple": (lambda cases: {"range": (0, 1)}, "returned a dict.*JSON"),
    "configure: NaN": (lambda cases: {"low": float("nan")}, "returned a dict.*JSON"),
    "guide: fails in bfloat16": (strict, r"failed under bfloat16 autocast \(expected dtype"),
    "train: infinite in bfloat16": (blown_up, "leads to values that are not finite under bfloat16 autocast"),
    "guide: detached in bfloat16": (detached, "failed under bfloat16 autocast .*does not require grad"),
    "configure: raises": (lambda cases: {}["low"], "failed: KeyError: 'low'"),
    "label: none": (lambda case: None, "returned nothing; it must return a tensor"),
    "label: number": (lambda case: 0.5, r"returned a float \(0.5\)"),
    "label: NaN": (lambda case: torch.tensor(torch.nan), "returned nan for images/"),
    "label: random": (lambda case: torch.rand(()), "labelled images/.* otherwise at the second time"),
    "label: draws": (drawing, "drew from torch's own random numbers; .* give it a torch.Generator of its own"),
    "label: two shapes": (growing, r"returned float32 \[.\] and float32 .*must have one form"),
    "build: function": (lambda: lambda x, t: x, r"returned a function.*torch.nn.Module"),
    "build: no weights": (lambda: nn.ReLU(inplace=False), "returned a network without weights"),
    "build: not net(x, t)": (lambda: nn.Linear(1, 1), r"returned a network that fails on x \["),
    "build: other shapes": (unlike, "returned another network at the second time"),
    "train: not scalar": (lambda net, x, t, label: net(x, t), r"returned a tensor of shape \[6, 1\]"),
    "train: NaN": (lambda net, x, t: net(x, t).mean() / 0, "returned nan at step 1"),
    "train: no weight": (lambda label: label.mean(), "returned a loss that no weight has a part in"),
    "train: stuck": (lambda net, x, t: 1 + 0 * net(x, t).mean(), "returned 1 at first and 1 after"),
    "train: raises": (lambda net, x, t: net(x), "failed: TypeError"),
    "train: exits": (lambda net, x, t: sys.exit(3), "failed: SystemExit: 3"),
    "target: other type": (lambda text: torch.tensor(1), r"returned int64 \[\] for .* labels are float32"),
    "target: other shape": (lambda text: torch.zeros(2), r"returned float32 \[2\]"),
    "target: ValueError": (lambda text: torch.tensor(float(text)), r"met 'size' with ValueError\("),
    "target: anything goes": (lambda text: torch.tensor(0.0), "accepted 'no such target' as float32"),
    "target: no sentence": (refuse_shortly, "refused 'size' with the words 'no'"),
    "guide: [N, 1]": (lambda net, x, t: net(x, t), r"returned .* here of shape \[6\]"),
    "guide: broadcast": (lambda net, x, t, target: net(x, t) - target, r"returned .*\[6, 6\]"),
    "guide: squeezed": (lambda net, x, t: net(x, t).squeeze(), r"returned a tensor of shape \[\].*of shape \[1\]"),
    "guide: not finite": (lambda net, x, t: net(x, t)[:, 0] / 0, "returned scores that are not"),
    "guide: detached": (lambda net, x, t: net(x.detach(), t)[:, 0], "cannot be differentiated"),
    "guide: flat": (lambda net, x, t: net(x, t)[:, 0] * 0, "returned a score whose gradient is 0"),
    "guide: jagged": (lambda x: (x - 2 * x.detach()).mean((1, 2, 3)), "returned a score that does not rise"),
    "guide: batch": (by_the_batch, "scored the first image otherwise when the others are changed"),
    "guide: sign": (lambda net, x, t, target: (net(x, t)[:, 0] - target) ** 2, "scores .* the sign that of a loss"),
    "evaluate: no dict": (lambda net, x, t: net(x, t), "returned a tensor"),
    "evaluate: [N, 1]": (lambda net, x, t: {"a": net(x, t)}, r"returned .*\[6, 1\].*'a'"),
    "evaluate: NaN": (lambda x: {"a": x[:, 0, 0, 0] / 0}, "returned .* not all finite"),
    "evaluate: empty": (lambda: {}, "returned no numbers"),
    "evaluate: level": (lambda x: {"level": x[:, 0, 0, 0]}, "named a number level"),
    "error: below 0": (lambda x: -torch.ones(len(x)), "returned a tensor .*; it must return a distance for each image"),
    "error: one": (lambda x: x.abs().mean(), "returned a tensor of shape .*; it must return a distance for each image"),
    "error: sees others": (lambda x: x.abs().mean() + torch.arange(len(x)), "returned .* for the first image, and"),
    "value: text": (lambda case: "12", r"returned a str \('12'\); it must return a finite number, or None"),
    "value: infinite": (lambda case: float("inf"), "returned a float .inf.; it must return a finite number"),
    "value: other unit": (lambda case: 1000.0, "returned 1000 for an image of which value is"),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_named(name, phantoms):
    hook = name.split(":")[0]
    broken, message = VIOLATIONS[name]
    with pytest.raises(TaskError, match=rf"task variant: its hook {hook} {message}"):
        check_task(variant(**{hook: broken}), data=phantoms, targets=TARGETS.get(hook, ()), steps=STEPS)


def test_every_hook_has_a_violation():
    assert {name.split(":")[0] for name in VIOLATIONS} == set(HOOKS)


def test_required_hooks_are_asked_for_and_the_others_are_not(phantoms):
    with pytest.raises(TaskError, match="task variant: lacks label, guide; write each"):
        check_task(variant(label=None, guide=None), data=phantoms)
    check_task(variant(evaluate=None), data=phantoms, steps=STEPS)


def test_an_argument_that_the_hook_does_not_know(phantoms):
    with pytest.raises(TaskError, match=r"task variant: its hooks cannot be registered: .*'weight'"):
        check_task(variant(train=lambda net, x, t, label, weight: 0), data=phantoms)


def test_targets_of_its_own_test_must_be_accepted(phantoms):
    with pytest.raises(TaskError, match=r"target refused '9' \(--target 9: outside the values"):
        check_task("regress", data=phantoms, targets=["9"])


def test_a_task_that_takes_nothing_proposed_says_how_to_name_targets(phantoms):
    def target(text, config):
        raise TargetError(f"--target {text}: not a colour of the rainbow.")

    with pytest.raises(TaskError, match=r"target refused 'size', .*check_task\(..., targets=\[...\]\)"):
        check_task(variant(target=target), data=phantoms, steps=STEPS)


def test_proposals_hold_what_a_config_holds(tmp_path):
    config = {"classes": ["a", "b"], "range": {"low": 0.25, "high": 3}}
    assert {"a", "b", "0.25", "3", "+", str(tmp_path)} <= set(proposals(config, tmp_path))
    assert "None" not in proposals(config, None)


def test_the_random_state_is_left_as_it_was(phantoms):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    check_task("regress", data=phantoms, steps=STEPS)
    assert torch.equal(torch.get_rng_state(), before)
