"""The kernels of the CPU (core.cpp) and those of CUDA on a CPU (cuda_core.cpp), without torch, under sanitizers.

benchmarks/sanitize.sh goes on: valgrind, the kernels as torch calls them, and those of a GPU on one.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from knife import native
from knife.errors import OpsError

HERE = Path(__file__).parent
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
FLAGS = ("-std=c++20", "-g1", *WARNINGS, "-DKNIFE_WITHOUT_TORCH", "-pthread")
SANITIZED = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
FEW_THREADS = ("-DKNIFE_NORM_THREADS=24", "-DKNIFE_STEP_THREADS=24")  # of a block of a CUDA kernel
SEEN = {
    "read": "ERROR: AddressSanitizer: ",
    "write": "ERROR: AddressSanitizer: ",
    "sum": "instead of",
}


def compiled(folder: Path, source: str, *flags: str) -> Path:
    """Compile kernels and what compares them; without a compiler that has the sanitizers there is nothing to run."""
    try:
        compiler = native.compiler()
    except OpsError as problem:
        pytest.skip(str(problem))

    def compile_with(more: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*compiler, *flags, *more], cwd=folder, capture_output=True, text=True, check=False)

    (folder / "empty.cpp").write_text("int main() {}\n")
    if compile_with(["empty.cpp"]).returncode:
        pytest.skip(f"{compiler[0]} has no sanitizers")
    done = compile_with([*FLAGS, f"-I{native.source_folder()}", HERE / source, "-o", "core"])
    assert not done.returncode, done.stderr
    return folder / "core"


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("core"), "core.cpp", *SANITIZED)


@pytest.fixture(scope="module")
def cuda_core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("cuda_core"), "cuda_core.cpp", *SANITIZED, *FEW_THREADS)


@pytest.fixture(scope="module")
def racing_cuda_core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("race"), "cuda_core.cpp", "-O1", "-fsanitize=thread", *FEW_THREADS)


def ran(core: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([core, *arguments], capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_no_kernel_leaves_its_buffers_or_errs(core: Path) -> None:
    done = ran(core)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("all right\n")


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["steps", "norms", "convolutions"])
@pytest.mark.parametrize("wrong", SEEN)
def test_what_is_wrong_is_seen(core: Path, kernels: str, wrong: str) -> None:
    done = ran(core, kernels, wrong)
    assert done.returncode
    assert SEEN[wrong] in done.stderr


@pytest.mark.slow
def test_undefined_behaviour_is_seen(core: Path) -> None:
    done = ran(core, "all", "overflow")
    assert done.returncode
    assert "runtime error: signed integer overflow" in done.stderr


@pytest.mark.slow
def test_no_cuda_kernel_leaves_its_buffers_or_errs(cuda_core: Path) -> None:
    done = ran(cuda_core)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("all right\n")


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["steps", "norms"])
@pytest.mark.parametrize("wrong", SEEN)
def test_what_is_wrong_in_a_cuda_kernel_is_seen(cuda_core: Path, kernels: str, wrong: str) -> None:
    done = ran(cuda_core, kernels, wrong)
    assert done.returncode
    assert SEEN[wrong] in done.stderr


@pytest.mark.slow
def test_too_little_room_between_two_launches_is_seen(cuda_core: Path) -> None:
    done = ran(cuda_core, "norms", "room")
    assert done.returncode
    assert "ERROR: AddressSanitizer: " in done.stderr


@pytest.mark.slow
def test_threads_of_a_cuda_kernel_wait_for_each_other(racing_cuda_core: Path) -> None:
    done = ran(racing_cuda_core, "all", "few")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["steps", "norms"])
def test_barriers_that_are_left_out_are_seen(racing_cuda_core: Path, kernels: str) -> None:
    done = ran(racing_cuda_core, kernels, "barrier")
    assert done.returncode
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
