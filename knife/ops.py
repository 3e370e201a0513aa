"""The fused ops, each a formula in one or two passes over memory.

`knife::ddim_step` is one step between two noise levels:

    e  = eps - scale sqrt(1 - ab) grad ;  x0 = (x - sqrt(1 - ab) e) / sqrt(ab) ;  x' = sqrt(ab') x0 + sqrt(1 - ab') e

`knife::group_norm_silu` is what stands before every convolution of a network, and has a derivative:

    y = silu(group_norm(x) (1 + scale) + shift)

`knife::winograd` is a 3x3 convolution by a quarter of the products (Lavin and Gray, arXiv 1509.09308); CPU alone.

Their schemas and bodies in plain torch are registered here, and those bodies are the specification. A compiled library
(csrc/) that registers kernels for the same ops replaces them when it is loaded; the dispatcher picks, so no caller asks
which one runs.

`status` decides once per device, on first use, which kernels run; `knife.native` finds, builds and loads the library.
"""

import functools
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from knife import native
from knife.errors import OpsError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_OPS = torch.library.Library("knife", "FRAGMENT")

# --- The step: schema, reference, shape rule; no derivative --------------------------------------------------------

_OPS.define(
    "ddim_step(Tensor x, Tensor eps, Tensor? grad, Tensor alpha_bar, Tensor alpha_bar_next, Tensor scale,"
    " float low, float high) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def ddim_step(
    x: Tensor,
    eps: Tensor,
    grad: Tensor | None,
    alpha_bar: Tensor,
    alpha_bar_next: Tensor,
    scale: Tensor,
    clamp: tuple[float, float] | None = None,
) -> Tensor:
    """Take one DDIM step, up or down the noise levels (paper, eq. 3 and 4; guidance of Algorithms 1 and 2).

    Coefficients are formed in float64; images in bfloat16 and float16 are computed in float32 and rounded once.

    Args:
        x: images [N, ...] at the level of alpha_bar: float32, float64, bfloat16 or float16.
        eps: predicted noise, like x; any strides, such as the channel slice `out[:, :C]` of a learned-sigma output.
        grad: gradient of the task's score, like x; None steps unguided.
        alpha_bar: share of signal at the level of x, one per image: [N] float64 on the device of x.
        alpha_bar_next: the same at the level stepped to.
        scale: the paper's s, [N] float64.
        clamp: limits of the predicted clean image x0; eps is then what x and the clamped x0 imply. None leaves x0 free.

    Returns:
        The images at the next level, with the shape, dtype and memory format of x.

    Raises:
        RuntimeError: if the tensors do not fit together, or one of them requires a gradient.
        OpsError: if KNIFE_OPS=native and there is no compiled kernel for the device.
    """
    if not torch.compiler.is_compiling():
        status(x.device.type)
    if needs_gradient(x, eps, grad):
        raise RuntimeError("ddim_step: an argument requires a gradient, but a step has none: use torch.no_grad().")
    low, high = clamp or (-math.inf, math.inf)
    stepped: Tensor = torch.ops.knife.ddim_step.default(x, eps, grad, alpha_bar, alpha_bar_next, scale, low, high)
    return stepped


def reference(
    x: Tensor,
    eps: Tensor,
    grad: Tensor | None,
    alpha_bar: Tensor,
    alpha_bar_next: Tensor,
    scale: Tensor,
    low: float,
    high: float,
) -> Tensor:
    """Compute knife::ddim_step in plain torch: what csrc/step.h must equal, bit for bit in float32 and float64."""
    _refuse("ddim_step", _step_complaints(x, eps, grad, alpha_bar, alpha_bar_next, scale, low, high))
    compute = _compute_dtype(x)

    def per_image(coefficient: Tensor) -> Tensor:
        return coefficient.to(compute).view(-1, *[1] * (x.ndim - 1))

    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    e = eps.to(compute)
    if grad is not None:
        e = e - per_image(scale * noise) * grad.to(compute)
    x0 = (x.to(compute) - per_image(noise) * e) / per_image(signal)
    if math.isfinite(low) or math.isfinite(high):
        kept = x0.clamp(low, high)
        ratio = torch.where(noise > 0, signal / noise, 0.0)  # at level 0 x holds no eps that a clamp could change
        e = e + per_image(ratio) * (x0 - kept)  # the eps that x and the clamped x0 imply: (x - signal kept) / noise
        x0 = kept
    stepped = per_image(alpha_bar_next.sqrt()) * x0 + per_image((1 - alpha_bar_next).sqrt()) * e  # eq. 3, 4
    return torch.empty_like(x).copy_(stepped)


