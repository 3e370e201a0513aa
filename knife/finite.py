"""Pixels that are no number: refused, or, where the user says so (`--nan fill=0`), filled with one and counted.

Labels are never filled: a number that suits intensities may be a label.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from knife.errors import InputError, SettingsError
from knife.files import shown

Array = np.ndarray[Any, Any]


def fill_of(text: str | None) -> float | None:
    """Read the words of --nan, such as fill=0: what stands for NaN and infinity, in a file's own units; None: nothing.

    Raises:
        SettingsError: if it is no such word, or no number that float32 holds.
    """
    if text is None:
        return None
    word, _, number = text.partition("=")
    try:
        fill = float(number) if word == "fill" else math.nan
    except ValueError:
        fill = math.nan
    if not abs(fill) <= float(np.finfo(np.float32).max):
        raise SettingsError(f"--nan {text}: give fill= and a number in the units of the files, such as fill=0.")
    return fill


def finite(values: Array, path: Path, fill: float | None, unit: str) -> tuple[Array, int]:
    """Return the values [...] float32 of a file with `fill` for what is NaN or infinite, and how many that were.

    unit: what a value is called in the message.

    Raises:
        InputError: if some are, and nothing is to fill them.
    """
    bad = ~np.isfinite(values)
    count = int(bad.sum())
    if count and fill is None:
        raise InputError(
            f"{shown(path)}: {count} {unit} are NaN, infinite or beyond float32; correct the file, or, if it is no "
            "mask, give --nan fill=0 to read them as 0."
        )
    return (np.where(bad, np.float32(fill), values), count) if count else (values, 0)
