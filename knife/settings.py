"""How a translation walks: the knobs and their defaults, without torch, so that --help can show them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How a translation walks."""

    noise_level: int = 475  # L: how far an image is encoded
    steps: int = 50  # of encoding, and again of decoding
    scale: float | None = None  # the paper's s, one for all; None: `strength` makes one for each image and step
    strength: float = 0.2  # size of the guidance against that of the noise prediction, see `knife.ddim.balanced`
    guide_above: int = 0  # noise levels from this one down are walked without guidance
    batch_size: int = 8
    control: bool = True  # decode unguided too, and add to the input only what guidance changed
    clamp: bool = False  # keep the predicted clean image x0 within the value range while decoding
    dtype: str = "same"  # what NIfTI results are stored as: the input's integer type if every value fits it, or float32


DEFAULTS = Settings()
