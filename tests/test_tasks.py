"""A stranger's plugin may do anything; the listing goes on, and the other tasks with it."""

import builtins
import json
import sys
from importlib.metadata import entry_points

import pytest
import torch

from knife import hookimpl
from knife.data import Case
from knife.errors import InputError, TargetError, TaskError
from knife.tasks import HOOKS, Task, manager_of, names, plugins, registered, survives_json, task

BUILTIN = ["classify", "regress", "segment"]
GOOD = """
import torch
from knife import hookimpl

@hookimpl
def label(case): return torch.zeros(())
@hookimpl
def build(image_spec): return torch.nn.Identity()
@hookimpl
def train(net): return torch.zeros(())
@hookimpl
def target(text): return torch.zeros(())
@hookimpl
def guide(x): return x.mean((1, 2, 3))
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a plugin: a module and the metadata of its distribution."""
    monkeypatch.syspath_prepend(tmp_path)
    installed = []

    def install(name, source, distribution=None, task_name=None):
        module, distribution = f"plugin_{name}", distribution or f"knife-{name}"
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[knife]\n{task_name or name} = {module}\n")
        installed.append(module)
        return info

    yield install
    for module in installed:
        sys.modules.pop(module, None)


def row_of(name):
    rows = plugins()
    assert [row.task for row in rows if row.usable and row.distribution == "knife-diffusion"] == BUILTIN
    (row,) = [row for row in rows if row.task == name]
    return row


def test_the_built_in_tasks_are_listed():
    rows = plugins()
    assert [row.task for row in rows if row.distribution == "knife-diffusion"] == BUILTIN == names()
    assert all(row.usable for row in rows)
    assert {row.task: {*HOOKS} - {*row.hooks} for row in rows} == {
        "classify": {"value"}, "regress": set(), "segment": {"value"},
    }  # fmt: skip
    json.dumps([row.status for row in rows])


def test_a_good_plugin(install):
    install("good", GOOD)
    row = row_of("good")
    assert (row.distribution, row.version, row.status) == ("knife-good", "1.2", "ok")
    assert row.hooks == ("label", "build", "train", "target", "guide")
    assert task("good").hooks == row.hooks


