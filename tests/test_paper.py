"""The script that measures the paper's networks: it runs, and counts and draws on as it says."""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from knife import bench

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import paper


def test_it_runs_with_tiny_networks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "PEAK_SIDE", 64)
    given = ["--cases", "brats-segment", "--batches", "1", "--steps", "1", "--most", "0.1", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["paper.py", "--tiny", "--device", "cpu", *given])
    paper.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["benchmark"], told["device"], told["precision"], told["tiny"]) == ("paper", "cpu", "bfloat16", True)
    assert [(row["solver"], row["steps"], row["timed"]) for row in told["walks"]] == [("ddim", 1, 1), ("ab2", 1, 1)]
    for part, columns in paper.COLUMNS.items():
        for row in told[part]:
            assert {*columns} - {"GiB"} <= {*row}
            assert "problem" not in row
    (counted,) = told["launches"]
    assert counted["what"] == "ops", "no kernels, as there is no GPU"
    assert counted["step"] - counted["network"] - counted["gradient"] == counted["outside"] > 0
    (trained,) = told["training"]
    assert trained["network"] == "paper-brats"
    assert trained["batch"] == 10


def test_a_walk_that_takes_too_long_is_drawn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = 0.0, list[int]()

    def run(steps: int) -> None:
        nonlocal now
        asked.append(steps)
        now += 0.5 + 0.25 * steps

    monkeypatch.setattr(paper, "seconds", lambda call, device: -now + (call() or now))
    options = argparse.Namespace(device="cpu", most=12.0, repeats=2)
    assert paper.paced(run, 400, options) == (1.5 * 100, 4)
    assert asked == [1, 1, 4, 4, 4], "one that warms up, one that tells how long, three that count"
    asked.clear()
    assert paper.paced(run, 16, options) == (4.5, 16)
    assert asked == [1, 1, 4, 16, 16]


def test_a_case_that_fails_is_a_row() -> None:
    def fail() -> paper.Row:
        raise RuntimeError("no\n  luck")

    assert paper.fenced({"case": "a"}, "cpu", fail) == {"case": "a", "problem": "RuntimeError: no luck", "GiB": None}


def test_a_trace_is_counted() -> None:
    kinds = [("kernel", "gemm"), ("kernel", "gemm"), ("gpu_memcpy", "Memcpy HtoD"), ("cuda_runtime", "cudaMemcpyAsync")]
    kinds += [("cuda_runtime", "cudaLaunchKernel"), ("cuda_driver", "cuLaunchKernelEx"), ("cuda_runtime", "cudaMalloc")]
    kinds += [("cuda_runtime", "cudaStreamSynchronize"), ("cuda_runtime", "cudaDeviceSynchronize"), ("cpu_op", "mm")]
    events = [{"cat": category, "name": name} for category, name in kinds]
    assert paper.tally([*events, {"ph": "M"}]) == Counter(kernels=2, copies=1, launches=2, waits=1)


@pytest.mark.parametrize(("room", "found"), [(9, 0), (10, 10), (19, 10), (85, 80)])
def test_a_batch_is_doubled_until_it_fits_no_more(room: int, found: int) -> None:
    assert paper.largest(lambda batch: batch <= room, 10) == found


def test_memory_that_runs_out_ends_the_doubling_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def step_that(error: Exception):
        def step(state, job):
            raise error

        return step

    options = argparse.Namespace(device="cpu", tiny=True)
    job = paper.training_job("paper-brats", Path("nowhere"), options)
    monkeypatch.setattr(paper, "train_step", step_that(torch.OutOfMemoryError("out")))
    assert not paper.fits(None, job, 10)
    monkeypatch.setattr(paper, "train_step", step_that(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        paper.fits(None, job, 10)
