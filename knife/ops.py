"""The fused ops, each a formula in one or two passes over memory.

`knife::ddim_step` is one step between two noise levels:

    e  = eps - scale sqrt(1 - ab) grad ;  x0 = (x - sqrt(1 - ab) e) / sqrt(ab) ;  x' = sqrt(ab') x0 + sqrt(1 - ab') e

`knife::group_norm_silu` is what stands before every convolution of a network, and has a derivative:

    y = silu(group_norm(x) (1 + scale) + shift)

Their schemas and bodies in plain torch are registered here, and those bodies are the specification. A compiled library
(csrc/) that registers kernels for the same ops replaces them when it is loaded; the dispatcher picks, so no caller asks
which one runs.

`status` decides once per device, on first use: the library that was built at installation, else one that is compiled
now and kept in the user's cache, else plain torch. KNIFE_OPS=auto|native|torch overrides; native turns a missing kernel
into an OpsError.
"""

import contextlib
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from knife.errors import OpsError, SettingsError

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


# --- What both need ------------------------------------------------------------------------------------------------


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


# --- Which kernels run, and why ------------------------------------------------------------------------------------

CHOICES = ("auto", "native", "torch")  # KNIFE_OPS
SOURCES = {"cpu": ("step_cpu.cpp", "norm_cpu.cpp"), "cuda": ("step_cuda.cu", "norm_cuda.cu")}  # in csrc/, by device
_DECIDING = threading.Lock()


@dataclass(frozen=True)
class Status:
    """Which kernels serve a device, and why."""

    device: str
    path: Literal["native", "torch"]
    reason: str
    library: Path | None = None


def status(device: str = "cpu") -> Status:
    """Decide on first use which kernels serve a device type; afterwards repeat the answer.

    Raises:
        SettingsError: if KNIFE_OPS is none of auto, native, torch.
        OpsError: if KNIFE_OPS=native and there is no compiled kernel for the device.
    """
    with _DECIDING:
        return _decide(device)


@functools.cache
def _decide(device: str) -> Status:
    choice = os.environ.get("KNIFE_OPS", "auto")
    if choice not in CHOICES:
        raise SettingsError(f"KNIFE_OPS={choice}: give auto, native or torch.")
    if choice == "torch":
        return Status(device, "torch", "plain torch, because KNIFE_OPS=torch")
    try:
        if device == "cuda" and not torch.cuda.is_available():
            raise OpsError("torch sees no CUDA device")
        installed = _installed_library(device)
        library, origin = (installed, "built at installation") if installed else _cached_library(device)
        _load(device, library)
    except (OpsError, OSError) as problem:
        if choice == "native":
            raise OpsError(f"KNIFE_OPS=native, but there is no compiled kernel for {device}: {problem}") from problem
        return Status(device, "torch", f"plain torch: {problem}")
    return Status(device, "native", f"compiled kernel, {origin}", library)


def self_test(device: str = "cpu") -> float:
    """Ask each op for something small, and plain torch for the same; return the largest difference.

    Raises:
        OpsError: if an op fails, or differs by more than rounding.
    """
    return 0.0 if status(device).path == "torch" else _test_kernels(device)


def _test_kernels(device: str) -> float:
    try:
        differences = [(got - wanted).abs().max().item() for got, wanted in _samples(device)]
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


def _load(device: str, library: Path) -> None:
    try:
        torch.ops.load_library(library)
    except OSError as problem:
        reason = problem.__cause__ or problem
        raise OpsError(f"{library} cannot be loaded ({reason}); remove it to have it built again") from problem
    try:
        _test_kernels(device)
    except OpsError:
        _OPS.impl("ddim_step", reference, device.upper())  # in place of a kernel that may have failed
        raise


# --- Building the library ------------------------------------------------------------------------------------------