UNMARKED = "(there, but not marked with @hookimpl)"
BROKEN = {
    "import_error": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "syntax_error": ("def broken(", "SyntaxError: '(' was never closed (plugin_syntax_error.py, line 1)"),
    "raises": ("raise ValueError('two\\n  lines')", "ValueError: two lines"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "base": ("class Odd(BaseException): pass\nraise Odd('odd')", "Odd: odd"),
    "empty": ("", "lacks label, build, train, target, guide"),
    "incomplete": (GOOD.replace("def guide(x)", "def evaluate(x)"), "lacks guide"),
    "unmarked": (
        GOOD.replace("@hookimpl\ndef train", "def train"),
        f"lacks train {UNMARKED}",
    ),
    "no_function": (GOOD + "\nguide = 3", f"lacks guide {UNMARKED}"),
    "misspelt": (GOOD + "\n@hookimpl\ndef configgure(cases): pass", "PluginValidationError: unknown hook 'configgure'"),
    "signature": (GOOD.replace("train(net)", "train(net, weight)"), "{'weight'} are declared in the hookimpl"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_a_row_with_its_reason(name, install):
    source, reason = BROKEN[name]
    install(name, source)
    row = row_of(name)
    assert not row.usable
    assert reason in row.status
    assert "\n" not in row.status
    assert (row.distribution, row.version) == (f"knife-{name}", "1.2")
    with pytest.raises(TaskError, match=rf"task {name}: its plugin \(knife-{name}\) cannot be used: "):
        task(name)


def test_a_module_that_is_not_there(install):
    info = install("gone", GOOD)
    (info / "entry_points.txt").write_text("[knife]\ngone = no_such_plugin:thing\n")
    assert row_of("gone").status == "ModuleNotFoundError: No module named 'no_such_plugin'"


def test_a_value_that_names_no_module(install):
    info = install("garbled", GOOD)
    (info / "entry_points.txt").write_text("[knife]\ngarbled = not a module!\n")
    assert not row_of("garbled").usable


def test_ctrl_c_is_not_swallowed(install):
    install("slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        plugins()


@pytest.mark.parametrize("name", ["../evil", "Upper", "has space", "a" * 41, "dot.ted", "diffusion"])
def test_a_name_that_cannot_be_a_task(name, install):
    install("odd", GOOD, task_name=name)
    status = row_of(name).status
    assert status.startswith(("the name must be lowercase", "the name diffusion is taken by the model itself"))


def test_a_plugin_that_shadows_a_built_in_task_is_left_aside(install):
    install("shadow", "raise SystemExit('this is not imported')", task_name="regress")
    rows = [row for row in plugins() if row.task == "regress"]
    assert [row.distribution for row in rows] == ["knife-diffusion", "knife-shadow"]
    assert [row.status for row in rows] == ["ok", "the name regress is knife's own; rename the entry point"]
    assert task("regress").hooks == HOOKS


def test_the_user_says_whose_plugins_count(install, monkeypatch):
    install("one", GOOD, task_name="twice")
    install("two", GOOD, task_name="twice")
    monkeypatch.setenv("KNIFE_PLUGINS", "Knife_Two")
    assert [row.distribution for row in plugins() if row.task == "twice"] == ["knife-two"]
    assert task("twice").hooks == ("label", "build", "train", "target", "guide")
    monkeypatch.setenv("KNIFE_PLUGINS", "")
    assert names() == BUILTIN
    with pytest.raises(TaskError, match="task twice: no plugin offers it"):
        task("twice")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x80", b"no section\n", b"[knife\nx", b"[knife]\nno value\n", b"\0" * 99]
)
def test_metadata_that_cannot_be_read_hides_no_other(install, content):
    (install("damaged", GOOD) / "entry_points.txt").write_bytes(content)
    install("good", GOOD)
    assert {"good", *BUILTIN} <= set(names())
    assert task("good").name == "good"


def test_two_strangers_of_one_name(install):
    install("one", GOOD, task_name="twice")
    install("two", "import no_such_module", task_name="twice")
    assert [row.usable for row in plugins() if row.task == "twice"] == [False, False]
    with pytest.raises(TaskError, match="claimed by knife-one and knife-two"):
        task("twice")


def test_what_a_plugin_prints_goes_to_stderr(install, capsys):
    install("loud", "import sys\nprint('loud')\nprint('louder', file=sys.stdout)\n" + GOOD)
    assert row_of("loud").usable
    said = capsys.readouterr()
    assert said.out == ""
    assert "loud" in said.err


def test_a_plugin_that_takes_stdout_away(install, capsys):
    install("thief", "import io, sys\nsys.stdout = io.StringIO()\n" + GOOD)
    assert row_of("thief").usable
    print("still here")
    assert capsys.readouterr().out == "still here\n"


def test_a_task_asked_for_by_name_imports_no_other_plugin(install, monkeypatch):
    install("slow", "import builtins\nbuiltins.slow_was_imported = True\n" + GOOD)
    monkeypatch.setattr(builtins, "slow_was_imported", False, raising=False)
    task("regress")
    assert not builtins.slow_was_imported
    plugins()
    assert builtins.slow_was_imported


def test_metadata_without_a_name(install):
    info = install("nameless", GOOD)
    (info / "METADATA").unlink()
    assert row_of("nameless").distribution == "?"


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(
        TaskError, match=r"task age: no plugin offers it; choose from classify, regress, segment \(knife"
    ):
        task("age")


def task_with(**hooks):
    """Return a task of these hooks alone."""

    class Plugin:
        pass

    plugin = Plugin()
    for name, hook in hooks.items():
        setattr(plugin, name, hookimpl(hook))
    return Task("odd", manager_of(plugin), registered(plugin))


TARGETS = torch.tensor([0.0, 1.0, float("inf")])
X, T = torch.zeros(2, 1, 4, 4), torch.zeros(2)


def test_a_hook_that_raises_is_named():
    odd = task_with(train=lambda net: 1 / 0)
    with pytest.raises(TaskError, match="its hook train failed: ZeroDivisionError: division by zero") as caught:
        odd.train(None, X, T, T)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_hook_that_exits_is_named():
    with pytest.raises(TaskError, match="its hook guide failed: SystemExit"):
        task_with(guide=lambda x: sys.exit()).score(None, T)(X, T)


@pytest.mark.parametrize("error", [TargetError("no such class."), MemoryError(), torch.OutOfMemoryError("full")])
def test_what_is_not_the_plugins_fault_passes_through(error):
    def target(text):
        raise error

    with pytest.raises(type(error)) as caught:
        task_with(target=target).target("x", None, None, {})
    assert caught.value is error


GARBAGE = {
    "configure": (lambda: [1], r"returned a list \(\[1\]\); it must return a dict that JSON gives back as it was"),
    "label": (lambda: None, "returned nothing; it must return a tensor"),
    "build": (lambda: "net", r"returned a str \('net'\); it must return a torch.nn.Module"),
    "train": (lambda x: x, r"returned a tensor of shape \[2, 1, 4, 4\] and type float32; it must return one scalar"),
    "target": (lambda: 0.3, r"returned a float \(0.3\); it must return a tensor"),
    "guide": (lambda x: x.mean(), r"returned .* \[\] .*; it must return one score for each image, here of shape \[2\]"),
    "evaluate": (
        lambda x: {"value": x.mean() / 0},
        r"returned .*, not all finite; it must return for 'value' a tensor of shape \[2\]",
    ),
    "error": (
        lambda x: -x.mean((1, 2, 3)) - 1,
        r"returned a tensor .*; it must return a distance for each image, 0 or more, here of shape \[2\]",
    ),
    "value": (lambda: "much", r"returned a str \('much'\); it must return a finite number, or None"),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_garbage_is_refused(hook):
    returns, message = GARBAGE[hook]
    odd = task_with(**{hook: returns})
    calls = {
        "configure": lambda: odd.configure([]),
        "label": lambda: odd.label(None, {}),
        "build": lambda: odd.build(None, {}),
        "train": lambda: odd.train(None, X, T, T),
        "target": lambda: odd.target("", None, None, {}),
        "guide": lambda: odd.score(None, T)(X, T),
        "evaluate": lambda: odd.evaluate(None, X, T, T, {}),
        "error": lambda: odd.error(None, X, T, T, {}),
        "value": lambda: odd.value(None, {}),
    }
    with pytest.raises(TaskError, match=rf"task odd: its hook {hook} {message}"):
        calls[hook]()


def test_optional_hooks_may_be_left_out():
    nothing = task_with()
    assert nothing.configure([]) == {}
    assert nothing.evaluate(None, X, T, T, {}) == {}
    assert nothing.error(None, X, T, T, {}) is None
    assert nothing.value(None, {}) is None


def test_errors_count_from_the_target_in_the_users_units():
    def said(logits):
        return lambda x, t: torch.tensor(logits)

    config = {"mean": 40.0, "std": 10.0}
    ages = task("regress").error(said([[0.5], [2.0], [1.0]]), torch.zeros(3, 1), None, TARGETS, config)
    assert ages.tolist() == [5.0, 10.0, float("inf")]
    even = task("classify").error(said([[0.0, 0.0], [0.0, 99.0]]), X, T, torch.tensor([0, 1]), {})
    assert even.tolist() == [0.5, 0.0]
    found, wanted = [[[[1.0, 1.0]]], [[[-1.0, -1.0]]]], torch.tensor([[[[0.0, 1.0]]], [[[0.0, 0.0]]]])
    assert task("segment").error(said(found), X, T, wanted, {}).tolist() == pytest.approx([1 / 3, 0.0])


@pytest.mark.parametrize(
    ("value", "survives"),
    [
        ({"a": [1, 2.5, "x", None, {"b": True}]}, True),
        ({"a": (1, 2)}, False),
        ({1: "a"}, False),
        ({"a": float("inf")}, False),
        ({"a": {1, 2}}, False),
    ],
)
def test_what_json_gives_back(value, survives):
    assert survives_json(value) is survives


def test_the_built_in_entry_points_are_like_any_others():
    assert {point.value for point in entry_points(group="knife")} >= {f"knife_plugins.{name}" for name in BUILTIN}


# ---------------------------------------------------------------------------------------- what the built-in tasks learn


def case(name, mask=None, **values):
    """Return a case of a bright image whose mask covers a share of it, or that has no mask."""
    share = None if mask is None else (torch.arange(16.0).view(1, 4, 4) < 16 * mask).float()
    return Case(name, torch.arange(16.0).view(1, 4, 4) + 1, share, values)


LACKING = {  # the cases in order: which have what
    "regress": ([case("a"), case("b", age="30"), case("c", age="50"), case("d", age="n/a")], "age", ["b", "c"]),
    "classify": ([case("a"), case("b", sex="F"), case("c", sex="M"), case("d")], "sex", ["b", "c"]),
    "segment": ([case("a"), case("b", 0.5), case("c", 0.0)], "mask", ["b", "c"]),
}


@pytest.mark.parametrize("name", LACKING)
def test_a_case_without_label_is_refused_alone(name):
    cases, label, usable = LACKING[name]
    known = task(name)
    config = known.configure(cases)
    assert config["label"] == label
    labelled = []
    for one in cases:
        if one.name in usable:
            known.label(one, config)
            labelled.append(one.name)
        else:
            with pytest.raises(InputError, match=rf"^{one.name}: (has no|age is (missing|n/a), and no number)"):
                known.label(one, config)
    assert labelled == usable


def test_masks_count_wherever_they_are():
    cases = [case("a"), case("b", 0.0), case("c", 0.5)]
    config = task("regress").configure(cases)
    assert (config["label"], config["low"], config["high"]) == ("relative size of the mask", 0.0, pytest.approx(8 / 15))
    assert task("regress").configure(cases, "relative size of the mask") == {
        k: v for k, v in config.items() if k != "maps"
    }
    classes = {"label": "mask", "classes": ["diseased", "healthy"]}
    assert task("classify").configure(cases) == {**classes, "maps": 2}
    assert task("classify").configure(cases, "mask") == classes


def test_a_column_counts_from_half_of_the_cases_on():
    few = [case("a", 0.2, sex="F", age="30"), case("b", 0.0), case("c", 0.4)]
    assert task("regress").configure(few)["label"] == "relative size of the mask"
    assert task("classify").configure(few)["label"] == "mask"
    half = [*few[:2], case("d", 0.1, sex="M", age="31"), few[2]]
    assert task("regress").configure(half)["label"] == "age"
    assert task("classify").configure(half)["label"] == "sex"


@pytest.mark.parametrize(
    ("name", "label", "said"),
    [
        ("regress", None, "neither numbers nor masks"),
        ("regress", "age", "no image has a number as age"),
        ("classify", None, "neither classes nor masks"),
        ("classify", "age", "no image has age"),
        ("segment", None, "no image has a mask"),
    ],
)
def test_data_that_nobody_can_learn_from_are_refused(name, label, said):
    with pytest.raises(InputError, match=rf"{name}: .*{said}"):
        task(name).configure([case("a"), case("b")], label)
