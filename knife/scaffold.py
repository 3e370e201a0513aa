"""Writes a new task plugin: a package that works, to be turned into another task.

The files of `template/` are its text; `$name` in them becomes the task's name.
"""

from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory

from knife.errors import InputError, SettingsError
from knife.files import make_folder, sync, write_safely
from knife.tasks import NAME, RESERVED, names

TEMPLATE = Path(__file__).parent / "template"
PLACES = {  # file of the template -> where it goes
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "plugin.py": "knife_$name.py",
    "test_contract.py": "tests/test_contract.py",
}


def new_plugin(name: str, folder: Path) -> Path:
    """Write a working plugin package for a task of this name to folder/knife-<name>, whole or not at all; return it.

    Raises:
        SettingsError: if the name is not a name, or another task has it.
        InputError: if the package's folder exists, or `folder` is a file.
    """
    if not NAME.fullmatch(name):
        raise SettingsError(f"NAME {name!r}: give lowercase letters, digits and _, a letter first, 40 at most.")
    if name in (*RESERVED, *names()):
        raise SettingsError(f"NAME {name}: a task of that name is there already (knife plugins list); choose another.")
    package = folder / f"knife-{name}"
    if package.exists():
        raise InputError(f"{package}: exists already; choose another name or folder, or remove it.")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--folder {folder}: a file; give a folder.")
    make_folder(folder)
    with TemporaryDirectory(dir=folder, prefix=".knife-") as partial:
        for source, place in PLACES.items():
            path = Path(partial, "package", Template(place).substitute(name=name))
            text = (TEMPLATE / source).read_text(encoding="utf-8")
            write_safely(path, Template(text).substitute(name=name).encode())
        Path(partial, "package").rename(package)
        sync(folder)
    return package
