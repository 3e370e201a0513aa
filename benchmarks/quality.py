"""How good are the shipped models? Measured on held-out phantoms, whose truth is known, by a judge that guides nothing.

    python benchmarks/quality.py [--count 64] [--models DIR] [--noise-level L] [--steps N] [--device cpu]

Each image is translated as the command line does it. The judge is a segmenter of another architecture and seed, trained
on clean phantoms of another seed; its own Dice is printed first. It is trained on the first run (some minutes on a CPU)
and kept in --judge. Prints a table and, last, one JSON line.
"""

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knife.bootstrap import slope, spearman
from knife.checkpoint import STARTER, stored_models
from knife.devices import resolve_device
from knife.image import Image, read
from knife.outputs import Edit
from knife.pairs import Pair
from knife.phantom import CHANNELS, Phantom, phantom, write_nifti
from knife.settings import PRECISIONS, STRENGTH, Settings, Wish
from knife.spec import preset
from knife.steering import run
from knife.tasks import task
from knife.translation import job_of, level_of

HELD_OUT, JUDGE_DATA = 20_220_402, 77  # seeds of phantoms that no shipped model was trained on (theirs: 1)
TARGETS = (0.02, 0.05, 0.10, 0.15)
TRACE = 0.002  # of the brain: what a judge sees of a tumour that is gone


def pixels(phantoms: list[Phantom]) -> Tensor:
    """Return images [N, 4, S, S] in [-1, 1]."""
    return torch.stack([torch.from_numpy(p.pixels) for p in phantoms]) * 2 - 1


def masks(phantoms: list[Phantom]) -> Tensor:
    """Return tumour masks [N, 1, S, S], 0 or 1."""
    return torch.stack([torch.from_numpy(p.mask) > 0 for p in phantoms])[:, None].float()


def train_judge(file: Path, steps: int, device: str) -> nn.Module:
    """Return the judge, trained on clean phantoms unless `file` holds it already."""
    torch.manual_seed(9)
    net = preset("small-64").spec("segment", CHANNELS).for_judge().build_unet(1).to(device)
    if file.exists():
        net.load_state_dict(torch.load(file, map_location=device, weights_only=True))
        return net.eval()
    data = [phantom(i, seed=JUDGE_DATA) for i in range(1500)]
    x, y = pixels(data).to(device), masks(data).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(x), (16,))
        logits = net(x[chosen], torch.zeros(16, device=device))
        p, wanted = logits.sigmoid(), y[chosen]
        dice_loss = 1 - (2 * (p * wanted).sum() + 1) / (p.sum() + wanted.sum() + 1)
        (F.binary_cross_entropy_with_logits(logits, wanted) + dice_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), file)
    return net.eval()


@torch.no_grad()
def judged(judge: nn.Module, x: Tensor) -> Tensor:
    """Return the mask [N, 1, S, S] that the judge sees in images in [-1, 1]."""
    return (judge(x, torch.zeros(len(x), device=x.device)) > 0).float()


@torch.no_grad()
def doubted(judge: nn.Module, x: Tensor) -> Tensor:
    """Return how many pixels of images in [-1, 1] the judge gives to neither side with 90 %, [N]."""
    p = judge(x, torch.zeros(len(x), device=x.device)).sigmoid()
    return ((p > 0.1) & (p < 0.9)).sum((1, 2, 3))


def dice(a: Tensor, b: Tensor) -> Tensor:
    """Return the overlap of masks, [N]; two empty masks agree."""
    areas = (a + b).sum((1, 2, 3))
    return torch.where(areas > 0, 2 * (a * b).sum((1, 2, 3)) / areas.clamp(min=1), torch.ones_like(areas))


def outside(change: Tensor, brain: Tensor, tumour: Tensor, margin: int = 4) -> Tensor:
    """Return the mean absolute change, in units of the whole range, of the brain outside the dilated tumour, [N]."""
    near = F.max_pool2d(tumour, 2 * margin + 1, 1, margin)
    region = brain * (1 - near)
    return ((change.abs() / 2).mean(1, keepdim=True) * region).sum((1, 2, 3)) / region.sum((1, 2, 3)).clamp(min=1)


