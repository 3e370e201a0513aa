"""How few calls of the diffusion model are enough? Each solver, from few steps to one for every level.

    python benchmarks/calls.py [--count 4] [--steps 5,10,20,50,100,475] [--figure calls.png]

The shipped models translate held-out phantoms towards a tumour size, at a fixed strength and in one decode, so that
what differs is the walk alone. The reference walks every level by the second order. The judge of `quality.py` reads
the results. Prints a table and, last, one JSON line; a call is one of the diffusion model for one image, to encode or
to decode (the control's come in the same batch).
"""

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from quality import Bench, mean_of, options_of
from torch import Tensor

from knife import panel
from knife.ddim import SOLVERS
from knife.settings import LEVEL, STRENGTH

WANTED = 0.08  # tumour size, relative to the brain
STEPS = "5,10,20,50,100,475"


def walked(bench: Bench, solver: str, steps: int) -> tuple[Tensor, dict[str, float]]:
    """Return what guidance changed, [N, C, S, S], and the figures of a walk."""
    bench.settings = replace(bench.settings, solver=solver, steps=steps)
    bench.records.clear()
    y = bench.edit(slice(None), "regress", f"{WANTED}")
    size = bench.size(slice(None), y)
    return y - bench.x, {
        "calls": 2 * steps,
        "round trip": mean_of(bench, "reconstruction"),
        "size error": float((size - WANTED).abs().mean()),
        "outside": bench.change(slice(None), y),
    }


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4, help="phantoms, half of them healthy")
    parser.add_argument("--steps", default=STEPS, help="of each walk, rising")
    parser.add_argument("--judge", type=Path, default=Path("out/judge.pt"))
    parser.add_argument("--figure", type=Path, default=Path("out/calls.png"))
    given = parser.parse_args()
    words = ["--count", str(given.count), "--judge", str(given.judge), "--strength", str(STRENGTH)]
    with TemporaryDirectory() as folder:
        bench = Bench(options_of([*words, "--noise-level", str(LEVEL)]), Path(folder))
        reference, figures = walked(bench, "ab2", LEVEL)
        rows = [{"solver": "reference", **figures}]
        for solver in SOLVERS:
            for steps in map(int, given.steps.split(",")):
                change, figures = walked(bench, solver, steps)
                missed = float((change - reference).square().mean().sqrt() / reference.square().mean().sqrt())
                rows.append({"solver": solver, **figures, "effect missed": missed})
    for row in rows:
        print("  ".join(f"{name} {value:.4g}" if name != "solver" else f"{value:<10}" for name, value in row.items()))
    lines = [
        panel.Line(
            solver,
            [
                (torch.tensor(row["calls"]).log10().item(), 100 * row["round trip"])
                for row in rows
                if row["solver"] == solver
            ],
        )
        for solver in SOLVERS
    ]
    given.figure.parent.mkdir(parents=True, exist_ok=True)
    panel.chart(lines, "log10 of the calls", "error of the round trip, % of the range").save(given.figure)
    about = {"count": given.count, "device": platform.processor() or platform.machine(), "torch": torch.__version__}
    print(json.dumps({"rows": rows, **about}))


if __name__ == "__main__":
    main()
