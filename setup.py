"""Build the compiled ops into the package where torch is at hand; all else stands in pyproject.toml.

    pip install .                        needs no compiler: the ops are compiled on first use, or plain torch serves
    pip install --no-build-isolation .   torch is importable here: the ops are compiled now, if there is a compiler

Nothing that goes wrong here stops an installation.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent))


def extensions() -> list[Extension]:
    """List the libraries that can be compiled here: for cpu, and for cuda if torch was built for it."""
    try:
        import torch

        from knife import native
        from knife.errors import OpsError
    except Exception as problem:  # no torch in an isolated build, or one that does not load
        print(f"knife: ops are left to be compiled on first use: {problem}", file=sys.stderr)
        return []
    found = []
    for device in ["cpu", "cuda"] if torch.version.cuda else ["cpu"]:
        try:
            native.compiler(device)
            sources = [f"csrc/{source.name}" for source in native.sources(device)]
            found.append(Extension(f"knife.{native.library_name(device)}", sources, optional=True))
        except OpsError as problem:
            warnings.warn(f"knife: installed without compiled ops: {problem}", stacklevel=1)
    return found


class BuildOps(build_ext):
    """Compile as knife does on first use, by one command in one place."""

    def build_extension(self, extension: Any) -> None:
        """Compile one library; if that fails, warn and go on without."""
        from knife import native
        from knife.errors import OpsError

        library = Path(self.get_ext_fullpath(extension.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        device = next(device for device in native.SOURCES if extension.name == f"knife.{native.library_name(device)}")
        try:
            native.build(device, library)
        except OpsError as problem:
            warnings.warn(f"knife: installed without compiled ops: {problem}", stacklevel=1)


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildOps})
