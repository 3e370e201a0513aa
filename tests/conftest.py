"""What several test modules use: one thread, a folder of tiny stored models, and images for them."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn

from knife import cli, ops
from knife.checkpoint import Card, save
from knife.ddim import slope
from knife.phantom import phantom, write_nifti
from knife.schedule import Schedule, timestep
from knife.spec import ImageSpec
from knife.tasks import task
from knife.unet import Architecture

SIZE = (16, 16)
TINY = Architecture(8, (1, 2), res_blocks=1, groups=4, pool="mean")
SCHEDULE = Schedule("linear", 50)
CHANNELS = {"brain": ("t1", "t1ce", "t2", "flair"), "photo": ("r", "g", "b")}
CONFIGS = {
    "regress": {"label": "size", "low": 0.0, "high": 0.35, "mean": 0.1, "std": 0.1},
    "classify": {"label": "class", "classes": ["diseased", "healthy"]},
    "segment": {"label": "mask"},
}
TARGETS = {"regress": torch.tensor([1.0, -1.0]), "classify": torch.tensor([0, 1]), "segment": torch.zeros(2, 1, *SIZE)}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Compute in one thread, here and in the processes that tests start: several workers share the machine."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def meta_ops() -> str:
    """Return a device that holds no values, and let plain torch serve it, as no kernel is for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KNIFE_OPS", "torch")
        assert ops.status("meta").path == "torch"
    return "meta"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Store models/<brain, photo>/<diffusion, regress, classify, segment>.safetensors; read them only."""
    folder = tmp_path_factory.mktemp("models")
    for dataset, channels in CHANNELS.items():
        for kind in ("diffusion", *CONFIGS):
            store(folder, Card(kind, dataset, ImageSpec(channels, SIZE, TINY, TINY), SCHEDULE, CONFIGS.get(kind, {})))
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make images of 32 x 32 pixels for both sets of models; read them only.

    slice.nii, healthy.nii  four unnamed channels, with and without a tumour    case/  slice.nii in four files
    mask.nii                where healthy.nii shall have one                     face.png
    """
    folder = tmp_path_factory.mktemp("images")
    diseased, healthy = (phantom(5, size=32, relative_size=size) for size in (0.1, 0.0))
    write_nifti(folder / "slice.nii", diseased.pixels)
    write_nifti(folder / "healthy.nii", healthy.pixels)
    write_nifti(folder / "mask.nii", diseased.mask)
    (folder / "case").mkdir()
    for name, plane in zip(CHANNELS["brain"], diseased.pixels, strict=True):
        write_nifti(folder / "case" / f"case_{name}.nii.gz", plane)
    colours = (np.moveaxis(diseased.pixels[:3], 0, 2) * 255).round().astype(np.uint8)
    PIL.Image.fromarray(colours).save(folder / "face.png")
    return folder


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda number, handler: signal.getsignal(number))

    def command(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["knife", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *capsys.readouterr())

    return command


def store(folder: Path, card: Card) -> Path:
    """Store a network of random weights, and return its file."""
    torch.manual_seed(0)
    net = awake(card.build()).eval().requires_grad_(False)
    guidance = {} if card.kind == "diffusion" else {"gradient": steepness(card, net)}
    path = folder / card.dataset / f"{card.kind}.safetensors"
    save(path, net.state_dict(), {**card.to_json(), "guidance": guidance, "training": {"step": 7, "loss": 0.5}})
    return path


def awake(net: nn.Module) -> nn.Module:
    """Wake the layers that start silent, so that the image has a say in what comes out."""
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return net


def steepness(card: Card, net: nn.Module) -> float:
    """Measure the size of the guidance half way up the noise levels, as a training does."""
    x: Tensor = torch.randn(2, len(card.spec.channels), *SIZE)
    level = torch.full((2,), card.schedule.T // 2)
    g = slope(task(card.kind).score(net, TARGETS[card.kind]), x, timestep(level)).gradient
    return float((1 - card.schedule.alpha_bar[level[0]]).sqrt() * g.square().mean().sqrt())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none; `benchmarks/gpu.sh` runs it where there is one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
