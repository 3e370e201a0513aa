"""Do the tests mean it? The code is changed a little, one place at a time, and some test must fail each time.

    python benchmarks/mutants.py [--only schedule,files] [--match TEXT] [--least 85]

A mutant has one thing changed: a comparison, an operator, a number (by one, or doubled), a text, a condition, the order
of arguments, min for max, what is returned; or one thing left out: a statement, an argument, a decorator, a `suppress`,
a method such as `.sqrt()`. What refusals say, type annotations and the table of presets stay as they are: a test of
them would only say them again. The tests of the module run, the quickest first, until one fails; that is a mutant
killed. One that makes a test take longer than 20 seconds and ten times as long as usual has been noticed too: it counts
as killed, and as hung. Mutants that no test could kill stand in EQUIVALENT with the reason, and are counted apart; one
that is killed all the same, or is there no more, is an error of that table.

Every mutant lives in a process forked from this one, which has imported the libraries; no file of knife is changed.
Prints a table with the survivors and, last, one JSON line. The exit code is 1 if a subject has less than `--least`
percent of its mutants killed, or if EQUIVALENT is wrong.
"""

import argparse
import ast
import gc
import importlib
import importlib.util
import json
import os
import platform
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SUBJECTS = {  # the modules of each, and the test modules of each of those
    "schedule": {"schedule": ("schedule",)},
    "sampler": {"ddim": ("ddim",), "ddpm": ("ddpm",)},
    "files": {"files": ("files", "crashes")},
    "cards": {"spec": ("spec",), "checkpoint": ("checkpoint",)},
}
TABLES = ["PRESETS", "FACES", "BRATS", "GUIDE", "SMALL", "JUDGE_UNET", "JUDGE_ENCODER", "SMALL_GUIDE", "DAMAGED"]
EQUIVALENT: dict[str, tuple[str, ...]] = {  # why no test can tell them apart -> mutants
    "one is as good a factor as a divisor": ("ddim.settled: one.scale * ones -> one.scale / ones",),
    "all are as long, by the lines above": (
        "ddim.pull: zip(guidance, slopes, strict=True) -> zip(guidance, slopes)",
        "ddim.pull: strict=True -> strict=False",
        "ddim.pull: zip(slopes, scales, strict=True) -> zip(slopes, scales)",
        "ddim.pull: strict=True -> strict=False #2",
        "ddim.walk: zip(pairwise(levels), pairwise(places), strict=True) -> zip(pairwise(levels), pairwise(places))",
        "ddim.walk: strict=True -> strict=False",
        "ddim.places_of: zip(t, alpha_bars, *single, strict=True) -> zip(t, alpha_bars, *single)",
        "ddim.places_of: strict=True -> strict=False",
    ),
    "a slice that ends behind the last is whole": ("ddim.walk: 0 -> -1",),
    "no 8-bit value is 0.999": (
        "ddpm.discretized_log_likelihood: x > 0.999 -> x >= 0.999",
        "ddpm.discretized_log_likelihood: x < -0.999 -> x <= -0.999",
    ),
    "there is one alone": (
        "ddim.pull: slopes[0] -> slopes[-1]",
        "ddim.pull: scales[0] -> scales[-1]",
        "ddim.slope: torch.autograd.grad(reached.sum(), x)[0] -> torch.autograd.grad(reached.sum(), x)[-1]",
        "schedule.Schedule.alpha_bar: torch.cumprod(1 - self.beta, 0) -> torch.cumprod(1 - self.beta, -1)",
        "ddpm.coefficients: beta[0] -> beta[-1]",
    ),
    "a number in a tensor is taken for a number": (
        "schedule.Schedule.digest: self.alpha_bar.numpy().tobytes() -> self.alpha_bar.numpy()",
    ),
    "one is as long as the other, and so is a number as its negative": (
        "spec.ImageSpec.for_judge: side & -side -> side | -side",
    ),
    "no side that can be halved lies between 64 and 65, or twice these": ("spec: 64 -> 65",),
    "done once more by what follows: by view(torch.uint8), which has no gradient, and by reshape, which copies": (
        "checkpoint.save: t.detach() -> t",
        "checkpoint.seal: tensors[name].contiguous() -> tensors[name]",
    ),
    "neither is more than there can be": ("checkpoint.refuse_larger: 0 -> -1",),
    "how much is kept changes no result": (
        "ddim: 64 -> 65",
        "ddim: 64 -> 63",
        "schedule.alpha_bar_on: lru_cache(8) -> lru_cache(9)",
        "schedule.alpha_bar_on: lru_cache(8) -> lru_cache(7)",
        "ddpm: @lru_cache(8) -> no decorator",
        "ddpm.coefficients: lru_cache(8) -> lru_cache(9)",
        "ddpm.coefficients: lru_cache(8) -> lru_cache(7)",
    ),
    "where os has the first of these flags, it lacks the second, and the file is open for writing anyway": (
        "files.regular: getattr(os, 'O_NONBLOCK', 0) -> getattr(os, 'O_NONBLOCK', 1)",
        "files.regular: getattr(os, 'O_NONBLOCK', 0) -> getattr(os, 'O_NONBLOCK', -1)",
        "files.regular: getattr(os, 'O_BINARY', 0) -> getattr(os, 'O_BINARYx', 0)",
        "files.write_safely: getattr(os, 'O_BINARY', 0) -> getattr(os, 'O_BINARYx', 0)",
        "files.write_safely: getattr(os, 'O_BINARY', 0) -> getattr(os, 'O_BINARY', 1)",
    ),
    "a name that nobody else thinks of, either way": (
        "files.write_safely: secrets.token_hex(8) -> secrets.token_hex(9)",
        "files.write_safely: secrets.token_hex(8) -> secrets.token_hex(7)",
    ),
    "torch.cat takes the precision of the finer one, and 1 is 1 in any": (
        "schedule.Schedule.alpha_bar: torch.ones(1, dtype=torch.float64) -> torch.ones(1)",
    ),
}
CALLED_EQUIVALENT = {name for names in EQUIVALENT.values() for name in names}

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
NAMES = {"min": "max", "any": "all", "minimum": "maximum", "zeros_like": "ones_like", "ones": "zeros"}
SYMMETRIC = ("min", "max", "torch.minimum", "torch.maximum")
NAMES |= {new: old for old, new in NAMES.items()}
PATIENCE = 20  # seconds
SPARE = 2 * 2**30  # bytes of memory that a mutant may take beyond what this process has
LONG = 160  # letters of a description
LARGEST = 64 * 2**20  # bytes of a file that it may write


