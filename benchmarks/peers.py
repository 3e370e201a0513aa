"""Seconds an image of knife beside guided-diffusion, diffusers and MONAI, on the same work.

    python benchmarks/peers.py [--only NAME,NAME,...] [--repeats 5] [--threads N] [--device cuda]
                               [--precision bfloat16]

The same U-Net with the same random weights, the same guide, the same phantoms, the same levels: knife imports the
weights as guided-diffusion stores them and exports them for diffusers, whose file MONAI's network reads under other
names. All peers have guided-diffusion's encoder as their guide, differentiated as its sample scripts do, and take their
own scheduler's steps. Where the algorithm is the same, so are the outputs: the largest difference is printed.

Every program is a process of its own, and none but knife's imports knife. They are asked in turn, one at a time, in
another order each time; a ratio is taken within each repeat, the median and the range of all repeats are printed. The
seconds are the clock's; those of the CPU stand beside them, of all threads together, for machines that are not idle. A
program that is not installed is a row that says so (`pip install -e .[peers]`).

Cases: `batch1`, `batch8` (64x64x4, 20 steps up, 20 guided steps down), `faces`, `brats` (one call of the paper's
U-Nets, without gradient), and, if --only names it, `paper` (500 + 500 steps, once: the paper's way). On a GPU also
`faces16`, `brats16` (one call of 16 images), and `brats-walk` (16 images, 10 steps up and 10 guided down). Seconds
begin when the images lie on the device, and end when it is done.

With --precision bfloat16 a peer does all its work under one torch.autocast, which keeps the weights it has halved, and
knife computes as its own option of that name lets it. Networks of random weights make much of that rounding: what
differs is no longer small. KNIFE_GRAPHS=on records knife's steps on a GPU. `diffusers-compile` is diffusers' U-Net in
channels_last under torch.compile, run on a GPU (in the mode `reduce-overhead`, which records CUDA graphs), or where
--only names it; the seconds that compiling took are told apart.

`knife-standard` is no equal work: it is all of `knife.translate` as it comes, models read, 20 steps by ab2, a control
beside the edit. The guide being random, it is made to take its target for reached at once; where it is not, an image is
decoded again. Beside `paper` it tells what fewer steps save.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # whoever imports knife may compute otherwise than without it, so that only its own functions do
    from knife.spec import ImageSpec

HIGHEST = 500  # timestep that walks lead to, from 0: knife's levels 1 to 501
TRAINED = 1000  # timesteps of the schedule
TARGET = 1.0  # of the guide
STRENGTH = 0.2  # size of the guidance against eps

Network = Callable[[Tensor, Tensor], Tensor]  # (x [N, C, H, W], t [N]) -> [N, 2C, H, W]
Pull = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> scaled gradient of the score, like x
Run = Callable[[Tensor, Sequence[int]], tuple[Tensor | None, dict[str, float]]]  # (x, timesteps) -> result, its figures


class Case(NamedTuple):
    """One piece of work."""

    name: str
    words: str
    network: str  # whose folder holds the weights
    batch: int = 1
    stride: int = 0  # timesteps between two steps of a walk; 0: no walk, the U-Net is asked once
    times: int | None = None  # how often it is repeated, whatever --repeats says
    unasked: tuple[str, ...] = ("cpu", "cuda")  # kinds of devices on which it is done though --only names none

    @property
    def timesteps(self) -> list[int]:
        """Return where the network is asked, rising; a walk goes up and down again."""
        return [*range(0, HIGHEST + 1, self.stride)] if self.stride else [HIGHEST // 2]


class Where(NamedTuple):
    """What all programs compute on, and how."""

    device: str = "cpu"
    precision: str = "float32"

    @property
    def kind(self) -> str:
        """Return the kind of the device: cpu, cuda."""
        return self.device.partition(":")[0]

    def settle(self) -> None:
        """Wait until a GPU has done what was asked of it."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.device)


