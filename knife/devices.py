"""Which device to compute on, and why."""

import torch

from knife.errors import DeviceError


def resolve_device(text: str) -> tuple[str, str]:
    """Return the device for auto, cpu, cuda or cuda:N, and in words why it was taken.

    Raises:
        DeviceError: if that device is not here; knife never falls back silently.
    """
    if text == "cpu":
        return "cpu", "as --device says"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        return ("cuda:0", torch.cuda.get_device_name(0)) if count else ("cpu", "no CUDA device here")
    name, _, index = text.partition(":")
    if name != "cuda" or (index and not index.isdigit()):
        raise DeviceError(f"--device {text}: give auto, cpu, cuda or cuda:N.")
    if int(index or 0) >= count:
        raise DeviceError(f"--device {text}: this machine has {count or 'no'} CUDA device{'s' * (count != 1)}; give cpu or auto.")
    return f"cuda:{index or 0}", "as --device says"
