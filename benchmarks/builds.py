"""Can a build be spoilt? Kernels are compiled by processes at once, by ones that are killed, and into bad caches.

    python benchmarks/builds.py [--kills 20] [--quick-kills 200] [--together 8] [--seed 0]

together     processes ask for kernels at once: one builds, all get the same library
killed       processes are killed (SIGKILL) at a random moment of a build by the real compiler, half of them together
             with the compiler; after each, the next start (its compiler copies a library) must have working kernels,
             or plain torch with the reason, within LIMIT seconds, and no library that is not whole may lie there
quick kills  the same with a compiler that copies a library, so that most moments lie in knife's own part of the work
bad caches   a lock left behind, one that can only be read, a full disk (a tmpfs, where this process may mount one, and
             a limit of file sizes), libraries that are half, empty or a bit off, one of another torch, one of another
             processor, a compiler that fails, hangs or makes rubbish: each must end as the table says

Every start is forked from this process, which has imported torch, and loads and tests what it gets. Prints a table and,
last, one JSON line; the exit code is 1 if anything ended otherwise.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from knife import native, ops

LIMIT = 120  # seconds within which a start must have its answer
NOTHING: Callable[[], object] = lambda: None  # noqa: E731


@dataclass(frozen=True)
class Start:
    """What a start got: native or torch, and why; `lost` if it had no answer in time."""

    path: str
    reason: str
    library: str = ""


LOST = Start("lost", f"no answer in {LIMIT} s")


def main() -> int:
    """Run all of it and print."""
    options = options_of()
    chance, rows = random.Random(options.seed), dict[str, dict[str, int]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        good, seconds = built(folder / "good")
        rows["together"] = together(folder / "together", options.together)
        rows["killed"] = killed(folder / "killed", options.kills, chance, good)
        compiler = copier(folder / "quick", good)
        rows["quick kills"] = killed(folder / "quick-killed", options.quick_kills, chance, good, compiler)
        ends = dict(bad_caches(folder / "bad", good))
    for row, counts in rows.items():
        print(f"{row:12}" + "".join(f"  {count} {what.replace('_', ' ')}" for what, count in counts.items()))
    for row, (start, wanted) in ends.items():
        print(
            f"{row:24} {start.path:7} {'' if start.path == wanted else 'BUT SHOULD BE ' + wanted} {start.reason[:150]}"
        )
    wrong = sum(sum(counts[what] for what in counts if what in WRONG) for counts in rows.values())
    wrong += sum(start.path != wanted for start, wanted in ends.values())
    about = {"seed": options.seed, "build_s": round(seconds), "torch": torch.__version__, "machine": platform.machine()}
    print(json.dumps({"benchmark": "builds", **about, **rows, "bad_caches": len(ends), "wrong": wrong}))
    return 1 if wrong else 0


WRONG = ("half_libraries", "lost", "wrong", "libraries_too_many", "builds_too_many")


def options_of() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="during builds by the real compiler")
    parser.add_argument("--quick-kills", type=int, default=200, help="during builds that only copy a library")
    parser.add_argument("--together", type=int, default=8, help="processes at once")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def built(cache: Path) -> tuple[Path, float]:
    """Build a good library, and tell how many seconds that takes."""
    began = time.monotonic()
    start = ended(begun(cache), limit=native.BUILD_SECONDS)
    if start.path != "native":
        sys.exit(f"no kernels can be built here: {start.reason}")
    return Path(start.library), time.monotonic() - began


# -------------------------------------------------------------------------------------------------------------- starts


def begun(cache: Path, compiler: str = "", before: Callable[[], object] = NOTHING) -> tuple[int, int]:
    """Fork a process that asks for kernels as knife does at its first step; return its id and where it answers."""
    sys.stdout.flush()
    out, into = os.pipe()
    if child := os.fork():
        os.close(into)
        return child, out
    try:
        os.setsid()
        os.close(out)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # torch warns if this process had kernels before
        os.environ |= {"XDG_CACHE_HOME": str(cache), "KNIFE_OPS": "auto"} | ({"CXX": compiler} if compiler else {})
        native._installed_library = lambda device: None  # type: ignore[attr-defined]
        native.tempfile.tempdir = str(cache.parent / "tmp")  # type: ignore[attr-defined]
        before()
        status = ops._decide.__wrapped__("cpu")
        os.write(into, json.dumps([status.path, status.reason, str(status.library or "")]).encode())
    except BaseException as problem:
        os.write(into, json.dumps(["error", repr(problem)]).encode())
    os._exit(0)


def ended(process: tuple[int, int], limit: float = LIMIT) -> Start:
    """Wait for the answer of a process; end one that has none in time."""
    child, out = process
    deadline = time.monotonic() + limit
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(out)
            return LOST
        time.sleep(0.01)
    with open(out, "rb") as answer:
        said = answer.read()
    return Start(*json.loads(said)) if said else Start("error", "the process ended without a word")


def copier(folder: Path, library: Path, body: str = "") -> str:
    """Write a compiler that notes its starts and does what the body says, or copies a library in two halves."""
    folder.mkdir(parents=True, exist_ok=True)
    script, half = folder / "quick-c++", library.stat().st_size // 2
    body = body or f"head -c {half} {library} > $out; sleep 0.05; tail -c +{half + 1} {library} >> $out"
    script.write_text(f"#!/bin/sh\nfor out; do :; done\necho $$ >> {folder}/started\n{body}\n")
    script.chmod(0o755)
    return str(script)


# ------------------------------------------------------------------------------------------------------------ at once


def together(cache: Path, count: int, compiler: str = "") -> dict[str, int]:
    """Start processes at once on an empty cache, with the real compiler unless another is given."""
    starts = [ended(one, native.BUILD_SECONDS + LIMIT) for one in [begun(cache, compiler) for _ in range(count)]]
    built = sum("built on first use" in start.reason for start in starts)
    return {
        "processes": count,
        "with_kernels": sum(start.path == "native" for start in starts),
        "builds": built,
        "builds_too_many": built - 1,
        "libraries_too_many": len({start.library for start in starts}) - 1,
    }


# -------------------------------------------------------------------------------------------------------------- killed


def killed(cache: Path, kills: int, chance: random.Random, good: Path, compiler: str = "") -> dict[str, int]:
    """Kill builds at random moments; every other time the compiler goes on without the process that started it."""
    counts = dict.fromkeys(
        ("kills", "too_late", "half_libraries", "lost", "with_kernels", "in_plain_torch", "wrong"), 0
    )
    quick = copier(cache.parent / f"{cache.name}-compiler", good)
    began = time.monotonic()
    ended(begun(cache, compiler), native.BUILD_SECONDS)
    seconds = time.monotonic() - began
    while counts["kills"] < kills:
        shutil.rmtree(cache, ignore_errors=True)
        process = begun(cache, compiler)
        time.sleep(chance.uniform(0, seconds))
        groups = killed_at(process, with_compilers=chance.random() < 0.5)
        counts["too_late" if groups is None else "kills"] += 1
        counts["half_libraries"] += sum(native._name_of(one) != one.name for one in cache.rglob("knife_*.so"))
        start = ended(begun(cache, quick))
        end_groups(groups or [])
        counts["lost"] += start is LOST
        counts["with_kernels"] += start.path == "native"
        counts["in_plain_torch"] += start.path == "torch"
        counts["wrong"] += start.path == "error"
    return counts


def killed_at(process: tuple[int, int], with_compilers: bool) -> list[int] | None:
    """Kill a process, and the compilers it has started or not; return those, or None if it had ended before."""
    child, out = process
    os.close(out)
    if os.waitpid(child, os.WNOHANG)[0]:
        return None
    groups = compilers(child)
    if with_compilers:
        end_groups(groups)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return groups


def end_groups(groups: list[int]) -> None:
    """End processes with those that they have started."""
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def compilers(process: int) -> list[int]:
    """Return the processes that a process has started, each the first of a group of its own."""
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


# ---------------------------------------------------------------------------------------------------------- bad caches


def bad_caches(folder: Path, good: Path) -> Iterator[tuple[str, tuple[Start, str]]]:
    """Yield the name of something bad, what a start then got, and what it should get."""
    quick = copier(folder / "quick", good)
    (folder / "tmp").mkdir()

    def begin(name: str, compiler: str = quick, before: Callable[[], object] = NOTHING) -> Start:
        return ended(begun(folder / name, compiler, before))

    for name, damage in DAMAGES.items():
        cache = folder / name.replace(" ", "-")
        library = Path(begin(cache.name).library)
        damage(library)
        yield name, (begin(cache.name), "native")
    for name, before in OTHERS.items():
        begin("others")
        start = begin("others", before=before)
        yield name, (start if "built on first use" in start.reason else Start("used", start.reason), "native")
    for name, body in BAD_COMPILERS.items():
        compiler = copier(folder / f"compiler-{len(name)}", good, body)
        yield name, (begin(f"cache-{len(name)}", compiler, lambda: setattr(native, "BUILD_SECONDS", 2)), "torch")
    yield "no compiler", (begin("none", "/nowhere/c++"), "torch")
    yield "files of 100 kB at most", (begin("limit", quick, lambda: limit_files(100_000)), "torch")
    yield from mounted(folder, begin)


def change(library: Path, change_of: Callable[[bytes], bytes]) -> None:
    """Change the bytes of a library in place."""
    library.write_bytes(change_of(library.read_bytes()))


def leave_lock(library: Path) -> None:
    """Leave a lock file that nobody holds, and what a killed build leaves."""
    library.unlink()
    (library.parent / "lock").write_text("12345 another-host\n")
    (library.parent / "build-left").mkdir()
    (library.parent / "build-left" / "new.so").write_text("half")
    (library.parent / "new.so").write_text("half")


def flip(data: bytes) -> bytes:
    """Change one bit in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def other_processor() -> None:
    """Let torch tell of another processor's vectors; what it built before must not be used."""
    capability = torch.backends.cpu.get_cpu_capability()
    torch.backends.cpu.get_cpu_capability = lambda: "AVX2" if capability != "AVX2" else "DEFAULT"