class Program(NamedTuple):
    """One program: what it is called, how its runs are set up, and what it needs, module -> distribution."""

    name: str
    prepare: Callable[[Path, Case, Where], Run]
    needs: Mapping[str, str]
    unasked: tuple[str, ...] = ("cpu", "cuda")  # kinds of devices on which it runs though --only names none


class Figures(NamedTuple):
    """What one program did in one case: seconds an image in each repeat, its result, and why there are none."""

    program: str
    seconds: Sequence[float] = ()
    cpu: Sequence[float] = ()  # seconds an image of all its threads together
    result: np.ndarray | None = None
    told: Mapping[str, float] = {}
    problem: str = ""


CASES = [
    Case("batch1", "64x64x4, batch 1, 20 + 20 steps", "small", 1, 25),
    Case("batch8", "64x64x4, batch 8, 20 + 20 steps", "small", 8, 25),
    Case("faces", "paper's faces U-Net, 128x128x3, one call", "faces"),
    Case("brats", "paper's BRATS U-Net, 256x256x4, one call", "brats"),
    Case("paper", "64x64x4, batch 1, 500 + 500 steps", "small", 1, 1, times=1, unasked=()),
    Case("faces16", "paper's faces U-Net, 128x128x3, batch 16, one call", "faces", 16, unasked=("cuda",)),
    Case("brats16", "paper's BRATS U-Net, 256x256x4, batch 16, one call", "brats", 16, unasked=("cuda",)),
    Case("brats-walk", "paper's BRATS networks, batch 16, 10 + 10 steps", "brats", 16, 50, unasked=("cuda",)),
]

# --- The command ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, and print a table of each case when it is done, and one JSON line."""
    options = parse()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    where = Where(options.device, options.precision)
    cases, programs = chosen(options.only, where)
    facts = about(options.threads, where)
    print("; ".join(f"{key} {value}" for key, value in facts.items() if value))
    results = {}
    with tempfile.TemporaryDirectory() as name:
        for network in {case.network for case in cases}:
            walked = max((case.batch for case in cases if case.network == network and case.stride), default=0)
            store(network, Path(name, network), walked)
        workers = {one.name: start(one, options.threads, where) for one in programs if not lacking(one)}
        for case in cases:
            results[case.name] = rows(measure(case, programs, workers, Path(name), options.repeats))
            show(case.words, results[case.name])
        for pipe in workers.values():
            pipe.close()
    print(json.dumps({"benchmark": "peers", **facts, "results": results}))


def chosen(only: str | None, where: Where) -> tuple[list[Case], list[Program]]:
    """Return the cases and programs that --only names; of a kind of which it names none, those that are usual."""
    named = set(only.split(",")) if only else set()
    cases = [case for case in CASES if case.name in named] or [case for case in CASES if where.kind in case.unasked]
    programs = [one for one in PROGRAMS if one.name in named] or [one for one in PROGRAMS if where.kind in one.unasked]
    return cases, programs


