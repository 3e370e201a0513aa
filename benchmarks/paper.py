"""The paper's networks with random weights: seconds an image, launches of a step, images a second of a training.

    python benchmarks/paper.py [--device cuda] [--parts walks,launches,training] [--cases brats-regress,...]
                               [--batches 16,1] [--steps 500] [--precision float32] [--most 60] [--tiny]

walks: images are encoded to L = 500 and decoded while a guide pulls, through `knife.ddim`, with the networks as a
translation prepares them (frozen, channels_last, autocast or not, recorded if KNIFE_GRAPHS=on): the paper's way, every
level by `ddim` with one s and no control, and in 30 + 30 steps by `ab2`. A few steps are timed first. Where all would
take longer than --most seconds, the figure is drawn on from those, and `timed` says from how many.

The floor is what the operations of the convolutions and matrix products would take at the rate of one large product in
the same precision: a call of the U-Net for each step up and down, a call of the guide and its gradient for each step
down. In float32 the product's inputs are rounded as those of convolutions are (TF32, where torch does that).

launches: what one guided step, a call of the U-Net and the gradient of the guide launch on a GPU, told by torch's
profiler; `outside` is what the step launches besides the two. Waits are those of the host for the GPU. On a CPU the
ops that compute are counted instead: they are no kernels.

training: steps of the diffusion models as `knife train` takes them, draws and copies to the device included, of images
that lie in memory; with the batch of the preset and, on a GPU, the largest found by doubling it. Its share of the peak
counts three calls of the network an image.

Medians; each row is printed when it is known. --tiny takes small networks of the same make, to try the script. The last
line printed is one JSON object.
"""

import argparse
import gc
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from network import ready
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from knife import ops
from knife.batches import Ahead
from knife.bench import forward, gradient_operations, machine, medians, operations, peak_gflops, seconds
from knife.checkpoint import Card, Stored
from knife.data import Case
from knife.ddim import Guidance, called, decode, encode, slope
from knife.devices import computed_in, keep_freed_memory, ran_out_of_memory
from knife.graphs import in_words, player
from knife.job import Examples, Run
from knife.job import Job as TrainingJob
from knife.layouts import Folder
from knife.resume import State, start
from knife.schedule import Schedule, path, timestep
from knife.settings import PRECISIONS, Settings
from knife.spec import ImageSpec, preset
from knife.steering import Guide, Job
from knife.tasks import task
from knife.train import train_step
from knife.unet import Architecture

Row = dict[str, Any]
CASES = {  # preset and task
    "faces-regress": ("paper-faces", "regress"),
    "brats-regress": ("paper-brats", "regress"),
    "brats-segment": ("paper-brats", "segment"),
}
LEVEL = 500  # the paper's L
SHORT = 30  # steps of the walk of second order
SCALE = 1.0  # the paper's s; no step takes longer for its value
FEW = 20  # steps, at most, that are timed before all are
TINY = 32  # width of the tiny networks, and the side of their images
EXAMPLES = 16  # images that are trained on
COLUMNS = {  # of each part: what stands in a row, and how it is written
    "walks": {
        "case": "", "batch": "", "solver": "", "steps": "", "timed": "", "seconds an image": ".4g",
        "floor": ".3g", "of peak": ".0%", "TFLOP an image": ".4g", "GiB": ".1f",
    },
    "launches": {
        "case": "", "batch": "", "what": "", "step": "", "network": "", "gradient": "", "outside": "",
    },
    "training": {
        "network": "", "batch": "", "images a second": ".4g", "seconds": ".4g", "precision": "", "of peak": ".0%",
        "GiB": ".1f",
    },
}  # fmt: skip
ON_GPU = {"kernel": "kernels", "gpu_memcpy": "copies", "gpu_memset": "copies"}  # in a trace, by category
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")  # how the names of the host's calls begin
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


def main() -> None:
    """Measure, and print tables and one JSON line."""
    options = parse()
    keep_freed_memory()
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = options.autotune
    facts = about(options)
    print("; ".join(f"{name} {value}" for name, value in facts.items()))
    found: dict[str, list[Row]] = {}
    for part in options.parts:
        print("\n" + "".join(f"{name:>17}" for name in COLUMNS[part]), flush=True)
        found[part] = []
        for row in MEASURES[part](options):
            show(row, COLUMNS[part])
            found[part].append(row)
    print(json.dumps({"benchmark": "paper", **facts, **found}))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", type=some_of(MEASURES), default=[*MEASURES], help=", ".join(MEASURES))
    parser.add_argument("--cases", type=some_of(CASES), default=[*CASES], help=", ".join(CASES))
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[16, 1])
    parser.add_argument("--steps", type=int, default=LEVEL, help=f"of the paper's way, up and down again; all: {LEVEL}")
    parser.add_argument("--precision", default="bfloat16", choices=PRECISIONS[1:], help="of the walks")
    parser.add_argument("--most", type=float, default=60.0, help="seconds of a walk, above which it is drawn on")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--autotune", action="store_true", help="let cuDNN try its algorithms for each convolution")
    parser.add_argument("--tiny", action="store_true", help="small networks of the same make, to try the script")
    return parser.parse_args()