@dataclass(frozen=True)
class Mutant:
    """A module with one thing changed: where, what, and the whole of its source."""

    module: str
    line: int
    name: str
    source: str


@dataclass
class Tally:
    """What became of the mutants of a subject."""

    mutants: int = 0
    killed: int = 0
    hung: int = 0
    equivalent: int = 0
    survived: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # said to be equivalent, but killed

    @property
    def share(self) -> float:
        """Return how many percent are killed of those that can be."""
        return 100 * self.killed / max(1, self.mutants - self.equivalent)


# ------------------------------------------------------------------------------------------------------------- changes


def mutants_of(module: str) -> list[Mutant]:
    """Return every mutant of a module of knife."""
    return mutants_in((ROOT / "knife" / f"{module}.py").read_text(), module)


def mutants_in(text: str, module: str) -> list[Mutant]:
    """Return every mutant of a source, as it is read from top to bottom; the same text is not tried twice."""
    tree = ast.parse(text)
    seen, names, found = {ast.unparse(tree)}, Counter[str](), []
    for parent, name, at, where in places(tree, module):
        node = getattr(parent, name) if at is None else getattr(parent, name)[at]
        for new in changes(node):
            put(parent, name, at, ast.copy_location(new, node))
            source = ast.unparse(tree)
            put(parent, name, at, node)
            if source in seen:
                continue
            seen.add(source)
            words = f"{where}: {shortened(described(parent, node), described(parent, node, new))}"
            names[words] += 1
            words += f" #{names[words]}" if names[words] > 1 else ""
            found.append(Mutant(module, getattr(node, "lineno", getattr(parent, "lineno", 0)), words, source))
    return found


Place = tuple[ast.AST, str, int | None, str]  # a node, its field, the index there if it is a list, and the function


