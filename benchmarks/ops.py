"""Measure the fused ops beside a plain copy and beside the same in plain torch.

    python benchmarks/ops.py [--device cuda] [--dtype bfloat16] [--repeats 50]

A guided DDIM step reads x, eps and the gradient and writes x': four passes over an image. Nothing can be faster than
moving those bytes, so the yardstick is a copy of as many (of a tensor twice as large: one pass reads, one writes) into
memory that is there already; the step also has to get its output. eps is a channel slice of a twice as wide output, as
in translation. Beside it stand the three lines of the formula in plain torch, and `ddim_sample` of the package
guided-diffusion-sdk, if that is installed, around a network that costs nothing.

The norm, group_norm, a scale and shift and SiLU, reads its features and writes as many: two passes, though it must read
twice. Beside it stand a copy, and the same as three calls of torch; for channels_last and contiguous features, and for
the gradient of x too (forward and backward, through autograd).

All are timed in turn, many times, and the medians compared; freed memory is kept, as in a translation. --cpu-time
counts the processor's time instead of the clock's, where others share it. The last line printed is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from knife import ops
from knife.bench import gigabytes, machine, medians, step_and_copy
from knife.devices import keep_freed_memory

SIZES = ((1, 4, 64, 64), (1, 4, 256, 256), (16, 4, 256, 256))
COLUMNS = (
    "size",
    "step us",
    "step GB/s",
    "copy GB/s",
    "of copy",
    "three lines us",
    "times",
    "guided-diffusion us",
    "times",
)
NORMS = ((1, 48, 32, 32), (8, 48, 32, 32), (1, 144, 8, 8), (1, 128, 64, 64), (1, 128, 256, 256))
GROUPS = {48: 8, 144: 8, 128: 32}  # of so many channels, as in the presets
NORM_COLUMNS = (
    *("size", "layout", "norm us", "norm GB/s", "copy GB/s", "of copy", "torch us", "times"),
    *("gradient us", "times"),
)
Calls = dict[str, Callable[[], Any]]


def main() -> None:
    """Measure every size and print a table and one JSON line."""
    options = parse()
    options.clock = time.process_time if options.cpu_time else time.perf_counter
    torch.manual_seed(0)
    keep_freed_memory()
    status = ops.status(torch.device(options.device).type)
    print(f"{machine(options.device)}; torch {torch.__version__}; {torch.get_num_threads()} threads; {options.dtype}")
    print(f"{status.path}: {status.reason}\n")
    with torch.no_grad():
        rows = [measure(size, options) for size in SIZES]
    show(rows)
    norms = [measure_norm(size, last, options) for size in NORMS for last in (True, False)]
    show_norms(norms)
    facts = {"machine": machine(options.device), "device": options.device, "dtype": options.dtype}
    facts |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "path": status.path}
    facts["clock"] = "cpu" if options.cpu_time else "wall"
    print(json.dumps({"benchmark": "ops", **facts, "results": rows, "norms": norms}))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default="float32", choices=[str(dtype).removeprefix("torch.") for dtype in ops.DTYPES]
    )
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--cpu-time", action="store_true")
    return parser.parse_args()


def measure(size: tuple[int, int, int, int], options: argparse.Namespace) -> dict[str, Any]:
    """Time a step of one size beside its rivals; GB/s count four passes."""
    dtype = getattr(torch, options.dtype)
    x, grad = torch.randn(2, *size, device=options.device).to(dtype)
    output = torch.randn(size[0], 2 * size[1], *size[2:], device=options.device).to(dtype)
    median = medians(rivals(x, output, grad), options.repeats, options.device, options.clock)
    rates = {f"{name}_gbs": gigabytes(x) / median[name] for name in ("step", "copy")}
    times = {f"{name}_us": value * 1e6 for name, value in median.items()}
    return {"size": list(size), "of_copy": median["copy"] / median["step"], **rates, **times}


def rivals(x: Tensor, output: Tensor, grad: Tensor) -> Calls:
    """Set up the step, the copy of as many bytes, and the step as others take it."""
    numbers = torch.tensor([[0.5], [0.51], [3.0]], dtype=torch.float64, device=x.device).expand(3, len(x))
    lines = three_lines(x, output[:, : x.shape[1]], grad, *numbers)
    return step_and_copy(x, output, grad) | {"three_lines": lines} | guided_diffusion(x, output, grad)


def three_lines(x: Tensor, eps: Tensor, grad: Tensor, *numbers: Tensor) -> Callable[[], Tensor]:
    """Write the formula in plain torch, its coefficients ready in the type of x."""
    alpha_bar, alpha_bar_next, scale = (number.view(-1, 1, 1, 1) for number in numbers)
    coefficients = (alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), alpha_bar_next.sqrt(), (1 - alpha_bar_next).sqrt())
    signal, noise, next_signal, next_noise = (c.to(x.dtype) for c in coefficients)
    guide = (scale * noise).to(x.dtype)

    def step() -> Tensor:
        e = eps - guide * grad
        x0 = (x - noise * e) / signal
        return next_signal * x0 + next_noise * e

    return step


def guided_diffusion(x: Tensor, output: Tensor, grad: Tensor) -> Calls:
    """Set up the original implementation's step around a network and a guide that cost nothing."""
    try:
        from guided_diffusion.script_util import create_gaussian_diffusion
    except ImportError:
        return {}
    if x.dtype not in (torch.float32, torch.float64):
        return {}
    diffusion = create_gaussian_diffusion(steps=1000, learn_sigma=True)
    t = torch.full((x.shape[0],), 400, device=x.device)
    options = {"clip_denoised": False, "cond_fn": lambda x, t: grad, "model_kwargs": {}}
    return {"guided_diffusion": lambda: diffusion.ddim_sample(lambda x, t: output, x, t, **options)}


