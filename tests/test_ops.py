"""The fused ops: compiled kernels against the reference, closed forms, refusals."""

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from knife import ops
from knife.bench import operations
from knife.native import Status

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
    "one x": lambda x, eps, g: (x[:, :, :1].expand_as(x), eps, g),
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
    with torch.autocast(device, torch.bfloat16):  # around whatever uses an op first
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
    "overlap": lambda x: x[..., :1].expand_as(x) if x.ndim == 4 and x.numel() else x,
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
    monkeypatch.setattr(ops, "status", lambda device: Status(device, "torch", "as the test wants"))
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


@pytest.mark.parametrize("name", ["weight", "bias", "scale", "shift"])
def test_mixed_devices_of_the_norm_are_refused(name: str) -> None:
    ops.status()
    arguments = dict(zip(NORM_ARGUMENTS, norm_arguments((2, 6, 4, 4), 3, torch.float32), strict=True))
    arguments[name] = arguments[name].to("meta")
    for norm in (torch.ops.knife.group_norm_silu, ops.norm_reference):
        with pytest.raises(
            RuntimeError, match=f"group_norm_silu: {name} is on meta, but x is on cpu: move both to one device."
        ):
            norm(*arguments.values())


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


# --- What every op does with odd tensors ------------------------------------------------------------------------------

OPS = ("ddim_step", "group_norm_silu", "group_norm_silu_backward", "winograd")


def arguments_of(op: str, x: Tensor, by: Callable[[Tensor], Tensor] = Tensor.contiguous) -> list[Any]:
    """Give an op images or features [2, 16, H, W], and other arguments that `by` has changed."""
    _, eps, grad = images(tuple(x.shape), torch.float32)
    _, weight, bias, groups, small, *condition = norm_arguments((2, 16, 4, 4), 4, torch.float32)
    _, kernel, added = convolution((2, 16, 4, 4), 32)
    given: dict[str, list[Any]] = {
        "ddim_step": [x, eps, grad, *numbers(2), -1.0, 1.0],
        "group_norm_silu": [x, weight, bias, groups, small, *condition],
        "group_norm_silu_backward": [grad, x, torch.ones(2, 2, groups), weight, bias, groups, *condition],
        "winograd": [x, ops.winograd_weight(kernel), added],
    }
    return [by(a) if isinstance(a, Tensor) and a is not x else a for a in given[op]]


def answers_of(op: str, x: Tensor, by: Callable[[Tensor], Tensor] = Tensor.contiguous) -> tuple[Tensor, ...]:
    answer = getattr(torch.ops.knife, op)(*arguments_of(op, x, by))
    return answer if isinstance(answer, tuple) else (answer,)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("op", OPS)
