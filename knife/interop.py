"""Takes over networks trained elsewhere: weights in the layout of guided-diffusion (Dhariwal and Nichol, 2021).

The layers are those of `knife.unet` under other names (`foreign_names`); the linear layers of attention stand there as
convolutions one pixel wide. Their rows lie in the same order: [q, k, v][head][dim] in the attention pool,
[head][q, k, v][dim] in the blocks. The latter is the family's default: weights of several heads that were trained with
its `use_new_attention_order` look the same and come out wrong.

The shapes tell nearly all of an architecture (`read_architecture`). They do not tell the number of heads and the image
size (of which only an attention pool bears a trace), nor the schedule and the value range: these are said (`Told`), or
taken from a preset, or assumed to be the paper's. What the outputs of a task mean stands in no such file either: see
`LABELS`.

This is the only place that opens a pickle, and only one that holds nothing but tensors: no code in it can run.
"""

import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from knife.checkpoint import Card, digest
from knife.errors import ModelError, SettingsError
from knife.schedule import Schedule
from knife.spec import PRESETS, ImageSpec, attending
from knife.spec import preset as look_up
from knife.unet import Architecture, Attention, Block, Encoder, UNet

# What a task remembers of its labels when nobody said: raw outputs as values from 0 to 1, classes by their numbers
# (as many as the file has outputs), one mask.
LABELS: dict[str, dict[str, Any]] = {
    "diffusion": {},
    "regress": {"label": "value", "low": 0.0, "high": 1.0, "mean": 0.0, "std": 1.0},
    "classify": {"label": "class"},
    "segment": {"label": "mask"},
}
UNETS, ENCODERS = ("diffusion", "segment"), ("regress", "classify")  # which network a kind is
CHANNELS = {1: ("grey",), 3: ("r", "g", "b"), 4: ("t1", "t1ce", "t2", "flair")}  # by number; others: 0, 1, ...
GROUPS = 32  # of every norm of the family

BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "affine": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
ATTENTION = {"attention.norm": "norm", "attention.qkv": "qkv", "attention.out": "proj_out"}
POOL = {"head.position": "out.2.positional_embedding", "head.qkv": "out.2.qkv_proj", "head.out": "out.2.c_proj"}
LAST = {
    "attention": "out.2.c_proj.weight",
    "mean": "out.3.weight",
    "spatial": "out.2.weight",
    "spatial-norm": "out.3.weight",
}
ONE_WIDE = ("attention.qkv.weight", "attention.out.weight", "head.qkv.weight", "head.out.weight")


@dataclass(frozen=True)
class Told:
    """What a file of weights does not tell, as the user says it; None takes a default."""

    value_range: tuple[float, float] | None = None  # the least and the largest value of the images; -1, 1
    channels: tuple[str, ...] | None = None  # their names, in order; by their number (`CHANNELS`)
    config: Mapping[str, Any] | None = None  # what the task shall remember of its labels; `LABELS`
    size: tuple[int, int] | None = None  # height, width in pixels; the paper's for so many channels
    heads: int | None = None  # of every attention; the paper's
    head_width: int | None = None  # channels a head, instead of heads
    schedule: Schedule | None = None  # linear with T = 1000, the family's
    label: int | None = None  # the class that a class-conditional network is asked with; the mean of all

    def __post_init__(self) -> None:
        low, high = self.value_range or (-1.0, 1.0)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise SettingsError(f"--value-range {low:g},{high:g}: give two numbers, the lower one first.")
        if self.heads and self.head_width:
            raise SettingsError("--heads and --head-width: two ways to say the same; give one of them.")
        for name, value in {"heads": self.heads, "head-width": self.head_width, "size": min(self.size or (1,))}.items():
            if value is not None and value < 1:
                raise SettingsError(f"--{name} {value}: give a number above 0.")

    def refuse(self, names: Sequence[str], why: str) -> None:
        """Refuse what is said besides though the source tells it already.

        Raises:
            SettingsError: naming the option.
        """
        for name in names:
            if getattr(self, name) is not None:
                raise SettingsError(f"--{name.replace('_', '-')}: {why}; leave it out.")