def parse() -> argparse.Namespace:
    """Read the command line."""
    names = [case.name for case in CASES] + [program.name for program in PROGRAMS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"cases and programs, with commas: {', '.join(names)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    for name in options.only.split(",") if options.only else ():
        if name not in names:
            parser.error(f"--only {name}: unknown; give some of {', '.join(names)}")
    return options


def about(threads: int, where: Where) -> dict[str, Any]:
    """Return what the figures hold for."""
    from knife.bench import machine
    from knife.graphs import in_words

    wanted = dict.fromkeys(name for program in PROGRAMS for name in program.needs.values())
    found = {dist.name.replace("_", "-"): dist.version for dist in importlib.metadata.distributions()}
    versions = {name: found.get(name, "") for name in ("torch", *wanted)}
    facts = {"machine": machine(where.device), **where._asdict(), "graphs": in_words() if where.kind == "cuda" else ""}
    return {**facts, "threads": threads, "date": time.strftime("%Y-%m-%d"), **versions}


def measure(
    case: Case, programs: Sequence[Program], workers: Mapping[str, Connection], folder: Path, repeats: int
) -> list[Figures]:
    """Ask every program in turn to do a case."""
    x = images(folder / case.network, case)
    asking = [program for program in programs if case.stride or program.prepare is not knife_standard]
    figures = {program.name: Figures(program.name, problem=lacking(program)) for program in asking}
    for repeat in range(case.times or repeats):
        turn = repeat % len(asking)
        for program in (*asking[turn:], *asking[:turn]):
            if not figures[program.name].problem:
                figures[program.name] = asked(
                    workers[program.name], figures[program.name], case, folder / case.network, x
                )
    return [*figures.values()]


def lacking(program: Program) -> str:
    """Say what must be installed for a program to run; nothing if all is there."""
    missing = [dist for module, dist in program.needs.items() if importlib.util.find_spec(module) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def rows(figures: Sequence[Figures]) -> list[dict[str, Any]]:
    """Compare the programs in one case: with the fastest peer in each repeat, and with knife's result."""
    median = {one.program: statistics.median(one.seconds) for one in figures if one.seconds}
    peers = [one for one in figures if one.seconds and not one.program.startswith("knife")]
    best = min(peers, key=lambda one: median[one.program], default=None)
    own = next((one.result for one in figures if one.program == "knife"), None)
    table = []
    for one in figures:
        row: dict[str, Any] = {"program": one.program}
        if one.seconds:
            row |= {"seconds": median[one.program], "spread": [min(one.seconds), max(one.seconds)]}
            row["cpu_seconds"] = statistics.median(one.cpu)
        if one.seconds and best:
            ratios = [mine / theirs for mine, theirs in zip(one.seconds, best.seconds, strict=False)]
            row |= {"ratio": statistics.median(ratios), "ratio_spread": [min(ratios), max(ratios)]}
        if own is not None and one.result is not None and one.program != "knife":
            row["difference"] = float(np.abs(one.result - own).max())
        table.append({**row, **one.told, **({"problem": one.problem} if one.problem else {})})
    return table


def show(words: str, table: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of one case."""
    print(f"\n{words}\n{'':<18}{'s/image':>9}{'spread':>18}{'CPU s':>9}", end="")
    print(f"{'of best peer':>14}{'spread':>13}{'difference':>12}")
    for row in table:
        line = f"{row['program']:<18}"
        if "seconds" in row:
            line += f"{row['seconds']:9.3f}" + "{:>9.3f} -{:7.3f}".format(*row["spread"]) + f"{row['cpu_seconds']:9.3f}"
        if "ratio" in row:
            line += f"{row['ratio']:14.3f}" + "{:>7.2f} -{:4.2f}".format(*row["ratio_spread"])
        line += f"{row['difference']:12.1e}" if "difference" in row else " " * 12 * ("ratio" in row)
        told = {"decodes": "{:.1f} decodes", "gflops": "{:.0f} GFLOP/s", "peak": "matrix product {:.0f} GFLOP/s"}
        told["compiling"] = "compiled in {:.0f} s"
        notes = [form.format(row[key]) for key, form in told.items() if key in row]
        print(f"{line}  {', '.join([*notes, row.get('problem', '')])}".rstrip(", "), flush=True)


# --- A process of each program ----------------------------------------------------------------------------------------


def start(program: Program, threads: int, where: Where) -> Connection:
    """Start a program's process; it ends when the pipe is closed."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    context.Process(target=serve, args=(program.name, theirs, threads, where), daemon=True).start()
    theirs.close()
    return pipe


def asked(pipe: Connection, before: Figures, case: Case, folder: Path, x: np.ndarray) -> Figures:
    """Let a program do a case once more."""
    try:
        pipe.send((case, folder, x))
        answer = pipe.recv()
    except (EOFError, OSError):
        answer = "failed: its process ended"
    if isinstance(answer, str):
        return before._replace(problem=answer)
    seconds, cpu, result, told = answer
    times = {"seconds": [*before.seconds, seconds / case.batch], "cpu": [*before.cpu, cpu / case.batch]}
    return before._replace(**times, result=result, told=told)


def serve(name: str, pipe: Connection, threads: int, where: Where) -> None:
    """Do cases until nobody asks for any more: set one up when it is new, run a little of it, then all of it, timed."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # at what peers and their own dependencies find old
    warnings.filterwarnings("error", "KNIFE_GRAPHS")  # calls that cannot be recorded are no figure of recorded ones
    program = next(program for program in PROGRAMS if program.name == name)
    halved = where.precision == "bfloat16" and not name.startswith("knife")  # knife itself says where it halves
    run, ready = None, None
    while True:
        try:
            case, folder, x = pipe.recv()
        except EOFError:
            return
        try:
            with torch.autocast(where.kind, torch.bfloat16, enabled=halved):
                given = torch.from_numpy(x).to(where.device)
                if case != ready:
                    run, ready = None, None  # so that its memory is free for the next
                    if where.kind == "cuda":
                        torch.cuda.empty_cache()
                    run, ready = program.prepare(folder, case, where), case
                    run(given, case.timesteps[:2])
                assert run is not None
                where.settle()
                began, busy = time.perf_counter(), time.process_time()
                result, told = run(given, case.timesteps)
                where.settle()
                seconds, cpu = time.perf_counter() - began, time.process_time() - busy
            pipe.send((seconds, cpu, None if result is None else result.float().contiguous().cpu().numpy(), told))
        except Exception as error:  # whatever a peer may raise becomes its row
            pipe.send(f"failed: {type(error).__name__}: {' '.join(str(error).split())[:150]}")


# --- What all are given -----------------------------------------------------------------------------------------------


def specs() -> dict[str, "ImageSpec"]:
    """Return the networks: the small one, and the paper's."""
    from knife.spec import ImageSpec, preset
    from knife.unet import Architecture

    unet = Architecture(64, (1, 2, 2, 4), res_blocks=1, attention=(8,))
    guide = Architecture(32, (1, 2, 2, 4), 1, (8,), head_width=64, scale_shift=True, updown=True)
    brats = preset("paper-brats").spec("diffusion", ("t1", "t1ce", "t2", "flair"))
    return {
        "small": ImageSpec(brats.channels, (64, 64), unet, guide),
        "faces": preset("paper-faces").spec("diffusion", ("r", "g", "b")),
        "brats": replace(brats, unet=replace(brats.unet, classes=0)),
    }


def store(network: str, folder: Path, walked: int) -> None:
    """Store a network's random weights in every program's way, and a guide and so many phantoms if any are walked.

    folder/unet.pt, guide.pt: as guided-diffusion stores them; .json: its options. folder/diffusers: as diffusers does.
    folder/models: as knife does, once it has imported the former.
    """
    from knife.diffusers import export_diffusers
    from knife.phantom import phantom, write_nifti

    folder.mkdir()
    torch.manual_seed(0)
    spec = specs()[network]
    store_as_original(spec.build_unet(2 * len(spec.channels)), folder / "unet.pt")
    (folder / "unet.json").write_text(json.dumps(original_options(spec, encoder=False)))
    imported(folder / "unet.pt", "diffusion", spec)
    export_diffusers(folder / "models" / "peers" / "diffusion.safetensors", folder / "diffusers")
    if walked:
        store_as_original(spec.build_encoder(1), folder / "guide.pt")
        (folder / "guide.json").write_text(json.dumps(original_options(spec, encoder=True)))
        for i in range(walked):
            write_nifti(folder / f"{i}.nii", phantom(i, spec.size[0], seed=5).pixels)
        imported(folder / "guide.pt", "regress", spec)


def store_as_original(net: nn.Module, path: Path) -> None:
    """Draw the weights that begin as zeros, and store all under guided-diffusion's names.

    They are drawn small: a walk through loud random layers is chaotic, and would make much of the rounding of each.
    """
    from knife.interop import foreign_names, foreign_shape

    for parameter in net.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 / 6)
    names = foreign_names(net)
    torch.save({names[k]: v.reshape(foreign_shape(k, v.shape)) for k, v in net.state_dict().items()}, path)


def original_options(spec: "ImageSpec", encoder: bool) -> dict[str, Any]:
    """Return what guided-diffusion calls the options of a U-Net or an encoder."""
    arch = asdict(spec.encoder if encoder else spec.unet)
    return {
        "image_size": spec.size[0],
        "in_channels": len(spec.channels),
        "model_channels": arch["width"],
        "out_channels": 1 if encoder else 2 * len(spec.channels),
        "num_res_blocks": arch["res_blocks"],
        "attention_resolutions": arch["attention"],
        "channel_mult": arch["mult"],
        "num_heads": arch["heads"],
        "num_head_channels": arch["head_width"] or -1,
        "use_scale_shift_norm": arch["scale_shift"],
        "resblock_updown": arch["updown"],
        **({"pool": "attention"} if encoder else {}),
    }


def imported(path: Path, kind: str, spec: "ImageSpec") -> None:
    """Store weights as knife does, with what it would have measured of a guide had it trained it."""
    from knife import checkpoint
    from knife.interop import Told, import_guided_diffusion

    arch = spec.unet if kind == "diffusion" else spec.encoder
    heads = None if arch.head_width else arch.heads
    told = Told(size=spec.size, heads=heads, head_width=arch.head_width, channels=spec.channels)
    card, weights = import_guided_diffusion(path, kind, "peers", told)
    file = path.parent / "models" / "peers" / f"{kind}.safetensors"
    checkpoint.save(file, weights, card.to_json())
    if kind == "regress":
        steepness = steepness_of(path.parent)
        measured = {"gradient": steepness, "error": 4 * TARGET}  # any value is as near as this guide can tell
        checkpoint.save(file, weights, replace(card, guidance=measured).to_json())
        (path.parent / "scale.json").write_text(json.dumps(STRENGTH / steepness))


def steepness_of(folder: Path) -> float:
    """Return the size of sqrt(1 - ab) g on noised phantoms half the way up."""
    from knife import load_model
    from knife.ddim import slope
    from knife.schedule import Schedule, noise

    x = torch.from_numpy(images(folder, Case("", "", "", 1, 1)))
    ab = Schedule("linear", TRAINED).alpha_bar[HIGHEST // 2].expand(len(x))
    noisy = noise(x, torch.randn_like(x), ab)
    guide = load_model(folder / "models" / "peers" / "regress.safetensors")
    g = slope(lambda x, t: score(guide, x, t), noisy, torch.full((len(x),), HIGHEST // 2)).gradient
    return float((1 - ab[0]).sqrt() * g.square().mean().sqrt())


def images(folder: Path, case: Case) -> np.ndarray:
    """Return what a case begins with, [N, C, H, W]: phantoms to walk, noise for a call."""
    shape = shape_of(folder, case)
    if case.stride:
        from knife.phantom import phantom

        x = np.stack([phantom(i, shape[-1], seed=5).pixels for i in range(case.batch)]) * 2 - 1
        return x.astype(np.float32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).numpy()


def shape_of(folder: Path, case: Case) -> tuple[int, int, int, int]:
    """Return the shape of what a case begins with."""
    options = json.loads((folder / "unet.json").read_text())
    return case.batch, options["in_channels"], options["image_size"], options["image_size"]


def score(guide: Network, x: Tensor, t: Tensor) -> Tensor:
    """Return how near a guide's value is to the target, [N]."""
    return -0.5 * (guide(x, t)[:, 0] - TARGET) ** 2


# --- knife ------------------------------------------------------------------------------------------------------------


def knife(folder: Path, case: Case, where: Where) -> Run:
    """Set up the networks as `knife translate` loads them, and the paper's solver."""
    from knife import load_model
    from knife.ddim import Guidance, ddim, decode, encode
    from knife.graphs import player
    from knife.schedule import Schedule

    net = load_model(folder / "models" / "peers" / "diffusion.safetensors", where.device)
    if not case.stride:
        return with_rate(net, where)
    guide = load_model(folder / "models" / "peers" / "regress.safetensors", where.device)
    told = precisely(lambda x, t: score(guide, x, t), where)
    pulls = [Guidance(told, json.loads((folder / "scale.json").read_text()))]
    schedule, asked, play = Schedule("linear", TRAINED), precisely(net, where), player()

    def run(x: Tensor, timesteps: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        levels = [t + 1 for t in timesteps]
        noisy, _ = encode(asked, x.to(memory_format=torch.channels_last), schedule, levels, solver=ddim, play=play)
        return decode(asked, noisy, schedule, levels, pulls, solver=ddim, play=play), {}

    return run


def precisely(network: Network, where: Where) -> Network:
    """Return a network, or a score, in the precision that a translation gives it."""
    from knife.steering import answer

    return partial(answer, where.device, where.precision, network)


def with_rate(net: nn.Module, where: Where) -> Run:
    """Return a run that asks a network once and tells GFLOP/s, beside those of the fastest of some matrix products."""
    from knife.bench import operations, peak_gflops
    from knife.graphs import player

    flops, peak = list[int](), peak_gflops(where.device, dtype=getattr(torch, where.precision))
    ask, play = precisely(lambda x, t: net(x.to(memory_format=torch.channels_last), t), where), player()
    once = called(partial(play, ask))

    def run(x: Tensor, timesteps: Sequence[int]) -> tuple[Tensor | None, dict[str, float]]:
        if not flops:
            flops.append(operations(lambda: called(ask)(x, timesteps)))
        began = time.perf_counter()
        result, _ = once(x, timesteps)
        where.settle()
        return result, {"gflops": flops[0] / 1e9 / (time.perf_counter() - began), "peak": peak}

    return run


def knife_standard(folder: Path, case: Case, where: Where) -> Run:
    """Set up what a user types: `knife translate` at its standard quality, but for images that are refused."""
    from knife import Settings, Wish, translate

    settings = Settings(noise_level=HIGHEST, batch_size=case.batch, extrapolate=True, max_reconstruction=1e9)
    settings = replace(settings, precision=where.precision)

    def run(x: Tensor, timesteps: Sequence[int]) -> tuple[None, dict[str, float]]:
        files = [folder / f"{i}.nii" for i in range(len(x))]
        wish, models = Wish("regress", str(TARGET)), folder / "models"
        done = translate(files, wish, models=models, settings=settings, device=where.device)
        return None, {"decodes": statistics.mean(len(one.record.get("attempts", [()])) for one in done)}

    return run


# --- The peers --------------------------------------------------------------------------------------------------------


def guided_diffusion(folder: Path, case: Case, where: Where) -> Run:
    """Set up guided-diffusion: its U-Net, its spaced diffusion, its steps with a condition."""
    from guided_diffusion import gaussian_diffusion as original
    from guided_diffusion.respace import SpacedDiffusion
    from guided_diffusion.unet import UNetModel

    net = loaded_as_original(UNetModel, folder, "unet", where)
    if not case.stride:
        return called(net)
    pull = original_pull(folder, where)

    @torch.no_grad()
    def run(x: Tensor, timesteps: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        diffusion = SpacedDiffusion(
            use_timesteps=timesteps,
            betas=original.get_named_beta_schedule("linear", TRAINED),
            model_mean_type=original.ModelMeanType.EPSILON,
            model_var_type=original.ModelVarType.LEARNED_RANGE,
            loss_type=original.LossType.MSE,
        )
        for i in range(len(timesteps) - 1):
            t = torch.tensor([i] * len(x), device=x.device)
            x = diffusion.ddim_reverse_sample(net, x, t, clip_denoised=False)["sample"]
        for i in range(len(timesteps) - 1, 0, -1):
            t = torch.tensor([i] * len(x), device=x.device)
            x = diffusion.ddim_sample(net, x, t, clip_denoised=False, cond_fn=pull, model_kwargs={})["sample"]
        return x, {}

    return run


def diffusers(folder: Path, case: Case, where: Where, compiled: bool = False) -> Run:
    """Set up diffusers: its U-Net, as it is or compiled, its DDIM scheduler and the inverse one."""
    from diffusers import DDIMInverseScheduler, DDIMScheduler, UNet2DModel

    build: Any = UNet2DModel.from_pretrained
    net, told = build(folder / "diffusers", low_cpu_mem_usage=False).eval().to(where.device), {}
    if compiled:
        net, told["compiling"] = compiled_for(net, shape_of(folder, case), where)
    if not case.stride:
        return called(lambda x, t: net(x, t).sample, told)
    pull = original_pull(folder, where)
    options = {"num_train_timesteps": TRAINED, "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
    kinds: list[Any] = [DDIMInverseScheduler, DDIMScheduler]
    up, down = (kind(**options) for kind in kinds)
    for scheduler in (up, down):
        scheduler.set_timesteps(TRAINED // case.stride)

    @torch.no_grad()
    def run(x: Tensor, timesteps: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        channels = x.shape[1]
        for here, there in pairwise(timesteps):  # its inverse step is called by where it leads
            x = up.step(net(x, at(here, x)).sample[:, :channels], there, x).prev_sample
        for here in reversed(timesteps[1:]):
            noise, t = (1 - down.alphas_cumprod[here]).sqrt(), at(here, x)
            eps = net(x, t).sample[:, :channels] - noise * pull(x, t)
            x = down.step(eps, here, x).prev_sample
        return x, told

    return run


@torch.no_grad()
def compiled_for(net: nn.Module, shape: Sequence[int], where: Where) -> tuple[Network, float]:
    """Return a network compiled for images [N, C, H, W] in channels_last, and the seconds of its first three calls.

    The first compiles; the others warm its CUDA graph up and record it, where there is one.
    """
    mode = "reduce-overhead" if where.kind == "cuda" else "default"
    move: Any = net.to  # the declared types leave out memory_format
    compiled: Any = torch.compile(move(memory_format=torch.channels_last), mode=mode, fullgraph=True)

    def call(x: Tensor, t: Tensor) -> Any:
        return compiled(x.to(memory_format=torch.channels_last), t)

    x, began = torch.randn(*shape, device=where.device), time.perf_counter()
    for _ in range(3):
        call(x, at(0, x))
    where.settle()
    return call, time.perf_counter() - began


def at(timestep: int, x: Tensor) -> Tensor:
    """Return a timestep for each of the images x, [N]."""
    return torch.full((len(x),), timestep, device=x.device)


def monai(folder: Path, case: Case, where: Where) -> Run:
    """Set up MONAI: its U-Net with the weights of diffusers' file, its DDIM scheduler."""
    from monai.networks.nets import DiffusionModelUNet
    from monai.networks.schedulers import DDIMScheduler
    from safetensors.torch import load_file

    config = json.loads((folder / "diffusers" / "config.json").read_text())
    widths = config["block_out_channels"]
    net = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        num_res_blocks=config["layers_per_block"],
        channels=widths,
        attention_levels=[name.startswith("Attn") for name in config["down_block_types"]],
        norm_num_groups=config["norm_num_groups"],
        norm_eps=config["norm_eps"],
        num_head_channels=[config["attention_head_dim"] or width for width in widths],
        use_flash_attention=True,  # not its default, but faster
    )
    weights = load_file(folder / "diffusers" / "diffusion_pytorch_model.safetensors")
    net.load_state_dict({name_in_monai(name): tensor for name, tensor in weights.items()})
    net.eval().to(where.device)
    if not case.stride:
        return called(net)
    pull, scheduler = original_pull(folder, where), DDIMScheduler(TRAINED, clip_sample=False)
    scheduler.set_timesteps(TRAINED // case.stride)

    @torch.no_grad()
    def run(x: Tensor, timesteps: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        channels = x.shape[1]
        for here in timesteps[:-1]:
            x, _ = scheduler.reversed_step(net(x, at(here, x))[:, :channels], here, x)
        for here in reversed(timesteps[1:]):
            noise, t = (1 - scheduler.alphas_cumprod[here]).sqrt(), at(here, x)
            eps = net(x, t)[:, :channels] - noise * pull(x, t)
            x, _ = scheduler.step(eps, here, x)
        return x, {}

    return run


MONAI = {  # what diffusers' names are there; whole parts of a name, between dots
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2.conv",
    "conv_in": "conv_in.conv",
    "conv1": "conv1.conv",
    "conv2": "conv2.conv",
    "conv_shortcut": "skip_connection.conv",
    "downsamplers.0.conv": "downsampler.op.conv",
    "upsamplers.0.conv": "upsampler.postconv.conv",
    "mid_block.resnets.0": "middle_block.resnet_1",
    "mid_block.resnets.1": "middle_block.resnet_2",
    "mid_block.attentions.0": "middle_block.attention",
    "group_norm": "norm",
    "to_q": "attn.to_q",
    "to_k": "attn.to_k",
    "to_v": "attn.to_v",
    "to_out.0": "attn.out_proj",
}


def name_in_monai(name: str) -> str:
    """Return MONAI's name for a tensor, by diffusers'."""
    dotted = f".{name}."
    for theirs, ours in MONAI.items():
        dotted = dotted.replace(f".{theirs}.", f".{ours}.")
    return dotted.strip(".")


def loaded_as_original(build: Callable[..., nn.Module], folder: Path, name: str, where: Where) -> nn.Module:
    """Build one of guided-diffusion's networks by its stored options and weights."""
    net = build(**json.loads((folder / f"{name}.json").read_text()))
    net.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
    return net.eval().to(where.device)


def original_pull(folder: Path, where: Where) -> Pull:
    """Return the guidance as guided-diffusion's sample scripts compute it, by its own encoder."""
    from guided_diffusion.unet import EncoderUNetModel

    guide = loaded_as_original(EncoderUNetModel, folder, "guide", where)
    scale = json.loads((folder / "scale.json").read_text())

    def pull(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            return torch.autograd.grad(score(guide, x_in, t).sum(), x_in)[0] * scale

    return pull


def called(net: Network, told: Mapping[str, float] = MappingProxyType({})) -> Run:
    """Return a run that asks a network once, at the first of the timesteps."""

    @torch.no_grad()
    def run(x: Tensor, timesteps: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        return net(x, at(timesteps[0], x)), dict(told)

    return run


ORIGINAL = {"guided_diffusion": "guided-diffusion-sdk", "blobfile": "blobfile"}  # which all peers take their guide from
PROGRAMS = [
    Program("knife", knife, {}),
    Program("knife-standard", knife_standard, {}),
    Program("guided-diffusion", guided_diffusion, ORIGINAL),
    Program("diffusers", diffusers, {**ORIGINAL, "diffusers": "diffusers"}),
    Program("diffusers-compile", partial(diffusers, compiled=True), {**ORIGINAL, "diffusers": "diffusers"}, ("cuda",)),
    Program("monai", monai, {**ORIGINAL, "monai": "monai", "einops": "einops"}),
]

if __name__ == "__main__":
    main()
