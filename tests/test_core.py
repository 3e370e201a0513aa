"""The kernels of the CPU without torch (core.cpp) under AddressSanitizer and UndefinedBehaviorSanitizer.

benchmarks/sanitize.sh goes on: threads, valgrind, the kernels as torch calls them, and those of a GPU.
"""

import subprocess
from pathlib import Path

import pytest

from knife import native
from knife.errors import OpsError

CORE = Path(__file__).with_name("core.cpp")
FLAGS = ("-std=c++20", "-g1", "-Wall", "-Wextra", "-Werror", "-DKNIFE_WITHOUT_TORCH")
SANITIZED = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
SEEN = {
    "read": "ERROR: AddressSanitizer: ",
    "write": "ERROR: AddressSanitizer: ",
    "sum": "instead of",
}


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the kernels and what compares them; without a compiler that has sanitizers there is nothing to run."""
    folder = tmp_path_factory.mktemp("core")
    try:
        compiler = native.compiler()
    except OpsError as problem:
        pytest.skip(str(problem))
    (folder / "empty.cpp").write_text("int main() {}\n")
    if subprocess.run([*compiler, *SANITIZED, "empty.cpp"], cwd=folder, capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler[0]} has no sanitizers")
    command = [*compiler, *FLAGS, *SANITIZED, f"-I{native.source_folder()}", str(CORE), "-pthread", "-o", "core"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return folder / "core"


def ran(core: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([core, *arguments], capture_output=True, text=True, timeout=120, check=False)


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