def _fake_step(x: Tensor, *others: Any) -> Tensor:
    """Answer with an output that has no data, for meta tensors and compilers."""
    _refuse("ddim_step", _step_complaints(x, *others))
    return torch.empty_like(x)


_OPS.impl("ddim_step", reference, "CompositeExplicitAutograd")
torch.library.register_fake("knife::ddim_step", _fake_step, lib=_OPS)


def _step_complaints(
    x: Tensor,
    eps: Tensor,
    grad: Tensor | None,
    alpha_bar: Tensor,
    alpha_bar_next: Tensor,
    scale: Tensor,
    low: float,
    high: float,
) -> Iterator[str]:
    """Yield what does not fit together, in the words of csrc/step_arguments.h."""
    yield from _dtype_complaints(x)
    if x.ndim == 0:
        yield "x is [], a single number: give images [N, ...]."
    for name, image in (("eps", eps), ("grad", x if grad is None else grad)):
        yield from _image_complaints(name, image, x)
    for name, numbers in (("alpha_bar", alpha_bar), ("alpha_bar_next", alpha_bar_next), ("scale", scale)):
        if numbers.shape != x.shape[:1]:
            yield f"{name} is {list(numbers.shape)}, but x is {list(x.shape)}: give one number per image."
        if numbers.dtype != torch.float64:
            yield f"{name} is {_name(numbers.dtype)}: give float64."
        yield from _device_complaints(name, numbers, x)
    if not low <= high:
        yield f"low is {low:g} and high is {high:g}: give a low that does not exceed high."


# --- The norm: schema, reference, shape rule, derivative -----------------------------------------------------------

