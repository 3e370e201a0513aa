"""How words of the command line are read that several commands know."""

import re

from knife.errors import SettingsError

SHAPE = re.compile(r"\s*(?:ellipse|rectangle):")
TARGET = re.compile(SHAPE.pattern + r"[^,;]*(?:,[^,;]*){3}|[^,;]+")  # a shape's own commas separate nothing


def slice_range(text: str | None) -> tuple[int, int] | None:
    """Read FIRST:LAST+1, the slices of a volume; None is all of them.

    Raises:
        SettingsError: if it is no such range.
    """
    if text is None:
        return None
    return span("--slices", text, "the first slice and the last + 1, such as 80:129")


def span(option: str, text: str, wanted: str) -> tuple[int, int]:
    """Read LOW:HIGH, whole numbers from 0 on of which the second is larger.

    Raises:
        SettingsError: naming the option, what it says and what is wanted, if it is no such range.
    """
    try:
        low, high = map(int, text.split(":"))
    except ValueError:
        low, high = 0, 0
    if not 0 <= low < high:
        raise SettingsError(f"{option} {text}: give {wanted}.")
    return low, high


def listed_targets(text: str) -> list[str]:
    """Read targets with commas or semicolons between them.

    Raises:
        SettingsError: if a shape lacks numbers.
    """
    found = [target.strip() for target in TARGET.findall(text)]
    for target in found:
        if SHAPE.match(target) and target.count(",") != 3:
            raise SettingsError(f"--targets {text}: {target} is no shape; give four numbers, as ellipse:120,100,20,15.")
    return [target for target in found if target]
