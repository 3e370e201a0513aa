"""One image towards several targets, from several noise levels, on one sheet: how far a knob turns the image."""

from collections.abc import Callable, Sequence
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
    with refusing_disk(out):
        write_safely(file, sheet(rows))
    return rows, file


def sheet(rows: Sequence[Sequence[Translation]]) -> bytes:
    """Draw the input, and a column for each target: the channel that changes most, or the colours, and the change."""
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
    tiles, names = [], []
    for row, results in zip(rows, ends, strict=True):
        level = f"L = {row[0].record['settings']['noise_level']}"
        tiles.append([seen(start), *(seen(end) for end in results)])
        maps = [panel.heat(panel.fitting((end - start).abs().sum(0, keepdim=True))[0], peak) for end in results]
        tiles.append([seen(start) * 0, *maps])
        names += [level, "change"]
    shown = "" if colour else f", {first.record['channels'][most]}"
    title = f"{', '.join(first.record['input'][:1])}: {first.record['task']}{shown}"
    columns = ["input", *(f"{one.record['target']}{reached(one)}" for one in rows[0])]
    return panel.png(panel.captioned(tiles, max(1, 128 // tiles[0][0].shape[1]), title, names, columns))


def reached(one: Translation) -> str:
    """Say in few words what the guide saw at the end, if that is one number."""
    after = one.record["after"]
    return f" ({next(iter(after.values())):.3g})" if len(after) == 1 else ""