# They have no bodies in plain torch, as that is best differentiated by torch itself.
_OPS.define(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, Tensor? scale, Tensor? shift)"
    " -> (Tensor y, Tensor moments)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_OPS.define(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor moments, Tensor weight, Tensor bias, int groups,"
    " Tensor? scale, Tensor? shift) -> (Tensor of_x, Tensor of_gain, Tensor of_offset)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Normalise features by groups of channels, scale and shift them, and apply SiLU; differentiable once.

    Features in bfloat16 and float16 are computed in float32 and rounded once.

    Args:
        x: features [N, C, ...]: float32, float64, bfloat16 or float16; fastest if contiguous or channels_last.
        weight: factor of each channel, [C].
        bias: summand of each channel, [C].
        groups: how many groups of neighbouring channels have a mean and a variance of their own.
        eps: added to the variance.
        scale: a further factor 1 + scale for each image and channel, [N, C].
        shift: a further summand for each image and channel, [N, C].

    Returns:
        silu(group_norm(x) (1 + scale) + shift), with the shape and dtype of x; kernels keep its memory format too.

    Raises:
        RuntimeError: if the tensors do not fit together.
        OpsError: if KNIFE_OPS=native and there is no compiled kernel for the device.
    """
    if weight.dtype != (compute := _compute_dtype(x)):
        weight, bias = weight.to(compute), bias.to(compute)
    if scale is not None and scale.dtype != compute:
        scale = scale.to(compute)
    if shift is not None and shift.dtype != compute:
        shift = shift.to(compute)
    if torch.compiler.is_compiling() or status(x.device.type).path == "torch":
        return norm_reference(x, weight, bias, groups, eps, scale, shift)
    if needs_gradient(x, weight, bias, scale, shift):
        differentiable: Any = _Norm
        return differentiable.apply(x, weight, bias, groups, eps, scale, shift)
    return torch.ops.knife.group_norm_silu.default(x, weight, bias, groups, eps, scale, shift)[0]


def norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """Compute knife::group_norm_silu in plain torch: what csrc/norm.h must equal up to rounding, gradients included."""
    _refuse("group_norm_silu", _norm_complaints(x, weight, bias, groups, scale, shift))
    z = F.group_norm(x.to(weight.dtype), groups, weight, bias, eps)
    if scale is not None:
        z = z * (1 + scale.view(*scale.shape, *[1] * (x.ndim - 2)))
    if shift is not None:
        z = z + shift.view(*shift.shape, *[1] * (x.ndim - 2))
    return F.silu(z).to(x.dtype)


class _Norm(torch.autograd.Function):
    """The op and its derivative; not registered with the op, where each call would cost as much as a small norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *condition: Any) -> Tensor:
        y, moments = torch.ops.knife.group_norm_silu.default(x, weight, bias, groups, eps, *condition)
        ctx.save_for_backward(x, moments, weight, bias, *condition)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With z = gain (x - mean) rstd + offset, gain = weight (1 + scale), offset = bias (1 + scale) + shift."""
        if torch.is_grad_enabled():
            raise RuntimeError("group_norm_silu: it can be differentiated once only; leave out create_graph=True.")
        x, moments, weight, bias, scale, shift = ctx.saved_tensors
        of_x, of_gain, of_offset = torch.ops.knife.group_norm_silu_backward.default(
            grad, x, moments, weight, bias, ctx.groups, scale, shift
        )
        _, weighted, biased, _, _, scaled, shifted = ctx.needs_input_grad
        factor = 1 if scale is None else 1 + scale
        return (
            of_x,
            (of_gain * factor).sum(0) if weighted else None,
            (of_offset * factor).sum(0) if biased else None,
            None,
            None,
            of_gain * weight + of_offset * bias if scaled else None,
            of_offset if shifted else None,
        )


def _fake_norm(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    bias, groups, _, *condition = others
    _refuse("group_norm_silu", _norm_complaints(x, weight, bias, groups, *condition))
    return torch.empty_like(x), weight.new_empty(2, x.shape[0], groups)


def _fake_norm_backward(
    grad: Tensor, x: Tensor, moments: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _refuse("group_norm_silu_backward", _norm_backward_complaints(grad, x, moments, weight, *others))
    return torch.empty_like(x), weight.new_empty(x.shape[:2]), weight.new_empty(x.shape[:2])


torch.library.register_fake("knife::group_norm_silu", _fake_norm, lib=_OPS)
torch.library.register_fake("knife::group_norm_silu_backward", _fake_norm_backward, lib=_OPS)


def _norm_backward_complaints(grad: Tensor, x: Tensor, moments: Tensor, *others: Any) -> Iterator[str]:
    """Yield what does not fit together, in the words of csrc/norm_arguments.h."""
    yield from _norm_complaints(x, *others)
    yield from _image_complaints("grad", grad, x)
    yield from _number_complaints("moments", moments, x, (2, x.shape[0], others[2]), "two numbers per image and group")


def _norm_complaints(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, scale: Tensor | None, shift: Tensor | None
) -> Iterator[str]:
    yield from _dtype_complaints(x)
    if x.ndim < 2:
        yield f"x is {list(x.shape)}: give features [N, C, ...]."
    if groups < 1 or x.shape[1] % groups:
        yield f"x is {list(x.shape)} and groups is {groups}: give groups that divide the channels."
    for name, numbers in (("weight", weight), ("bias", bias)):
        yield from _number_complaints(name, numbers, x, x.shape[1:2], "one number per channel")
    for name, condition in (("scale", scale), ("shift", shift)):
        if condition is not None:
            yield from _number_complaints(name, condition, x, x.shape[:2], "one number per image and channel")


# --- The convolution: schema, reference, shape rule ----------------------------------------------------------------

TILE, LANES = 4, 16  # pixels of a side that are made at once; channels that a kernel takes at once
_NEAR, _FAR = math.sqrt(0.5), math.sqrt(2.0)  # where polynomials are taken, besides 0 and infinity, with either sign

_OPS.define("winograd(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve features by 3x3 weights, with zeros around them: F.conv2d(x, w, bias, padding=1) up to rounding.

    4x4 pixels are made at once, of 36 products instead of 144. It has no derivative of its own: that of x is again a
    convolution, by the weights turned around.

    Args:
        x: features [N, C, H, W] in float32 on the CPU, C a multiple of `LANES`; fastest if channels_last.
        weight: what `winograd_weight` makes of w, [36, C, K], K a multiple of `LANES`.
        bias: summand of each output, [K].

    Returns:
        [N, K, H, W], channels_last.

    Raises:
        RuntimeError: if the tensors do not fit together, or one of them requires a gradient.
        NotImplementedError: where there is no compiled kernel.
    """
    if not torch.compiler.is_compiling():
        status(x.device.type)
    if needs_gradient(x, weight, bias):
        raise RuntimeError("winograd: an argument requires a gradient, but it has none: use knife.layers.")
    convolved: Tensor = torch.ops.knife.winograd.default(x, weight, bias)
    return convolved


