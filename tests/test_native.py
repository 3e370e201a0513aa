"""The library of kernels: how it is found, built and loaded, and that plain torch serves where it cannot be had.

benchmarks/builds.py goes on longer, with the real compiler.
"""

import errno
import functools
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from knife import native, ops
from knife.errors import OpsError, SettingsError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import builds

ROOT = Path(__file__).resolve().parent.parent
forking = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of forks where there are threads


@pytest.fixture(scope="module")
def library() -> Path:
    """Find the library that this session uses, for fake compilers to hand out."""
    status = ops.status()
    if status.library is None:
        pytest.skip(status.reason)
    return status.library


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Start with an empty cache and no choice made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KNIFE_OPS", raising=False)
    monkeypatch.setattr(ops, "_decide", functools.cache(ops._decide.__wrapped__))
    monkeypatch.setattr(native, "_installed_library", lambda device: None)
    return monkeypatch


def fake_compiler(folder: Path, body: str) -> str:
    """Write a compiler that notes its start and then does what body says; $out is what it shall make."""
    script = folder / "fake-c++"
    script.write_text(f"#!/bin/sh\nfor out; do :; done\necho $$ >> {folder}/started\n{body}\n")
    script.chmod(0o755)
    return str(script)


def test_torch_is_chosen(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("KNIFE_OPS", "torch")
    status = ops.status()
    assert (status.path, status.library, status.reason) == ("torch", None, "plain torch, because KNIFE_OPS=torch")


def test_unknown_choice_is_refused(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("KNIFE_OPS", "fast")
    with pytest.raises(SettingsError, match="KNIFE_OPS=fast: give auto, native or torch"):
        ops.status()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (None, "no compiler for cpu found (looked for"),
        ("echo step.h:1: error: no such luck; exit 1", "failed: step.h:1: error: no such luck"),
        ("exit 1", "failed: it said nothing"),
        ("ulimit -f 1; head -c 100000 /dev/zero > $out", "failed: "),
        ("echo rubbish > $out", "cannot be loaded ("),
    ],
    ids=["none", "error", "silent", "full", "rubbish"],
)
def test_without_a_library_plain_torch_serves_and_says_why(
    fresh: pytest.MonkeyPatch, tmp_path: Path, body: str | None, reason: str
) -> None:
    fresh.setenv("CXX", fake_compiler(tmp_path, body) if body else "/nowhere/c++")
    status = ops.status()
    assert (status.path, status.library) == ("torch", None)
    assert status.reason.startswith("plain torch: ")
    assert reason in status.reason
    fresh.setenv("KNIFE_OPS", "native")
    with pytest.raises(OpsError, match="KNIFE_OPS=native, but there is no compiled kernel for cpu: "):
        ops._decide.__wrapped__("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_missing_cuda_says_so(fresh: pytest.MonkeyPatch) -> None:
    assert ops.status("cuda").reason == "plain torch: torch sees no CUDA device"


def test_a_device_without_a_kernel_says_so(fresh: pytest.MonkeyPatch) -> None:
    assert ops.status("mps").reason == "plain torch: there is no kernel for mps, only for cpu and cuda"


def test_slow_compiler_is_stopped_with_all_that_it_has_started(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("CXX", fake_compiler(tmp_path, f"sleep 60 & echo $! >> {tmp_path}/started; wait"))
    fresh.setattr(native, "BUILD_SECONDS", 1)
    assert "was stopped after 1 s" in ops.status().reason
    processes = [Path("/proc", number, "stat") for number in (tmp_path / "started").read_text().split()]
    assert len(processes) == 2
    wait_for(lambda: all(not process.exists() or " Z " in process.read_text() for process in processes))


def test_lock_of_another_process_is_not_waited_for_forever(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(native, "BUILD_SECONDS", 0.2)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(OpsError, match="another process has held"), native._locked(tmp_path / "lock"):
            pass
        process.kill()


def test_cache_that_cannot_be_written_gives_way_to_a_temporary_folder(
    fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    (tmp_path / "tmp").mkdir()
    fresh.setattr(native.tempfile, "tempdir", str(tmp_path / "tmp"))
    folder = native._private_folder("key")
    assert folder.parent == tmp_path / "tmp"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)  # others could put their library there
    with pytest.raises(OpsError, match="no folder to build in"):
        native._private_folder("key")


@forking
def test_processes_at_once_build_once(library: Path, tmp_path: Path) -> None:
    compiler = fake_compiler(tmp_path, f"sleep 1; cp {library} $out")
    counts = builds.together(tmp_path / "cache", 8, compiler)
    assert (counts["with_kernels"], counts["builds"], counts["libraries_too_many"]) == (8, 1, 0)
    assert len((tmp_path / "started").read_text().split()) == 1


@forking
def test_killed_build_leaves_nothing_harmful(library: Path, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good, slow = tmp_path / "good", tmp_path / "slow"
    good.mkdir()
    slow.mkdir()
    process = builds.begun(tmp_path / "cache", fake_compiler(slow, "echo half > $out; sleep 60"))
    wait_for(lambda: any((tmp_path / "cache").rglob("build-*/*.so")))
    assert builds.killed_at(process, with_compilers=True)
    assert not any((tmp_path / "cache").glob("knife/ops/*/*.so"))
    fresh.setenv("CXX", fake_compiler(good, f"cp {library} $out"))
    built, origin = native._cached_library("cpu")
    assert origin.startswith("built on first use")
    assert built.read_bytes() == library.read_bytes()
    assert sorted(path.name for path in built.parent.iterdir()) == [built.name, "lock"]
    assert native._cached_library("cpu") == (built, "built on an earlier use")


@forking
def test_builds_that_are_killed_at_any_moment_are_made_good(library: Path, tmp_path: Path) -> None:
    compiler = builds.copier(tmp_path / "compiler", library)
    counts = builds.killed(tmp_path / "cache", 8, random.Random(0), library, compiler)
    assert counts["kills"] == 8
    assert (counts["half_libraries"], counts["lost"], counts["wrong"]) == (0, 0, 0)
    assert counts["with_kernels"] == counts["kills"] + counts["too_late"]


@forking
def test_bad_caches_end_in_kernels_or_in_plain_torch(library: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    ends = dict(builds.bad_caches(tmp_path / "bad", library))
    assert len(ends) >= 10
    for name, (start, wanted) in ends.items():
        assert start.path == wanted, f"{name}: {start.reason}"
        assert start.reason.startswith("plain torch: " if wanted == "torch" else "compiled kernel, ")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("damage", ["empty", "half", "a bit"])
def test_damaged_library_is_never_loaded_but_built_again(
    library: Path, fresh: pytest.MonkeyPatch, tmp_path: Path, damage: str
) -> None:
    fresh.setenv("CXX", fake_compiler(tmp_path, f"cp {library} $out"))
    built, _ = native._cached_library("cpu")
    whole = built.read_bytes()
    middle = len(whole) // 2
    changed = {"empty": b"", "half": whole[:middle]}.get(damage)
    if changed is None:
        changed = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    built.write_bytes(changed)
    again, origin = native._cached_library("cpu")
    assert origin.startswith("built on first use")
    assert again.read_bytes() == whole


def test_a_library_is_compiled_for_no_more_than_torch_found(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = set()
    for capability, allowed in {
        "DEFAULT": set(),
        "AVX2": {"-mavx2", "-mfma", "-mf16c"},
        "AVX512": {"-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"},
        "something new": set(),
    }.items():
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        machine = {flag for flag in native.flags("cpu") if flag.startswith("-m") and "width" not in flag}
        assert machine == allowed
        digests.add((native.source_digest("cpu"), native.library_name("cpu")))
    assert len(digests) == 3, "and another processor's has another name, in the cache and where knife is installed"


@pytest.mark.parametrize("other", ["torch", "processor"])
def test_library_of_another_torch_or_processor_is_left_alone(
    fresh: pytest.MonkeyPatch, tmp_path: Path, other: str
) -> None:
    fresh.setenv("CXX", fake_compiler(tmp_path, "echo one > $out"))
    first, _ = native._cached_library("cpu")
    if other == "torch":
        fresh.setattr(torch, "__version__", "9.9.9")
    else:
        capability = "AVX2" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "AVX512"
        fresh.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    second, origin = native._cached_library("cpu")
    assert second.parent != first.parent
    assert origin.startswith("built on first use")
    assert first.is_file()


def test_installed_library_of_other_sources_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(native.source_folder(), tmp_path / "csrc")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    installed = tmp_path / f"{native.library_name('cpu')}.cpython-313.so"
    installed.touch()
    assert native._installed_library("cpu") == installed
    with (tmp_path / "csrc" / "step.h").open("a") as header:
        header.write("// changed")
    assert native._installed_library("cpu") is None


def test_missing_sources_say_so(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(native, "__file__", str(tmp_path / "knife" / "native.py"))
    assert ops.status().reason.startswith("plain torch: the sources of the kernels are missing: there is no csrc")


def test_cache_that_can_only_be_read_serves_what_it_holds(
    library: Path, fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh.setattr(native.tempfile, "tempdir", str(tmp_path))
    fresh.setenv("CXX", fake_compiler(tmp_path, f"cp {library} $out"))
    built, _ = native._cached_library("cpu")
    refused = built.parent
    fresh.setattr(os, "access", lambda path, mode: Path(path) != refused)
    assert native._cached_library("cpu") == (built, "built on an earlier use")
    built.write_bytes(b"damaged")
    elsewhere, origin = native._cached_library("cpu")
    assert elsewhere.parent.parent == tmp_path
    assert origin.startswith("built on first use")


def test_full_disk_leaves_plain_torch(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "build-x")

    fresh.setenv("CXX", fake_compiler(tmp_path, "echo one > $out"))
    fresh.setattr(native.tempfile, "TemporaryDirectory", full)
    assert ops.status().reason == "plain torch: [Errno 28] No space left on device: 'build-x'"
    assert not any((tmp_path / "cache").rglob("*.so"))


def test_threads_at_once_decide_once(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("CXX", fake_compiler(tmp_path, "sleep 0.2; exit 1"))
    threads = [threading.Thread(target=ops.status) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len((tmp_path / "started").read_text().split()) == 1


@pytest.mark.slow
def test_wrong_kernel_is_replaced_by_plain_torch(tmp_path: Path) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(native.source_folder(), sources)
    header = sources / "step.h"
    header.write_text(header.read_text().replace("step.next_signal * x0 +", "step.next_signal * x0 -"))
    code = f"""
import pathlib, torch
from knife import native, ops
native.source_folder = lambda: pathlib.Path({str(sources)!r})
x, ones = torch.rand(2, 1, 2, 2, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
assert torch.equal(ops.ddim_step(x, x, None, ones, ones, ones), ops.reference(x, x, None, ones, ones, ones, -1e9, 1e9))
print(ops.status().path, ops.status().reason)
"""
    environment = {**os.environ, "KNIFE_OPS": "auto", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert answer.startswith(
        "torch plain torch: the kernel for cpu fails its self-test: it differs from plain torch by"
    )


@pytest.mark.nvcc
def test_cuda_kernel_compiles(tmp_path: Path) -> None:
    try:
        native.compiler("cuda")
    except OpsError as problem:
        pytest.skip(str(problem))
    native.build("cuda", tmp_path / "knife_cuda.so")
    assert b"aoti_torch_get_current_cuda_stream" in (tmp_path / "knife_cuda.so").read_bytes()


def test_a_library_of_other_files_has_another_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    before = native.source_digest("cpu")
    monkeypatch.setitem(native.SOURCES, "cpu", native.SOURCES["cpu"][:-1])
    assert native.source_digest("cpu") != before
