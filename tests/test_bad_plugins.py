"""Plugins that do what they should not, through the command line: each harms itself alone, and is named."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Run

from knife.cli import plugins_app  # noqa: F401 - the command line is imported before plugins may change anything

GOOD = """
import torch
from knife import hookimpl

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
    def forward(self, x, t):
        return x.mean((1, 2, 3)) + self.weight

@hookimpl
def configure(cases): return {}
@hookimpl
def label(case): return case.pixels.mean()
@hookimpl
def build(image_spec): return Net()
@hookimpl
def train(net, x, t, label): return (net(x, t) - label).square().mean()
@hookimpl
def target(text):
    from knife.errors import TargetError
    try:
        return torch.tensor(float(text))
    except ValueError:
        raise TargetError(f"--target {text}: give a number, such as 0.5.") from None
@hookimpl
def guide(net, x, t, target): return -(net(x, t) - target).square()
"""
JUDGE = """
from knife import hookimpl

@hookimpl
def judge(task, image_spec, config): return None
"""
IN_GUIDE = "def guide(net, x, t, target):"
BAD = {  # name: source, what the listing says, what asking for it says; "" where that is no business of the listing
    "import_error": ("import no_such_module", "ModuleNotFoundError"),
    "syntax_error": ("def broken(:", "SyntaxError"),
    "exits": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "no_text": ("class Odd(BaseException):\n    def __str__(self): raise ValueError\nraise Odd", "Odd: (without a"),
    "recursive": ("def f(): f()\nf()", "RecursionError"),
    "attribute": ("def __getattr__(name): raise ValueError(name)", "ValueError"),
    "signature": (GOOD.replace("def train(net, x, t, label)", "def train(net, x, t, label, lr)"), "'lr'"),
    "incomplete": (GOOD.replace("@hookimpl\ndef guide", "def guide"), "lacks guide (there, but not marked"),
    "old": (GOOD + "\n@hookimpl\ndef sample(x): return x", "unknown hook 'sample'"),
    "many_lines": ("raise ValueError('one\\n\\x1b[31mtwo\\n' * 1000)", "ValueError: one"),
    "raises": (GOOD.replace(IN_GUIDE, f"{IN_GUIDE} raise RuntimeError('no')\ndef unused(net, x, t, target):"), "ok"),
    "exits_later": (GOOD.replace(IN_GUIDE, f"{IN_GUIDE} raise SystemExit(0)\ndef unused(net, x, t, target):"), "ok"),
    "garbage": (GOOD.replace("return -(net", "return 'x' or (net"), "ok"),
    "prints": ("print('NOISE')\n" + GOOD.replace("return -(net", "print('NOISE'); return -(net"), "ok"),
    "not_finite": (GOOD.replace("return -(net(x, t)", "return -(net(x, t) / 0"), "ok"),
}
CHECKED = {  # those that can be imported: what trying them says
    "raises": "its hook guide failed: RuntimeError: no",
    "exits_later": "its hook guide failed: SystemExit: 0",
    "garbage": "its hook guide returned a str ('x')",
    "not_finite": "returned scores that are not finite",
}
Install = Callable[..., None]


def install(place: Path, name: str, source: str, group: str = "knife", distribution: str = "") -> None:
    """Install a plugin as pip would: a module, and the metadata of a distribution."""
    distribution = distribution or f"bad-{name}"
    place.mkdir(exist_ok=True)
    module = distribution.replace("-", "_")
    (place / f"{module}.py").write_text(source)
    info = place / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder where plugins may be installed; nothing of them stays imported."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield tmp_path / "site"
    for module in set(sys.modules) - known:
        if module.startswith("bad_"):
            del sys.modules[module]


@pytest.fixture
def crowd(site: Path) -> Path:
    """Install all bad plugins, two of one name, and one by the name of knife's own."""
    for name, (source, _) in BAD.items():
        install(site, name, source)
    install(site, "twice", GOOD, distribution="bad-twice-one")
    install(site, "twice", GOOD, distribution="bad-twice-two")
    install(site, "regress", GOOD, distribution="bad-shadow")
    install(site, "lost", "raise ValueError", group="knife.judges")
    install(site, "face_age", JUDGE, group="knife.judges", distribution="bad-shadow-judge")
    return site


