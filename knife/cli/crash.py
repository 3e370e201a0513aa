"""What is left when knife itself is at fault: a report for its makers, without anything of the user's in it."""

import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path

from knife import __version__

LIBRARIES = ("torch", "numpy", "nibabel", "pillow", "safetensors", "typer", "pydicom")


def write_report(error: BaseException, commands: Collection[str]) -> Path | None:
    """Write versions, the command's name and the lines of code that led to an error into a file of its own.

    No message of the error is in it, no option's value and no path: they may name a patient.

    Returns:
        The file, or None if it cannot be written.
    """
    command = next((word for word in sys.argv[1:] if word in commands), "?")
    lines = [
        f"knife {__version__}, python {platform.python_version()}, {platform.system()} {platform.machine()}",
        ", ".join(f"{name} {installed(name)}" for name in LIBRARIES),
        f"command: {command}",
        *told(error),
    ]
    try:
        fd, name = tempfile.mkstemp(prefix="knife-crash-", suffix=".txt")
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    except OSError:
        return None
    return Path(name)


def installed(name: str) -> str:
    """Return the version of a library."""
    try:
        return version_of(name)
    except PackageNotFoundError:
        return "not installed"


def told(error: BaseException) -> Iterator[str]:
    """Yield the kind of an error and where in the code it came from, and the same of what caused it."""
    seen: BaseException | None = error
    while seen is not None:
        yield f"{type(seen).__module__}.{type(seen).__qualname__}"
        for frame in traceback.extract_tb(seen.__traceback__):
            yield f"  {'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}"
        seen = seen.__cause__ or seen.__context__