def winograd_weight(weight: Tensor) -> Tensor:
    """Transform weights [K, C, 3, 3] into what `winograd` takes: G w G' of each pair of channels, [36, C, K]."""
    _, _, g = _winograd_matrices(weight)
    spread = torch.einsum("pi,kcij,qj->pqck", g, weight.double(), g)
    return spread.flatten(0, 1).to(weight.dtype).contiguous()


def winograd_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute knife::winograd in plain torch: what csrc/winograd.h must equal up to rounding."""
    _refuse("winograd", _winograd_complaints(x, weight, bias))
    a, b, _ = (matrix.to(x.dtype) for matrix in _winograd_matrices(x))
    images, _, height, width = x.shape
    down, across = -(-height // TILE), -(-width // TILE)
    padded = F.pad(x, (1, TILE * across - width + 1, 1, TILE * down - height + 1))
    patches = padded.unfold(2, TILE + 2, TILE).unfold(3, TILE + 2, TILE)  # [N, C, down, across, 6, 6]
    spread = torch.einsum("ip,ncyxij,jq->pqnyxc", b, patches, b).flatten(0, 1).flatten(1, 3)
    products = (spread @ weight).view(TILE + 2, TILE + 2, images, down, across, weight.shape[2])
    made = torch.einsum("pi,pqnyxk,qj->nkyixj", a, products, a)
    y = made.flatten(2, 3).flatten(3)[:, :, :height, :width]
    y = y if bias is None else y + bias[:, None, None]
    return y.contiguous(memory_format=torch.channels_last)


def _winograd_matrices(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return A [6, 4], B [6, 6] and G [6, 3] in float64: y = A' [(G w) * (B' d)], y [4] being d [6] by w [3]."""
    points = [0.0, _NEAR, -_NEAR, _FAR, -_FAR]
    apart = [math.prod(p - q for q in points if q != p) for p in points]
    a = [[p**i for i in range(TILE)] for p in points] + [[0, 0, 0, 1]]
    g = [[p**i / d for i in range(3)] for p, d in zip(points, apart, strict=True)] + [[0, 0, 1]]
    b = [  # its columns are the coefficients of the polynomials that are 0 at every other point
        [1, 0, 0, 0, 0, 0],
        [0, -2 * _NEAR, 2 * _NEAR, -_FAR / 2, _FAR / 2, 1],
        [-2.5, -2, -2, -0.5, -0.5, 0],
        [0, _NEAR, -_NEAR, _FAR, -_FAR, -2.5],
        [1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    of_products, of_patch, of_weight = (like.new_tensor(rows, dtype=torch.float64) for rows in (a, b, g))
    return of_products, of_patch, of_weight


def _fake_winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _refuse("winograd", _winograd_complaints(x, weight, bias))
    y = x.new_empty(x.shape[0], weight.shape[2], *x.shape[2:])
    return y.contiguous(memory_format=torch.channels_last)


torch.library.register_fake("knife::winograd", _fake_winograd, lib=_OPS)


@register_flop_formula(torch.ops.knife.winograd)
def winograd_operations(x: Any, weight: Any, *others: Any, out_shape: Any, **more: Any) -> int:
    """Count as torch counts a convolution, so that GFLOP/s compare: two for each of nine products."""
    return 2 * 9 * int(x[1]) * math.prod(out_shape)


def _winograd_complaints(x: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[str]:
    """Yield what does not fit together, in the words of csrc/winograd_cpu.cpp."""
    known = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in known.items():
        if tensor.dtype != torch.float32:
            yield f"{name} is {_name(tensor.dtype)}: give float32."
        yield from _device_complaints(name, tensor, x)
    if x.ndim != 4 or x.shape[1] % LANES:
        yield f"x is {list(x.shape)}: give features [N, C, H, W], whose channels are a multiple of 16."
    if weight.ndim != 3 or weight.shape[:2] != ((TILE + 2) ** 2, x.shape[1]) or weight.shape[2] % LANES:
        yield f"weight is {list(weight.shape)}, but x is {list(x.shape)}: give [36, C, K], K a multiple of 16."
    if bias is not None and bias.shape != weight.shape[2:]:
        yield f"bias is {list(bias.shape)}, but weight is {list(weight.shape)}: give one number per output."


# --- What all need -------------------------------------------------------------------------------------------------


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Tell whether autograd follows what is done with any of the tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _refuse(op: str, complaints: Iterator[str]) -> None:
    for complaint in complaints:
        raise RuntimeError(f"{op}: {complaint}")


def _dtype_complaints(x: Tensor) -> Iterator[str]:
    if x.dtype not in DTYPES:
        yield f"x is {_name(x.dtype)}: give float32, float64, bfloat16 or float16."


def _image_complaints(name: str, image: Tensor, x: Tensor) -> Iterator[str]:
    if image.shape != x.shape:
        yield f"{name} is {list(image.shape)}, but x is {list(x.shape)}: give both one shape."
    if image.dtype != x.dtype:
        yield f"{name} is {_name(image.dtype)}, but x is {_name(x.dtype)}: give both one dtype."
    yield from _device_complaints(name, image, x)


def _number_complaints(name: str, numbers: Tensor, x: Tensor, shape: tuple[int, ...], wanted: str) -> Iterator[str]:
    if numbers.shape != shape:
        yield f"{name} is {list(numbers.shape)}, but x is {list(x.shape)}: give {wanted}."
    if numbers.dtype != _compute_dtype(x):
        yield f"{name} is {_name(numbers.dtype)}, but x is {_name(x.dtype)}: give {_name(_compute_dtype(x))}."
    yield from _device_complaints(name, numbers, x)


def _device_complaints(name: str, tensor: Tensor, x: Tensor) -> Iterator[str]:
    if tensor.device != x.device:
        yield f"{name} is on {tensor.device}, but x is on {x.device}: move both to one device."


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type that an op computes in: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- Which kernels run, and whether they are right ------------------------------------------------------------------

_DECIDING = threading.Lock()


def status(device: str = "cpu") -> native.Status:
    """Decide on first use which kernels serve a device type; afterwards repeat the answer.

    Raises:
        SettingsError: if KNIFE_OPS is none of auto, native, torch.
        OpsError: if KNIFE_OPS=native and there is no compiled kernel for the device.
    """
    with _DECIDING:
        return _decide(device)


@functools.cache
def _decide(device: str) -> native.Status:
    return native.serve(device, _prove)


def _prove(device: str) -> None:
    try:
        _test_kernels(device)
    except OpsError:
        _OPS.impl("ddim_step", reference, device.upper())  # in place of a kernel that may have failed
        raise


def self_test(device: str = "cpu") -> float:
    """Ask each op for something small, and plain torch for the same; return the largest difference.

    Raises:
        OpsError: if an op fails, or differs by more than rounding.
    """
    return 0.0 if status(device).path == "torch" else _test_kernels(device)


def _test_kernels(device: str) -> float:
    try:
        with torch.autocast(device, enabled=False):  # whoever asks first may compute at another precision
            pairs = (*_samples(device), *_convolved(device))
        differences = [(got - wanted).abs().max().item() for got, wanted in pairs]
    except RuntimeError as problem:
        raise OpsError(f"the kernel for {device} fails its self-test: {problem}") from problem
    difference = math.nan if any(map(math.isnan, differences)) else max(differences)
    if not difference <= 1e-5:
        raise OpsError(f"the kernel for {device} fails its self-test: it differs from plain torch by {difference:g}")
    return float(difference)


@torch.inference_mode(False)
@torch.enable_grad()
def _samples(device: str) -> list[tuple[Tensor, Tensor]]:
    """Return what kernels and their references make of the same: a step, a norm, and the gradients of a norm."""
    images = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    numbers = torch.tensor([[0.5], [0.6], [2.0]], dtype=torch.float64).to(device)
    step = (*images, *numbers, -1.0, 1.0)
    weight, bias, scale, shift = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).to(device)
    inputs = [tensor.clone().requires_grad_() for tensor in (images[0], weight, bias, scale[None], shift[None])]
    compute: tuple[Any, Any] = (_Norm.apply, norm_reference)
    norms = [norm(*inputs[:3], 2, 1e-5, *inputs[3:]) for norm in compute]
    gradients = [torch.autograd.grad(y, inputs, images[1]) for y in norms]
    return [
        (torch.ops.knife.ddim_step(*step), reference(*step)),
        (norms[0].detach(), norms[1].detach()),
        *zip(*gradients, strict=True),
    ]


def _convolved(device: str) -> list[tuple[Tensor, Tensor]]:
    """Return what the kernel of a convolution, which is for the CPU alone, and its reference make of the same."""
    if device != "cpu":
        return []
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(2, LANES, side, side, generator=generator) for side in (6, 3))
    by = winograd_weight(weight[:1].expand(LANES, -1, -1, -1) / LANES)
    return [(torch.ops.knife.winograd.default(x, by, None), winograd_reference(x, by))]