def test_values_are_right_wherever_they_lie(op: str) -> None:
    x = torch.randn(2, 16, 9, 6, generator=torch.Generator().manual_seed(0))
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag  # torch keeps the sign apart from the values
    assert negated.is_neg()
    shifted = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)  # not where vectors like to begin
    wanted = answers_of(op, x)
    for odd in (negated, shifted, every_other(x), x.flip(3).flip(3), x.transpose(2, 3).contiguous().transpose(2, 3)):
        for got, expected in zip(answers_of(op, odd), wanted, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for got, expected in zip(answers_of(op, x, every_other), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("op", OPS)
def test_one_number_may_stand_for_all(op: str) -> None:
    """Stretch what may overlap in memory; the answer is that of copies."""

    def stretched(a: Tensor) -> Tensor:
        return a[(slice(0, 1),) * a.ndim].expand_as(a)

    x = stretched(torch.full((2, 16, 5, 7), 0.3))
    before = x.clone()
    answers = answers_of(op, x, stretched), answers_of(op, x.clone(), lambda a: stretched(a).clone())
    for got, expected in zip(*answers, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_of_nothing_comes_nothing(op: str, size: tuple[int, int]) -> None:
    answers = answers_of(op, torch.empty(2, 16, *size))
    assert answers[0].numel() == 0
    assert answers[0].shape[2:] == size
    assert not any(answer.any() for answer in answers)


@pytest.mark.usefixtures("kernels")
def test_no_channels_leave_the_bias() -> None:
    convolved = torch.ops.knife.winograd(torch.zeros(1, 0, 5, 6), torch.zeros(36, 0, 16), torch.arange(16.0))
    assert torch.equal(convolved, torch.arange(16.0).view(1, 16, 1, 1).expand(1, 16, 5, 6))
    assert torch.ops.knife.winograd(torch.zeros(1, 16, 5, 6), torch.zeros(36, 16, 0), None).shape == (1, 0, 5, 6)
    y, moments = torch.ops.knife.group_norm_silu(
        torch.zeros(2, 0, 3), torch.ones(0), torch.ones(0), 4, 1e-5, None, None
    )
    assert (y.shape, moments.any()) == ((2, 0, 3), False)


@pytest.mark.parametrize("op", OPS)
def test_shapes_have_no_limit(op: str) -> None:
    side = 2**16  # 2**37 values
    x = torch.empty(2, 16, side, side, device="meta")
    arguments = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments_of(op, torch.empty(2, 16, 1, 1))]
    arguments = [x if isinstance(a, Tensor) and a.shape == (2, 16, 1, 1) else a for a in arguments]
    answer = getattr(torch.ops.knife, op)(*arguments)
    first = answer[0] if isinstance(answer, tuple) else answer
    assert first.shape == (2, 32 if op == "winograd" else 16, side, side)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("op", OPS)
def test_every_tensor_must_be_on_the_device_of_the_first(op: str) -> None:
    arguments = arguments_of(op, torch.randn(2, 16, 4, 4))
    places = [place for place, a in enumerate(arguments) if isinstance(a, Tensor)]
    for place in places:
        moved = [a.to("meta") if here == place else a for here, a in enumerate(arguments)]
        with pytest.raises(RuntimeError, match=rf"^{op}: \w+ is on .*: move both to one device\."):
            getattr(torch.ops.knife, op)(*moved)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_numbers_that_are_no_fractions_are_refused(op: str, dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=rf"^{op}: x is {str(dtype)[6:]}: give float32"):
        getattr(torch.ops.knife, op)(*arguments_of(op, torch.zeros(2, 16, 4, 4, dtype=dtype), Tensor.contiguous))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("place", range(3))
def test_a_convolution_without_a_derivative_says_so(place: int) -> None:
    arguments = arguments_of("winograd", torch.randn(2, 16, 4, 4))
    arguments[place].requires_grad_()
    with pytest.raises(RuntimeError, match="winograd: an argument requires a gradient"):
        ops.winograd(*arguments)
    with torch.no_grad():
        assert not ops.winograd(*arguments).requires_grad


# --- CUDA -------------------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("op", ["group_norm_silu", "group_norm_silu_backward"])
def test_cuda_norm_can_be_captured_on_another_stream(cuda: str, op: str) -> None:
    x = torch.randn(2, 16, 8, 8, device=cuda)
    arguments = [a.to(cuda) if isinstance(a, Tensor) else a for a in arguments_of(op, torch.randn(2, 16, 8, 8))]
    arguments[1 if op.endswith("backward") else 0] = x
    run = getattr(torch.ops.knife, op)
    run(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*arguments)
    x.mul_(-0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, run(*arguments)))


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


# --- The convolution --------------------------------------------------------------------------------------------------


def convolution(
    shape: tuple[int, int, int, int], outputs: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw features, 3x3 weights and a bias."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator)
    weight = torch.randn(outputs, shape[1], 3, 3, generator=generator) / (3 * shape[1] ** 0.5)
    return x.to(dtype), weight.to(dtype), torch.randn(outputs, generator=generator).to(dtype)


WINOGRAD_SHAPES = [
    ((0, 16, 8, 8), 16),
    ((1, 16, 1, 1), 32),
    ((3, 32, 5, 9), 16),
    ((2, 48, 12, 8), 16),
    ((1, 16, 70, 68), 16),
]


@pytest.fixture
def kernels() -> None:
    """Ask for compiled kernels on the CPU; without any, what computes by them cannot be tested."""
    if ops.status().path != "native":
        pytest.skip(ops.status().reason)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("lay", [channels_last, every_other, torch.Tensor.contiguous])
@pytest.mark.parametrize(("shape", "outputs"), WINOGRAD_SHAPES)
def test_winograd_convolves(
    shape: tuple[int, int, int, int], outputs: int, lay: Callable[[Tensor], Tensor], biased: bool
) -> None:
    x, weight, bias = convolution(shape, outputs)
    added = bias if biased else None
    got = ops.winograd(lay(x), ops.winograd_weight(weight), added)
    exact = F.conv2d(x.double(), weight.double(), bias.double() if biased else None, padding=1)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(got, ops.winograd_reference(x, ops.winograd_weight(weight), added), rtol=0, atol=1e-5)


def test_the_quarter_of_the_products_is_exact_but_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = convolution((2, 16, 9, 6), 32, torch.float64)
    monkeypatch.setattr(ops, "_winograd_complaints", lambda *_: iter(()))
    got = ops.winograd_reference(x, ops.winograd_weight(weight), bias)
    torch.testing.assert_close(got, F.conv2d(x, weight, bias, padding=1), rtol=0, atol=1e-13)


@pytest.mark.usefixtures("kernels")
def test_winograd_does_not_depend_on_threads() -> None:
    x, weight, bias = convolution((2, 32, 40, 36), 32)
    by, threads = ops.winograd_weight(weight), torch.get_num_threads()
    answers = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append(ops.winograd(x, by, bias))
    finally:
        torch.set_num_threads(threads)
    for answer in answers:
        torch.testing.assert_close(answer, answers[0], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("kernels")
def test_opcheck_winograd() -> None:
    x, weight, bias = convolution((2, 16, 8, 8), 32)
    torch.library.opcheck(torch.ops.knife.winograd, (channels_last(x), ops.winograd_weight(weight), bias))
    torch.library.opcheck(torch.ops.knife.winograd, (x, ops.winograd_weight(weight), None))


@pytest.mark.usefixtures("kernels")
def test_winograd_counts_as_a_convolution() -> None:
    x, weight, bias = convolution((2, 16, 9, 6), 32)
    by = ops.winograd_weight(weight)
    assert operations(lambda: ops.winograd(x, by, bias)) == operations(lambda: F.conv2d(x, weight, bias, padding=1)) > 0


WINOGRAD_REFUSED: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "x is float64: give float32.": (0, lambda x: x.double()),
    "bias is bfloat16: give float32.": (2, lambda bias: bias.bfloat16()),
    "weight is on meta, but x is on cpu: move both to one device.": (1, lambda weight: weight.to("meta")),
    "x is [2, 8, 4, 4]: give features [N, C, H, W], whose channels are a multiple of 16.": (0, lambda x: x[:, :8]),
    "x is [16, 4, 4]: give features [N, C, H, W], whose channels are a multiple of 16.": (0, lambda x: x[0]),
    "weight is [35, 16, 32], but x is [2, 16, 4, 4]: give [36, C, K], K a multiple of 16.": (1, lambda w: w[1:]),
    "weight is [36, 16, 31], but x is [2, 16, 4, 4]: give [36, C, K], K a multiple of 16.": (1, lambda w: w[..., 1:]),
    "bias is [31], but weight is [36, 16, 32]: give one number per output.": (2, lambda bias: bias[1:]),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("sentence", WINOGRAD_REFUSED)
def test_refusals_of_the_convolution_read_alike(sentence: str) -> None:
    x, weight, bias = convolution((2, 16, 4, 4), 32)
    arguments = [x, ops.winograd_weight(weight), bias]
    place, change = WINOGRAD_REFUSED[sentence]
    arguments[place] = change(arguments[place])
    for convolve in (torch.ops.knife.winograd, ops.winograd_reference):
        with pytest.raises(RuntimeError) as refusal:
            convolve(*arguments)
        assert str(refusal.value).splitlines()[0] == f"winograd: {sentence}"
