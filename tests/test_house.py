"""The plan of the code as a test: arrows point down, torch stays out of --help, hooks are documented and tested."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from knife import hookspecs

ROOT = Path(__file__).parents[1]
FLOORS = {
    8: ("sweep", "demo", "contract", "scaffold", "evaluate", "bench"),
    7: ("translation",),
    6: ("train", "doctor", "inputs", "steering"),
    5: ("stacks", "report", "calibrate", "job", "batches", "resume", "sheets"),
    4: ("prepared", "survey", "pairs", "outputs", "interop", "diffusers"),
    3: ("layouts", "data", "balance", "checkpoint", "judges"),
    2: ("ddpm", "ddim", "tasks", "masks", "volume", "dicom", "panel", "phantom", "preservation", "patients", "graphs"),
    1: (
        "schedule", "spec", "unet", "layers", "image", "nifti", "picture", "native", "ops", "hookspecs", "devices",
        "ranks",
    ),
    0: ("errors", "files", "lock", "finite", "settings", "bootstrap", "streams"),
}  # fmt: skip
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}
SAME_FLOOR = {
    ("files", "errors"), ("lock", "errors"), ("lock", "files"), ("resume", "job"), ("sheets", "job"),
    ("batches", "job"), ("finite", "errors"), ("settings", "errors"), ("finite", "files"), ("spec", "unet"),
    ("ops", "native"), ("graphs", "ddim"), ("layers", "ops"), ("unet", "ops"), ("unet", "layers"),
    ("image", "nifti"), ("image", "picture"), ("dicom", "volume"),
    ("data", "layouts"), ("diffusers", "interop"),
}  # fmt: skip
ONLY = {  # a library: the modules that may import it
    "typer": {"cli"},
    "rich": {"cli"},
    "pluggy": {"tasks", "hookspecs"},
    "nibabel": {"nifti", "phantom"},
    "PIL": {"picture", "panel"},
    "pydicom": {"dicom"},
    "jinja2": {"report"},
}
PLUGINS_MAY = {"knife.hookspecs", "knife.errors", "knife.unet", "knife.image", "knife.masks"}
MODULES = sorted(path for path in (ROOT / "knife").glob("*.py") if path.stem not in ("__init__", "__main__"))
COMMAND_LINE = [ROOT / "knife" / "__main__.py", *sorted((ROOT / "knife" / "cli").glob("*.py"))]


def imports(path: Path) -> set[str]:
    """Return the modules a file imports at run time; what stands under TYPE_CHECKING does not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" if node.module == "knife" else node.module for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_down(path: Path) -> None:
    assert path.stem in FLOOR_OF, "give the new module a floor"
    for name in imports(path):
        if name.startswith("knife."):
            other = name.split(".")[1]
            if other in FLOOR_OF and (path.stem, other) not in SAME_FLOOR:
                assert FLOOR_OF[other] < FLOOR_OF[path.stem], f"{path.stem} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_libraries_stay_where_they_belong(path: Path) -> None:
    for name in imports(path):
        library = name.split(".")[0]
        assert library not in ONLY or path.stem in ONLY[library], f"{path.stem} imports {library}"


@pytest.mark.parametrize("path", sorted({*(ROOT / "knife").rglob("*.py")} - {*COMMAND_LINE}), ids=str)
def test_nothing_below_imports_the_command_line(path: Path) -> None:
    assert not any(name.startswith("knife.cli") for name in imports(path))


@pytest.mark.parametrize("path", sorted((ROOT / "plugins").glob("*.py")), ids=lambda path: path.stem)
def test_plugins_have_no_privileges(path: Path) -> None:
    assert {name for name in imports(path) if name.split(".")[0] == "knife"} <= PLUGINS_MAY


@pytest.mark.parametrize("module", ["knife", "knife.cli"])
def test_torch_is_not_imported_before_it_is_needed(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_hooks_are_documented() -> None:
    for name in (*hookspecs.REQUIRED, *hookspecs.OPTIONAL, *hookspecs.JUDGE):
        assert inspect.getdoc(getattr(hookspecs, name))
        assert f"`{name}`" in (ROOT / "README.md").read_text(), f"the README's table of hooks lacks {name}"


def test_the_map_in_the_readme_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in MODULES:
        assert path.name in readme, f"the README's map lacks {path.name}"


def test_every_benchmark_can_be_imported() -> None:
    """They lie outside the package, where no type checker looks."""
    names = [path.stem for path in sorted((ROOT / "benchmarks").glob("*.py"))]
    assert "quality" in names
    command = [sys.executable, "-c", f"import {', '.join(names)}"]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
