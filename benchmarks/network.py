"""Measure the calls of the networks: milliseconds of a U-Net's forward pass and of a guide's gradient, and GFLOP/s.

    python benchmarks/network.py [--device cuda] [--only small-64:1 paper-brats:1] [--repeats 20] [--cpu-time]

Each network has random weights and is called as a translation calls it: frozen, channels_last, the U-Net without
autograd, the guide (the encoder of the preset) with a gradient over the pixels alone. Side by side in one process, in
turn: as the program computes in float32, with the norm in plain torch, with torch's convolutions instead of those by
fewer products or by packed weights, which are for the CPU, and in bfloat16. On the CPU all is done twice, in processes
of their own: with freed memory kept, as the program does it, and left to the system (KNIFE_MALLOC).

GFLOP/s of the forward pass, counted as torch's convolutions need them, stand beside those of one large matrix product
in the same precision, the most that the machine was seen to do; fewer products than counted may bring them above it.
Medians; --cpu-time counts the processor's time instead of the clock's, where others share it. The last line printed is
one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from knife import checkpoint, layers, ops, unet
from knife.bench import Clock, forward, machine, medians, operations, peak_gflops
from knife.ddim import slope
from knife.devices import MALLOC, keep_freed_memory, precision
from knife.spec import preset

CASES = {"small-64:1": 40, "small-64:8": 10, "paper-faces:1": 6, "paper-brats:1": 4}  # preset:batch, and the repeats
WAYS = ("float32", "plain norm", "torch's conv", "bfloat16")
KINDS = ("forward", "gradient")
PRECISE = ("float32", "bfloat16")
READY = layers.is_ready
COLUMNS = (
    "case       ",
    "memory",
    *(f"{kind} {way}" for kind in KINDS for way in ("ms", *WAYS[1:])),
    *(f"{what} {precision}" for precision in PRECISE for what in ("GFLOP/s", "of peak")),
)


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
    peaks = {precise: peak_gflops(options.device, clock, getattr(torch, precise)) for precise in PRECISE}
    return [measure(case, options.repeats or CASES[case], options.device, clock, peaks) for case in options.only]


def measure(case: str, repeats: int, device: str, clock: Clock, peaks: Mapping[str, float]) -> dict[str, Any]:
    """Time the two networks of a preset at one batch size, each in every way."""
    name, batch = case.split(":")
    row = preset(name)
    channels = tuple(map(str, range(row.channels or 4)))
    net = ready(row.spec("diffusion", channels).build_unet(2 * len(channels)), device)
    guide = ready(row.spec("regress", channels).build_encoder(1), device)
    x = torch.randn(int(batch), len(channels), *row.size, device=device).to(memory_format=torch.channels_last)
    t = torch.full((int(batch),), 400, device=device)
    calls = {f"forward {way}": in_way(way, device, lambda: forward(net, x, t)) for way in WAYS}
    calls |= {f"gradient {way}": in_way(way, device, lambda: slope(guide, x, t).gradient) for way in WAYS}
    answers = {name: call() for name, call in calls.items()}
    for kind in KINDS:
        usual = answers[f"{kind} float32"]
        for way in WAYS[1:]:
            close = (0.2 if way == "bfloat16" else 1e-4) * usual.abs().max().item()
            torch.testing.assert_close(answers[f"{kind} {way}"], usual, rtol=0, atol=close)
    work = operations(lambda: forward(net, x, t))
    times: dict[str, float] = {}
    for kind in KINDS:
        of_kind = {name: call for name, call in calls.items() if name.startswith(kind)}
        times |= medians(of_kind, repeats, device, clock)
    row: dict[str, Any] = {"case": case, **{f"{name} ms": time * 1e3 for name, time in times.items()}}
    for precise, peak in peaks.items():
        gflops = work / times[f"forward {precise}"] / 1e9
        row |= {f"gflops {precise}": gflops, f"of_peak {precise}": gflops / peak}
    return row


def ready(net: nn.Module, device: str) -> nn.Module:
    """Wake the layers that start silent, and make a network ready as `knife.checkpoint.load` does."""
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return checkpoint.ready(net, device).eval().requires_grad_(False)


def in_way(way: str, device: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Let networks compute as they do, with the norm in plain torch, with torch's convolutions, or in bfloat16."""

    def plain(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *condition: Tensor | None) -> Tensor:
        return ops.norm_reference(x, weight, bias, groups, eps, *condition)

    def no(x: Tensor, convolution: layers.Convolution) -> bool:
        return False

    def run() -> Tensor:
        unet.group_norm_silu = plain if way == "plain norm" else ops.group_norm_silu
        layers.is_ready = no if way == "torch's conv" else READY
        with precision(device, "bfloat16" if way == "bfloat16" else "float32"):
            return call()

    return run


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print("".join(f"{column:>{len(column) + 3}}" for column in COLUMNS))
    for row in rows:
        cells = [row["case"], row["memory"]]
        for kind in KINDS:
            usual, *others = (row[f"{kind} {way} ms"] for way in WAYS)
            cells += [f"{usual:.1f}", *(f"{other:.1f} ({other / usual:.2f})" for other in others)]
        for precise in PRECISE:
            cells += [f"{row[f'gflops {precise}']:.0f}", f"{row[f'of_peak {precise}']:.0%}"]
        print("".join(f"{cell:>{len(column) + 3}}" for cell, column in zip(cells, COLUMNS, strict=True)))


if __name__ == "__main__":
    main()
