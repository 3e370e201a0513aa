"""The short benchmark: its clocks, counts and lines are right, it measures every task, and says what it leaves out."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, SIZE
from torch import nn

from knife import bench, pairs
from knife.checkpoint import describe
from knife.cli import benching, main
from knife.errors import DeviceError, ModelError, SettingsError, TaskError
from knife.image import read
from knife.settings import QUALITIES
from knife.tasks import task

KINDS = sorted(CONFIGS)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure briefly."""
    monkeypatch.setattr(bench, "FEW", (2, 4))
    monkeypatch.setattr(bench, "REPEATS", 1)
    monkeypatch.setattr(bench, "PEAK_SIDE", 64)
    monkeypatch.setattr(bench, "STEP_SIZE", (2, 4, 8, 8))


def clock_of(*moments: float) -> Callable[[], float]:
    """Return a clock that shows these moments, one after the other."""
    shown: Iterator[float] = iter(moments)
    return lambda: next(shown)


def test_seconds_are_those_of_one_call_on_average() -> None:
    calls = list[int]()
    assert bench.seconds(lambda: calls.append(1), "cpu", clock_of(3.0, 9.0), count=4) == 1.5
    assert len(calls) == 4


def test_medians_are_taken_in_turn_there_and_back() -> None:
    called = list[str]()
    calls = {name: (lambda name=name: called.append(name)) for name in ("a", "b")}
    now = 0.0
    last = {"a": [1.0, 5.0, 2.0, 4.0], "b": [10.0, 30.0, 10.0, 20.0]}  # the first of each tells how long it takes
    started = False

    def clock() -> float:
        nonlocal now, started
        if started:
            now += last[called[-1]].pop(0)
        started = not started
        return now

    assert bench.medians(calls, 3, "cpu", clock) == {"a": 4.0, "b": 20.0}
    assert "".join(called) == "aabb" + "ba" + "ab" + "ba"


def test_the_peak_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PEAK_SIDE", 10)
    moments = [moment for i in range(10) for moment in (0.0, 4e-6 if i == 7 else 8e-6)]
    assert bench.peak_gflops("cpu", clock_of(*moments)) == pytest.approx(0.5)  # 2000 operations in 4 us


def test_the_peak_is_that_of_the_precision_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PEAK_SIDE", 10)
    monkeypatch.setattr(bench, "seconds", lambda call, *others: float(call().element_size()))
    assert bench.peak_gflops("cpu") == pytest.approx(2000 / 4 / 1e9)
    assert bench.peak_gflops("cpu", dtype=torch.bfloat16) == pytest.approx(2000 / 2 / 1e9)


def test_short_calls_are_timed_in_blocks() -> None:
    calls = list[int]()
    moments = (0.0, bench.BLOCK / 8, 0.0, 16e-3)
    assert bench.medians({"a": lambda: calls.append(1)}, 1, "cpu", clock_of(*moments)) == {"a": 2e-3}
    assert len(calls) == 1 + 1 + 8


def test_operations_are_counted_forward_and_backward() -> None:
    net = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    x, t = torch.zeros(2, 3, 8, 8), torch.zeros(2)
    forward = 2 * 2 * 8 * 8 * 3 * 5 * 9  # a multiplication and an addition for each weight, pixel and image
    assert bench.operations(lambda: net(x)) == forward
    net.requires_grad_(False)
    assert bench.gradient_operations(lambda x, t: net(x).sum((1, 2, 3)), x, t) == 2 * forward


def test_seconds_of_more_steps_lie_on_the_line() -> None:
    assert bench.drawn_on({10: 1.5, 20: 2.5}, 50) == pytest.approx(5.5)
    assert bench.drawn_on({20: 2.5, 10: 1.5}, 20) == 2.5
    assert bench.drawn_on({10: 2.0, 20: 1.0}, 50) == 1.0  # a machine that became idle between them


def test_a_step_moves_four_passes() -> None:
    assert bench.gigabytes(torch.zeros(1000, 1000)) == pytest.approx(0.016)
    x, grad, output = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), torch.zeros(2, 6, 4, 4)
    calls = bench.step_and_copy(x, output, grad)
    stepped, copied = calls["step"](), calls["copy"]()
    assert isinstance(stepped, torch.Tensor)
    assert isinstance(copied, torch.Tensor)
    assert stepped.shape == x.shape
    assert copied.numel() == 2 * x.numel()  # read and written: four passes over x too


def test_images_are_of_the_models_size_and_channels(models: Path, tmp_path: Path) -> None:
    for dataset, channels in (("brain", 4), ("photo", 3)):
        spec = describe(models / dataset / "diffusion.safetensors").card.spec
        folder = tmp_path / dataset
        folder.mkdir()
        first, second = map(read, bench.drawn(folder, spec, 2))
        assert first.pixels.shape == (channels, *SIZE)
        assert not first.pixels.equal(second.pixels)


