"""The compiled library that holds kernels for the ops (`knife.ops`): found, built, loaded and described.

`serve` says which kernels serve a device, and why: those of the library that was built at installation, else of one
that is compiled now and kept in the user's cache, else plain torch. KNIFE_OPS=auto|native|torch overrides; native turns
a missing library into an OpsError.
"""

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from knife.errors import OpsError, SettingsError

CHOICES = ("auto", "native", "torch")  # KNIFE_OPS
SOURCES = {  # in csrc/, by device
    "cpu": ("step_cpu.cpp", "norm_cpu.cpp", "winograd_cpu.cpp"),
    "cuda": ("step_cuda.cu", "norm_cuda.cu"),
}


@dataclass(frozen=True)
class Status:
    """Which kernels serve a device, and why."""

    device: str
    path: Literal["native", "torch"]
    reason: str
    library: Path | None = None


def serve(device: str, prove: Callable[[str], object]) -> Status:
    """Load the library of a device type, if there is one or one can be built, and say which kernels serve and why.

    Args:
        device: cpu, cuda, or another type, which plain torch serves.
        prove: tests the kernels of a device once they are loaded, and raises OpsError if they are wrong.

    Raises:
        SettingsError: if KNIFE_OPS is none of auto, native, torch.
        OpsError: if KNIFE_OPS=native and there is no compiled kernel for the device.
    """
    choice = os.environ.get("KNIFE_OPS", "auto")
    if choice not in CHOICES:
        raise SettingsError(f"KNIFE_OPS={choice}: give auto, native or torch.")
    if choice == "torch":
        return Status(device, "torch", "plain torch, because KNIFE_OPS=torch")
    try:
        library, origin = find(device)
        load(library)
        prove(device)
    except (OpsError, OSError) as problem:
        if choice == "native":
            raise OpsError(f"KNIFE_OPS=native, but there is no compiled kernel for {device}: {problem}") from problem
        return Status(device, "torch", f"plain torch: {problem}")
    return Status(device, "native", f"compiled kernel, {origin}", library)


def find(device: str) -> tuple[Path, str]:
    """Return the library of a device and where it came from, compiling it into the user's cache if there is none.

    Raises:
        OpsError: if there is none and none can be built.
        OSError: if the cache cannot be written to, as when the disk is full.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise OpsError("torch sees no CUDA device")
    installed = _installed_library(device)
    return (installed, "built at installation") if installed else _cached_library(device)


def load(library: Path) -> None:
    """Load a library, whose kernels then serve the ops.

    Raises:
        OpsError: if it cannot be loaded.
    """
    try:
        torch.ops.load_library(library)
    except OSError as problem:
        reason = problem.__cause__ or problem
        raise OpsError(f"{library} cannot be loaded ({reason}); remove it to have it built again") from problem


# --- Building the library ------------------------------------------------------------------------------------------

BUILD_SECONDS = 300  # longest compile, and longest wait for another process that compiles
# The stable ABI of torch 2.10, so that every later torch can load the library. No fused multiply-add where the code
# does not ask for one: the last bit of a step must be the reference's.
_COMMON_FLAGS = ("-std=c++20", "-O3", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000")
# By what torch itself found this processor to have: the instructions that torch's own kernels then use. Not
# -march=native, which adds others by the processor's name, though a virtual machine may hide any of them.
_VECTOR_FLAGS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ),
}
_FLAGS = {
    "cpu": ("-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    "cuda": (
        *("-Xcompiler", "-fPIC,-fvisibility=hidden", "--fmad=false", "-DUSE_CUDA", "--threads=0"),
        *("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"),
        "-gencode=arch=compute_75,code=compute_75",  # PTX for every other GPU since Turing
    ),
}


def source_folder() -> Path:
    """Return csrc/: inside the installed package, or beside it in a checkout.

    Raises:
        OpsError: if it is in neither place.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "step.h").is_file():
            return folder
    raise OpsError(f"the sources of the kernels are missing: there is no csrc folder in {package} or beside it")


def flags(device: str) -> tuple[str, ...]:
    """Return what a compiler is told besides folders: for the cpu, to use the vectors of this very processor."""
    vectors = _VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ()) if device == "cpu" else ()
    return (*_COMMON_FLAGS, *_FLAGS[device], *vectors)


def sources(device: str) -> list[Path]:
    """Return the files that are compiled into the library of a device.

    Raises:
        OpsError: if they are missing.
    """
    return [source_folder() / name for name in SOURCES[device]]


def source_digest(device: str) -> str:
    """Return a fingerprint of the kernels' sources and flags: a library that was built from others is not used.

    Flags are as the processor is, so machines of several kinds may share a cache.
    """
    digest = hashlib.sha256(repr((SOURCES.get(device), flags(device))).encode())
    for path in sorted(source_folder().iterdir()):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def library_name(device: str) -> str:
    """Return the name of the extension module that setup.py builds: of other sources, of another name."""
    return f"_ops_{device}_{source_digest(device)}"


