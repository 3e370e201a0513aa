"""The device asked for is taken or refused, never silently another one; memory that is freed stays at hand."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from knife import devices
from knife.devices import enough_memory, keep_freed_memory, resolve_device
from knife.errors import DeviceError, SettingsError


def test_the_cpu_is_taken_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device, why = resolve_device("auto")
    assert device == "cpu"
    assert why in ("torch finds no GPU", "this torch is built without CUDA")
    assert resolve_device("cpu")[0] == "cpu"


@pytest.mark.parametrize("text", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=f"--device {text}: not there"):
        resolve_device(text)


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", "cpu:0", "auto:1", "cuda:0 "])
def test_a_device_of_another_name_is_refused(text: str) -> None:
    with pytest.raises(DeviceError, match="give auto, cpu, cuda or cuda:N"):
        resolve_device(text)


def test_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    assert resolve_device("auto") == ("cuda:0", "Card 0, found by itself")
    assert resolve_device("cuda") == ("cuda:0", "Card 0, as asked for")
    assert resolve_device("cuda:1") == ("cuda:1", "Card 1, as asked for")
    with pytest.raises(DeviceError, match="--device cuda:2: not there"):
        resolve_device("cuda:2")


def test_networks_compute_in_bfloat16_where_the_device_multiplies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"cuda:0": (7, 5), "cuda:1": (8, 0), "cuda:2": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", found.__getitem__)
    assert [devices.halves(device) for device in found] == [False, True, True]
    for there in (False, True):
        monkeypatch.setattr(devices, "has_amx", lambda there=there: there)
        assert devices.halves("cpu") == there
    monkeypatch.setattr(torch.backends, "mkldnn", SimpleNamespace(enabled=False))  # whose kernels these are
    assert not devices.halves("cpu")


@pytest.mark.parametrize("halves", [False, True])
def test_networks_compute_in_the_precision_asked_for(monkeypatch: pytest.MonkeyPatch, halves: bool) -> None:
    monkeypatch.setattr(devices, "halves", lambda device: halves)
    a, layer = torch.ones(2, 2), torch.nn.Linear(2, 2)
    by_itself = "bfloat16" if halves else "float32"
    for wanted, got in (("auto", by_itself), ("float32", "float32"), ("bfloat16", "bfloat16")):
        assert devices.computed_in("cpu", wanted) == got
        with devices.precision("cpu", wanted):
            assert str(layer(a).dtype) == f"torch.{got}"


def test_the_share_of_a_gpus_memory_that_work_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"memory_allocated": 100, "memory_reserved": 300, "max_memory_allocated": 100}
    for name in tuple(told):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: told[name])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600, 1000))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: told.update(max_memory_allocated=100))
    with devices.memory_share("cuda:0") as share:
        told["max_memory_allocated"] = 300
        assert share() == 0.25, "200 more, of 600 free and 200 that torch keeps"
    with devices.memory_share("cuda:0") as share:
        assert 0 < share() < 0.01, "what took nothing may be taken any number of times, but not infinitely many"
    with devices.memory_share("cpu") as share:
        assert share() == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_too_little_memory_is_said_with_a_remedy(error: Exception) -> None:
    with (
        pytest.raises(DeviceError, match=r"cuda:0: two images do not fit into memory; give one\."),
        enough_memory("cuda:0", "two images do", "give one"),
    ):
        raise error


def test_other_errors_are_not_taken_for_memory() -> None:
    with pytest.raises(RuntimeError, match="a bug"), enough_memory("cpu", "it does", "give less"):
        raise RuntimeError("a bug")


# ------------------------------------------------------------------------------------------------------- freed memory

FAULTS = """
import resource, sys, torch
from knife.devices import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
large = lambda: torch.ones(2**24)  # 64 MiB
for _ in range(16):  # until the heap has found its shape
    large()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    large()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*words: str, **environment: str) -> int:
    """Count the page faults of making and freeing the same large tensor four times, in a process of its own."""
    command = [sys.executable, "-c", FAULTS, *words]
    answer = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return int(answer.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_freed_memory_serves_the_next_tensor() -> None:
    assert page_faults("keep", KNIFE_MALLOC="keep") < 100
    assert page_faults("keep", KNIFE_MALLOC="system") > 100


@pytest.mark.parametrize(
    ("choice", "library", "words"),
    [
        ("system", "glibc", "freed memory goes back to the system, because KNIFE_MALLOC=system"),
        ("keep", "", "left to the system, whose C library is not glibc"),
    ],
)
def test_what_is_done_about_freed_memory_is_said(
    monkeypatch: pytest.MonkeyPatch, choice: str, library: str, words: str
) -> None:
    monkeypatch.setenv("KNIFE_MALLOC", choice)
    monkeypatch.setattr(devices.platform, "libc_ver", lambda: (library, ""))
    assert keep_freed_memory.__wrapped__() == words


def test_an_unknown_choice_about_freed_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNIFE_MALLOC", "jemalloc")
    with pytest.raises(SettingsError, match="KNIFE_MALLOC=jemalloc: give keep or system"):
        keep_freed_memory.__wrapped__()