def places(parent: ast.AST, where: str) -> Iterator[Place]:
    """List where something may be changed, but for annotations, what refusals say, docstrings and tables."""
    for name, value in ast.iter_fields(parent):
        if name in ("annotation", "returns") or isinstance(parent, ast.Raise):
            continue
        for at, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(node, ast.AST) or is_left_out(node):
                continue
            yield parent, name, at, where
            named = isinstance(node, ast.FunctionDef | ast.ClassDef)
            yield from places(node, f"{where}.{node.name}" if named else where)


def is_left_out(node: ast.AST) -> bool:
    """Tell docstrings, types that stand for themselves, and tables."""
    match node:
        case ast.Expr(ast.Constant(str())) | ast.Subscript(ast.Name("Callable")):
            return True
        case ast.Assign([ast.Name(name)]):
            return name in TABLES
    return False


def put(parent: ast.AST, name: str, at: int | None, new: ast.AST) -> None:
    """Put a node into its place."""
    if at is None:
        setattr(parent, name, new)
    else:
        getattr(parent, name)[at] = new


def described(parent: ast.AST, node: ast.AST, new: ast.AST | None = None) -> str:
    """Return what stands there, with enough around it to be told from others, on one line."""
    if isinstance(node, ast.Constant | ast.comprehension) and isinstance(parent, ast.expr | ast.keyword):
        for name, value in ast.iter_fields(parent):
            if value is node or (isinstance(value, list) and node in value):
                at = value.index(node) if isinstance(value, list) else None
                put(parent, name, at, new or node)
                text = ast.unparse(parent)
                put(parent, name, at, node)
                return " ".join(text.split())
    if isinstance(node, ast.FunctionDef) and isinstance(new or node, ast.FunctionDef):
        return " ".join(f"@{ast.unparse(decorator)}" for decorator in (new or node).decorator_list) or "no decorator"
    if isinstance(node, ast.If | ast.While | ast.With | ast.ExceptHandler):
        return ast.unparse(new or node).strip().splitlines()[0] + (
            " raise" if isinstance(new, ast.ExceptHandler) else ""
        )
    return " ".join(ast.unparse(new or node).split())


def shortened(old: str, new: str) -> str:
    """Return what is changed into what, with no more than a few words around it if it is long."""
    if len(old) + len(new) > LONG:
        same = in_common(old, new)
        rest = in_common(old[same:][::-1], new[same:][::-1])
        old, new = (f"..{text[max(0, same - 20) : len(text) - rest + 10][:LONG]}.." for text in (old, new))
    return f"{old} -> {new}"


def in_common(one: str, other: str) -> int:
    """Return how many letters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Return what may stand in the place of a node."""
    match node:
        case ast.Compare(left, ops, rights):
            pairs = [(i, other()) for i, op in enumerate(ops) for other in COMPARISONS[type(op)]]
            yield from (ast.Compare(left, [*ops[:i], other, *ops[i + 1 :]], rights) for i, other in pairs)
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            yield ast.BinOp(left, OPERATORS[type(op)](), right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.And() if isinstance(op, ast.Or) else ast.Or(), values)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(value):
            yield from (ast.Constant(other) for other in other_values(value))
        case ast.Call():
            yield from other_calls(node)
        case ast.IfExp(test, body, orelse) if not decides(test):
            yield ast.IfExp(negated(test), body, orelse)
        case ast.comprehension(target, iterated, [test]) if not decides(test):
            yield ast.comprehension(target, iterated, [negated(test)], 0)
        case ast.stmt() | ast.excepthandler():
            yield from other_statements(node)


