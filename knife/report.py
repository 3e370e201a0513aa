"""One page that shows translations to somebody who has no knife: a single HTML file, to be mailed or filed.

Everything lies in the file itself, images included; it asks nothing of the network, and says so to the browser.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader
from torch import Tensor

from knife import panel
from knife.files import write_safely
from knife.outputs import Translation, refusing_disk

PAGE = "report.html"


def report(translations: Sequence[Translation]) -> bytes:
    """Return the page of some translations of one call: sliders between input and output, change, course, record."""
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    record = translations[0].record
    settings = {name: value for name, value in record["settings"].items() if value is not None}
    models = [f"{model['dataset']} {model['kind']} ({model['sha256'][:12]})" for model in record["models"]]
    page = pages.get_template(PAGE).render(
        title=f"knife: {record['task']} {record['target']}",
        synthetic=record["synthetic"],
        settings=[*settings.items(), ("models", ", ".join(models)), ("knife", record["knife"])],
        images=[section(one) for one in translations],
    )
    return page.encode("utf-8", "backslashreplace")


def write_report(translations: Sequence[Translation], path: Path) -> None:
    """Write the page of some translations.

    Raises:
        SettingsError: if the disk refuses.
    """
    with refusing_disk(path.parent):
        write_safely(path, report(translations))


def section(one: Translation) -> dict[str, Any]:
    """Return what the page says of one translation."""
    record = one.record
    before, after = (panel.fitting(image.normalised(None, (0, 1))) for image in (one.source, one.result))
    mask = None if one.wanted is None else panel.fitting(one.wanted[None].float())[0] > 0.5
    change = (after - before).abs().sum(0)
    slice_ = f", slice {record['slice']}" if "slice" in record else ""
    return {
        "name": ", ".join(record["input"]) + slice_,
        "facts": facts(record),
        "pairs": pairs(before, after, record["channels"], mask),
        "change": uri(panel.heat(change, float(change.max()))),
        "peak": f"{float(change.max()):.2g}",
        "curves": curves(record["along"]),
        "record": json.dumps(record, indent=1),
    }


def facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the guide saw before and after, and how much changed."""
    seen = [(name, f"{record['before'][name]:.4g} → {record['after'][name]:.4g}") for name in record["after"]]
    shares = ("effect", "reconstruction", "changed_inside", "changed_outside")
    told = [
        (name.replace("_", " "), f"{record[name]:.2%} of the range") for name in shares if record.get(name) is not None
    ]
    return [*seen, *told, ("seconds", f"{record['seconds']:.2f}")]


def pairs(before: Tensor, after: Tensor, channels: Sequence[str], mask: Tensor | None) -> list[dict[str, str]]:
    """Return input and output for each channel [C, H, W], or for the colours together."""
    colour = tuple(channels) == panel.COLOUR
    tiles = zip(panel.tiles(before, 0, 1, colour), panel.tiles(after, 0, 1, colour), strict=True)
    outlined = "" if mask is None else "; red: where it was asked for"
    return [
        {"name": name, "before": uri(a), "after": uri(panel.outlined(b, mask)), "outlined": outlined}
        for name, (a, b) in zip(["image"] if colour else channels, tiles, strict=True)
    ]


def curves(along: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Return the course of each number that the guide saw, as the path of a line in 240 x 160."""
    drawn = []
    for name in [name for name in along[0] if name != "level"]:
        values = torch.tensor([one[name] for one in along])
        low, high = float(values.min()), float(values.max())
        up = ((values - low) / max(high - low, 1e-12)).tolist()
        across = torch.linspace(8, 232, len(values)).tolist()
        points = [f"{x:.1f} {140 - 118 * y:.1f}" for x, y in zip(across, up, strict=True)]
        ends = {"first": along[0]["level"], "last": along[-1]["level"]}
        drawn.append(
            {"name": name, "path": "M" + " L".join(points), "low": f"{low:.3g}", "high": f"{high:.3g}", **ends}
        )
    return drawn


def uri(tile: panel.Tile) -> str:
    """Return a picture as a data URI."""
    return "data:image/png;base64," + base64.b64encode(panel.png(tile)).decode()