def test_the_listing_tells_each_by_its_fault(crowd: Path, run: Run) -> None:
    done = run("plugins", "list", "--json")
    assert done.code == 0
    rows = [row for row in json.loads(done.out) if row["distribution"].startswith("bad-")]
    status = {row["distribution"]: row["status"] for row in rows}
    for name, (_, said) in BAD.items():
        assert said in status[f"bad-{name}"], name
        assert len(status[f"bad-{name}"]) < 400
    assert "claimed by bad-twice-one and bad-twice-two" in status["bad-twice-one"]
    assert status["bad-shadow"] == "the name regress is knife's own; rename the entry point"
    assert status["bad-shadow-judge"] == "the name face_age is knife's own; rename the entry point"
    assert status["bad-lost"] == "ValueError:"
    own = {row["task"]: row["status"] for row in json.loads(done.out) if row.get("task") in ("classify", "regress")}
    assert own == {"classify": "ok", "regress": "ok"}
    table = run("plugins", "list")
    assert table.code == 0
    assert "\x1b" not in table.out + table.err


@pytest.mark.parametrize("name", BAD)
def test_a_check_says_where_it_fails(name: str, site: Path, run: Run) -> None:
    install(site, name, BAD[name][0])
    done = run("plugins", "check", name)
    if name == "prints":
        assert (done.code, done.out) == (0, "prints (bad-prints 1.0): a task, keeps its contract\n")
        assert "NOISE" in done.err
        return
    assert (done.code, done.out) == (1, "")
    assert CHECKED.get(name, BAD[name][1]) in done.err.splitlines()[-1]
    assert "Traceback" in done.err or "TaskError" in done.err
    assert "\x1b" not in done.err


def test_a_check_of_what_is_well(site: Path, run: Run) -> None:
    install(site, "well", GOOD, distribution="bad-well")
    install(site, "well", JUDGE, group="knife.judges", distribution="bad-judge")
    done = run("plugins", "check", "well")
    assert done.code == 0, done.err
    assert "well (bad-well 1.0): a task, keeps its contract; well (bad-judge 1.0): a judge, has its hooks" in done.out
    missing = run("plugins", "check", "nobody")
    assert (missing.code, missing.err) == (
        2, "knife: NAME nobody: no plugin has it; give one that knife plugins list shows.\n",
    )  # fmt: skip


def test_they_do_not_disturb_the_others(crowd: Path, run: Run, images: Path, models: Path) -> None:
    words = ("--noise-level", "10", "--steps", "5", "--strength", "0.2", "--models", models, "--dataset", "brain")
    done = run("translate", images / "slice.nii", "--task", "regress", "--target", "0.3", *words, "--json")
    assert done.code == 0, done.err
    (record,) = json.loads(done.out)
    assert record["task"] == "regress"


@pytest.mark.parametrize(("name", "said"), [*CHECKED.items(), *((name, BAD[name][1]) for name in ("exits", "old"))])
def test_asking_for_one_is_refused_in_a_sentence(name: str, said: str, site: Path, run: Run, images: Path) -> None:
    install(site, name, BAD[name][0])
    done = run("translate", images / "slice.nii", "--task", name, "--target", "0.3")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert f"task {name}: " in done.err
    if name in ("exits", "old"):
        assert said in done.err


def test_without_strangers_there_are_only_knifes_own(crowd: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNIFE_PLUGINS", "")
    rows = json.loads(run("plugins", "list", "--json").out)
    assert {row["distribution"] for row in rows} == {"knife-diffusion"}


def test_a_slow_one_is_waited_for_by_those_alone_who_ask_for_it(site: Path, tmp_path: Path) -> None:
    install(site, "slow", "import pathlib, time\npathlib.Path('imported').touch()\ntime.sleep(3)\n" + GOOD)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    for words in (("--help",), ("plugins", "check", "nobody")):
        command = [sys.executable, "-c", "from knife.cli import main; main()", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60, check=False)
        assert b"Traceback" not in done.stderr
        assert not (tmp_path / "imported").exists(), words


def test_prints_in_several_threads_leave_stdout_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from knife.tasks import hushed

    def noisy(seconds: float) -> None:
        with hushed():
            print("NOISE")
            time.sleep(seconds)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(noisy, (0.03, 0.01, 0.02, 0.04)))
    print("result")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("result\n", "NOISE\n" * 4)