def limit_files(size: int) -> None:
    """Let no process that is started from here write a larger file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a lock left behind": leave_lock,
    "an empty library": lambda library: change(library, lambda data: b""),
    "half a library": lambda library: change(library, lambda data: data[: len(data) // 2]),
    "a bit flipped": lambda library: change(library, flip),
}
OTHERS: dict[str, Callable[[], object]] = {
    "built for another torch": lambda: setattr(torch, "__version__", "9.9.9"),
    "built for another CPU": other_processor,
}
BAD_COMPILERS = {
    "a compiler that fails": "echo step.h:1: error: no such luck; exit 1",
    "one that hangs": "sleep 1000",
    "one that makes rubbish": "echo rubbish > $out",
}


def mounted(folder: Path, begin: Callable[..., Start]) -> Iterator[tuple[str, tuple[Start, str]]]:
    """Yield what happens on a full disk and on one that can only be read, if this process may mount them."""
    for name, options, first, wanted in (
        ("a full disk", "size=64k", False, "torch"),
        ("read-only, empty", "ro", False, "native"),  # there are temporary files
        ("read-only, with library", "size=64m", True, "native"),
    ):
        place = folder / f"disk{len(name)}"
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            print(f"{name}: this process may mount nothing, skipped")
            continue
        try:
            if first:
                begin(place.name)
                subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
            yield name, (begin(place.name), wanted)
        finally:
            subprocess.run(["umount", str(place)], check=True)


if __name__ == "__main__":
    sys.exit(main())