NOTHING = Told()


def import_guided_diffusion(
    path: Path, kind: str, dataset: str, told: Told = NOTHING, preset: str | None = None
) -> tuple[Card, dict[str, Tensor]]:
    """Read a guided-diffusion file as a model of knife: its card and its state dict, which `checkpoint.save` stores.

    Args:
        path: a `model*.pt` or `ema_*.pt`.
        kind: diffusion, regress, classify or segment.
        dataset: what the images are called.
        told: what the file does not tell.
        preset: the architecture it must have; None reads the architecture from the shapes of the weights.

    Raises:
        ModelError: if the file cannot be read, is unsafe to read, or has another architecture (every difference named).
        SettingsError: if an option has an impossible value.
    """
    check_kind(kind)
    row = look_up(preset) if preset is not None else None
    state = read_state_dict(path)
    if row:
        told.refuse(("size", "heads", "head_width"), f"--preset {preset} says it")
        names = told.channels or channel_names(row.channels or input_channels(state))
        spec = row.spec(kind, names)
    else:
        spec = read_spec(state, kind, told, path)
    card = new_card(kind, dataset, spec, told, outputs(state, spec.encoder.pool), path)
    if not row:
        known = spec.size if size_of_pool(state, spec.encoder) else told.size
        card = with_assumed(card, replace(told, size=known))
    return without_label(card, convert(state, card, path), told.label)


def check_kind(kind: str, known: Sequence[str] = tuple(LABELS)) -> None:
    """Refuse a kind of network that is not among the known ones.

    Raises:
        SettingsError: naming them.
    """
    if kind not in known:
        raise SettingsError(f"--as {kind}: no such kind of network is imported here; give one of {', '.join(known)}.")


def new_card(kind: str, dataset: str, spec: ImageSpec, told: Told, count: int, source: Path) -> Card:
    """Return the card of a network of `count` outputs that is imported from a file."""
    labels = dict(told.config) if told.config is not None else dict(LABELS[kind])
    if kind == "classify" and "classes" not in labels:
        labels["classes"] = [str(index) for index in range(count)]
    training = {"imported": source.name, "sha256": digest(source)}
    spec = replace(spec, value_range=told.value_range or (-1.0, 1.0))
    return Card(kind, dataset, spec, told.schedule or Schedule("linear", 1000), labels, training=training)


def with_assumed(card: Card, told: Told) -> Card:
    """Record in a card what nobody told, as the options that would say otherwise."""
    arch = card.spec.unet if card.kind in UNETS else card.spec.encoder
    found: dict[str, str] = {}
    if told.heads is None and told.head_width is None:
        found |= {"--head-width": str(arch.head_width)} if arch.head_width else {"--heads": str(arch.heads)}
    if told.size is None:
        found["--size"] = str(card.spec.size[0])
    if told.schedule is None:
        found["--schedule"] = card.schedule.kind
    if told.value_range is None:
        found["--value-range"] = "{:g},{:g}".format(*card.spec.value_range)
    return replace(card, training={**card.training, "assumed": found})


def channel_names(count: int) -> tuple[str, ...]:
    """Return the usual names of so many channels."""
    return CHANNELS.get(count) or tuple(map(str, range(count)))


def input_channels(state: Mapping[str, Tensor]) -> int:
    """Return for how many channels the first convolution was made; 1 if there is none."""
    first = state.get("input_blocks.0.0.weight")
    return first.shape[1] if first is not None and first.ndim == 4 else 1


def outputs(state: Mapping[str, Tensor], pool: str) -> int:
    """Return how many outputs an encoder has; 2 if its last layer is missing."""
    last = state.get(LAST[pool])
    return last.shape[0] if last is not None and last.ndim > 1 else 2