class Bench:
    """The models, the judge and the held-out phantoms, as files that a translation reads."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.device, _ = resolve_device(options.device)
        self.stored = {s.card.kind: s for s in stored_models(options.models) if not s.card.judge}
        self.settings = settings_of(options)
        self.judge = train_judge(options.judge, options.judge_steps, self.device)
        half = options.count // 2
        self.healthy = [phantom(i, seed=options.seed, relative_size=0.0) for i in range(half)]
        sizes = [0.03 + 0.27 * i / max(half - 1, 1) for i in range(half)]
        self.diseased = [phantom(half + i, seed=options.seed, relative_size=size) for i, size in enumerate(sizes)]
        everything = self.healthy + self.diseased
        self.images = [written(folder / f"{i:03d}.nii", p.pixels) for i, p in enumerate(everything)]
        self.x, self.mask = pixels(everything).to(self.device), masks(everything).to(self.device)
        self.brain = torch.stack([torch.from_numpy(p.brain) for p in everything])[:, None].float().to(self.device)
        self.half, self.seed, self.unbalanced, self.window = half, options.seed, options.unbalanced, options.window
        self.records: list[dict[str, Any]] = []  # of all translations

    def edit(self, rows: slice, name: str, wanted: str | Tensor) -> Tensor:
        """Translate some of the phantoms towards what a task wants of all, or targets [N, ...], as a command would."""
        pair = Pair(self.stored["diffusion"], self.stored[name])
        settings = self.settings.at(level_of([pair]))
        if self.unbalanced:
            scale = (settings.strength or STRENGTH) / pair.guide.card.guidance["gradient"]
            settings = replace(settings, scale=scale, strength=None)
        job = job_of([task(name)], [Wish(name, "", window=self.window)], [pair], settings, self.device)
        job = replace(job, onlookers=())
        images, card = self.images[rows], pair.guide.card
        targets = (
            [task(name).target(wanted, image, card.spec, card.config) for image in images]
            if isinstance(wanted, str)
            else wanted
        )
        edits = [Edit(image, (target,), None, (None,)) for image, target in zip(images, targets, strict=True)]
        done = [one for one in run(job, [edits]) if one]
        self.records += [one.record for one in done]
        return torch.stack([one.result.pixels for one in done]).to(self.device) * 2 - 1

    def change(self, rows: slice, y: Tensor, wanted: Tensor | None = None) -> float:
        """Return the mean change outside tumours old, new and wanted."""
        tumour = torch.maximum(self.mask[rows], judged(self.judge, y))
        if wanted is not None:
            tumour = torch.maximum(tumour, wanted)
        return float(outside(y - self.x[rows], self.brain[rows], tumour).mean())

    def size(self, rows: slice, y: Tensor) -> Tensor:
        """Return the judged relative tumour size, [N]."""
        return judged(self.judge, y).sum((1, 2, 3)) / self.brain[rows].sum((1, 2, 3))


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings of a translation: the usual ones, but for what the command line says."""
    names = ("noise_level", "steps", "solver", "strength", "clamp", "control", "batch_size", "auto_region", "precision")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(Settings(), **given)


def two_levels(text: str) -> tuple[int, int]:
    """Read LOW:HIGH."""
    low, high = map(int, text.split(":"))
    return low, high


def written(file: Path, pixels: Any) -> Image:
    """Write a phantom, and read it as a user's image."""
    write_nifti(file, pixels)
    return read(file)


def measure(bench: Bench) -> dict[str, float]:
    """Measure everything; see the README for what each figure means."""
    everything, healthy, diseased = slice(None), slice(0, bench.half), slice(bench.half, None)
    own = judged(bench.judge, bench.x[diseased])
    figures = {
        "judge's own Dice (median, diseased)": float(dice(own, bench.mask[diseased]).median()),
        "judge's own error of the size (mean, diseased)": float(
            (bench.size(diseased, bench.x[diseased]) - true_size(bench, diseased)).abs().mean()
        ),
    }
    wanted, reached, changes, told = [], [], [], []
    for value in TARGETS:
        y = bench.edit(everything, "regress", f"{value}")
        size = bench.size(everything, y)
        figures[f"regress to {value:g}: judged size (median)"] = float(size.median())
        figures[f"regress to {value:g}: share within 10 %"] = near(size, torch.full_like(size, value))
        true = [phantom(i, seed=bench.seed, relative_size=value) for i in range(len(y))]
        for name, x in (("edited", y), ("true", pixels(true).to(bench.device))):
            doubts = doubted(bench.judge, x).median()
            figures[f"regress to {value:g}: pixels that the judge doubts, {name} (median)"] = float(doubts)
        told.append(torch.tensor([record["after"]["value"] for record in bench.records[-len(y) :]]))
        wanted.append(torch.full_like(size, value))
        reached.append(size)
        changes.append(bench.change(everything, y))
    want, reach = torch.cat(wanted), torch.cat(reached)
    both = torch.stack([want, reach], 1).double().cpu().numpy()
    figures["round trip: mean absolute error"] = mean_of(bench, "reconstruction")
    figures["regress: Spearman of target and judged size"] = spearman(both)
    figures["regress: slope of judged size over target"] = slope(both)
    figures["regress: median error of judged size"] = float((want - reach).abs().median())
    figures["regress: share within 10 % of the target"] = near(reach, want)
    figures["regress: the same as the guide sees it"] = near(torch.cat(told), want.cpu())
    figures["regress: change outside"] = sum(changes) / len(changes)

    twins = [phantom(i, seed=bench.seed, relative_size=0.08) for i in range(bench.half)]
    target = masks(twins)
    y = bench.edit(healthy, "segment", target)
    target = target.to(bench.device)
    figures["segment: median Dice of judged tumour and mask"] = float(dice(judged(bench.judge, y), target).median())
    figures["segment: change outside"] = bench.change(healthy, y, target)

    y = bench.edit(diseased, "classify", "healthy")
    left = judged(bench.judge, y).sum((1, 2, 3)) / own.sum((1, 2, 3)).clamp(min=1)
    figures["classify to healthy: median cut of the tumour's area"] = float(1 - left.median())
    figures["classify to healthy: share the judge calls healthy"] = float(
        (bench.size(diseased, y) < TRACE).float().mean()
    )
    figures["classify: change outside"] = bench.change(diseased, y)
    y = bench.edit(healthy, "classify", "diseased")
    figures["classify to diseased: share the judge calls diseased"] = float(
        (bench.size(healthy, y) >= TRACE).float().mean()
    )
    figures["decodes an image"] = sum(len(record.get("attempts", [0])) for record in bench.records) / len(bench.records)
    return figures