def measure_norm(size: tuple[int, int, int, int], last: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Time a norm with scale and shift of one size and layout beside its rivals; GB/s count two passes."""
    dtype, layout = getattr(torch, options.dtype), torch.channels_last if last else torch.contiguous_format
    x = torch.randn(size, device=options.device).to(dtype, memory_format=layout)
    median = medians(norm_rivals(x, GROUPS[size[1]]), options.repeats, options.device, options.clock)
    moved = 2 * x.numel() * x.element_size() / 1e9
    rates = {f"{name}_gbs": moved / median[name] for name in ("norm", "copy")}
    times = {f"{name}_us": value * 1e6 for name, value in median.items()}
    facts = {"size": list(size), "layout": "channels_last" if last else "contiguous"}
    return {**facts, "of_copy": median["copy"] / median["norm"], **rates, **times}


def norm_rivals(x: Tensor, groups: int) -> Calls:
    """Set up the norm, a copy, the same as three calls of torch, and the gradients of both over x."""
    weight, bias = torch.randn(2, x.shape[1], device=x.device)
    scale, shift = torch.randn(x.shape[0], 2 * x.shape[1], device=x.device).chunk(2, 1)
    seen, target, descent = x.clone().requires_grad_(), torch.empty_like(x), torch.randn_like(x)

    def norm(x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, weight, bias, groups, 1e-5, scale, shift)

    def plain(x: Tensor) -> Tensor:
        z = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), 1e-5)
        return F.silu(z * (1 + scale[:, :, None, None].to(x.dtype)) + shift[:, :, None, None].to(x.dtype))

    return {
        "norm": lambda: norm(x),
        "copy": lambda: target.copy_(x),
        "torch": lambda: plain(x),
        "norm_gradient": lambda: torch.autograd.grad(norm(seen), seen, descent),
        "torch_gradient": lambda: torch.autograd.grad(plain(seen), seen, descent),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    widths = [max(len(column), 6) + 2 for column in COLUMNS]
    widths[0] = 12
    print("".join(f"{column:>{width}}" for column, width in zip(COLUMNS, widths, strict=True)))
    for row in rows:
        cells = [
            "x".join(map(str, row["size"])),
            f"{row['step_us']:.1f}",
            f"{row['step_gbs']:.1f}",
            f"{row['copy_gbs']:.1f}",
        ]
        cells.append(f"{row['of_copy']:.0%}")
        for name in ("three_lines", "guided_diffusion"):
            known = f"{name}_us" in row
            cells += [f"{row[f'{name}_us']:.1f}", f"{row[f'{name}_us'] / row['step_us']:.1f}"] if known else ["-", "-"]
        print("".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


def show_norms(rows: list[dict[str, Any]]) -> None:
    """Print the table of the norm."""
    widths = [16, 15, *(max(len(column), 6) + 2 for column in NORM_COLUMNS[2:])]
    print("\n" + "".join(f"{column:>{width}}" for column, width in zip(NORM_COLUMNS, widths, strict=True)))
    for row in rows:
        cells = ["x".join(map(str, row["size"])), row["layout"], f"{row['norm_us']:.1f}", f"{row['norm_gbs']:.1f}"]
        cells += [f"{row['copy_gbs']:.1f}", f"{row['of_copy']:.0%}", f"{row['torch_us']:.1f}"]
        cells += [f"{row['torch_us'] / row['norm_us']:.1f}", f"{row['norm_gradient_us']:.1f}"]
        cells += [f"{row['torch_gradient_us'] / row['norm_gradient_us']:.1f}"]
        print("".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


if __name__ == "__main__":
    main()
