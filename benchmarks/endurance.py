"""Does work survive? Trainings and translations are killed at random moments, signalled, and run on failing disks.

    python benchmarks/endurance.py [--kills 2000] [--signals 50] [--sweep 1] [--images 500] [--image-kills 200]

trainings     killed (SIGKILL) at random moments and begun again until they end: lost are committed states that are not
              there any more, mismatched are trainings whose digest is not that of the uninterrupted one
signals       the command itself gets SIGINT, SIGTERM or SIGKILL: a wrong code is any but 130, 143 and 137, or 0 if it
              was done
calls         the n-th call that touches a file fails (full disk, I/O error, short write, crash), for n = 1, 2, ...
              until a training meets none; then the disk is mended, and the same training must end as the
              uninterrupted one did, or, if it was an image that could not be read, refuse to go on with it
translations  a folder of images, killed and begun again: missing or torn are results that differ from those of the
              uninterrupted translation, done twice are images translated again though their record was there

Every process is forked from this one, which has imported torch, so that most of its life is work on files. Networks are
tiny. Prints a table and, last, one JSON line.
"""

import argparse
import errno
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Picture

from knife import files, resume, spec, tasks, translate
from knife.checkpoint import Card, read_about, save
from knife.errors import DiskError, InputError, ModelError, SettingsError
from knife.job import Run
from knife.phantom import phantom, write_nifti
from knife.resume import digest, path_before, resume_path
from knife.schedule import Schedule
from knife.settings import Settings, Wish
from knife.train import Unwatched, train
from knife.unet import Architecture

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from crashes import Failing

TINY = Architecture(8, (1,), res_blocks=1, groups=4, pool="mean")
FAST = spec.Training(4, 4, 2e-3, 0.9)
PRESET = spec.Preset("tiny", (8, 8), None, TINY, TINY, TINY, {"diffusion": FAST, "task": FAST})
STEPS = 4
CHANNELS = ("t1", "t1ce", "t2", "flair")
FAILURES: tuple[int | str, ...] = (errno.ENOSPC, errno.EIO, "short", "before", "after")
QUICK = Settings(noise_level=10, steps=2, strength=0.2, solver="ddim", control=False, batch_size=4)


def main() -> None:
    """Kill, count, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "kills": 2000,
        "signals": 50,
        "sweep": 1,
        "images": 500,
        "image-kills": 200,
        "seed": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec.PRESETS["tiny"], resume.LOG_EVERY = PRESET, 2
    tasks.registrations = cache(tasks.registrations)  # half of so short a training is looking for plugins
    chance, began = random.Random(options.seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        results = {
            "trainings": kill_trainings(root / "kills", options.kills, chance) if options.kills else {},
            "signals": signal_trainings(root / "signals", options.signals, chance) if options.signals else {},
            "calls": fail_calls(root / "calls", options.sweep) if options.sweep else {},
            "translations": kill_translations(root / "images", options.images, options.image_kills, chance)
            if options.image_kills
            else {},
        }
    for what, counts in results.items():
        print(f"{what:<14}" + "  ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items()))
    about = {"machine": platform.machine(), "torch": torch.__version__, "seconds": round(time.perf_counter() - began)}
    print(json.dumps({"benchmark": "endurance", **vars(options), **about, "results": results}))


# ----------------------------------------------------------------------------------------------------------- processes


@contextmanager
def child(work: Callable[[], object]) -> Iterator[int]:
    """Do a work in a child process that says nothing; it is killed in the end, if it has not ended."""
    number = os.fork()
    if not number:
        code = 1
        try:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (1, 2):
                os.dup2(nowhere, stream)
            work()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        except KeyboardInterrupt:  # as Python itself ends by it
            code = 128 + signal.SIGINT
        finally:
            os._exit(code)
    try:
        yield number
    finally:
        ended(number, 0)


def ended(number: int, seconds: float, how: int = signal.SIGKILL) -> int | None:
    """Wait for a child so long, then send it a signal and wait on; return its exit code, None if that is known."""
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            done, status = os.waitpid(number, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        os.kill(number, how)
        return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    except (ChildProcessError, ProcessLookupError):
        return None


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that a work takes in a child process."""
    began = time.perf_counter()
    with child(work) as number:
        if ended(number, 600) != 0:
            raise RuntimeError("an undisturbed process has failed")
    return time.perf_counter() - began


# ----------------------------------------------------------------------------------------------------------- trainings


