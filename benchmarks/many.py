"""A folder of many images: how long the network waits for files, and whether memory grows with their number.

    python benchmarks/many.py [--count 1000] [--few 100] [--noise-level 100] [--steps 4] [--task regress --target 0.1]

Phantoms of 64 x 64 pixels are written as NIfTI and translated by the command itself (`knife translate FOLDER`), a few
of them and all, each in a process of its own. The network works during the walks: encode, decode and what is read off
them. Its share is of the time from the first walk to the end of the command. Prints a table and, last, one JSON line.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from knife import ops, steering
from knife.cli.translating import translate
from knife.phantom import phantom, write_nifti


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--few", type=int, default=100)
    parser.add_argument("--task", default="regress")
    parser.add_argument("--target", default="0.1")
    parser.add_argument("--noise-level", type=int, default=100)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--strength", type=float, default=0.2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="translate what lies here, and nothing else (each process does)")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print."""
    options = options_of()
    if options.folder:
        print(json.dumps(measured(options)))
        return
    with tempfile.TemporaryDirectory() as name:
        figures = []
        for count in (options.few, options.count):
            folder = Path(name, str(count))
            folder.mkdir()
            for i in range(count):
                write_nifti(folder / f"{i:05d}.nii.gz", phantom(i, seed=5).pixels)
            figures.append(child(folder, options))
    rows = {
        "wall seconds": [one["wall"] for one in figures],
        "seconds an image": [one["wall"] / one["images"] for one in figures],
        "network works, % of the time": [100 * one["share"] for one in figures],
        "peak memory, MiB": [one["peak"] for one in figures],
    }
    print(f"{'':<32}" + "".join(f"{one['images']:>8} images" for one in figures))
    for what, values in rows.items():
        print(f"{what:<32}" + "".join(f"{value:15.4g}" for value in values))
    machine = (
        platform.machine() if options.device == "cpu" or not torch.cuda.is_available() else torch.cuda.get_device_name()
    )
    about = {
        "machine": machine,
        "threads": torch.get_num_threads(),
        "ops": ops.status().path,
        "torch": torch.__version__,
    }
    print(json.dumps({"benchmark": "many", **vars(options), **about, "results": figures}))


def child(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Translate a folder in a process of its own."""
    given = {name: value for name, value in vars(options).items() if name not in ("folder", "count", "few")}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    done = subprocess.run(
        [sys.executable, __file__, f"--folder={folder}", *words], stdout=subprocess.PIPE, check=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Translate a folder by the command; return how long it took, and how long the network worked."""
    walks = list[tuple[float, float]]()
    real = steering.translate_batch

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        done = real(*arguments)
        walks.append((began, time.perf_counter()))
        return done

    steering.translate_batch = timed
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        began = time.perf_counter()
        translate(
            [options.folder],
            [options.task],
            [options.target],
            out=options.folder / "out",
            noise_level=options.noise_level,
            steps=options.steps,
            strength=options.strength,
            batch_size=options.batch_size,
            max_reconstruction=9.0,  # so few steps lose much
            device=options.device,
        )
        ended = time.perf_counter()
    return {
        "images": len(printed.getvalue().splitlines()),
        "wall": ended - began,
        "share": sum(end - begin for begin, end in walks) / (ended - walks[0][0]),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


if __name__ == "__main__":
    main()
