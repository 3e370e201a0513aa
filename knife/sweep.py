"""One image towards several targets, from several noise levels, on one sheet: how far a knob turns the image."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knife import panel
from knife.errors import InputError, SettingsError
from knife.files import write_safely
from knife.outputs import Translation, refusing_disk, safe
from knife.settings import DEFAULTS, Settings, Wish
from knife.translation import translate


def sweep(
    image: Path,
    task: str,
    targets: Sequence[str],
    levels: Sequence[int],
    *,
    out: Path,
    settings: Settings = DEFAULTS,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> tuple[list[list[Translation]], Path]:
    """Translate an image towards each target from each noise level, and draw all results on one sheet.

    Args:
        image: one image, or a folder with one file for each MR sequence; of a volume, one slice (`slices`).
        task: the task that guides.
        targets: what it shall become, a column each.
        levels: noise levels to encode to, a row each; none stands for that of `settings`.
        out: the folder to write the sheet into.
        settings: as for `translate`; steps beyond a noise level are cut to it.
        progress: called with (translations done, translations in all).
        options: models, dataset, slices, region, nan, device: as for `translate`.

    Returns:
        The translations, a list for each noise level, and the sheet's file.

    Raises:
        KnifeError: as `translate` does.
    """
    if not targets:
        raise SettingsError("--targets: none given; separate them by commas, as 0.02,0.05,0.1.")
    rows: list[list[Translation]] = []
    heights: Sequence[int | None] = levels or [settings.noise_level]
    cells = [(level, target) for level in heights for target in targets]
    for done, (level, target) in enumerate(cells):
        progress(done, len(cells))
        steps = settings.steps if level is None or settings.steps is None else min(settings.steps, max(level, 1))
        here = replace(settings, noise_level=level, steps=steps)
        results = translate(image, Wish(task, target), settings=here, **options)
        if len(results) > 1:
            raise InputError(f"{image}: {len(results)} images, and a sheet shows one; name an image, or a --slice.")
        if done % len(targets) == 0:
            rows.append([])
        rows[-1] += results
    progress(len(cells), len(cells))
    file = out / f"{safe(Path(image).name.split('.')[0])}_{task}_sweep.png"
    with refusing_disk("-o", out):
        write_safely(file, sheet(rows))
    return rows, file


def sheet(rows: Sequence[Sequence[Translation]]) -> bytes:
    """Draw the input, and a column for each target: the channel that changes most, or the colours, and the change.

    Each map tells what was reached; what was wanted, if a mask, is outlined in the result.
    """
    first = rows[0][0]
    colour = tuple(first.record["channels"]) == panel.COLOUR
    changes = torch.stack([one.change.abs().mean((1, 2)) for row in rows for one in row])
    most = int(changes.sum(0).argmax())

    def seen(one: Tensor) -> panel.Tile:
        shown = panel.fitting(one if colour else one[most : most + 1])
        return panel.tiles(shown, 0, 1, colour)[0]

    start = first.source.normalised(None, (0, 1))
    ends = [[one.result.normalised(None, (0, 1)) for one in row] for row in rows]
    peak = max(float((end - start).abs().sum(0).max()) for row in ends for end in row)
    tiles, names, notes = [], [], []
    for row, results in zip(rows, ends, strict=True):
        level = f"L = {row[0].record['settings']['noise_level']}"
        tiles.append([seen(start), *map(outlined, map(seen, results), row)])
        maps = [panel.heat(panel.fitting((end - start).abs().sum(0, keepdim=True))[0], peak) for end in results]
        tiles.append([seen(start) * 0, *maps])
        names += [level, "change"]
        notes += [[], ["", *(f"{reached(one)}\n{judged(one)}".strip() for one in row)]]
    shown = "" if colour else f", {first.record['channels'][most]}"
    title = f"{first.record['input'][0]}: {first.record['task']}{shown}; change from 0 to {peak:.2g} of the window"
    columns = ["input", *map(wanted, rows[0])]
    return panel.png(panel.captioned(tiles, max(1, 128 // tiles[0][0].shape[1]), title, names, columns, notes))


def outlined(tile: panel.Tile, one: Translation) -> panel.Tile:
    """Return the tile of a result with the wanted mask, if one was."""
    return tile if one.wanted is None else panel.outlined(tile, panel.fitting(one.wanted[None].float())[0] > 0.5)


def wanted(one: Translation) -> str:
    """Say what was wanted; where that counts from the image, what it comes to."""
    (target,) = one.record["wanted"].values()
    return f"{one.record['target']} = {target}" if target != one.record["target"] else f"wanted {target}"


def reached(one: Translation) -> str:
    """Say in few words what the guide saw in the end, and whether that is near enough, if anybody knows."""
    told = {True: ", reached", False: ", not reached", None: ""}[one.record.get("reached")]
    return f"{number(one.record['after'], one.record.get('error', {}))}{told}"


def judged(one: Translation) -> str:
    """Say in few words what the judge saw in the end, if there is one."""
    judge = one.record.get("judge")
    return f"judge: {number(judge['after'], judge['error'])}" if judge else ""


def number(after: Mapping[str, float], error: Mapping[str, float]) -> str:
    """Return what a network saw in the end: its only number, or how far off the target is."""
    one = f"{next(iter(after.values())):.3g}" if len(after) == 1 else ""
    return one or "".join(f"{off:.3g} off" for off in error.values())