def tiny_run(root: Path, models: str, kind: str = "regress") -> Run:
    """Return a short training of a tiny network; its data are written if they are not there."""
    data = root / "data"
    if not data.exists():
        lines = ["image,side,split"]
        (data / "images").mkdir(parents=True)
        for i in range(8):
            pixels = np.full((16, 16), 20, np.uint8)
            pixels[3 : 5 + i, 3 : 5 + i] = 200
            Picture.fromarray(pixels).save(data / f"images/{i}.png")
            lines.append(f"images/{i}.png,{2 + i},{'val' if i == 7 else 'train'}")
        (data / "manifest.csv").write_text("\n".join(lines))
    return Run(kind, data, root / models, "set", "tiny", steps=STEPS, batch=4, lr=2e-3, ema=0.9, every=2)


def committed(run: Run) -> int:
    """Return the step of the newest state on the disk; nothing else may write there."""
    steps = [0]
    for path in (resume_path(run), path_before(run)):
        try:
            steps.append(int(read_about(path)["step"]))
        except ModelError:
            continue
    return max(steps)


def finished(run: Run) -> None:
    """Train to the end."""
    if train(run, Unwatched()) != run.steps:
        raise RuntimeError("stopped before its end")


def kill_trainings(root: Path, kills: int, chance: random.Random) -> dict[str, int]:
    """Kill trainings at random moments and begin them again, until so many were killed."""
    whole = tiny_run(root, "whole")
    finished(whole)  # here, so that no child has to load anything
    seconds = timed(lambda: finished(tiny_run(root, "timed")))
    wanted, counts = digest(whole), {"kills": 0, "ended": 0, "lost": 0, "mismatched": 0, "refused": 0}
    while counts["kills"] < kills:
        run = tiny_run(root, f"run{counts['ended']}")
        code: int | None = None
        most = seconds
        while code != 0:
            before = committed(run)
            with child(lambda run=run: finished(run)) as number:
                code = ended(number, chance.uniform(0, most))
            most *= 1.1  # on a busy machine too, a training ends at last
            counts["kills"] += code == -signal.SIGKILL
            counts["lost"] += committed(run) < before
            if code not in (0, -signal.SIGKILL):
                counts["refused"] += 1
                break
        counts["ended"] += 1
        counts["mismatched"] += code == 0 and digest(run) != wanted
        shutil.rmtree(run.models)
    return counts


def signal_trainings(root: Path, signals: int, chance: random.Random) -> dict[str, int]:
    """Send signals to the command at random moments, and begin it again: it saves, says so by its code, and goes on."""
    whole, (told, tell) = tiny_run(root, "whole"), os.pipe()

    def begun(run: Run) -> None:
        os.write(tell, b"!")
        commanded(run)

    finished(tiny_run(root, "loaded"))  # here, so that no child has to load anything
    seconds = timed(lambda: begun(whole))
    os.read(told, 1)
    wanted, counts = digest(whole), {"signals": 0, "ended": 0, "mismatched": 0, "wrong_code": 0, "still_locked": 0}
    while counts["signals"] < signals:
        run = tiny_run(root, f"run{counts['ended']}")
        code: int | None = None
        while code != 0:
            how, before = chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL]), locks(run)
            with child(lambda run=run: begun(run)) as number:
                os.read(told, 1)  # the command has begun
                code = ended(number, chance.uniform(0, seconds), how)
            sent = code not in (0, None)
            counts["signals"] += sent
            counts["wrong_code"] += sent and code not in (128 + how, -how)  # shells call both so
            counts["still_locked"] += sent and how != signal.SIGKILL and locks(run) > before
        counts["ended"] += 1
        counts["mismatched"] += digest(run) != wanted
    return counts


def locks(run: Run) -> set[Path]:
    """Return the locks that lie there; what is killed leaves its own, which nobody holds any more."""
    return {*run.models.rglob("*.lock")}


def commanded(run: Run) -> None:
    """Train by the command line; what comes too late to be heard is none of the command's."""
    from knife.cli import main as command

    sys.argv = ["knife", "train", run.kind, "--data", str(run.data), "--models", str(run.models), "--dataset=set"]
    sys.argv += ["--preset=tiny", "--every=2", "--device=cpu"]
    try:
        command()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def data_changed(run: Run) -> bool:
    """Tell whether a training refuses to go on because its images are others than before."""
    try:
        finished(run)
    except SettingsError as error:
        return "--accept-dataset-change" in str(error)
    return False