def some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return what reads names with commas."""

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := {*chosen} - {*known}:
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: unknown; give some of {', '.join(known)}")
        return chosen

    return names


def about(options: argparse.Namespace) -> Row:
    """Return what the figures hold for."""
    named = {name: getattr(options, name) for name in ("device", "precision", "autotune", "tiny")}
    kernels = ops.status(torch.device(options.device).type).path
    return {"machine": machine(options.device), **named, "graphs": in_words(), "ops": kernels} | {
        "product, GFLOP/s": round(peak_of(options.device, options.precision)),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def show(row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    """Print a row; what it does not know is a dash."""
    cells = ["-" if row.get(name) is None else format(row[name], form) for name, form in columns.items()]
    print("".join(f"{cell:>17}" for cell in cells), row.get("problem", ""), flush=True)


# ------------------------------------------------------------------------------------------------- what all parts need


def on_gpu(device: str) -> bool:
    """Tell whether a device is a GPU."""
    return torch.device(device).type == "cuda"


def fenced(row: Row, device: str, work: Callable[[], Row]) -> Row:
    """Return a row with what a piece of work found, and the most memory that it held; or with why it failed."""
    release(device)
    if on_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
    try:
        row = row | work()
    except Exception as error:  # one that fails leaves the others
        row = row | {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"}
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu(device) else None
    return row | {"GiB": memory}


def release(device: str) -> None:
    """Give the memory back that nothing holds any more."""
    gc.collect()
    if on_gpu(device):
        torch.cuda.empty_cache()


@lru_cache
def peak_of(device: str, precision: str) -> float:
    """Return the GFLOP/s of a large product; in float32 its inputs are rounded as those of convolutions are."""
    product = torch.backends.cuda.matmul
    if not on_gpu(device) or precision != "float32":
        return peak_gflops(device, dtype=getattr(torch, precision))
    before, product.fp32_precision = product.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    try:
        return peak_gflops(device)
    finally:
        product.fp32_precision = before


def spec_of(name: str, kind: str, tiny: bool) -> ImageSpec:
    """Return what a network of a preset sees, and its shape."""
    row = preset(name)
    spec = row.spec(kind, tuple(map(str, range(row.channels or 4))))
    if not tiny:
        return spec
    return replace(spec, size=(TINY, TINY), unet=smaller(spec.unet), encoder=smaller(spec.encoder))


def smaller(arch: Architecture) -> Architecture:
    """Return a narrow network of as many levels, one block each."""
    return replace(arch, width=TINY, res_blocks=1, head_width=arch.head_width and TINY)


# ------------------------------------------------------------------------------------------------------------- walks


def walks(options: argparse.Namespace) -> Iterator[Row]:
    """Time the walks of each case and batch."""
    for case in options.cases:
        job = job_of(case, options)
        work = work_of(job)
        for batch in options.batches:
            x = images(job, batch)
            for solver, steps in (("ddim", options.steps), ("ab2", min(SHORT, options.steps))):
                settings = replace(job.settings, solver=solver, steps=steps)
                one = replace(job, settings=settings, play=player())  # so that each row holds its own memory alone
                row = {"case": case, "batch": batch, "solver": solver, "steps": steps}
                yield fenced(row, options.device, partial(timed_walk, one, x, work, options))


def job_of(case: str, options: argparse.Namespace) -> Job:
    """Return a diffusion model and a guide of random weights, prepared as for a translation."""
    name, kind = CASES[case]
    cards = [Card(which, name, spec_of(name, which, options.tiny), Schedule()) for which in ("diffusion", kind)]
    net, guide = (ready(card.build(), options.device) for card in cards)
    diffusion, stored = (Stored(Path(), card) for card in cards)
    walk = {"noise_level": LEVEL, "steps": options.steps, "solver": "ddim", "scale": SCALE, "control": False}
    settings = Settings(precision=options.precision, **walk)
    return Job(diffusion, net, (Guide(task(kind), stored, guide),), settings, options.device)


def images(job: Job, batch: int) -> Tensor:
    """Return images of noise within the value range, [N, C, H, W]: no walk takes longer for what it sees."""
    spec = job.diffusion.card.spec
    x = torch.randn(batch, len(spec.channels), *spec.size).clamp(*spec.value_range)
    return x.to(job.device, memory_format=torch.channels_last)


def guidance_of(job: Job, x: Tensor) -> Guidance:
    """Return how the guide pulls at images [N, C, H, W] by the paper's s."""
    guide, scale = job.guides[0], job.settings.scale
    assert scale is not None
    return Guidance(job.precisely(guide.task.score(guide.net, target_of(guide, x))), scale)