def near(sizes: Tensor, wanted: Tensor) -> float:
    """Return the share of sizes that are within a tenth of what is wanted."""
    return float(((wanted - sizes).abs() <= 0.1 * wanted).float().mean())


def true_size(bench: Bench, rows: slice) -> Tensor:
    """Return the relative tumour size that the phantoms were made with, [N]."""
    return bench.mask[rows].sum((1, 2, 3)) / bench.brain[rows].sum((1, 2, 3))


def mean_of(bench: Bench, name: str) -> float:
    """Return the mean of a number in all records; 0 if none tells it."""
    values = [record[name] for record in bench.records if name in record]
    return sum(values) / max(len(values), 1)


GOALS = {  # figure: (at least, at most)
    "round trip: mean absolute error": (None, 0.01),
    "regress: Spearman of target and judged size": (0.9, None),
    "regress: median error of judged size": (None, 0.02),
    "regress: slope of judged size over target": (0.9, 1.1),
    "regress: share within 10 % of the target": (0.95, None),
    "regress: change outside": (None, 0.005),
    "segment: median Dice of judged tumour and mask": (0.85, None),
    "segment: change outside": (None, 0.005),
    "classify to healthy: median cut of the tumour's area": (0.8, None),
    "classify to healthy: share the judge calls healthy": (0.95, None),
    "classify: change outside": (None, 0.005),
    "classify to diseased: share the judge calls diseased": (0.95, None),
}


def verdict(name: str, value: float) -> str:
    """Say the goal of a figure and whether it is met."""
    low, high = GOALS.get(name, (None, None))
    if low is None and high is None:
        return ""
    met = (low is None or value >= low) and (high is None or value <= high)
    ends = ((">=", low), ("<=", high))
    wanted = " and ".join(f"{sign} {end:g}" for sign, end in ends if end is not None)
    return f"{wanted}  {'met' if met else 'MISSED'}"


def options_of(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=64, help="phantoms, half of them healthy")
    parser.add_argument("--seed", type=int, default=HELD_OUT, help="of the phantoms; the models' is 1")
    parser.add_argument("--models", type=Path, default=STARTER, help="folder that holds one data set's four models")
    parser.add_argument("--judge", type=Path, default=Path("out/judge.pt"))
    parser.add_argument("--judge-steps", type=int, default=1200)
    parser.add_argument("--noise-level", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--solver", choices=("ab2", "dpm2m", "ddim"))
    parser.add_argument("--strength", type=float, help="fixed; default: the closed loop")
    parser.add_argument("--unbalanced", action="store_true", help="one scale for every image and step, as in the paper")
    parser.add_argument("--window", type=two_levels, help="noise levels LOW:HIGH that guide")
    parser.add_argument("--auto-region", action="store_true", help="let change only where a first decode changed most")
    parser.add_argument("--clamp", action="store_true", help="keep the predicted clean image within the value range")
    parser.add_argument("--control", action=argparse.BooleanOptionalAction, help="add only what guidance changed")
    parser.add_argument("--precision", choices=PRECISIONS)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    return parser.parse_args(words)


def main() -> None:
    """Measure and print."""
    options = options_of()
    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        figures = measure(bench)
    for name, value in figures.items():
        print(f"{name:<55} {value:8.4f}  {verdict(name, value)}")
    about = {
        "settings": vars(bench.settings),
        "unbalanced": options.unbalanced,
        "window": options.window,
        "count": options.count,
        "seed": options.seed,
        "seconds": round(time.perf_counter() - began),
        "device": torch.cuda.get_device_name() if bench.device != "cpu" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps({"figures": {name: round(value, 4) for name, value in figures.items()}, **about}))


if __name__ == "__main__":
    main()