def fail_calls(root: Path, stride: int) -> dict[str, int]:
    """Let the n-th call of a training that touches a file fail, for every stride-th n and every way to fail."""
    whole = tiny_run(root, "whole")
    finished(whole)
    wanted = digest(whole)
    names = ("calls", "ended", "refused", "crashed", "without_an_image", "mismatched", "other")
    counts = dict.fromkeys(names, 0)
    for how in FAILURES:
        for n in range(1, 9999, stride):
            run, failing = tiny_run(root, "run"), Failing(n, how)
            told = root / "reached"
            told.unlink(missing_ok=True)

            def failed(run: Run = run, failing: Failing = failing, told: Path = told) -> None:
                files.os = failing  # type: ignore[assignment]
                try:
                    finished(run)
                except (DiskError, InputError) as error:
                    sys.exit(error.exit_code)
                finally:
                    about_image = Path(str(failing.failed)).parent == run.data / "images"
                    told.write_text(json.dumps({"reached": failing.reached, "image": about_image}))

            with child(failed) as number:
                code = ended(number, 600)
            name = {0: "ended", 2: "refused", 4: "refused", 9: "crashed"}.get(-1 if code is None else code, "other")
            counts["calls"] += 1
            counts[name] += 1
            said = json.loads(told.read_text()) if told.exists() else {"reached": True, "image": False}
            if code == 0 and said["image"] and data_changed(run):  # it was left out, and that is not forgotten
                counts["without_an_image"] += 1
            else:
                timed(lambda run=run: finished(run))
                counts["mismatched"] += digest(run) != wanted
            shutil.rmtree(run.models)
            if not said["reached"]:
                break
    return counts


# -------------------------------------------------------------------------------------------------------- translations


def store_models(folder: Path) -> None:
    """Store a tiny diffusion model and a tiny guide of random weights."""
    config = {"label": "size", "low": 0.0, "high": 0.35, "mean": 0.1, "std": 0.1}
    for kind in ("diffusion", "regress"):
        told = (config, {"gradient": 1e-3}) if kind == "regress" else ({}, {})
        card = Card(kind, "set", spec.ImageSpec(CHANNELS, (16, 16), TINY, TINY), Schedule("linear", 50), *told)
        torch.manual_seed(0)
        net = card.build()
        save(folder / "set" / f"{kind}.safetensors", net.state_dict(), card.to_json())


def results_of(out: Path) -> dict[str, bytes]:
    """Return all results but what depends on the time: name -> bytes."""
    found = {}
    for path in sorted(out.iterdir()) if out.exists() else []:
        data = path.read_bytes()
        if path.suffix == ".json":
            told = json.loads(data)
            told.pop("seconds", None)
            data = json.dumps(told).encode()
        if not path.name.startswith(files.TEMPORARY):
            found[path.name] = data
    return found


def records(out: Path) -> dict[str, int]:
    """Return when each record was written."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.json")} if out.exists() else {}


def kill_translations(root: Path, images: int, kills: int, chance: random.Random) -> dict[str, int]:
    """Kill the translation of a folder again and again, after a few more images each time."""
    (root / "in").mkdir(parents=True)
    store_models(root / "models")
    for i in range(images):
        write_nifti(root / "in" / f"{i:04d}.nii", phantom(i % 20, size=16, seed=i // 20).pixels)

    def translated(out: Path) -> None:
        translate([root / "in"], Wish("regress", "0.3"), out=out, models=root / "models", settings=QUICK)

    translated(root / "whole")
    wanted, out, counts = results_of(root / "whole"), root / "out", {"images": images, "kills": 0}
    twice, code = 0, None
    while code != 0:
        before = records(out)
        more = chance.uniform(0, 2 * images / kills) if counts["kills"] < kills else images
        with child(lambda: translated(out)) as number:
            while (code := ended_now(number)) is None and len(records(out)) - len(before) < more:
                time.sleep(0.002)
            if code is None:
                code = ended(number, chance.uniform(0, 0.03) if counts["kills"] < kills else 600)
        counts["kills"] += code == -signal.SIGKILL
        twice += sum(records(out)[name] != when for name, when in before.items())
        if code not in (0, -signal.SIGKILL):
            break
    found = results_of(out)
    torn = sum(found[name] != data for name, data in wanted.items() if name in found)
    return counts | {"missing": len(wanted.keys() - found.keys()), "torn": torn, "done_twice": twice}


def ended_now(number: int) -> int | None:
    """Return the exit code of a child, None if it has not ended."""
    done, status = os.waitpid(number, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


if __name__ == "__main__":
    main()
