"""Takes over networks trained elsewhere: weights in the layout of guided-diffusion (Dhariwal and Nichol, 2021).

The layers are those of `knife.unet` under other names (`foreign_names`); the linear layers of attention stand there as
convolutions one pixel wide. Their rows lie in the same order: [q, k, v][head][dim] in the attention pool,
[head][q, k, v][dim] in the blocks. The latter is the family's default: weights of several heads that were trained with
its `use_new_attention_order` look the same and come out wrong.

Shapes do not tell everything. The number of heads and the image size (of which only an attention pool bears a trace)
are taken from the preset; the schedule is the family's, linear with T = 1000; the value range is an option. What the
outputs of a task mean stands in no such file either: see `LABELS`.

This is the only place that opens a pickle, and only one that holds nothing but tensors: no code in it can run.
"""

import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from knife.checkpoint import Card, digest
from knife.errors import ModelError, SettingsError
from knife.schedule import Schedule
from knife.spec import preset as look_up
from knife.unet import Attention, Block, Encoder, UNet

# What a task remembers of its labels when nobody said: raw outputs as values from 0 to 1, classes by their numbers
# (as many as the file has outputs), one mask.
LABELS: dict[str, dict[str, Any]] = {
    "diffusion": {},
    "regress": {"label": "value", "low": 0.0, "high": 1.0, "mean": 0.0, "std": 1.0},
    "classify": {"label": "class"},
    "segment": {"label": "mask"},
}
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


def import_guided_diffusion(
    path: Path,
    preset: str,
    kind: str,
    dataset: str,
    value_range: tuple[float, float] = (-1.0, 1.0),
    channels: Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> tuple[Card, dict[str, Tensor]]:
    """Read a guided-diffusion file as a model of knife: its card and its state dict, which `checkpoint.save` stores.

    Args:
        path: a `model*.pt` or `ema_*.pt`.
        preset: the architecture it was trained with, and all that its shapes do not tell.
        kind: diffusion, regress, classify or segment.
        dataset: what the images are called.
        value_range: the least and the largest value of the images it was trained on.
        channels: their names, in order; None names them by their number (`CHANNELS`).
        config: what the task shall remember of its labels; None takes `LABELS`.

    Raises:
        ModelError: if the file cannot be read, is unsafe to read, or has another architecture (every difference named).
        SettingsError: if an option has an impossible value.
    """
    row = look_up(preset)
    low, high = value_range
    if kind not in LABELS:
        raise SettingsError(f"--as {kind}: no such kind of network; give one of {', '.join(LABELS)}.")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise SettingsError(f"--value-range {low:g},{high:g}: give two numbers, the lower one first.")
    state = read_state_dict(path)
    names = tuple(channels) if channels else channel_names(row.channels or input_channels(state))
    spec = row.spec(kind, names, (low, high))
    labels = dict(config) if config is not None else dict(LABELS[kind])
    if kind == "classify" and "classes" not in labels:
        labels["classes"] = [str(index) for index in range(outputs(state, spec.encoder.pool))]
    training = {"imported": path.name, "sha256": digest(path)}
    card = Card(kind, dataset, spec, Schedule("linear", 1000), labels, training=training)
    return card, convert(state, card, path)


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
    differences = [*hidden_differences(net), *visible_differences(net, names, state)]
    if differences:
        raise ModelError(
            f"{path}: not the {card.kind} network that the preset describes: {'; '.join(differences)}. "
            f"Give the preset and the kind it was trained as (knife presets)."
        )
    broken = [theirs for theirs in names.values() if not state[theirs].isfinite().all()]
    if broken:
        raise ModelError(f"{path}: {', '.join(broken)} hold values that are not finite; its training diverged.")
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    return {ours: state[theirs].to(torch.float32, copy=True).reshape(shapes[ours]) for ours, theirs in names.items()}


def hidden_differences(net: nn.Module) -> Iterator[str]:
    """Yield what the preset has and the family never had, though the shapes might agree."""
    groups = {module.num_groups for module in net.modules() if isinstance(module, nn.GroupNorm)}
    if groups != {GROUPS}:
        yield f"norms have {GROUPS} groups in the file and {max(groups - {GROUPS})} in the preset"
    if any(module.downscale_factor != 1 for module in net.modules() if isinstance(module, nn.PixelUnshuffle)):
        yield "the file has no stem of pixels as channels and the preset has one"


def visible_differences(net: nn.Module, names: Mapping[str, str], state: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield which tensors are missing from a file, which it has besides, and which are of another shape."""
    wanted = {names[name]: foreign_shape(name, tensor.shape) for name, tensor in net.state_dict().items()}
    missing = [name for name in wanted if name not in state]
    if missing:
        yield f"it lacks {', '.join(missing)}"
    unexpected = [name for name in state if name not in wanted]
    if unexpected:
        yield f"it also has {', '.join(unexpected)}"
    for name, shape in wanted.items():
        if name in state and list(state[name].shape) != shape:
            yield f"{name} is {list(state[name].shape)}, in the preset {shape}"


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
