"""Measure the calls of the networks: milliseconds of a U-Net's forward pass and of a guide's gradient, and GFLOP/s.

    python benchmarks/network.py [--device cuda] [--only small-64:1 paper-brats:1] [--repeats 20] [--cpu-time]

Each network has random weights and is called as a translation calls it: frozen, channels_last, the U-Net without
autograd, the guide (the encoder of the preset) with a gradient over the pixels alone. Side by side in one process, in
turn: the fused norm, and the same norm in plain torch (KNIFE_OPS=torch). On the CPU all is done twice, in processes of
their own: with freed memory kept, as the program does it, and left to the system (KNIFE_MALLOC).

GFLOP/s of the forward pass stand beside those of one large matrix product, the most that the machine was seen to do.
Medians; --cpu-time counts the processor's time instead of the clock's, where others share it. The last line printed is
one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from ops import machine
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from knife import ops, unet
from knife.devices import MALLOC, keep_freed_memory
from knife.spec import preset

CASES = {"small-64:1": 40, "small-64:8": 10, "paper-faces:1": 6, "paper-brats:1": 4}  # preset:batch, and the repeats
NORMS = ("fused", "plain")
COLUMNS = ("case", "memory", "forward ms", "plain", "times", "gradient ms", "plain", "times", "GFLOP/s", "of peak")
PEAK_SIDE = 2048


def main() -> None:
    """Measure every case and print a table and one JSON line."""
    options = parse()
    if options.child:
        print(json.dumps(measure_all(options)))
        return
    cpu = torch.device(options.device).type == "cpu"
    print(f"{machine(options.device)}; torch {torch.__version__}; {torch.get_num_threads()} threads")
    print(f"{ops.status(torch.device(options.device).type).reason}\n")
    rows = [row for choice in (MALLOC if cpu else MALLOC[:1]) for row in in_own_process(choice)]
    rows.sort(key=lambda row: list(CASES).index(row["case"]))
    show(rows)
    facts = {"machine": machine(options.device), "device": options.device, "torch": torch.__version__}
    facts |= {"threads": torch.get_num_threads(), "clock": "cpu" if options.cpu_time else "wall"}
    print(json.dumps({"benchmark": "network", **facts, "results": rows}))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, help="of every case; default: less for the larger ones")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_own_process(choice: str) -> list[dict[str, Any]]:
    """Measure all cases with KNIFE_MALLOC as given, which cannot be taken back in a process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    environment = {**os.environ, "KNIFE_MALLOC": choice}
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [{"memory": choice, **row} for row in json.loads(answer.splitlines()[-1])]


def measure_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the cases in this process."""
    keep_freed_memory()
    torch.manual_seed(0)
    clock = time.process_time if options.cpu_time else time.perf_counter
    peak = peak_gflops(options.device, clock)
    return [measure(case, options.repeats or CASES[case], options.device, clock, peak) for case in options.only]


def measure(case: str, repeats: int, device: str, clock: Callable[[], float], peak: float) -> dict[str, Any]:
    """Time the two networks of a preset at one batch size, each with both norms."""
    name, batch = case.split(":")
    row = preset(name)
    channels = tuple(map(str, range(row.channels or 4)))
    net = ready(row.spec("diffusion", channels).build_unet(2 * len(channels)), device)
    guide = ready(row.spec("regress", channels).build_encoder(1), device)
    x = torch.randn(int(batch), len(channels), *row.size, device=device).to(memory_format=torch.channels_last)
    t = torch.full((int(batch),), 400, device=device)
    calls = {f"forward {norm}": with_norm(norm, lambda: forward(net, x, t)) for norm in NORMS}
    calls |= {f"gradient {norm}": with_norm(norm, lambda: gradient(guide, x, t)) for norm in NORMS}
    answers = {name: call() for name, call in calls.items()}
    for kind in ("forward", "gradient"):
        fused, plain = (answers[f"{kind} {norm}"] for norm in NORMS)
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())
    with FlopCounterMode(display=False) as counter:
        forward(net, x, t)
    times: dict[str, float] = {}
    for kind in ("forward", "gradient"):
        of_kind = {name: call for name, call in calls.items() if name.startswith(kind)}
        times |= medians(of_kind, repeats, device, clock)
    gflops = counter.get_total_flops() / times["forward fused"] / 1e9
    return {"case": case, **{f"{k} ms": v * 1e3 for k, v in times.items()}, "gflops": gflops, "of_peak": gflops / peak}


def ready(net: nn.Module, device: str) -> nn.Module:
    """Wake the layers that start silent, and lay a network out as `knife.checkpoint.load` does."""
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


@torch.no_grad()
def forward(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """Call a U-Net as a step does."""
    return net(x, t)


def gradient(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """Differentiate a guide's answer over the pixels, as a guided step does."""
    seen = x.detach().requires_grad_()
    return torch.autograd.grad(net(seen, t).sum(), seen)[0]


def with_norm(norm: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Let networks use the fused norm, or the same in plain torch, while they are called."""

    def plain(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *condition: Tensor | None) -> Tensor:
        return ops.norm_reference(x, weight, bias, groups, eps, *condition)

    def run() -> Tensor:
        unet.group_norm_silu = ops.group_norm_silu if norm == "fused" else plain
        return call()

    return run


def medians(
    calls: dict[str, Callable[[], Tensor]], repeats: int, device: str, clock: Callable[[], float]
) -> dict[str, float]:
    """Time the calls in turn, there and back as the second finds warm caches, and return the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats):
        for name, call in list(calls.items())[:: 1 if i % 2 else -1]:
            times[name].append(seconds(call, device, clock))
    return {name: statistics.median(values) for name, values in times.items()}


def seconds(call: Callable[[], Any], device: str, clock: Callable[[], float]) -> float:
    """Return the seconds of a call, the device's work included."""
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    synchronize()
    start = clock()
    call()
    synchronize()
    return clock() - start


def peak_gflops(device: str, clock: Callable[[], float]) -> float:
    """Return the GFLOP/s of the best of ten products of two large matrices."""
    a, b = torch.randn(2, PEAK_SIDE, PEAK_SIDE, device=device)
    return 2 * PEAK_SIDE**3 / min(seconds(lambda: a @ b, device, clock) for _ in range(10)) / 1e9


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print("".join(f"{column:>14}" for column in COLUMNS))
    for row in rows:
        cells = [row["case"], row["memory"]]
        for kind in ("forward", "gradient"):
            fused, plain = (row[f"{kind} {norm} ms"] for norm in NORMS)
            cells += [f"{fused:.1f}", f"{plain:.1f}", f"{plain / fused:.2f}"]
        cells += [f"{row['gflops']:.0f}", f"{row['of_peak']:.0%}"]
        print("".join(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()
