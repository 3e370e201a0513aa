"""One page that shows translations to somebody who has no knife: a single HTML file, to be mailed or filed.

Everything lies in the file itself, images included; it asks nothing of the network, and says so to the browser.
"""

import base64
import json
import math
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
WIDTH, HEIGHT = 260, 170  # of a course, in its own units
LEFT, RIGHT, TOP, BOTTOM = 48, 248, 22, 140  # its frame
DASHES = ((0, 0, 0), (255, 255, 255))  # of the region's outline
CYAN = (64, 224, 255)  # of the wanted mask's on the map, whose colours are warm
MEANT = {  # what a record calls it, and what the page does
    "effect": "mean effect of guidance, background included",
    "reconstruction": "mean error of the unguided round trip, likewise",
    "changed": "mean change, background left out",
    "changed_inside": "mean change inside",
    "changed_outside": "mean change outside",
    "share_outside": "share of the change that lies outside",
    "p95": "95th percentile of the change",
    "p95_outside": "95th percentile of the change outside",
    "ssim": "SSIM",
    "ssim_outside": "SSIM outside",
}


def report(translations: Sequence[Translation]) -> bytes:
    """Return the page of some translations of one call: sliders between input and output, change, course, record."""
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    record = translations[0].record
    known = [one.record["reached"] for one in translations if "reached" in one.record]
    page = pages.get_template(PAGE).render(
        title="knife: " + ", ".join(f"{wish['task']} {wish['target']}" for wish in record["wishes"]),
        synthetic=record["synthetic"],
        reached=f"{sum(known)} of {len(known)} images reached their targets" if len(known) > 1 else "",
        settings=settings(record),
        models=models(record),
        scale=uri(panel.heat(torch.linspace(0, 1, 256)[None], 1.0)),
        images=[section(one) for one in translations],
    )
    return page.encode("utf-8", "backslashreplace")


def write_report(translations: Sequence[Translation], path: Path) -> None:
    """Write the page of some translations.

    Raises:
        DiskError: if the disk refuses.
    """
    with refusing_disk("-o", path.parent):
        write_safely(path, report(translations))


# ----------------------------------------------------------------------------------------------------------- the whole


