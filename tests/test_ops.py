"""The fused ops: compiled kernels against the reference, closed forms, refusals; how a library is found and built."""

import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from knife import ops
from knife.errors import OpsError, SettingsError

ROOT = Path(__file__).resolve().parent.parent
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.cuda),
]
CLAMPS = [(-math.inf, math.inf), (-1.0, 1.0), (-math.inf, 0.5)]
SHAPES = [
    (0, 4, 8, 8),
    (1,),
    (3,),
    (2, 0),
    (1, 1, 1, 1),
    (2, 3, 7, 5),
    (3, 1, 9, 4),
    (2, 8, 8, 16),
    (3, 4, 5, 6, 7),
    (3, 4, 96, 128),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Give a device with a compiled kernel; its absence is a failure under KNIFE_OPS=native, else a skip."""
    status = ops.status(request.param)
    if status.path != "native":
        pytest.skip(status.reason)
    return str(request.param)


def numbers(images: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Give alpha_bar, alpha_bar_next and scale, another for each image; the first image is at level 0."""
    alpha_bar = torch.linspace(1.0, 0.02, max(images, 2), dtype=torch.float64)[:images]
    return (
        alpha_bar.to(device),
        alpha_bar.flip(0).to(device) * 0.99,
        torch.arange(images, dtype=torch.float64, device=device) * 3,
    )


def images(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Draw x, eps and grad, contiguous."""
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]


def channel_slice(image: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Store an image as the first half of the channels of a tensor twice as wide."""
    return torch.cat([image, image + 1], 1).contiguous(memory_format=memory_format)[:, : image.shape[1]]


def channels_last(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)


def every_other(image: Tensor) -> Tensor:
    """Store an image with gaps between images, channels and pixels."""
    wide = image.new_zeros([2 * side for side in image.shape])
    view = wide[tuple(slice(None, None, 2) for _ in image.shape)]
    return view.copy_(image)


LAYOUTS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "contiguous": lambda x, eps, g: (x, eps, g),
    "slice": lambda x, eps, g: (x, channel_slice(eps), g),
    "channels_last": lambda x, eps, g: (channels_last(x), channels_last(eps), channels_last(g)),
    "channels_last slice": lambda x, eps, g: (
        channels_last(x),
        channel_slice(eps, torch.channels_last),
        channels_last(g),
    ),
    "mixed": lambda x, eps, g: (x, channel_slice(eps, torch.channels_last), channels_last(g)),
    "gaps": lambda x, eps, g: (every_other(x), every_other(eps), every_other(g)),
    "images inside": lambda x, eps, g: (x.transpose(0, 1).contiguous().transpose(0, 1), eps, g),
    "one eps": lambda x, eps, g: (x, eps[:1, :1, :1, :1].expand_as(x), g),
}


def assert_same(kernel: Tensor, reference: Tensor) -> None:
    """Compare bit for bit, memory format included."""
    torch.testing.assert_close(kernel, reference, rtol=0, atol=0, equal_nan=True, check_stride=kernel.numel() > 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_kernel_equals_reference(device: str, dtype: torch.dtype, layout: str) -> None:
    for shape in SHAPES:
        if layout != "contiguous" and (len(shape) != 4 or shape[0] == 0):
            continue
        x, eps, grad = LAYOUTS[layout](*images(shape, dtype, device))
        for g, clamp in itertools.product((None, grad), CLAMPS):
            arguments = (x, eps, g, *numbers(shape[0], device), *clamp)
            assert_same(torch.ops.knife.ddim_step(*arguments), ops.reference(*arguments))


def test_kernel_is_the_compiled_one(device: str) -> None:
    key = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}[device]
    assert torch._C._dispatch_has_kernel_for_dispatch_key("knife::ddim_step", key)
    assert 0 < ops.self_test(device) < 1e-5
    library = ops.status(device).library
    assert library is not None
    assert library.is_file()


def test_kernel_does_not_depend_on_threads(device: str) -> None:
    x, eps, grad = images((3, 4, 96, 128), torch.float32, device)
    arguments = (
        channels_last(x),
        channel_slice(eps, torch.channels_last),
        channels_last(grad),
        *numbers(3, device),
        -1.0,
        1.0,
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.ops.knife.ddim_step(*arguments)
        torch.set_num_threads(3)
        assert_same(torch.ops.knife.ddim_step(*arguments), alone)
    finally:
        torch.set_num_threads(threads)


def test_kernel_passes_nan_and_infinity_like_the_reference(device: str) -> None:
    x, eps, grad = images((2, 4, 8, 8), torch.float32, device)
    x[0, 0, 0, 0], eps[1, 0, 1, 1], grad[1, 1, 1, 1] = math.nan, math.nan, math.inf
    for clamp in CLAMPS:
        arguments = (x, eps, grad, *numbers(2, device), *clamp)
        stepped = torch.ops.knife.ddim_step(*arguments)
        assert stepped[0, 0, 0, 0].isnan()
        assert_same(stepped, ops.reference(*arguments))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last slice"])
def test_opcheck(layout: str, guided: bool) -> None:
    ops.status()
    x, eps, grad = LAYOUTS[layout](*images((2, 4, 8, 8), torch.float32))
    torch.library.opcheck(torch.ops.knife.ddim_step, (x, eps, grad if guided else None, *numbers(2), -1.0, 1.0))


# --- The mathematics, by whichever kernel runs ------------------------------------------------------------------------


def test_constant_eps_follows_the_closed_form_and_comes_back() -> None:
    x, eps, _ = images((4, 2, 5, 5), torch.float64)
    alpha_bar, alpha_bar_next, scale = numbers(4)
    a, b = alpha_bar.view(-1, 1, 1, 1), alpha_bar_next.view(-1, 1, 1, 1)
    stepped = ops.ddim_step(x, eps, None, alpha_bar, alpha_bar_next, scale)
    closed = (b / a).sqrt() * x + ((1 - b).sqrt() - (b * (1 - a) / a).sqrt()) * eps
    torch.testing.assert_close(stepped, closed, rtol=1e-12, atol=1e-12)
    back = ops.ddim_step(stepped, eps, None, alpha_bar_next, alpha_bar, scale)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)


def test_guidance_is_a_shift_of_eps() -> None:
    x, eps, grad = images((3, 2, 5, 5), torch.float64)
    alpha_bar, alpha_bar_next, scale = numbers(3)
    shifted = eps - (scale * (1 - alpha_bar).sqrt()).view(-1, 1, 1, 1) * grad
    guided = ops.ddim_step(x, eps, grad, alpha_bar, alpha_bar_next, scale)
    assert_same(guided, ops.ddim_step(x, shifted, None, alpha_bar, alpha_bar_next, scale))
    unguided = ops.ddim_step(x, eps, None, alpha_bar, alpha_bar_next, scale)
    assert_same(guided[0], unguided[0])  # scale 0
    assert (guided[1] - unguided[1]).abs().max() > 0.01


def test_clamp_limits_x0_and_keeps_what_x_says() -> None:
    x, eps, _ = images((4, 2, 5, 5), torch.float64)
    alpha_bar, _, scale = numbers(4)
    x0 = ops.ddim_step(3 * x, eps, None, alpha_bar, torch.ones(4, dtype=torch.float64), scale, (-0.5, 0.25))
    assert x0.min() == -0.5
    assert x0.max() == 0.25
    same_level = ops.ddim_step(
        3 * x, eps, None, alpha_bar, alpha_bar, scale, (-0.5, 0.25)
    )  # of x0 and its eps: x again
    torch.testing.assert_close(same_level[1:], 3 * x[1:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(same_level[0], (3 * x[0]).clamp(-0.5, 0.25))  # at level 0 there is no eps to change


def test_every_image_has_its_own_numbers() -> None:
    x, eps, grad = images((4, 3, 6, 6), torch.float32)
    table = numbers(4)
    batch = ops.ddim_step(x, eps, grad, *table, (-1.0, 1.0))
    for i, one in enumerate(batch.split(1)):
        alone = [t[i : i + 1] for t in (x, eps, grad, *table)]
        assert_same(one, ops.ddim_step(*alone, clamp=(-1.0, 1.0)))
    spread = [t[1].expand(4) for t in table]
    assert_same(ops.ddim_step(x, eps, grad, *spread), ops.ddim_step(x, eps, grad, *[t.contiguous() for t in spread]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x, eps, grad = images((2, 3, 8, 8), dtype)
    exact = ops.ddim_step(x.float(), eps.float(), grad.float(), *numbers(2))
    assert_same(ops.ddim_step(x, eps, grad, *numbers(2)), exact.to(dtype))


def test_inputs_are_left_alone() -> None:
    tensors = [*images((2, 3, 8, 8), torch.float32), *numbers(2)]
    before = [t.clone() for t in tensors]
    ops.ddim_step(*tensors, clamp=(-1.0, 1.0))
    assert all(map(torch.equal, tensors, before))


# --- Refusals and traces ----------------------------------------------------------------------------------------------

ARGUMENTS = ("x", "eps", "grad", "alpha_bar", "alpha_bar_next", "scale")
REFUSED: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "x is int64: give float32, float64, bfloat16 or float16.": ("x", lambda a: a["x"].long()),
    "x is complex64: give float32, float64, bfloat16 or float16.": ("x", lambda a: a["x"].cfloat()),
    "x is [], a single number: give images [N, ...].": ("x", lambda a: a["x"][0, 0, 0, 0]),
    "eps is [2, 3, 4, 5], but x is [2, 3, 4, 4]: give both one shape.": ("eps", lambda a: torch.zeros(2, 3, 4, 5)),
    "eps is [3, 4, 4], but x is [2, 3, 4, 4]: give both one shape.": ("eps", lambda a: a["eps"][0]),
    "eps is float64, but x is float32: give both one dtype.": ("eps", lambda a: a["eps"].double()),
    "grad is [1, 3, 4, 4], but x is [2, 3, 4, 4]: give both one shape.": ("grad", lambda a: a["grad"][:1]),
    "grad is bfloat16, but x is float32: give both one dtype.": ("grad", lambda a: a["grad"].bfloat16()),
    "alpha_bar is [1], but x is [2, 3, 4, 4]: give one number per image.": ("alpha_bar", lambda a: a["alpha_bar"][:1]),
    "alpha_bar_next is [2, 1], but x is [2, 3, 4, 4]: give one number per image.": (
        "alpha_bar_next",
        lambda a: a["alpha_bar_next"][:, None],
    ),
    "scale is float32: give float64.": ("scale", lambda a: a["scale"].float()),
    "low is 1.5 and high is -1: give a low that does not exceed high.": ("low", lambda a: 1.5),
    "low is nan and high is -1: give a low that does not exceed high.": ("low", lambda a: math.nan),
}


def refusable() -> dict[str, Any]:
    tensors = [*images((2, 3, 4, 4), torch.float32), *numbers(2)]
    return {**dict(zip(ARGUMENTS, tensors, strict=True)), "low": -1.0, "high": -1.0}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refusals_read_alike(sentence: str) -> None:
    ops.status()
    name, change = REFUSED[sentence]
    arguments = refusable()
    arguments[name] = change(arguments)
    for step in (torch.ops.knife.ddim_step, ops.reference):
        with pytest.raises(RuntimeError) as refusal:
            step(*arguments.values())
        assert str(refusal.value).splitlines()[0] == f"ddim_step: {sentence}"


@pytest.mark.parametrize("name", ["eps", "grad", "alpha_bar", "alpha_bar_next", "scale"])
def test_mixed_devices_are_refused(name: str) -> None:
    arguments = refusable()
    arguments[name] = arguments[name].to("meta")
    for step in (torch.ops.knife.ddim_step, ops.reference):
        with pytest.raises(
            RuntimeError, match=f"ddim_step: {name} is on meta, but x is on cpu: move both to one device."
        ):
            step(*arguments.values())


@pytest.mark.parametrize("name", ["x", "eps", "grad"])
def test_gradients_are_refused(name: str) -> None:
    arguments = dict(zip(ARGUMENTS, refusable().values(), strict=False))
    arguments[name].requires_grad_()
    with pytest.raises(RuntimeError, match="requires a gradient, but a step has none"):
        ops.ddim_step(**arguments)
    with torch.no_grad():
        assert not ops.ddim_step(**arguments).requires_grad


def test_meta_tensors_have_no_size_limit() -> None:
    x = torch.empty(2, 2**31, dtype=torch.float16, device="meta")
    stepped = torch.ops.knife.ddim_step(x, x, None, *numbers(2, "meta"), -1.0, 1.0)
    assert (stepped.shape, stepped.dtype) == (x.shape, x.dtype)


def test_step_can_be_traced_whole() -> None:
    x, eps, grad = LAYOUTS["channels_last slice"](*images((2, 4, 8, 8), torch.float32))
    traced = torch.compile(ops.ddim_step, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_same(
            traced(x, eps, grad, *numbers(2), (-1.0, 1.0)), ops.ddim_step(x, eps, grad, *numbers(2), (-1.0, 1.0))
        )


# --- The norm ---------------------------------------------------------------------------------------------------------

NORM_SHAPES = [  # and the groups
    ((1, 48, 16, 16), 8),
    ((2, 6, 5, 7), 3),
    ((3, 4, 67, 65), 1),  # more than one tile, and what is left of a row
    ((2, 8, 9, 3), 8),  # groups = channels
    ((2, 130, 3, 3), 2),  # more channels than a tile has columns
    ((4, 12), 4),
    ((2, 6, 3, 4, 5), 2),
    ((0, 4, 3, 3), 2),
    ((2, 4, 0, 3), 2),
]
NORM_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: channels_last(x) if x.ndim == 4 else x,
    "slice": lambda x: channel_slice(x) if x.ndim == 4 else x,
    "gaps": every_other,
}


def norm_arguments(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, device: str = "cpu", conditioned: bool = True
) -> list[Any]:
    """Draw what group_norm_silu takes; scale and shift are the halves of one tensor, as in a network."""
    generator = torch.Generator().manual_seed(sum(shape))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = (torch.randn(shape, generator=generator) * 3 + 5).to(device, dtype)
    weight, bias = torch.randn(2, shape[1], generator=generator).to(device, compute)
    condition = torch.randn(shape[0], 2 * shape[1], generator=generator).to(device, compute).chunk(2, 1)
    return [x, weight, bias, groups, 1e-5, *(condition if conditioned else (None, None))]


def exact_norm(arguments: list[Any]) -> Tensor:
    """Compute the norm in float64 by plain torch."""
    return ops.norm_reference(*[a.double() if isinstance(a, Tensor) else a for a in arguments])


@pytest.mark.parametrize("layout", NORM_LAYOUTS)
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_norm_equals_reference(device: str, dtype: torch.dtype, layout: str) -> None:
    off = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for (shape, groups), conditioned in itertools.product(NORM_SHAPES, (False, True)):
        arguments = norm_arguments(shape, groups, dtype, device, conditioned)
        arguments[0] = NORM_LAYOUTS[layout](arguments[0])
        y, moments = torch.ops.knife.group_norm_silu(*arguments)
        assert (y.dtype, y.stride()) == (dtype, torch.empty_like(arguments[0]).stride())
        assert moments.shape == (2, shape[0], groups)
        if y.numel():
            torch.testing.assert_close(y.double(), exact_norm(arguments), rtol=off, atol=off)


@pytest.mark.parametrize("layout", NORM_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_norm_has_the_gradients_of_the_reference(device: str, dtype: torch.dtype, layout: str) -> None:
    off = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    for (shape, groups), conditioned in itertools.product(NORM_SHAPES, (False, True)):
        arguments = norm_arguments(shape, groups, dtype, device, conditioned)
        arguments[0] = NORM_LAYOUTS[layout](arguments[0])
        inputs = [a.requires_grad_() for a in arguments if isinstance(a, Tensor)]
        y = ops._Norm.apply(*arguments)
        exact = exact_norm(arguments)
        descent = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        found, wanted = torch.autograd.grad(y, inputs, descent), torch.autograd.grad(exact, inputs, descent.double())
        if not y.numel():  # where torch's own have been NaN
            assert not any(gradient.any() for gradient in found)
            continue
        for gradient, expected in zip(found, wanted, strict=True):
            size = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(gradient / size, expected / size, rtol=0, atol=off)
        assert found[0].stride() == torch.empty_like(arguments[0]).stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("conditioned", [False, True])
def test_norm_passes_gradcheck(layout: str, conditioned: bool) -> None:
    arguments = norm_arguments((2, 4, 3, 3), 2, torch.float64, conditioned=conditioned)
    arguments[0] = NORM_LAYOUTS[layout](arguments[0])
    inputs = tuple(a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in arguments)
    assert torch.autograd.gradcheck(ops.group_norm_silu, inputs)


@pytest.mark.parametrize("layout", NORM_LAYOUTS)
@pytest.mark.parametrize("conditioned", [False, True])
def test_opcheck_norm(device: str, layout: str, conditioned: bool) -> None:
    arguments = norm_arguments((2, 6, 4, 4), 3, torch.float32, device, conditioned)
    arguments[0] = NORM_LAYOUTS[layout](arguments[0])
    torch.library.opcheck(torch.ops.knife.group_norm_silu, arguments)
    _, moments = torch.ops.knife.group_norm_silu(*arguments)
    x, weight, bias, groups, _, *condition = arguments
    backward = (torch.ones_like(x), x, moments, weight, bias, groups, *condition)
    torch.library.opcheck(torch.ops.knife.group_norm_silu_backward, backward)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_norm_does_not_depend_on_threads_or_the_time(device: str, layout: str) -> None:
    arguments = norm_arguments((3, 64, 48, 40), 4, torch.float32, device)
    arguments[0] = NORM_LAYOUTS[layout](arguments[0])
    x, weight, bias, groups, _, *condition = arguments
    threads, answers = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            y, moments = torch.ops.knife.group_norm_silu(*arguments)
            backward = torch.ops.knife.group_norm_silu_backward(y, x, moments, weight, bias, groups, *condition)
            answers.append((y, moments, *backward))
    finally:
        torch.set_num_threads(threads)
    for answer in answers[1:]:
        assert all(map(torch.equal, answer, answers[0]))


def test_norm_is_exact_far_from_zero(device: str) -> None:
    x = 1e3 + torch.randn(1, 8, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    x[0, 0, 0, 0] = 1.2e3  # the sums begin here
    weight, bias = torch.ones(8, device=device), torch.zeros(8, device=device)
    for layout in (x, channels_last(x)):
        _, moments = torch.ops.knife.group_norm_silu(layout, weight, bias, 2, 1e-5, None, None)
        grouped = x.double().unflatten(1, (2, 4)).flatten(2)
        exact = grouped.mean(2), (grouped.var(2, correction=0) + 1e-5).rsqrt()
        torch.testing.assert_close(moments[0], exact[0].float(), rtol=1e-6, atol=0)
        torch.testing.assert_close(moments[1], exact[1].float(), rtol=1e-5, atol=0)


def test_norm_holds_for_large_and_odd_values(device: str) -> None:
    x = torch.tensor([-1e4, -200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0, 1e4], device=device).view(1, 1, 9, 1)
    weight, bias = torch.tensor([30.0], device=device), torch.tensor([-2.0], device=device)
    y, _ = torch.ops.knife.group_norm_silu(x, weight, bias, 1, 1e-5, None, None)
    torch.testing.assert_close(y, ops.norm_reference(x, weight, bias, 1, 1e-5, None, None), rtol=1e-5, atol=1e-6)
    x[0, 0, 4] = math.nan
    assert torch.ops.knife.group_norm_silu(x, weight, bias, 1, 1e-5, None, None)[0].isnan().all()


def test_norm_of_a_group_that_is_flat(device: str) -> None:
    x = torch.full((1, 4, 8, 8), 7.5, device=device)
    weight, bias = torch.ones(4, device=device), torch.arange(4.0, device=device)
    y = ops.group_norm_silu(x, weight, bias, 2)  # x / sqrt(eps) is 2372, of which float32 keeps four decimals
    torch.testing.assert_close(y, torch.nn.functional.silu(bias).view(1, 4, 1, 1).expand_as(x), rtol=0, atol=5e-4)


def test_norm_takes_parameters_of_a_network_in_half_precision() -> None:
    x, weight, bias, groups, eps, scale, shift = norm_arguments((2, 8, 6, 6), 2, torch.bfloat16)
    halves = [t.bfloat16() for t in (weight, bias, scale, shift)]
    y = ops.group_norm_silu(x, *halves[:2], groups, eps, *halves[2:])
    exact = exact_norm([x, *halves[:2], groups, eps, *halves[2:]])
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=2**-8)


def test_norm_in_plain_torch_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = norm_arguments((2, 8, 6, 6), 2, torch.float32)
    fused = ops.group_norm_silu(*arguments)
    monkeypatch.setattr(ops, "status", lambda device: ops.Status(device, "torch", "as the test wants"))
    torch.testing.assert_close(ops.group_norm_silu(*arguments), fused, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="and groups is 3: give groups that divide"):
        ops.group_norm_silu(*arguments[:3], 3)


def test_norm_is_the_same_whether_or_not_it_is_differentiated(device: str) -> None:
    arguments = norm_arguments((1, 8, 4, 4), 2, torch.float32, device)
    alone = ops.group_norm_silu(*arguments)
    differentiable = ops.group_norm_silu(arguments[0].requires_grad_(), *arguments[1:])
    assert alone.grad_fn is None
    assert type(differentiable.grad_fn).__name__ == "_NormBackward"
    assert torch.equal(alone, differentiable)
    with torch.no_grad():
        assert ops.group_norm_silu(*arguments).grad_fn is None


def test_norm_is_differentiated_only_once(device: str) -> None:
    arguments = norm_arguments((1, 8, 4, 4), 2, torch.float32, device)
    y = ops.group_norm_silu(arguments[0].requires_grad_(), *arguments[1:])
    with pytest.raises(RuntimeError, match="it can be differentiated once only"):
        torch.autograd.grad(y.sum(), arguments[0], create_graph=True)


def test_norm_can_be_traced_whole() -> None:
    arguments = norm_arguments((2, 8, 6, 6), 2, torch.float32)
    traced = torch.compile(ops.group_norm_silu, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(*arguments), ops.group_norm_silu(*arguments), rtol=1e-5, atol=1e-5)


NORM_ARGUMENTS = ("x", "weight", "bias", "groups", "eps", "scale", "shift")
NORM_REFUSED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "x is int64: give float32, float64, bfloat16 or float16.": ("x", lambda x: x.long()),
    "x is [6]: give features [N, C, ...].": ("x", lambda x: x[0, :, 0, 0]),
    "x is [2, 6, 4, 4] and groups is 4: give groups that divide the channels.": ("groups", lambda groups: 4),
    "x is [2, 6, 4, 4] and groups is 0: give groups that divide the channels.": ("groups", lambda groups: 0),
    "weight is [5], but x is [2, 6, 4, 4]: give one number per channel.": ("weight", lambda weight: weight[:5]),
    "bias is [1, 6], but x is [2, 6, 4, 4]: give one number per channel.": ("bias", lambda bias: bias[None]),
    "weight is float64, but x is float32: give float32.": ("weight", lambda weight: weight.double()),
    "bias is float32, but x is float64: give float64.": ("x", lambda x: x.double()),
    "scale is [2, 5], but x is [2, 6, 4, 4]: give one number per image and channel.": ("scale", lambda s: s[:, :5]),
    "shift is [1, 6], but x is [2, 6, 4, 4]: give one number per image and channel.": ("shift", lambda s: s[:1]),
    "shift is bfloat16, but x is float32: give float32.": ("shift", lambda shift: shift.bfloat16()),
}


@pytest.mark.parametrize("sentence", NORM_REFUSED)
def test_refusals_of_the_norm_read_alike(device: str, sentence: str) -> None:
    name, change = NORM_REFUSED[sentence]
    arguments = dict(zip(NORM_ARGUMENTS, norm_arguments((2, 6, 4, 4), 3, torch.float32, device), strict=True))
    arguments[name] = change(arguments[name])
    if sentence.startswith("bias is float32"):
        arguments["weight"] = arguments["weight"].double()
    for norm in (torch.ops.knife.group_norm_silu, ops.norm_reference):
        with pytest.raises(RuntimeError) as refusal:
            norm(*arguments.values())
        assert str(refusal.value).splitlines()[0] == f"group_norm_silu: {sentence}"


@pytest.mark.parametrize("wrong", ["grad", "moments"])
def test_refusals_of_the_derivative(device: str, wrong: str) -> None:
    x, weight, bias, groups, _, *condition = norm_arguments((2, 6, 4, 4), 3, torch.float32, device)
    grad = x[:1] if wrong == "grad" else x
    moments = torch.ones(2, 2, 3 if wrong == "grad" else 2, device=device)
    words = {
        "grad": "grad is [1, 6, 4, 4], but x is [2, 6, 4, 4]: give both one shape.",
        "moments": "moments is [2, 2, 2], but x is [2, 6, 4, 4]: give two numbers per image and group.",
    }
    for place in (device, "meta"):
        tensors = [t.to(place) for t in (grad, x, moments, weight, bias)]
        with pytest.raises(RuntimeError, match=re.escape(f"group_norm_silu_backward: {words[wrong]}")):
            torch.ops.knife.group_norm_silu_backward(*tensors, groups, *[t.to(place) for t in condition])


# --- Which kernels run, and why ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> Path:
    """Find the library that this session uses, for fake compilers to hand out."""
    status = ops.status()
    if status.library is None:
        pytest.skip(status.reason)
    return status.library


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Start with an empty cache and no choice made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KNIFE_OPS", raising=False)
    monkeypatch.setattr(ops, "_decide", ops.functools.cache(ops._decide.__wrapped__))
    monkeypatch.setattr(ops, "_installed_library", lambda device: None)
    return monkeypatch


def fake_compiler(folder: Path, body: str) -> str:
    """Write a compiler that notes its start and then does what body says; $out is what it shall make."""
    script = folder / "fake-c++"
    script.write_text(f"#!/bin/sh\nfor out; do :; done\necho $$ >> {folder}/started\n{body}\n")
    script.chmod(0o755)
    return str(script)


def test_torch_is_chosen(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("KNIFE_OPS", "torch")
    status = ops.status()
    assert (status.path, status.library, status.reason) == ("torch", None, "plain torch, because KNIFE_OPS=torch")


def test_unknown_choice_is_refused(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("KNIFE_OPS", "fast")
    with pytest.raises(SettingsError, match="KNIFE_OPS=fast: give auto, native or torch"):
        ops.status()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (None, "no compiler for cpu found (looked for"),
        ("echo step.h:1: error: no such luck; exit 1", "failed: step.h:1: error: no such luck"),
        ("exit 1", "failed: it said nothing"),
        ("echo rubbish > $out", "cannot be loaded ("),
    ],
    ids=["none", "error", "silent", "rubbish"],
)
def test_without_a_library_plain_torch_serves_and_says_why(
    fresh: pytest.MonkeyPatch, tmp_path: Path, body: str | None, reason: str
) -> None:
    fresh.setenv("CXX", fake_compiler(tmp_path, body) if body else "/nowhere/c++")
    status = ops.status()
    assert (status.path, status.library) == ("torch", None)
    assert status.reason.startswith("plain torch: ")
    assert reason in status.reason
    fresh.setenv("KNIFE_OPS", "native")
    with pytest.raises(OpsError, match="KNIFE_OPS=native, but there is no compiled kernel for cpu: "):
        ops._decide.__wrapped__("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_missing_cuda_says_so(fresh: pytest.MonkeyPatch) -> None:
    assert ops.status("cuda").reason == "plain torch: torch sees no CUDA device"


def test_a_device_without_a_kernel_says_so(fresh: pytest.MonkeyPatch) -> None:
    assert ops.status("mps").reason == "plain torch: there is no kernel for mps, only for cpu and cuda"


def test_slow_compiler_is_stopped(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("CXX", fake_compiler(tmp_path, "sleep 60"))
    fresh.setattr(ops, "BUILD_SECONDS", 0.2)
    assert "was stopped after 0.2 s" in ops.status().reason


def test_lock_of_another_process_is_not_waited_for_forever(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(ops, "BUILD_SECONDS", 0.2)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(OpsError, match="another process has held"), ops._locked(tmp_path / "lock"):
            pass
        process.kill()


def test_cache_that_cannot_be_written_gives_way_to_a_temporary_folder(
    fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    (tmp_path / "tmp").mkdir()
    fresh.setattr(ops.tempfile, "tempdir", str(tmp_path / "tmp"))
    folder = ops._private_folder("key")
    assert folder.parent == tmp_path / "tmp"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)  # others could put their library there
    with pytest.raises(OpsError, match="no folder to build in"):
        ops._private_folder("key")


FIND = "import sys; sys.path.insert(0, sys.argv[1]); from knife import ops; print(*ops._cached_library('cpu'), sep='|')"


def find_in_new_process(**environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FIND, str(ROOT)]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def test_processes_at_once_build_once(library: Path, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = fake_compiler(tmp_path, f"sleep 1; cp {library} $out")
    processes = [find_in_new_process(CXX=compiler, XDG_CACHE_HOME=str(tmp_path / "cache")) for _ in range(4)]
    answers = [process.communicate(timeout=60)[0].strip().split("|") for process in processes]
    assert len({library for library, _ in answers}) == 1
    assert sum(origin.startswith("built on first use") for _, origin in answers) == 1
    assert len((tmp_path / "started").read_text().split()) == 1


def test_killed_build_leaves_nothing_harmful(library: Path, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good, slow = tmp_path / "good", tmp_path / "slow"
    good.mkdir()
    slow.mkdir()
    process = find_in_new_process(
        CXX=fake_compiler(slow, "echo half > $out; sleep 60"), XDG_CACHE_HOME=str(tmp_path / "cache")
    )
    wait_for(lambda: any((tmp_path / "cache").rglob("build-*/knife_cpu.so")))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not any((tmp_path / "cache").glob("knife/ops/*/knife_cpu.so"))
    fresh.setenv("CXX", fake_compiler(good, f"cp {library} $out"))
    built, origin = ops._cached_library("cpu")
    assert origin.startswith("built on first use")
    assert built.read_bytes() == library.read_bytes()
    assert sorted(path.name for path in built.parent.iterdir()) == ["knife_cpu.so", "lock"]
    assert ops._cached_library("cpu") == (built, "built on an earlier use")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_threads_at_once_decide_once(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("CXX", fake_compiler(tmp_path, "sleep 0.2; exit 1"))
    threads = [threading.Thread(target=ops.status) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len((tmp_path / "started").read_text().split()) == 1


@pytest.mark.slow
def test_wrong_kernel_is_replaced_by_plain_torch(tmp_path: Path) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(ops.source_folder(), sources)
    header = sources / "step.h"
    header.write_text(header.read_text().replace("step.next_signal * x0 +", "step.next_signal * x0 -"))
    code = f"""
import pathlib, torch
from knife import ops
ops.source_folder = lambda: pathlib.Path({str(sources)!r})
x, ones = torch.rand(2, 1, 2, 2, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
assert torch.equal(ops.ddim_step(x, x, None, ones, ones, ones), ops.reference(x, x, None, ones, ones, ones, -1e9, 1e9))
print(ops.status().path, ops.status().reason)
"""
    environment = {**os.environ, "KNIFE_OPS": "auto", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert answer.startswith(
        "torch plain torch: the kernel for cpu fails its self-test: it differs from plain torch by"
    )


# --- CUDA -------------------------------------------------------------------------------------------------------------


@pytest.mark.nvcc
def test_cuda_kernel_compiles(tmp_path: Path) -> None:
    try:
        ops.compiler("cuda")
    except OpsError as problem:
        pytest.skip(str(problem))
    ops.build("cuda", tmp_path / "knife_cuda.so")
    assert b"aoti_torch_get_current_cuda_stream" in (tmp_path / "knife_cuda.so").read_bytes()


@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA")
    status = ops.status("cuda")
    if status.path != "native":
        pytest.skip(status.reason)
    return "cuda"


@pytest.mark.cuda
def test_cuda_runs_on_the_current_stream(cuda: str) -> None:
    x, eps, grad = images((2, 4, 64, 64), torch.float32, cuda)
    table, late = numbers(2, cuda), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)  # a step on another stream would read zeros
        stepped = torch.ops.knife.ddim_step(late, eps, grad, *table, -1.0, 1.0)
    torch.cuda.synchronize()
    assert_same(stepped, ops.reference(x, eps, grad, *table, -1.0, 1.0))


@pytest.mark.cuda
def test_cuda_step_can_be_captured(cuda: str) -> None:
    x, eps, grad = images((2, 4, 64, 64), torch.float32, cuda)
    table = numbers(2, cuda)
    torch.ops.knife.ddim_step(x, eps, grad, *table, -1.0, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stepped = torch.ops.knife.ddim_step(x, eps, grad, *table, -1.0, 1.0)
    x.mul_(-0.5)
    table[0].mul_(0.9)  # the coefficients are read when the graph runs
    graph.replay()
    torch.cuda.synchronize()
    assert_same(stepped, ops.reference(x, eps, grad, *table, -1.0, 1.0))


@pytest.mark.cuda
def test_cuda_counts_beyond_two_billion_pixels(cuda: str) -> None:
    pixels = 2**31 + 24
    if torch.cuda.mem_get_info()[0] < 10 * pixels:
        pytest.skip("not enough free GPU memory")
    x = torch.zeros(1, pixels, dtype=torch.bfloat16, device=cuda)
    x[:, -24:] = torch.arange(24, device=cuda)
    table = [t[1:] for t in numbers(2, cuda)]
    stepped = torch.ops.knife.ddim_step(x, x, None, *table, -math.inf, math.inf)
    assert_same(stepped[:, -24:].clone(), ops.reference(x[:, -24:], x[:, -24:], None, *table, -math.inf, math.inf))
    assert not stepped[:, :-24].any()


@pytest.mark.cuda
@pytest.mark.parametrize("name", ARGUMENTS)
def test_cuda_refuses_mixed_devices(cuda: str, name: str) -> None:
    arguments = {key: value.to(cuda) if isinstance(value, Tensor) else value for key, value in refusable().items()}
    arguments[name] = arguments[name].to("cpu")
    with pytest.raises(
        RuntimeError, match=f"ddim_step: {'eps' if name == 'x' else name} is on .*: move both to one device."
    ):
        torch.ops.knife.ddim_step(*arguments.values())