def without_label(card: Card, weights: dict[str, Tensor], label: int | None) -> tuple[Card, dict[str, Tensor]]:
    """Add the vector of one class to the bias of the time embedding for good, and drop the label embedding.

    knife asks every network without a label, and a network that was never trained so answers badly. Of a
    class-conditional network it therefore keeps one class, or what stands for none: the mean of all.

    Raises:
        SettingsError: if there is no such class.
    """
    rows = weights.get("embedding.label.weight")
    count = 0 if rows is None else len(rows)
    if label is not None and not 0 <= label < count:
        advice = f"there are 0 to {count - 1}; give one of them" if count else "there are no classes; leave it out"
        raise SettingsError(f"--class {label}: {advice}.")
    if rows is None:
        return card, weights
    folded = {name: tensor for name, tensor in weights.items() if name != "embedding.label.weight"}
    kept = rows.mean(0) if label is None else rows[label]
    folded["embedding.linear2.bias"] = weights["embedding.linear2.bias"] + kept
    unet, encoder = replace(card.spec.unet, classes=0), replace(card.spec.encoder, classes=0)
    training = {**card.training, "class": "mean" if label is None else label}
    return replace(card, spec=replace(card.spec, unet=unet, encoder=encoder), training=training), folded


# --- Architectures ----------------------------------------------------------------------------------------------------


def read_spec(state: Mapping[str, Tensor], kind: str, told: Told, path: Path) -> ImageSpec:
    """Read from the shapes of guided-diffusion's weights what images a network sees, and its architecture.

    Every way to part its blocks into levels is tried; the one that fits every shape of the file is the true one.

    Raises:
        ModelError: if none fits, or several do, or it is a network of another kind.
        SettingsError: if an option does not fit, or the image size must be given.
    """
    is_unet = any(name.startswith("output_blocks.") for name in state)
    if is_unet != (kind in UNETS):
        found, kinds = ("a U-Net", UNETS) if is_unet else ("an encoder", ENCODERS)
        raise ModelError(f"{path}: holds {found}, and --as {kind} is none; give --as {' or --as '.join(kinds)}.")
    names = told.channels or channel_names(input_channels(state))
    if len(names) != input_channels(state):
        raise SettingsError(f"channels {', '.join(names)}: {path} was made for {input_channels(state)}; name each.")
    tried = {arch: misfit(arch, state, is_unet, told.size) for arch in read_architectures(state, is_unet, told)}
    fitting = [arch for arch, why in tried.items() if not why]
    if not fitting:
        nearest = min(tried.values(), key=len, default="its layers have other names or widths")
        advice = "; --size may be wrong" if told.size and "positional_embedding is" in nearest else ""
        raise ModelError(
            f"{path}: no network of the guided-diffusion family; what comes nearest differs: {nearest}{advice}."
        )
    if len(fitting) > 1:
        ways = ", ".join(f"{len(arch.mult)} x {arch.res_blocks}" for arch in fitting)
        raise ModelError(
            f"{path}: its shapes fit several networks (levels x blocks: {ways}); give --size, or the --preset it has."
        )
    arch = fitting[0]
    check_heads(arch)
    size = told.size or size_of_pool(state, arch) or usual_size(len(names))
    arch = replace(arch, outputs=fixed_outputs(kind, len(names), arch.outputs or 0, path))
    return ImageSpec(names, size, arch, arch)


