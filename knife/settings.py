"""What a translation wants and how it walks: the knobs and their defaults, without torch, so that --help shows them."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

from knife.errors import SettingsError

LEVEL = 475  # L, where no calibration says better
SPREAD = 1.5  # power by which the levels of a walk lie closer near 0, where an image's details are made and lost
STRENGTH = 0.2  # where the loop cannot be closed
BATCH, MOST_AT_ONCE = 8, 64  # images at once where nobody says how many: at first, and where there is memory for them
FIRST, ROUNDS = 0.1, 3  # the strength that the closed loop begins with, and the times that it decodes an image


class Quality(NamedTuple):
    """How finely a translation walks: steps of encoding, and again of decoding, and which of `knife.ddim`'s solvers."""

    steps: int  # at most; there are no more than levels
    solver: str


SOLVER_NAMES = ("ab2", "dpm2m", "ddim")
PRECISIONS = ("auto", "float32", "bfloat16")
QUALITIES = {"draft": Quality(10, "ab2"), "standard": Quality(20, "ab2"), "paper": Quality(1000, "ddim")}
STANDARD = QUALITIES["standard"]


def one_of(option: str, value: str, known: Collection[str]) -> None:
    """Raise SettingsError if an option has none of the values known."""
    if value not in known:
        raise SettingsError(f"--{option} {value}: unknown; give one of {', '.join(known)}.")


class Wish(NamedTuple):
    """What one task shall make of the images.

    target: in the task's own terms, as 0.3, healthy, mask.nii; by:+15% and by:-0.02 count from what the image has.
    weight: of its guidance against the usual. window: it guides from noise levels above the first, up to the second.
    """

    task: str
    target: str
    weight: float = 1.0
    window: tuple[int, int] | None = None


@dataclass(frozen=True)
class Settings:
    """How a translation walks."""

    noise_level: int | None = None  # L: how far an image is encoded; None: as the guide is calibrated, else LEVEL
    quality: str = "standard"  # draft, standard or paper: steps and solver where these are None
    steps: int | None = None  # of encoding, and again of decoding
    solver: str | None = None  # ab2, dpm2m, or ddim as in the paper
    scale: float | None = None  # the paper's s, one for all
    strength: float | None = None  # size of the guidance against eps, see `knife.ddim.balanced`; with neither, the
    tolerance: float | None = None  # strength of each image is raised until it is so near its target
    batch_size: int | None = None  # images at once; None: BATCH, and more on a GPU that has the memory
    control: bool = True  # decode unguided too, and add to the input only what guidance changed
    clamp: bool = False  # keep the predicted clean image x0 within the value range while decoding
    auto_region: bool = False  # decode again, and let change only where guidance changed most
    extrapolate: bool = False  # let targets lie beyond the values that a guide was trained on
    max_reconstruction: float = 0.1  # error of the unguided round trip, of the range, above which an image is refused
    precision: str = "auto"  # or float32, bfloat16: what networks compute in; images and steps stay in float32
    dtype: str = "same"  # what NIfTI results are stored as: the input's integer type if every value fits it, or float32

    @property
    def closed(self) -> bool:
        """Tell whether the strength is adjusted for each image."""
        return self.scale is None and self.strength is None

    def __post_init__(self) -> None:
        """Raise SettingsError if a quality, solver or precision is unknown, or the guidance is given twice."""
        for option, value, known in (
            ("quality", self.quality, QUALITIES),
            ("solver", self.solver, SOLVER_NAMES),
            ("precision", self.precision, PRECISIONS),
        ):
            if value is not None:
                one_of(option, value, known)
        if self.scale is not None and self.strength is not None:
            raise SettingsError("--scale and --strength: two ways to say the same; give one of them.")

    def at(self, level: int) -> "Settings":
        """Return settings that say a noise level, if they do not yet, steps and solver."""
        level = level if self.noise_level is None else self.noise_level
        usual = QUALITIES[self.quality]
        steps = min(usual.steps, max(level, 1)) if self.steps is None else self.steps
        return replace(self, noise_level=level, steps=steps, solver=self.solver or usual.solver)


DEFAULTS = Settings()
