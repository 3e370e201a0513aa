"""What knife says when it refuses: one base class, one catch in the CLI.

    KnifeError            exit code 2 unless a child says otherwise
    ├── InputError        an image, mask or data folder cannot be used as it is
    ├── TargetError       --target does not mean anything to the task
    ├── TaskError         a task plugin is unknown, broken or breaks its contract
    ├── ModelError        a checkpoint is missing, damaged or does not fit
    │   └── UnreadableError  it may be whole, but the disk refuses to read it (4)
    ├── SettingsError     an option has an impossible value, or differs from the run it resumes
    ├── DiskError         the disk is full or refuses, or holds no state that can be trusted (4)
    │   └── LockedError   another process trains this model
    ├── SamplingError     guidance blew an image up (6)
    ├── DivergedError     a training is no longer finite (6)
    ├── DeviceError       the device asked for is not there, or another process of a training has ended
    │   └── MemoryShortError  not even one image fits into its memory (5)
    └── OpsError          KNIFE_OPS=native, and the compiled ops cannot be had

A message names the option or file, what was found there, and what to do next.
"""


class KnifeError(Exception):
    """Base of every refusal; `exit_code` is what the command line exits with."""

    exit_code = 2


class InputError(KnifeError):
    """An image, mask or data folder cannot be used as it is."""


class ApartError(InputError):
    """An image and a mask have no place in common."""


class TargetError(KnifeError):
    """A target does not mean anything to the task."""


class TaskError(KnifeError):
    """A task plugin is unknown, broken, or breaks its contract."""


class ModelError(KnifeError):
    """A checkpoint is missing, damaged, or does not fit what it shall be used with."""


class UnreadableError(ModelError):
    """A checkpoint may be whole, but the disk refuses to read it."""

    exit_code = 4


class SettingsError(KnifeError):
    """An option has an impossible value, or differs from the run it resumes."""


class DiskError(KnifeError):
    """The disk is full or refuses, or holds no state that can be trusted."""

    exit_code = 4


class LockedError(DiskError):
    """Another process trains this model."""


class SamplingError(KnifeError):
    """Guidance blew an image up."""

    exit_code = 6


class DivergedError(KnifeError):
    """A training is no longer finite."""

    exit_code = 6


class DeviceError(KnifeError):
    """The device asked for is not there, or another process of a training has ended."""


class MemoryShortError(DeviceError):
    """Not even one image fits into the memory of the device."""

    exit_code = 5


class OpsError(KnifeError):
    """The compiled ops were required and cannot be had."""