def other_values(value: object) -> list[object]:
    """Return what may stand for a constant."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, value - 1]
        case float():
            return [2 * value or 1.0]
        case str():
            return [f"{value}x"]
    return []


def other_calls(call: ast.Call) -> Iterator[ast.expr]:
    """Return calls of the opposite, with fewer arguments or swapped ones, or what a method is called of."""
    match call.func:
        case ast.Name(name) if name in NAMES:
            yield ast.Call(ast.Name(NAMES[name]), call.args, call.keywords)
        case ast.Attribute(value, name) if name in NAMES:
            yield ast.Call(ast.Attribute(value, NAMES[name]), call.args, call.keywords)
        case ast.Attribute(value) if not call.args and not call.keywords:
            yield value
    match call.args:
        case [first, second, *rest] if not (isinstance(first, ast.Starred) or ast.unparse(call.func) in SYMMETRIC):
            yield ast.Call(call.func, [second, first, *rest], call.keywords)
    for i, keyword in enumerate(call.keywords):
        fewer = call.keywords[:i], call.keywords[i + 1 :]
        yield ast.Call(call.func, call.args, [*fewer[0], *fewer[1]])
        if keyword.arg in NAMES:
            yield ast.Call(call.func, call.args, [*fewer[0], ast.keyword(NAMES[keyword.arg], keyword.value), *fewer[1]])


def other_statements(node: ast.AST) -> Iterator[ast.AST]:
    """Return what may stand for a statement or a handler of exceptions."""
    match node:
        case ast.Return(value) if value and not (isinstance(value, ast.Constant) and value.value is None):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(ast.Call()) | ast.Raise() | ast.AugAssign():
            yield ast.Pass()
        case ast.Break() | ast.Continue():
            yield ast.Continue() if isinstance(node, ast.Break) else ast.Break()
        case ast.If(test, body, orelse) | ast.While(test, body, orelse) if not decides(test):
            yield type(node)(negated(test), body, orelse)
        case ast.With([ast.withitem(ast.Call(ast.Name("suppress")))], body):
            yield ast.If(ast.Constant(True), body, [])
        case ast.With([first, ast.withitem(ast.Call(ast.Name("suppress")))], body):
            yield ast.With([first], body)
        case ast.ExceptHandler(kind, name):
            yield ast.ExceptHandler(kind, name, [ast.Raise()])
        case ast.FunctionDef(decorator_list=[_, *_]):
            fields = dict(ast.iter_fields(node))
            for i in range(len(node.decorator_list)):
                fewer = [*node.decorator_list[:i], *node.decorator_list[i + 1 :]]
                yield ast.FunctionDef(**fields | {"decorator_list": fewer})


def decides(test: ast.expr) -> bool:
    """Tell a condition that is changed into its opposite where it stands."""
    return (isinstance(test, ast.Compare) and len(test.ops) == 1) or isinstance(test, ast.UnaryOp)


def negated(test: ast.expr) -> ast.expr:
    """Return the opposite of a condition."""
    return ast.UnaryOp(ast.Not(), test)


# ------------------------------------------------------------------------------------------------------------- running


class Watcher:
    """A plugin of pytest that runs the quickest tests first, times them, and does not wait for any forever."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.noted = seconds, Counter[str]()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort the tests."""
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 0.0))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """End this process if a test takes too long."""
        signal.alarm(PATIENCE + round(10 * self.seconds.get(nodeid, PATIENCE)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up what a test takes."""
        self.noted[report.nodeid] += report.duration


def run_tests(tests: tuple[str, ...], folder: Path, watcher: Watcher) -> int:
    """Run test modules in this process until a test fails; return the exit code of pytest."""
    paths = [str(ROOT / "tests" / f"test_{name}.py") for name in tests]
    options = ["-x", "--tb=no", "--assert=plain", "-pno:cacheprovider", f"--rootdir={ROOT}", f"-c{ROOT}/pyproject.toml"]
    return pytest.main([*paths, *options, f"--basetemp={folder}/tests"], plugins=[watcher])


def outcome(mutant: Mutant | None, tests: tuple[str, ...], folder: Path, seconds: dict[str, float]) -> int:
    """Run tests in a forked process against a mutant, or the code as it is; return how it ended, as `os.fork` tells.

    0 is a mutant that nobody noticed. What the process noted is left in the folder.
    """
    number = os.fork()
    if not number:
        code = 1
        try:
            confine()
            if mutant:
                install(mutant)
            watcher = Watcher(seconds)
            code = run_tests(tests, folder, watcher)
            if not mutant:
                (folder / "noted").write_text(json.dumps({"seconds": watcher.noted, "modules": [*sys.modules]}))
        finally:
            os._exit(int(code))
    _, status = os.waitpid(number, 0)
    with suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)  # what it has forked
    return os.waitstatus_to_exitcode(status)


def confine() -> None:
    """Let this process say nothing, and end if it never comes to test; refuse it too much memory, and large files."""
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    signal.alarm(4 * PATIENCE)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + SPARE, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, LARGEST))
    from hypothesis import Phase, settings

    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate])  # the smallest example is not asked
    settings.load_profile("mutants")


def install(mutant: Mutant) -> None:
    """Put a mutant where its module is imported from."""
    spec = importlib.util.find_spec(f"knife.{mutant.module}")
    assert spec is not None
    assert spec.loader is not None
    code = compile(mutant.source, str(spec.origin), "exec")
    spec.loader.get_code = lambda name: code  # type: ignore[attr-defined]
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    setattr(importlib.import_module("knife"), mutant.module, module)


def undisturbed(tests: tuple[str, ...], folder: Path) -> dict[str, float]:
    """Run tests against the code as it is, twice: for the libraries, which are imported here, and for their times."""
    for _ in range(2):
        if outcome(None, tests, folder, {}):
            raise SystemExit(f"the tests of {', '.join(tests)} fail as it is; mend them first.")
        noted = json.loads((folder / "noted").read_text())
        for name in noted["modules"]:
            if name not in sys.modules and name.split(".")[0] not in (
                "knife",
                "knife_plugins",
                *sys.stdlib_module_names,
            ):
                with suppress(Exception), warnings.catch_warnings(action="ignore"):
                    if not (name.startswith(("test_", "conftest", "crashes")) or "pytest" in name):
                        importlib.import_module(name)
    gc.freeze()  # what is here now need not be looked through in each process
    return noted["seconds"]


def try_all(modules: dict[str, tuple[str, ...]], folder: Path, match: str) -> Tally:
    """Try every mutant of some modules."""
    tally = Tally()
    for module, tests in modules.items():
        seconds = undisturbed(tests, folder)
        for mutant in mutants_of(module):
            if match not in mutant.name:
                continue
            code = outcome(mutant, tests, folder, seconds)
            tally.mutants += 1
            tally.killed += code != 0
            tally.hung += code == -signal.SIGALRM
            if code and mutant.name in CALLED_EQUIVALENT:
                tally.wrong.append(mutant.name)
                print(f"    killed, so not equivalent: {mutant.name}", flush=True)
            elif mutant.name in CALLED_EQUIVALENT:
                tally.equivalent += 1
            elif not code:
                tally.survived.append(f"knife/{module}.py:{mutant.line}  {mutant.name}")
                print(f"    {tally.survived[-1]}", flush=True)
    return tally


def unknown(only: list[str]) -> list[str]:
    """Return what EQUIVALENT tells of mutants that there are none of."""
    modules = [module for name in only for module in SUBJECTS[name]]
    names = {mutant.name for module in modules for mutant in mutants_of(module)}
    return [name for name in CALLED_EQUIVALENT if name.split(":")[0].split(".")[0] in modules and name not in names]


def main() -> int:
    """Try the mutants of every subject and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SUBJECTS), help="subjects, with commas between")
    parser.add_argument("--match", default="", help="only mutants whose description has this text")
    parser.add_argument("--least", type=float, default=85.0, help="percent of a subject that must be killed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    only, began, tallies = options.only.split(","), time.perf_counter(), dict[str, Tally]()
    gone = unknown(only)
    for name in gone:
        print(f"    EQUIVALENT tells of no mutant: {name}")
    columns = ("mutants", "killed", "hung", "equivalent", "survived")
    print(f"{'':<10}" + "".join(f"{column:>12}" for column in columns) + f"{'percent':>12}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        sys.pycache_prefix, sys.dont_write_bytecode = f"{folder}/compiled", False  # of knife and its tests, once
        for name in only:
            tally = tallies[name] = try_all(SUBJECTS[name], Path(folder), options.match)
            counts = [tally.mutants, tally.killed, tally.hung, tally.equivalent, len(tally.survived)]
            print(f"{name:<10}" + "".join(f"{count:12}" for count in counts) + f"{tally.share:12.1f}", flush=True)
    about = {"torch": torch.__version__, "machine": platform.machine(), "seconds": round(time.perf_counter() - began)}
    results = {name: {**vars(tally), "percent": round(tally.share, 1)} for name, tally in tallies.items()}
    print(json.dumps({"benchmark": "mutants", **about, "subjects": results}))
    return 1 if gone or any(tally.wrong or tally.share < options.least for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