@pytest.mark.parametrize(("kind", "text"), [("regress", "+"), ("classify", "healthy"), ("segment", bench.SHAPE)])
def test_every_task_gets_a_target_that_it_understands(models: Path, images: Path, kind: str, text: str) -> None:
    card = describe(models / "brain" / f"{kind}.safetensors").card
    image = read(images / "slice.nii")
    found, target = bench.usual_target(task(kind), card, image)
    assert found == text
    assert target.equal(task(kind).target(text, image, card.spec, card.config))


def test_a_task_that_understands_no_target_is_named(models: Path, images: Path, monkeypatch) -> None:
    card = describe(models / "brain" / "segment.safetensors").card
    monkeypatch.setattr(bench, "SHAPE", "nothing")
    with pytest.raises(TaskError, match=r"segment: not measured, as none of \+, nothing means anything to it"):
        bench.usual_target(task("segment"), card, read(images / "slice.nii"))


def test_it_measures_every_task_one_at_a_time_and_in_batches(models: Path, quick: None) -> None:
    ticks = list[tuple[int, int]]()
    found = bench.bench("brain", models=models, batch=3, device="cpu", progress=lambda *tick: ticks.append(tick))
    assert found.left_out == {}
    assert found.about["models"] == "brain"
    assert (found.about["channels"], found.about["size"]) == (4, list(SIZE))
    assert [(pace.task, pace.batch) for pace in found.paces] == [(kind, size) for kind in KINDS for size in (1, 3)]
    for pace in found.paces:
        assert [*pace.timed] == [2, 4]
        assert pace.steps == min(QUALITIES["standard"].steps, 50)
        assert pace.seconds >= pace.timed[4] > 0
    assert [(call.network, call.batch) for call in found.calls] == [
        (network, size) for size in (1, 3) for network in ("diffusion", *KINDS)
    ]
    for call in found.calls:
        assert call.of_peak == pytest.approx(call.gflops / found.peak_gflops)
    assert found.step.of_copy == pytest.approx(found.step.gigabytes / found.step.copy_gigabytes)
    assert ticks == [(done, 9) for done in range(1, 10)]


def test_a_batch_of_three_takes_three_times_the_operations(models: Path, quick: None) -> None:
    found = bench.bench("brain", models=models, batch=3, device="cpu")
    work = {(call.network, call.batch): call.gflops * call.milliseconds for call in found.calls}
    for network in ("diffusion", *KINDS):
        assert work[network, 3] == pytest.approx(3 * work[network, 1], rel=0.01)


def test_tasks_that_cannot_be_measured_are_left_out_and_named(models: Path, quick: None, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "mine"
    shutil.copytree(models / "photo", folder)
    (folder / "regress.safetensors").unlink()
    (folder / "segment.safetensors").write_bytes(b"damaged")
    found = bench.bench("mine", models=tmp_path / "models", batch=2, device="cpu")
    assert {pace.task for pace in found.paces} == {"classify"}
    assert sorted(found.left_out) == ["regress", "segment"]
    assert "no trained models" in found.left_out["regress"]
    assert "damaged" in found.left_out["segment"]


def test_what_cannot_be_measured_is_refused(models: Path) -> None:
    with pytest.raises(SettingsError, match="--batch-size 1: give 2 or more"):
        bench.bench("brain", models=models, batch=1)
    with pytest.raises(ModelError, match=r"no trained models in .* under the name nowhere"):
        bench.bench("nowhere", models=models)
    with pytest.raises(DeviceError, match="--device abacus: unknown"):
        bench.bench("brain", models=models, device="abacus")


def test_without_a_name_the_shipped_models_serve(models: Path, quick: None, monkeypatch, tmp_path: Path) -> None:
    shutil.copytree(models / "photo", tmp_path / "shipped" / "only")
    monkeypatch.setattr(pairs, "STARTER", tmp_path / "shipped")
    assert bench.bench(models=models, batch=2, device="cpu").about["channels"] == 3


def test_the_command_prints_tables_or_json(models: Path, quick: None, monkeypatch, capsys) -> None:
    command = ["knife", "bench", "--dataset", "brain", "--models", str(models), "--batch-size", "2", "--device", "cpu"]
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    for words in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", [*command, *words])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code in (0, None)
        out = capsys.readouterr().out
        if words:
            told = json.loads(out)
            assert [call["batch"] for call in told["calls"]] == [1] * 4 + [2] * 4
            assert told["paces"][0]["timed"].keys() == {"2", "4"}
        else:
            for text in ("classify", "regress, its gradient", "diffusion, a call", "2 and 4 steps were timed"):
                assert text in out
            assert "The fused step, 2x4x8x8: " in out


def test_a_row_tells_a_share_in_percent() -> None:
    row = benching.call_row(bench.Call("segment", 8, 12.5, 75.0, 0.5))
    assert row == {
        "network": "segment, its gradient", "batch": 8, "milliseconds": 12.5, "GFLOP/s": 75.0, "of the product's": "50%"
    }  # fmt: skip