def compiler(device: str = "cpu") -> list[str]:
    """Return the command that compiles for a device: CXX or c++, g++, clang++; for cuda nvcc of CUDA_HOME or PATH.

    Raises:
        OpsError: if there is no kernel for the device, or no compiler.
    """
    if device not in SOURCES:
        raise OpsError(f"there is no kernel for {device}, only for {' and '.join(SOURCES)}")
    if device == "cuda":
        home = os.environ.get("CUDA_HOME")
        names = [str(Path(home, "bin", "nvcc")) if home else "nvcc"]
    else:
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for words in map(shlex.split, names):
        if words and shutil.which(words[0]):
            return words
    raise OpsError(f"no compiler for {device} found (looked for {', '.join(names)})")


def build(device: str, library: Path) -> None:
    """Compile the kernel of a device into a library, which appears whole or not at all.

    Raises:
        OpsError: if there is no compiler, or it fails or takes too long.
    """
    home = Path(torch.__file__).parent
    command = [*compiler(device), *flags(device), "-isystem", str(home / "include")]
    command += [*map(str, sources(device)), f"-L{home / 'lib'}", "-ltorch_cpu"]
    if device == "cuda" and (home / "lib" / "libtorch_cuda.so").exists():  # not in torch for the CPU: compiled, not run
        command.append("-ltorch_cuda")
    with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent) as scratch:
        product = Path(scratch, library.name)
        _run([*command, "-o", str(product)], Path(scratch))
        product.replace(library)


def _run(command: list[str], scratch: Path) -> None:
    log = scratch / "log"
    with (
        log.open("w") as output,  # no pipe: a child that outlives the compiler would hold it open
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch), "LC_ALL": "C"},
            start_new_session=True,
        ) as running,
    ):
        try:
            code = running.wait(BUILD_SECONDS)
        except BaseException as problem:
            os.killpg(running.pid, signal.SIGKILL)  # the compiler with the programs that it has started
            if isinstance(problem, subprocess.TimeoutExpired):
                raise OpsError(f"{command[0]} was stopped after {BUILD_SECONDS} s") from problem
            raise
    if code:
        raise OpsError(f"{command[0]} failed: {_first_error(log.read_text(errors='replace'))}")


def _first_error(log: str) -> str:
    lines = log.strip().splitlines() or ["it said nothing"]
    return next((line for line in lines if "error" in line.lower()), lines[-1]).strip()


def _installed_library(device: str) -> Path | None:
    if device not in SOURCES:
        return None
    return next(Path(__file__).parent.glob(f"{library_name(device)}*.so"), None)


def _cached_library(device: str) -> tuple[Path, str]:
    """Return the library of a device and where it came from, compiling it into the cache if there is none."""
    compiler(device)
    facts = (source_digest(device), torch.__version__, torch.version.cuda, sys.platform, platform.machine())
    folder = _private_folder(hashlib.sha256(repr(facts).encode()).hexdigest()[:16])
    if library := _whole_library(folder):
        return library, "built on an earlier use"
    with _locked(folder / "lock"):
        if library := _whole_library(folder):
            return library, "built by another process"
        for left_behind in folder.glob("build-*"):  # by a build that was killed
            shutil.rmtree(left_behind, ignore_errors=True)
        start = time.monotonic()
        build(device, folder / "new.so")
        library = (folder / "new.so").rename(folder / _name_of(folder / "new.so"))
        return library, f"built on first use in {time.monotonic() - start:.0f} s"


def _name_of(library: Path) -> str:
    """Return the name of a library in the cache, which tells its hash: half a library would end the process."""
    return f"knife_{hashlib.sha256(library.read_bytes()).hexdigest()}.so"


def _whole_library(folder: Path) -> Path | None:
    """Return the library in a folder of the cache; None if there is none, or a bit of it has changed."""
    return next((library for library in folder.glob("knife_*.so") if library.name == _name_of(library)), None)


def _private_folder(key: str) -> Path:
    """Return a folder for a library that nobody else can write to: in the user's cache, else among temporary files."""
    if sys.platform == "win32":
        raise OpsError("kernels are compiled on first use on Linux and macOS only")
    for folder in _folders(key):
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            info = folder.lstat()
            private = info.st_uid == os.getuid() and not info.st_mode & 0o022
            if private and (os.access(folder, os.W_OK) or _whole_library(folder)):
                return folder
    tried = " and ".join(map(str, _folders(key)))
    raise OpsError(f"no folder to build in: {tried} cannot be written, or belong to another user")


def _folders(key: str) -> Iterator[Path]:
    with contextlib.suppress(RuntimeError):  # no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "knife", "ops", key)
    yield Path(tempfile.gettempdir(), f"knife-ops-{os.getuid()}-{key}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel frees when its holder dies; wait for it no longer than a compile may take."""
    import fcntl  # not on Windows

    deadline = time.monotonic() + BUILD_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError) as problem:
                if time.monotonic() > deadline:
                    raise OpsError(f"another process has held {path} for {BUILD_SECONDS} s; end it first") from problem
                time.sleep(0.1)
        yield
