"""Does a training wait for its images? Images a second that can be read, beside those that a network consumes.

    python benchmarks/loader.py [--count 512] [--size 128] [--batch 64] [--preset small-128] [--device cuda]

Phantoms are written as NIfTI, decoded once into a prepared set, and read from there in random batches, as a training
does; beside it stand the loss and gradients of the preset's diffusion model on the same batches, in float32 and in
bfloat16. The last line printed is one JSON object.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from knife import data
from knife.batches import order_of
from knife.checkpoint import ready
from knife.ddpm import hybrid_loss
from knife.devices import precision, resolve_device
from knife.layouts import open_folder
from knife.phantom import write_dataset
from knife.prepared import key, prepared
from knife.schedule import Schedule
from knife.spec import preset

RANGE = (-1.0, 1.0)
READS, STEPS = 30, 3  # batches that are timed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--preset", default="small-128")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device, _ = resolve_device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder) / "phantoms", options.count, options.size, 0, lambda done: None)
        figures = measure(Path(folder), options, device)
    for name, value in figures.items():
        print(f"{name:<44} {value:12,.1f} images a second")
    about = {"device": device if device == "cpu" else torch.cuda.get_device_name(), "machine": platform.machine()}
    about |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"benchmark": "loader", **vars(options), **about, "results": figures}))


def measure(folder: Path, options: argparse.Namespace, device: str) -> dict[str, float]:
    """Return images a second: decoded, read from the prepared set, and consumed."""
    entries = open_folder(folder / "phantoms").entries
    channels = data.channels_of(entries)
    form = data.Form(channels, (options.size, options.size), RANGE)

    def decode(part: list) -> data.Loaded:
        return data.load(part, form)

    began = time.perf_counter()
    name = key(data.inventory(entries), form)
    loaded = prepared(folder / name, entries, form, decode, lambda done: None)
    figures = {"decoded and prepared, once": len(entries) / (time.perf_counter() - began)}
    images = [case.pixels for case in loaded.cases]

    def batch(step: int) -> torch.Tensor:
        order = order_of(0, step, len(images))
        return torch.stack([images[i] for i in order[: options.batch]])

    figures["read in random batches"] = options.batch / median_of(batch, READS)
    net = ready(preset(options.preset).spec("diffusion", channels).build_unet(2 * len(channels)), device)
    schedule = Schedule()

    def consume(step: int, precise: str) -> None:
        x = batch(step).to(device, memory_format=torch.channels_last)
        level = torch.randint(1, schedule.T + 1, (len(x),), device=device)
        with precision(device, precise):
            hybrid_loss(net, x, level, torch.randn_like(x), schedule).mean().backward()
        if device != "cpu":
            torch.cuda.synchronize()

    for precise in ("float32", "bfloat16"):
        seconds = median_of(partial(consume, precise=precise), STEPS)
        figures[f"consumed by {options.preset}, {precise}"] = options.batch / seconds
    return figures


def median_of(work: Callable[[int], object], times: int) -> float:
    """Return the median of the seconds that a piece of work takes, after one run that does not count."""
    work(0)
    seconds = []
    for step in range(1, times + 1):
        began = time.perf_counter()
        work(step)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
