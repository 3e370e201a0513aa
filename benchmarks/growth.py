"""How the cost of a translation grows: with pixels, channels, steps, images at once, and tasks that guide together.

    python benchmarks/growth.py [--device cuda] [--repeats 3] [--cpu-time]

The networks of the preset small-64 (guides are its encoders) with random weights walk up and guided down again, a
control beside, as a translation does; files are neither read nor written. From one case (64 x 64 pixels, four channels,
six steps, one image, one guide), one number at a time is changed. Medians of the calls in turn; --cpu-time counts the
processor's time instead of the clock's, where others share it. The last line printed is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from network import ready

from knife.bench import machine, medians
from knife.ddim import Guidance, Score, ab2, decode_with_control, encode
from knife.devices import keep_freed_memory
from knife.schedule import Schedule, path
from knife.settings import LEVEL, SPREAD
from knife.spec import preset

COLUMNS = ("what grows", "from", "to", "times", "seconds", "times", "seconds an image")


@dataclass(frozen=True)
class Case:
    """What one translation is like."""

    side: int = 64  # pixels
    channels: int = 4
    steps: int = 6
    batch: int = 1
    guides: int = 1

    @property
    def pixels(self) -> int:
        """Return how many an image has."""
        return self.side**2


GROWN: dict[str, tuple[str, tuple[int, ...]]] = {  # what grows: the number that is changed, and its values
    "pixels": ("side", (32, 128, 256)),
    "channels": ("channels", (1, 8, 32)),
    "steps": ("steps", (12, 24)),
    "batch": ("batch", (2, 4, 8, 16)),
    "guides": ("guides", (0, 2, 3)),
}


def main() -> None:
    """Measure every case and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    print(f"{machine(options.device)}; torch {torch.__version__}; {torch.get_num_threads()} threads\n")
    rows = [row for name in GROWN for row in grown(name, options)]
    show(rows)
    facts = {"machine": machine(options.device), "device": options.device, "torch": torch.__version__}
    facts |= {"threads": torch.get_num_threads(), "clock": "cpu" if options.cpu_time else "wall"}
    print(json.dumps({"benchmark": "growth", **facts, "case": asdict(Case()), "results": rows}))


def grown(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the cases of one number beside the one that all begin with."""
    field, values = GROWN[name]
    cases = {value: replace(Case(), **{field: value}) for value in (getattr(Case(), field), *values)}
    clock = time.process_time if options.cpu_time else time.perf_counter
    calls = {str(value): translation(case, options.device) for value, case in cases.items()}
    times = medians(calls, options.repeats, options.device, clock)
    first, *others = cases.values()
    begun = times[str(getattr(first, field))]
    return [
        {
            "grows": name,
            "from": getattr(first, name),
            "to": getattr(case, name),
            "seconds": (spent := times[str(getattr(case, field))]),
            "times": spent / begun,
            "seconds_per_image": spent / case.batch,
        }
        for case in others
    ]


def translation(case: Case, device: str) -> Callable[[], object]:
    """Return a call that walks a batch up and guided down again, by networks of random weights."""
    row, size = preset("small-64"), (case.side, case.side)
    spec = replace(row.spec("diffusion", tuple(map(str, range(case.channels)))), size=size)
    net = ready(spec.build_unet(2 * case.channels), device)
    guides = [ready(spec.build_encoder(1), device) for _ in range(case.guides)]
    x = torch.randn(case.batch, case.channels, *size, device=device).to(memory_format=torch.channels_last)
    guidance = [Guidance(score_of(guide), 1.0) for guide in guides]
    schedule, levels = Schedule(), path(LEVEL, case.steps, SPREAD)

    def run() -> object:
        noisy, last = encode(net, x, schedule, levels, solver=ab2)
        return decode_with_control(net, noisy, schedule, levels, guidance, solver=ab2, before=last)

    return run


def score_of(guide: torch.nn.Module) -> Score:
    """Return a guide's answer as a score."""
    return lambda x, t: guide(x, t)[:, 0]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print("".join(f"{column:>18}" for column in COLUMNS))
    for row in rows:
        factor = f"{row['to'] / row['from']:.3g}"
        cells = [row["grows"], row["from"], row["to"], factor, f"{row['seconds']:.3f}", f"{row['times']:.2f}"]
        print("".join(f"{cell:>18}" for cell in [*cells, f"{row['seconds_per_image']:.3f}"]))


if __name__ == "__main__":
    main()
