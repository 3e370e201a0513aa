"""Image-to-image translation with one diffusion model and many tasks.

    knife.translate(...)      translate images: what the command line calls
    knife.load_model(path)    a stored network, called as net(x, t)
    knife.Wish                a task and what it shall make of them
    knife.Settings            noise level, steps, strength and the like
    knife.Image               an image and where it came from
    knife.hookimpl            marks the hooks of a task plugin

Nothing heavy is imported before it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from knife import errors
from knife.errors import KnifeError

if TYPE_CHECKING:
    from knife.checkpoint import load_model
    from knife.hookspecs import hookimpl
    from knife.image import Image
    from knife.settings import Settings, Wish
    from knife.translation import translate

__version__ = "0.1.0"
__all__ = ["Image", "KnifeError", "Settings", "Wish", "errors", "hookimpl", "load_model", "translate"]

LAZY = {
    "Image": "image",
    "Settings": "settings",
    "Wish": "settings",
    "hookimpl": "hookspecs",
    "load_model": "checkpoint",
    "translate": "translation",
}


def __dir__() -> list[str]:
    """Name what there is, imported yet or not."""
    return sorted([*__all__, "__version__"])


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in LAZY:
        raise AttributeError(f"module 'knife' has no attribute {name!r}")
    return getattr(import_module(f"knife.{LAZY[name]}"), name)
