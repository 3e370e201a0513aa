"""Which device to compute on: chosen once, and said in words; never a silent fall back from what was asked for."""

import ctypes
import functools
import os
import platform
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from knife.errors import DeviceError, MemoryShortError, SettingsError

MALLOC = ("keep", "system")  # KNIFE_MALLOC
M_TRIM_THRESHOLD, M_MMAP_MAX, MOST = -1, -4, 2**31 - 1  # of mallopt in glibc's malloc.h
NO_MEMORY = (  # how torch says that memory ran out where it has no class for it
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
AMPERE = (8, 0)  # the first GPUs that multiply in bfloat16
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"  # how cuBLAS begins with its memory: of a fixed size, it adds in one order


def precision(device: str, wanted: str = "auto") -> torch.autocast:
    """Return the context that networks compute in: bfloat16 autocast, or float32.

    Args:
        device: what torch calls the device.
        wanted: one of `knife.settings.PRECISIONS`, see `computed_in`.
    """
    halved = computed_in(device, wanted) == "bfloat16"
    kind = device.split(":", maxsplit=1)[0]
    return torch.autocast(kind, torch.bfloat16, enabled=halved, cache_enabled=False)  # a call uses each weight but once


def computed_in(device: str, wanted: str = "auto") -> str:
    """Return what networks compute in, float32 or bfloat16; auto: the latter where a device multiplies in it itself."""
    return wanted if wanted != "auto" else "bfloat16" if halves(device) else "float32"


def halves(device: str) -> bool:
    """Tell whether a device multiplies matrices in bfloat16 itself: GPUs since Ampere, CPUs that have AMX."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= AMPERE
    return bool(torch.backends.mkldnn.enabled and has_amx())


@functools.cache
def has_amx() -> bool:
    """Tell whether the CPU multiplies tiles of bfloat16, the system lets it, and torch's oneDNN does so."""
    asked = [getattr(torch.cpu, name, bool) for name in ("_is_amx_tile_supported", "_init_amx")]
    return all(ask() for ask in (*asked, getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)))


def resolve_device(text: str = "auto") -> tuple[str, str]:
    """Return the device that --device means, and why it was chosen, in words.

    Args:
        text: auto (a GPU if there is one), cpu, cuda (the first GPU) or cuda:N.

    Returns:
        What torch calls the device ("cpu", "cuda:0"), and the reason.

    Raises:
        DeviceError: if the device is unknown or not there.
    """
    if text == "cpu":
        return "cpu", "as asked for"
    if not re.fullmatch(r"auto|cuda(:[0-9]{1,3})?", text):
        raise DeviceError(f"--device {text}: unknown; give auto, cpu, cuda or cuda:N.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto" and not count:
        return "cpu", without_gpu()
    index = int(text.partition(":")[2] or 0)
    if index >= count:
        there = f"GPUs here: {count}, counted from cuda:0" if count else without_gpu()
        raise DeviceError(f"--device {text}: not there ({there}); give another one, or --device auto.")
    name = torch.cuda.get_device_name(index)
    return f"cuda:{index}", f"{name}, {'as asked for' if text != 'auto' else 'found by itself'}"


def without_gpu() -> str:
    """Say why there is no GPU."""
    return "torch finds no GPU" if torch.version.cuda else "this torch is built without CUDA"


@functools.cache
def keep_freed_memory() -> str:
    """Let the memory that tensors free serve the next ones, from the first call on; return in words what was done.

    glibc gives the memory of large tensors back to the system as soon as they are freed, and every page of the next one
    must be fetched and cleared anew: a network at work does so for each of its layers. Kept, it is given back at exit,
    and the process holds about a third more of it. KNIFE_MALLOC=system leaves glibc as it is.

    Raises:
        SettingsError: if KNIFE_MALLOC is none of keep, system.
    """
    choice = os.environ.get("KNIFE_MALLOC", "keep")
    if choice not in MALLOC:
        raise SettingsError(f"KNIFE_MALLOC={choice}: give keep or system.")
    if choice == "system":
        return "freed memory goes back to the system, because KNIFE_MALLOC=system"
    if platform.libc_ver()[0] != "glibc":
        return "left to the system, whose C library is not glibc"
    mallopt = ctypes.CDLL(None).mallopt
    if not (mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, MOST)):
        return "left to the system: glibc refused to keep what is freed"
    return "what tensors free is kept for the next ones"


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let torch give the same bits every time, if that is wanted, and leave its settings as they were.

    On a GPU, many a kernel adds in the order in which its threads come. A process that has used CUDA before must have
    begun with CUBLAS_WORKSPACE_CONFIG=:4096:8.

    Raises:
        SettingsError: if a network does what torch can only do in changing order.
    """
    if not wanted:
        yield
        return
    torch_before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn, chosen, cublas = torch.backends.cudnn, torch.backends.cudnn.benchmark, os.environ.get(CUBLAS)
    os.environ.setdefault(CUBLAS, ":4096:8")
    try:
        torch.use_deterministic_algorithms(True)
        cudnn.benchmark = False
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200].rstrip(" .")
        raise SettingsError(
            f"--deterministic: torch cannot compute this network so ({reason}); leave it out."
        ) from error
    finally:
        torch.use_deterministic_algorithms(torch_before[0], warn_only=torch_before[1])
        cudnn.benchmark = chosen
        if cublas is None:
            del os.environ[CUBLAS]


def staged(tensor: Tensor, device: str) -> Tensor:
    """Return a tensor where a device can fetch it from while the host goes on: for a GPU, in pinned memory."""
    return tensor.pin_memory() if device.startswith("cuda") and tensor.is_cpu else tensor


def told(*numbers: Tensor) -> list[float]:
    """Return single numbers that a device has computed, all at once: the host waits until they are."""
    return torch.stack([number.detach().to(numbers[0]) for number in numbers]).tolist()


def without_helpers(thread: Executor) -> None:
    """Let torch compute by itself in the one thread of an executor, and elsewhere as before.

    With helpers of its own there, OpenMP would count more threads than processors, and let all of them sleep after each
    loop of a network instead of waiting awake.
    """
    count = torch.get_num_threads()
    thread.submit(torch.get_num_threads).result()  # asked first, or the thread takes over the others' number later on
    thread.submit(torch.set_num_threads, 1).result()
    torch.set_num_threads(count)  # of threads to come, and of this one


@contextmanager
def memory_share(device: str) -> Iterator[Callable[[], float]]:
    """Yield what tells, once some work on a GPU is done, which share of the memory that was free it took at most.

    On the CPU, whose memory serves other programs too, nothing is measured: there it takes all.
    """
    if not device.startswith("cuda"):
        yield lambda: 1.0
        return
    held = torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held  # with what torch keeps
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: max(torch.cuda.max_memory_allocated(device) - held, 1) / max(free, 1)


@contextmanager
def enough_memory(device: str, what: str, remedy: str) -> Iterator[None]:
    """Turn running out of memory into a refusal that says how to need less.

    Raises:
        MemoryShortError: naming the device, what did not fit and the remedy.
    """
    try:
        yield
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        raise MemoryShortError(f"{device}: {what} not fit into memory; {remedy}.") from error


def ran_out_of_memory(error: Exception) -> bool:
    """Tell whether an error means that memory ran out; not all that says so in torch has a class of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)