def read_architectures(state: Mapping[str, Tensor], is_unet: bool, told: Told) -> Iterator[Architecture]:
    """Yield every way to part the blocks of a file into levels, with all else as the shapes or the user tell."""
    paper = look_up("paper-faces").diffusion if is_unet else look_up("paper-faces").encoder
    said = told.heads or told.head_width
    width = side(state, "time_embed.0.weight", 1)
    total = len({name.split(".")[1] for name in state if name.startswith("input_blocks.")})
    pool = paper.pool if is_unet else read_pool(state)
    for levels in (count for count in range(1, total // 2 + 1) if width and total % count == 0):
        stride = total // levels  # blocks of a level: the first convolution or a halving of the grid, then the others
        first = [f"input_blocks.{1 + stride * level}" for level in range(levels)]
        widths = [side(state, f"{name}.0.out_layers.3.weight", 0) for name in first]
        if all(w and w % GROUPS == 0 and w % width == 0 for w in widths):
            yield Architecture(
                width,
                mult=tuple(w // width for w in widths),
                res_blocks=stride - 1,
                attention=tuple(2**level for level, name in enumerate(first) if f"{name}.1.qkv.weight" in state),
                heads=(told.heads or 1) if said else paper.heads,
                head_width=told.head_width if said else paper.head_width,
                scale_shift=side(state, "input_blocks.1.0.emb_layers.1.weight", 0) == 2 * widths[0],
                updown=levels > 1 and not any(name.endswith(".0.op.weight") for name in state),
                classes=side(state, "label_emb.weight", 0),
                pool=pool,
                outputs=side(state, "out.2.weight" if is_unet else LAST[pool], 0),
            )


def read_pool(state: Mapping[str, Tensor]) -> str:
    """Return how an encoder makes its outputs: one of `knife.unet.POOLS`."""
    if "out.2.positional_embedding" in state:
        return "attention"
    if "out.3.weight" not in state:
        return "spatial"
    return "mean" if state["out.3.weight"].ndim == 4 else "spatial-norm"


def misfit(arch: Architecture, state: Mapping[str, Tensor], is_unet: bool, size: tuple[int, int] | None) -> str:
    """Say where the weights of a file differ from an architecture; nothing if they fit."""
    size = size or size_of_pool(state, arch) or (arch.factor(), arch.factor())
    with torch.device("meta"):
        ends = input_channels(state), arch.outputs or 1
        net = UNet(arch, *ends) if is_unet else Encoder(arch, *ends, size)
    return "; ".join(visible_differences(net, foreign_names(net), state))


def side(state: Mapping[str, Tensor], name: str, axis: int) -> int:
    """Return the length of a tensor along an axis; 0 if there is none."""
    tensor = state.get(name)
    return tensor.shape[axis] if tensor is not None and tensor.ndim > axis else 0


def size_of_pool(state: Mapping[str, Tensor], arch: Architecture) -> tuple[int, int] | None:
    """Return the image size that an attention pool was made for, which has a position for each pixel and the mean."""
    edge = math.isqrt(max(side(state, "out.2.positional_embedding", 1) - 1, 0))
    return (edge * arch.factor(), edge * arch.factor()) if edge else None


def usual_size(channels: int) -> tuple[int, int]:
    """Return the image size of the paper's networks for so many channels.

    Raises:
        SettingsError: if it has none.
    """
    sizes = {row.channels: row.size for row in PRESETS.values() if row.name.startswith("paper-")}
    if channels not in sizes:
        raise SettingsError(f"--size: not told by weights for {channels} channels; give the image size in pixels.")
    return sizes[channels]


def check_heads(arch: Architecture) -> None:
    """Refuse heads that do not divide the channels of every attention.

    Raises:
        SettingsError: naming the option.
    """
    for channels in attending(arch):
        if channels % (arch.head_width or arch.heads):
            option = f"--head-width {arch.head_width}" if arch.head_width else f"--heads {arch.heads}"
            raise SettingsError(
                f"{option}: does not divide the {channels} channels of an attention; give --heads or --head-width as "
                f"the network was trained."
            )


def fixed_outputs(kind: str, channels: int, count: int, path: Path) -> int | None:
    """Return `Architecture.outputs` for a network of a kind that has so many: None where knife would build as many.

    Raises:
        ModelError: if a network of this kind cannot have so many.
    """
    fitting = {"diffusion": {2 * channels, channels}, "regress": {1}, "classify": {max(count, 2)}}.get(kind, {count})
    if count not in fitting:
        wanted = " or ".join(map(str, sorted(fitting)))
        raise ModelError(
            f"{path}: has {count} outputs, and --as {kind} needs {wanted}; give the kind it was trained as."
        )
    usual = {"diffusion": 2 * channels, "classify": count}.get(kind, 1)
    return None if count == usual else count


# --- Names ------------------------------------------------------------------------------------------------------------


def foreign_names(net: nn.Module) -> dict[str, str]:
    """Return guided-diffusion's name for every tensor of a network's state dict, by knife's name.

    Raises:
        ModelError: if the network is neither a U-Net nor an encoder of knife.
    """
    if not isinstance(net, UNet | Encoder):
        raise ModelError(f"guided-diffusion has no {type(net).__name__}; only a UNet and an Encoder can be taken over.")
    modules = dict(foreign_modules(net))
    names = {}
    for name in net.state_dict():
        module, _, leaf = name.rpartition(".")
        names[name] = modules[name] if name in modules else f"{modules[module]}.{leaf}"
    return names


def foreign_modules(net: UNet | Encoder) -> Iterator[tuple[str, str]]:
    """Yield knife's and guided-diffusion's names of all layers, from input to output."""
    yield "embedding.linear1", "time_embed.0"
    yield "embedding.linear2", "time_embed.2"
    yield "embedding.label", "label_emb"
    yield "down.conv_in", "input_blocks.0.0"
    for index, name in enumerate(net.down.blocks, start=1):
        yield from foreign_block(f"down.blocks.{name}", f"input_blocks.{index}", 0, "op")
    yield from foreign_block("down.middle0", "middle_block", 0)
    yield from foreign_block("down.middle1", "middle_block", 2)
    yield "norm_out", "out.0"
    if isinstance(net, UNet):
        yield from foreign_up(net)
        yield "conv_out", "out.2"
    elif net.spatial:
        yield from ((f"head.{index}", f"out.{index}") for index in range(4))
    else:
        yield from POOL.items()
        yield "head", "out.3"


def foreign_up(net: UNet) -> Iterator[tuple[str, str]]:
    """Yield the names of the way up, where an upsampling stands at the end of the block before it."""
    index, length = -1, 0
    for name, block in net.up.items():
        if not name.endswith("_up"):
            index, length = index + 1, 0
        yield from foreign_block(f"up.{name}", f"output_blocks.{index}", length, "conv")
        length += 2 if isinstance(block, Block) and isinstance(block.attention, Attention) else 1


def foreign_block(ours: str, theirs: str, place: int, resampling: str = "") -> Iterator[tuple[str, str]]:
    """Yield the names of a block, or of a resampling convolution, that stands at a place of a foreign sequence."""
    if resampling:
        yield ours, f"{theirs}.{place}.{resampling}"
    for our, their in BLOCK.items():
        yield f"{ours}.{our}", f"{theirs}.{place}.{their}"
    for our, their in ATTENTION.items():
        yield f"{ours}.{our}", f"{theirs}.{place + 1}.{their}"


def foreign_shape(name: str, shape: Sequence[int]) -> list[int]:
    """Return the shape there of a tensor that has this shape under knife's name."""
    if name.endswith(ONE_WIDE):
        return [*shape, 1]
    return [*shape, 1, 1] if name == "head.weight" else list(shape)  # which is a 1x1 convolution behind the mean


# --- Weights ----------------------------------------------------------------------------------------------------------


def convert(state: Mapping[str, Tensor], card: Card, path: Path) -> dict[str, Tensor]:
    """Return guided-diffusion's weights in float32 under knife's names, for the network that a card describes.

    Args:
        state: what `read_state_dict` returned.
        card: the network.
        path: the file, to be named in messages.

    Raises:
        ModelError: if the architectures differ, naming every difference, or weights are not finite.
    """
    with torch.device("meta"):
        net = card.build()
    names = foreign_names(net)
    found = [*hidden_differences(net), *visible_differences(net, names, state)]
    if found:
        raise ModelError(
            f"{path}: not the {card.kind} network that the preset describes: {'; '.join(found)}. "
            f"Give the preset and the kind it was trained as (knife presets), or leave --preset out."
        )
    check_finite(state, path)
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    return {ours: state[theirs].to(torch.float32, copy=True).reshape(shapes[ours]) for ours, theirs in names.items()}


def check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights of which some are no numbers.

    Raises:
        ModelError: naming them.
    """
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise ModelError(f"{path}: {', '.join(broken)} hold values that are not finite; its training diverged.")


def hidden_differences(net: nn.Module) -> Iterator[str]:
    """Yield what the preset has and the family never had, though the shapes might agree."""
    groups = {module.num_groups for module in net.modules() if isinstance(module, nn.GroupNorm)}
    if groups != {GROUPS}:
        yield f"norms have {GROUPS} groups in the file and {max(groups - {GROUPS})} in the preset"
    if any(module.downscale_factor != 1 for module in net.modules() if isinstance(module, nn.PixelUnshuffle)):
        yield "the file has no stem of pixels as channels and the preset has one"


def visible_differences(net: nn.Module, names: Mapping[str, str], state: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield which tensors are missing from a file, which it has besides, and which are of another shape."""
    yield from differences({names[k]: foreign_shape(k, tensor.shape) for k, tensor in net.state_dict().items()}, state)


def differences(wanted: Mapping[str, Sequence[int]], state: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield in which tensors a file differs from the names and shapes that are wanted."""
    missing = [name for name in wanted if name not in state]
    if missing:
        yield f"it lacks {', '.join(missing)}"
    unexpected = [name for name in state if name not in wanted]
    if unexpected:
        yield f"it also has {', '.join(unexpected)}"
    for name, shape in wanted.items():
        if name in state and list(state[name].shape) != list(shape):
            yield f"{name} is {list(state[name].shape)} instead of {list(shape)}"


# --- Files ------------------------------------------------------------------------------------------------------------


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a plain state dict that torch.save wrote, without running anything that a file may hold.

    Raises:
        ModelError: if the file is missing or damaged, or holds anything but floating-point tensors by name.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file.")
    check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ModelError(f"{path}: holds more than tensors, perhaps a program; save its state dict alone.") from error
    except Exception as error:  # torch raises a dozen classes at damaged files
        raise ModelError(f"{path}: damaged ({type(error).__name__}); copy it again.") from error
    if not isinstance(state, dict) or not state or not all(map(is_weight, state.keys(), state.values())):
        raise ModelError(f"{path}: {contents(state)}, not a plain state dict; give a model*.pt or ema_*.pt file.")
    return {name: tensor.detach() for name, tensor in state.items()}


def check_archive(path: Path) -> None:
    """Refuse what torch.save did not write: pickles, tars, TorchScript, compressed or overlapping entries, damage."""
    advice = "save its state dict with torch.save (PyTorch 1.6 or later)"
    try:
        if not zipfile.is_zipfile(path):
            raise ModelError(f"{path}: not in torch.save's present format, and no other is opened; {advice}.")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.filename.endswith("/constants.pkl") or "/code/" in entry.filename for entry in entries):
                raise ModelError(f"{path}: a TorchScript program, which is not opened; {advice}.")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ModelError(f"{path}: has compressed entries, which torch.save does not write; {advice}.")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise ModelError(f"{path}: claims to hold more than its {path.stat().st_size} bytes; {advice}.")
            damaged = archive.testzip()
    except ModelError:
        raise
    except Exception as error:  # zipfile raises half a dozen classes at damaged files
        raise ModelError(f"{path}: damaged ({type(error).__name__}); copy it again.") from error
    if damaged:
        raise ModelError(f"{path}: damaged (the checksum of {damaged} is wrong); copy it again.")


def is_weight(name: object, value: object) -> bool:
    """Tell whether an entry is a named floating-point tensor whose values all lie in the file."""
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.is_floating_point()
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )


def contents(state: object) -> str:
    """Describe what a file held instead of weights."""
    if not isinstance(state, dict) or not state:
        return f"an empty {type(state).__name__}" if state == {} else f"a {type(state).__name__}"
    odd = [str(name) for name, value in state.items() if not is_weight(name, value)]
    return f"a dict in which {', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''} are no weights"