def target_of(guide: Guide, x: Tensor) -> Tensor:
    """Return a target for each image: a number, or a mask of random pixels."""
    return (x[:, :1] > 0).float() if guide.task.name == "segment" else torch.ones(len(x), device=x.device)


def walk(job: Job, x: Tensor, steps: int) -> Tensor:
    """Encode images [N, C, H, W] and decode them guided, along the first steps of a job's levels."""
    net, schedule, levels = job.precisely(job.net), job.diffusion.card.schedule, job.levels[: steps + 1]
    noisy, last = encode(net, x, schedule, levels, solver=job.solver, play=job.play)
    return decode(net, noisy, schedule, levels, [guidance_of(job, x)], solver=job.solver, before=last, play=job.play)


def timed_walk(job: Job, x: Tensor, work: tuple[int, int], options: argparse.Namespace) -> Row:
    """Time a walk of a batch, beside its floor."""
    steps, results = job.settings.steps, list[Tensor]()
    assert steps is not None

    def run(count: int) -> None:
        results[:] = [walk(job, x, count)]

    spent, timed = paced(run, steps, options)
    each, flops = spent / len(x), steps * (2 * work[0] + work[1])
    floor = flops / peak_of(options.device, options.precision) / 1e9
    row = {"timed": timed, "seconds an image": each, "floor": floor, "of peak": floor / each}
    blown = {} if bool(results[0].isfinite().all()) else {"problem": "values are not finite"}
    return {**row, "TFLOP an image": flops / 1e12, **blown}


def paced(run: Callable[[int], object], steps: int, options: argparse.Namespace) -> tuple[float, int]:
    """Return the seconds of so many steps, and how many were timed for it: all of them, if --most allows it.

    Before it is timed, a step is taken up and down, in which calls are recorded and memory is taken.
    """

    def clocked(count: int) -> float:
        return seconds(partial(run, count), options.device)

    run(1)
    few = max(1, min(steps, FEW, int(options.most / 4 / clocked(1))))
    times = [clocked(few)]
    whole = times[0] * steps / few
    if few < steps and whole > options.most:
        times += [clocked(few) for _ in range(2)]
        return statistics.median(times) * steps / few, few
    repeats = max(1, min(options.repeats, int(options.most / whole)))
    return statistics.median(clocked(steps) for _ in range(repeats)), steps


def work_of(job: Job) -> tuple[int, int]:
    """Count the operations of a U-Net's call and of a guide's gradient for one image."""
    x = images(job, 1)
    t, net, score = middle(x), job.precisely(job.net), guidance_of(job, x).score
    return operations(lambda: forward(net, x, t)), gradient_operations(score, x, t)