def settings(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what was set, and where it ran."""
    told = {**record["settings"], "region": record["region"], "device": record["device"], "ops": record["ops"]}
    said = {name: "yes" if value is True else "no" if value is False else value for name, value in told.items()}
    named = [(name.replace("_", " "), value) for name, value in said.items() if value is not None]
    judges = [(f"judge of {judge['task']}", judge["origin"]) for judge in record.get("judges", [])]
    return [*named, *judges, ("knife, torch", f"{record['knife']}, {record['torch']}")]


def models(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return which models served as what: first the diffusion model, then a guide for each task, then judges."""
    guides = len(record["wishes"])
    return [
        {**model, "role": "walks" if i == 0 else "guides" if i <= guides else "judges"}
        for i, model in enumerate(record["models"])
    ]


# ----------------------------------------------------------------------------------------------------------- one image


def section(one: Translation) -> dict[str, Any]:
    """Return what the page says of one translation."""
    record = one.record
    before, after = (panel.fitting(image.normalised(None, (0, 1))) for image in (one.source, one.result))
    change = (after - before).abs().sum(0)
    wanted = fitted(one.wanted)
    slice_ = f", slice {record['slice']}" if "slice" in record else ""
    return {
        "name": ", ".join(record["input"]) + slice_,
        "goals": [goal(record, wish) for wish in record["wishes"]],
        "pairs": pairs(before, after, record["channels"], wanted),
        "masked": wanted is not None,
        "region": one.region is not None,
        "inside": "changed_inside" in record["preservation"],
        "change": uri(marked(panel.heat(change, float(change.max())), wanted, fitted(one.region))),
        "peak": f"{float(change.max()):.2g}",
        "courses": courses(record),
        "attempts": attempts(record),
        "others": moved(record.get("others", {})),
        "kept": kept(record),
        "seconds": f"{record['seconds']:.2f}",
        "record": json.dumps(record, indent=1),
    }


def goal(record: Mapping[str, Any], wish: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a task wanted, what guide and judge saw before and after, and whether that is near enough."""
    task, judge = wish["task"], record.get("judge", {})
    wanted = record.get("wanted", {}).get(task, wish["target"])
    error, allowed = (record.get(name, {}).get(task) for name in ("error", "tolerance"))
    judged = judge.get("error", {}).get(task)
    return {
        "task": task,
        "wanted": wanted if wanted == wish["target"] else f"{wish['target']} = {wanted}",
        "guide": moved({when: own(record, task, record[when]) for when in ("before", "after")}),
        "judge": moved({when: own(record, task, judge.get(when, {})) for when in ("before", "after")}),
        "judged": "" if judged is None or math.isnan(judged) else f"{judged:.3g} off",
        "verdict": verdict(error, allowed),
        "missed": error is not None and allowed is not None and error > allowed,
    }


def own(record: Mapping[str, Any], task: str, numbers: Mapping[str, float]) -> dict[str, float]:
    """Return a task's own numbers among those of all; of several tasks, theirs begin with its name."""
    if len(record["wishes"]) == 1:
        return dict(numbers)
    return {name.removeprefix(f"{task} "): value for name, value in numbers.items() if name.startswith(f"{task} ")}


def verdict(error: float | None, allowed: float | None) -> str:
    """Say in plain words whether a target was reached."""
    if error is None:
        return "no telling: the target has no end, or the task no measure"
    if allowed is None:
        return f"{error:.3g} off"
    return f"{'not reached' if error > allowed else 'reached'}: {error:.3g} off, {allowed:.3g} allowed"


def moved(numbers: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str, str]]:
    """Return what numbers were before and are after, by name."""
    before, after = numbers.get("before", {}), numbers.get("after", {})
    return [(name, f"{before[name]:.4g}", f"{value:.4g}") for name, value in after.items()]


def attempts(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the strengths that were tried, how far off each left the targets, and which was used."""
    tried = record.get("attempts", [])
    tasks = [*dict.fromkeys(task for one in tried for task in one["error"])]
    rows = [
        {
            "strength": f"{one['strength']:g}",
            "errors": [f"{one['error'][task]:.3g}" if task in one["error"] else "" for task in tasks],
            "used": one["strength"] == record["strength"],
        }
        for one in tried
    ]
    return {"tasks": tasks, "rows": rows}


def kept(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return how much changed, in words."""
    sizes = {name: record[name] for name in ("effect", "reconstruction") if name in record} | record["preservation"]
    return [
        (MEANT.get(name, name.replace("_", " ")), f"{value:.4f}" if name.startswith("ssim") else f"{value:.2%}")
        for name, value in sizes.items()
    ]


# ------------------------------------------------------------------------------------------------------------ pictures


def fitted(mask: Tensor | None) -> Tensor | None:
    """Return a mask, [H, W] or [1, H, W], in the size in which images are drawn, [H, W] bool."""
    return None if mask is None else panel.fitting(mask.float().reshape(1, *mask.shape[-2:]))[0] > 0.5


def marked(tile: panel.Tile, wanted: Tensor | None, region: Tensor | None) -> panel.Tile:
    """Return a map with the outlines of region and wanted mask."""
    return panel.outlined(panel.outlined(tile, region, DASHES), wanted, (CYAN,))


def pairs(before: Tensor, after: Tensor, channels: Sequence[str], mask: Tensor | None) -> list[dict[str, str]]:
    """Return input and output for each channel [C, H, W], or for the colours together, with the outline of a mask."""
    colour = tuple(channels) == panel.COLOUR
    tiles = zip(panel.tiles(before, 0, 1, colour), panel.tiles(after, 0, 1, colour), strict=True)
    return [
        {"name": name, "before": uri(panel.outlined(a, mask)), "after": uri(panel.outlined(b, mask))}
        for name, (a, b) in zip(["image"] if colour else channels, tiles, strict=True)
    ]


def courses(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the course of each number that the guides saw, from the highest noise level down to the image."""
    lines = wanted_numbers(record)
    return [
        course(name, [(one["level"], one[name]) for one in record["along"]], record["after"][name], lines.get(name))
        for name in record["after"]
    ]


def wanted_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the wanted value of each number that has one: its task sees no other number, and its target is one."""
    found = {}
    for wish in record["wishes"]:
        task = wish["task"]
        names = [name for name in record["after"] if len(record["wishes"]) == 1 or name.startswith(f"{task} ")]
        try:
            value = float(record.get("wanted", {}).get(task, wish["target"]))
        except ValueError:
            continue
        if len(names) == 1 and math.isfinite(value):
            found[names[0]] = value
    return found


def course(name: str, points: Sequence[tuple[int, float]], end: float, wanted: float | None) -> dict[str, Any]:
    """Return a course as an SVG draws it: (level, value) on the way, the value in the end, and the wanted one."""
    values = [value for _, value in points] + [end] + ([] if wanted is None else [wanted])
    low, high, top = min(values), max(values), max(level for level, _ in points)
    room = 0.06 * (high - low) or max(abs(high), 1.0) / 20

    def across(level: float) -> float:
        return round(RIGHT - (RIGHT - LEFT) * level / top, 1)

    def up(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - low + room) / (high - low + 2 * room), 1)

    return {
        "name": name,
        "path": "M" + " L".join(f"{across(level)} {up(value)}" for level, value in points),
        "end": (across(0), up(end)),
        "wanted": None if wanted is None else up(wanted),
        "levels": [(across(level), f"{level:g}") for level in panel.ticks(0, top)],
        "values": [(up(value), f"{value:.4g}") for value in panel.ticks(low, high)],
    }


def uri(tile: panel.Tile) -> str:
    """Return a picture as a data URI."""
    return "data:image/png;base64," + base64.b64encode(panel.png(tile)).decode()