BUILD_SECONDS = 300  # longest compile, and longest wait for another process that compiles
# The stable ABI of torch 2.10, so that every later torch can load the library. No fused multiply-add where the code
# does not ask for one: the last bit of a step must be the reference's.
_COMMON_FLAGS = ("-std=c++20", "-O3", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000")
_VECTOR_FLAGS = {  # by what torch itself found this processor to have
    "AVX2": ("-march=x86-64-v3",),
    "AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
}
_FLAGS = {
    "cpu": ("-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    "cuda": (
        *("-Xcompiler", "-fPIC,-fvisibility=hidden", "--fmad=false", "-DUSE_CUDA", "--threads=0"),
        *("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"),
        "-gencode=arch=compute_75,code=compute_75",  # PTX for every other GPU since Turing
    ),
}


def source_folder() -> Path:
    """Return csrc/: inside the installed package, or beside it in a checkout.

    Raises:
        OpsError: if it is in neither place.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "step.h").is_file():
            return folder
    raise OpsError(f"the sources of the kernels are missing: there is no csrc folder in {package} or beside it")


def flags(device: str) -> tuple[str, ...]:
    """Return what a compiler is told besides folders: for the cpu, to use the vectors of this very processor."""
    vectors = _VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ()) if device == "cpu" else ()
    return (*_COMMON_FLAGS, *_FLAGS[device], *vectors)


def sources(device: str) -> list[Path]:
    """Return the files that are compiled into the library of a device.

    Raises:
        OpsError: if they are missing.
    """
    return [source_folder() / name for name in SOURCES[device]]


def source_digest(device: str) -> str:
    """Return a fingerprint of the kernels' sources and flags: a library that was built from others is not used.

    Flags are as the processor is, so machines of several kinds may share a cache.
    """
    digest = hashlib.sha256(repr(flags(device)).encode())
    for path in sorted(source_folder().iterdir()):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def library_name(device: str) -> str:
    """Return the name of the extension module that setup.py builds: of other sources, of another name."""
    return f"_ops_{device}_{source_digest(device)}"


def compiler(device: str = "cpu") -> list[str]:
    """Return the command that compiles for a device: CXX or c++, g++, clang++; for cuda nvcc of CUDA_HOME or PATH.

    Raises:
        OpsError: if there is no kernel for the device, or no compiler.
    """
    if device not in SOURCES:
        raise OpsError(f"there is no kernel for {device}, only for {' and '.join(SOURCES)}")
    if device == "cuda":
        home = os.environ.get("CUDA_HOME")
        names = [str(Path(home, "bin", "nvcc")) if home else "nvcc"]
    else:
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for words in map(shlex.split, names):
        if words and shutil.which(words[0]):
            return words
    raise OpsError(f"no compiler for {device} found (looked for {', '.join(names)})")


def build(device: str, library: Path) -> None:
    """Compile the kernel of a device into a library, which appears whole or not at all.

    Raises:
        OpsError: if there is no compiler, or it fails or takes too long.
    """
    home = Path(torch.__file__).parent
    command = [*compiler(device), *flags(device), "-isystem", str(home / "include")]
    command += [*map(str, sources(device)), f"-L{home / 'lib'}", "-ltorch_cpu"]
    if device == "cuda" and (home / "lib" / "libtorch_cuda.so").exists():  # not in torch for the CPU: compiled, not run
        command.append("-ltorch_cuda")
    with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent) as scratch:
        product = Path(scratch, library.name)
        _run([*command, "-o", str(product)], Path(scratch))
        product.replace(library)


def _run(command: list[str], scratch: Path) -> None:
    log = scratch / "log"
    try:
        with log.open("w") as output:  # no pipe: a child that outlives the compiler would hold it open
            subprocess.run(
                command,
                check=True,
                timeout=BUILD_SECONDS,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(scratch), "LC_ALL": "C"},
            )
    except subprocess.TimeoutExpired as problem:
        raise OpsError(f"{command[0]} was stopped after {BUILD_SECONDS} s") from problem
    except subprocess.CalledProcessError as problem:
        raise OpsError(f"{command[0]} failed: {_first_error(log.read_text(errors='replace'))}") from problem


def _first_error(log: str) -> str:
    lines = log.strip().splitlines() or ["it said nothing"]
    return next((line for line in lines if "error" in line.lower()), lines[-1]).strip()


def _installed_library(device: str) -> Path | None:
    if device not in SOURCES:
        return None
    return next(Path(__file__).parent.glob(f"{library_name(device)}*.so"), None)


def _cached_library(device: str) -> tuple[Path, str]:
    """Return the library of a device and where it came from, compiling it into the cache if there is none."""
    compiler(device)
    facts = (source_digest(device), torch.__version__, torch.version.cuda, sys.platform, platform.machine())
    library = _private_folder(hashlib.sha256(repr(facts).encode()).hexdigest()[:16]) / f"knife_{device}.so"
    if library.exists():
        return library, "built on an earlier use"
    with _locked(library.parent / "lock"):
        if library.exists():
            return library, "built by another process"
        for left_behind in library.parent.glob("build-*"):  # by a build that was killed
            shutil.rmtree(left_behind, ignore_errors=True)
        start = time.monotonic()
        build(device, library)
        return library, f"built on first use in {time.monotonic() - start:.0f} s"


def _private_folder(key: str) -> Path:
    """Return a folder for a library that nobody else can write to: in the user's cache, else among temporary files."""
    if sys.platform == "win32":
        raise OpsError("kernels are compiled on first use on Linux and macOS only")
    for folder in _folders(key):
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            info = folder.lstat()
            private = info.st_uid == os.getuid() and not info.st_mode & 0o022
            if private and (os.access(folder, os.W_OK) or any(folder.glob("*.so"))):
                return folder
    tried = " and ".join(map(str, _folders(key)))
    raise OpsError(f"no folder to build in: {tried} cannot be written, or belong to another user")


def _folders(key: str) -> Iterator[Path]:
    with contextlib.suppress(RuntimeError):  # no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "knife", "ops", key)
    yield Path(tempfile.gettempdir(), f"knife-ops-{os.getuid()}-{key}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel frees when its holder dies; wait for it no longer than a compile may take."""
    import fcntl  # not on Windows

    deadline = time.monotonic() + BUILD_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError) as problem:
                if time.monotonic() > deadline:
                    raise OpsError(f"another process has held {path} for {BUILD_SECONDS} s; end it first") from problem
                time.sleep(0.1)
        yield
