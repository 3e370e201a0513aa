"""The hooks of a task, and of a judge: all that knife asks of a plugin.

A task says how well a noised image fits its target, as one number per image. knife adds the noise, differentiates,
scales and steps; a task never sees autograd, schedules, devices or file formats. `train` and `guide` are twins: one
loss descended over the network's weights, one score climbed over the image's pixels.

Every hook is called on one plugin alone, and may leave out arguments it does not need.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from knife.data import Case
    from knife.image import Image
    from knife.spec import ImageSpec

hookspec = pluggy.HookspecMarker("knife")
hookimpl = pluggy.HookimplMarker("knife")

REQUIRED = ("label", "build", "train", "target", "guide")
OPTIONAL = ("configure", "evaluate", "error", "value")
JUDGE = ("judge", "origin")  # of a judge; the first is required


@hookspec(firstresult=True)
def configure(cases: "Sequence[Case]", label: str | None) -> dict[str, Any]:
    """Return what the task must remember of its training data, as JSON: class names, range and unit of the label.

    `label` is the user's --label, or None: then the task chooses. Optional; without it the config is empty. A number
    `tolerance` in it says which `error` is near enough for anybody, where that is more than the network's own.
    """


@hookspec(firstresult=True)
def label(case: "Case", config: Mapping[str, Any]) -> "Tensor":
    """Return the training label of one case: a class index, a number, a mask [1, H, W].

    It is asked for whenever its case is drawn, so that it should be quick, and must be the same each time. A training
    asks in a thread, one label at a time, while the network learns in another: draw nothing from torch's own random
    numbers, which are the network's then.
    """


@hookspec(firstresult=True)
def build(image_spec: "ImageSpec", config: Mapping[str, Any]) -> "nn.Module":
    """Return a new network, called as net(x [N, C, H, W], t [N]); `image_spec` builds the usual ones."""


@hookspec(firstresult=True)
def train(net: "nn.Module", x: "Tensor", t: "Tensor", label: "Tensor") -> "Tensor":
    """Return the loss over a batch of noised images x [N, C, H, W] at timesteps t [N]: a scalar, to descend."""


@hookspec(firstresult=True)
def target(text: str, image: "Image", image_spec: "ImageSpec", config: Mapping[str, Any]) -> "Tensor":
    """Return the value of --target for one image, of the shape and type of a label.

    Raise TargetError saying what is wanted if it means nothing. `config["extrapolate"]` is true where the user allows
    values beyond those of the training.
    """


@hookspec(firstresult=True)
def guide(net: "nn.Module", x: "Tensor", t: "Tensor", target: "Tensor") -> "Tensor":
    """Return how well each noised image fits its target, [N], to climb over the pixels; target is [N, ...].

    A score below 0 is understood to be best at 0, as a log-likelihood or minus a square is: no step asks for more.
    One without end, as for "more", stays above 0. To look at values on the way (`if x.max() > 1`, `.item()`) makes a
    GPU wait, and such steps are not recorded.
    """


@hookspec(firstresult=True)
def evaluate(
    net: "nn.Module", x: "Tensor", t: "Tensor", target: "Tensor | None", config: Mapping[str, Any]
) -> "dict[str, Tensor]":
    """Return named numbers for the report, each [N] in the user's units: what the network sees. Optional.

    Of images that another task guides `target` is None: numbers that need one are left out.
    """


@hookspec(firstresult=True)
def error(net: "nn.Module", x: "Tensor", t: "Tensor", target: "Tensor", config: Mapping[str, Any]) -> "Tensor":
    """Return how far the network sees each image from its target, [N]: 0 where it is reached, in the user's units.

    It is what closes the loop of a translation, and what calibration and evaluation count. Where a target has no end,
    as with "more", infinity. Optional.
    """


@hookspec(firstresult=True)
def value(case: "Case", config: Mapping[str, Any]) -> float | None:
    """Return a case's label as the number that `evaluate` tells of it, in the user's units; None if it has none.

    Only for tasks that tell a single number: evaluation sets what networks see of true images against it, and --cap and
    --balance go by it where it is measured and stands in no column. Optional.
    """


@hookspec(firstresult=True)
def judge(task: str, image_spec: "ImageSpec", config: Mapping[str, Any]) -> "nn.Module | None":
    """Return a network that tells of clean images what the task's guide tells; None if it knows no such thing.

    It is called as net(x [N, C, H, W], t [N]) with t = 0, and answers as the guide's network does, in its units:
    `image_spec` says what x looks like, and `config` what the guide tells. Load what is heavy here, not at import.
    """


@hookspec(firstresult=True)
def origin() -> str:
    """Return what really judges, as records name it: a program or data set, and its version. Optional."""