def middle(x: Tensor) -> Tensor:
    """Return the timestep half the way up for each image, [N]."""
    return timestep(torch.full((len(x),), LEVEL // 2, device=x.device))


# ---------------------------------------------------------------------------------------------------------- launches


def launches(options: argparse.Namespace) -> Iterator[Row]:
    """Count what a guided step launches, for the last batch size of those given, which changes nothing of it."""
    for case in options.cases:
        job, batch = replace(job_of(case, options), play=player()), options.batches[-1]
        row = {"case": case, "batch": batch}
        found = fenced(row, options.device, partial(counts, job, images(job, batch)))
        for what, numbers in found.pop("counts", {"": {}}).items():
            yield {**found, "what": what, **numbers}


def counts(job: Job, x: Tensor) -> Row:
    """Return what is launched, kind -> {step, network, gradient, outside}; a step is the third of a walk.

    Of one that is recorded nothing is launched inside: all is outside.
    """
    net, schedule, guidance = job.precisely(job.net), job.diffusion.card.schedule, guidance_of(job, x)
    t = middle(x)

    def steps(count: int) -> Callable[[], object]:
        return lambda: decode(net, x, schedule, path(LEVEL, 3)[: count + 1], [guidance], play=job.play)

    calls = {"two": steps(2), "three": steps(3)}
    if job.play is called:
        calls |= {"network": lambda: forward(net, x, t), "gradient": lambda: slope(guidance.score, x, t)}
    found = {name: launched(call, job.device) for name, call in calls.items()}
    if not any(found["three"].values()):
        raise RuntimeError("the profiler tells of nothing on this device")
    return {"counts": {what: numbers_of(found, what) for what in found["three"]}}


def numbers_of(found: Mapping[str, Counter[str]], what: str) -> dict[str, int]:
    """Return one kind of what was counted: of a step, what it is made of, and what remains."""
    network, gradient = (found[name][what] if name in found else 0 for name in ("network", "gradient"))
    step = found["three"][what] - found["two"][what]
    return {"step": step, "network": network, "gradient": gradient, "outside": step - network - gradient}


def launched(call: Callable[[], object], device: str) -> Counter[str]:
    """Count what a call does on a GPU, and how often the host waits for it; on a CPU the ops that compute."""
    call()
    if not on_gpu(device):
        with Ops() as counter:
            call()
        return Counter(ops=counter.count)
    for _ in range(2):  # the first sets the profiler up
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize(device)
    with TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        return tally(json.loads(trace.read_text())["traceEvents"])


def tally(events: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """Count the events of a trace by what they are; the wait for the end of all is left out."""
    found = Counter(dict.fromkeys(("kernels", "copies", "launches", "waits"), 0))
    for event in events:
        category, name = event.get("cat", ""), event.get("name", "")
        if category in ON_GPU:
            found[ON_GPU[category]] += 1
        elif category in ("cuda_runtime", "cuda_driver"):
            found["launches"] += name.startswith(LAUNCHES)
            found["waits"] += name in WAITS
    return found


class Ops(TorchDispatchMode):
    """Counts the ops that compute: views, and memory that is only taken, count nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or "empty" in func.name())
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------------------- training


def trainings(options: argparse.Namespace) -> Iterator[Row]:
    """Time training steps of the diffusion models of the cases that are asked for."""
    for name in dict.fromkeys(CASES[case][0] for case in options.cases):
        with TemporaryDirectory() as folder:
            job = training_job(name, Path(folder), options)
            state = start(job, print)
            usual = job.run.batch
            yield trained(state, job, usual, options)
            if on_gpu(options.device):
                most = largest(partial(fits, state, job), 2 * usual)
                if most:
                    yield trained(state, job, most, options)
            del state
        release(options.device)


def training_job(name: str, folder: Path, options: argparse.Namespace) -> TrainingJob:
    """Return the job of training a diffusion model on noise that lies in memory."""
    plan, spec = preset(name).settings("diffusion"), spec_of(name, "diffusion", options.tiny)
    run = Run("diffusion", folder, folder, "noise", name, plan.steps, plan.batch, plan.lr, plan.ema)
    run = replace(run, device=options.device)
    cases = [Case(str(i), torch.randn(len(spec.channels), *spec.size), None, {}) for i in range(EXAMPLES)]
    card = Card("diffusion", "noise", spec, Schedule())
    return TrainingJob(run, card, None, Examples(cases, None, {}), cases, [], 0, Folder(folder, "", []), {}, "", {})


def at_batch(job: TrainingJob, batch: int) -> TrainingJob:
    """Return a job that takes so many images a step."""
    return replace(job, run=replace(job.run, batch=batch))


def trained(state: State, job: TrainingJob, batch: int, options: argparse.Namespace) -> Row:
    """Time steps of one batch size."""
    precision, x = computed_in(options.device), job.examples[0][0][None].to(options.device)
    work, peak = operations(lambda: forward(state.net, x, middle(x))), peak_of(options.device, precision)

    def steps() -> Row:
        with Ahead() as ahead:  # as in a training, the next batch is made beside
            call = partial(train_step, state, at_batch(job, batch), make=ahead.batch)
            spent = medians({"step": call}, options.repeats, options.device)["step"]
        return {
            "images a second": batch / spent,
            "seconds": spent,
            "of peak": 3 * work * batch / spent / 1e9 / peak,
        }

    row = {"network": job.run.preset, "batch": batch, "precision": precision}
    return fenced(row, options.device, steps)


def largest(fits: Callable[[int], bool], first: int) -> int:
    """Double a batch while it fits, and return the last that did; 0 if not even the first does."""
    batch = 0
    while fits(size := max(first, 2 * batch)):
        batch = size
    return batch


def fits(state: State, job: TrainingJob, batch: int) -> bool:
    """Tell whether a step of so many images fits into memory."""
    try:
        train_step(state, at_batch(job, batch))
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
    else:
        return True
    release(job.run.device)  # out of the handler, so that what the error held is free
    return False


MEASURES = {"walks": walks, "launches": launches, "training": trainings}

if __name__ == "__main__":
    main()
