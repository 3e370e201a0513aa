"""Exchanges U-Nets with diffusers: folders that `diffusers.UNet2DModel.from_pretrained` opens, and those it saved.

The network there is the same, layer by layer, under other names (`module_names`). Only attention is laid out
otherwise: the rows [head][q, k, v][dim] of one linear layer stand apart as to_q, to_k and to_v, [head][dim] each.

What its options can say of an architecture is in `unet_config`, which serves both ways: a folder whose options differ
from those that knife would write for its network holds a network that knife cannot be.

knife asks a network without a label and diffusers always wants one, so a label embedding does not travel: it is left
out on the way there, and folded into the time embedding on the way here (`interop.without_label`).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from knife.checkpoint import Card, describe, load, write_safely
from knife.errors import KnifeError, ModelError, SettingsError
from knife.interop import (
    NOTHING,
    UNETS,
    Told,
    channel_names,
    check_finite,
    check_kind,
    contents,
    differences,
    fixed_outputs,
    is_weight,
    new_card,
    usual_size,
    with_assumed,
    without_label,
)
from knife.spec import ImageSpec, possible
from knife.unet import Architecture, Attention, UNet

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
LONGEST_CONFIG = 1_000_000  # bytes

# diffusers' own values of its options. `unet_config` sets those that vary among knife's networks; the others are as
# knife's networks are built.
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
BLOCK_TYPES = {  # by whether a level attends, and whether residual blocks change the grid
    (False, False): ("DownBlock2D", "UpBlock2D"),
    (False, True): ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
    (True, False): ("AttnDownBlock2D", "AttnUpBlock2D"),
    (True, True): ("AttnDownBlock2D", "AttnUpBlock2D"),
}
ENDS = {
    "embedding.linear1": "time_embedding.linear_1",
    "embedding.linear2": "time_embedding.linear_2",
    "embedding.label": "class_embedding",
    "down.conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "affine": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
ATTENTION = {"attention.norm": "group_norm", "attention.qkv": "to_qkv", "attention.out": "to_out.0"}  # to_q, to_k, to_v


def export_diffusers(path: Path, folder: Path) -> Card:
    """Write a stored U-Net as a folder that `diffusers.UNet2DModel.from_pretrained` opens; return its card.

    The card travels in the weights' file, so that `import_diffusers` knows channels, value range and schedule.

    Raises:
        ModelError: if the model cannot be read, or diffusers cannot express it, naming what.
        SettingsError: if there is something in the folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"-o {folder}: is there already; give a new or empty folder.")
    stored = describe(path)
    if stored.card.kind not in UNETS:
        raise ModelError(
            f"{path}: a {stored.card.kind} network, and only a U-Net ({', '.join(UNETS)}) can be exported."
        )
    net = load(stored)
    assert isinstance(net, UNet)
    arch, ends = replace(stored.card.spec.unet, classes=0), (net.down.conv_in.in_channels, net.conv_out.out_channels)
    try:
        config = unet_config(arch, *ends, stored.card.spec.size)
    except SettingsError as error:
        raise ModelError(f"{path}: cannot be exported to diffusers: {error}") from error
    weights = {name: tensor for name, tensor in to_diffusers(net).items() if not name.startswith("class_embedding.")}
    about = {"format": "pt", "card": json.dumps(stored.card.to_json())}
    write_safely(folder / WEIGHTS, serialise({k: tensor.contiguous() for k, tensor in weights.items()}, about))
    write_safely(folder / CONFIG, json.dumps({"_class_name": "UNet2DModel", **config}, indent=2).encode())
    return stored.card


def import_diffusers(folder: Path, kind: str, dataset: str, told: Told = NOTHING) -> tuple[Card, dict[str, Tensor]]:
    """Read a diffusers folder as a model of knife: its card and its state dict, which `checkpoint.save` stores.

    Args:
        folder: what `UNet2DModel.save_pretrained` or `export_diffusers` wrote.
        kind: diffusion or segment.
        dataset: what the images are called.
        told: what the folder does not tell.

    Raises:
        ModelError: if the folder cannot be read, or its network is none of knife's, naming every option that differs.
        SettingsError: if an option has an impossible value.
    """
    check_kind(kind, UNETS)
    told.refuse(("heads", "head_width"), f"{folder / CONFIG} says it")
    config = read_config(folder)
    state, card = read_weights(folder / WEIGHTS)
    told = recalled(told, card)
    try:
        arch, net = read_network(config, len(state))
    except SettingsError as error:
        raise ModelError(f"{folder / CONFIG}: no network of knife: {error}") from error
    channels = config["in_channels"]
    names = told.channels or channel_names(channels)
    if len(names) != channels:
        raise SettingsError(f"channels {', '.join(names)}: {folder} was made for {channels}; name each.")
    told = replace(told, size=told.size or read_size(config))
    arch = replace(arch, outputs=fixed_outputs(kind, channels, config["out_channels"], folder))
    spec = ImageSpec(names, told.size or usual_size(channels), arch, arch)
    card = with_assumed(new_card(kind, dataset, spec, told, 1, folder / WEIGHTS), replace(told, heads=1))
    weights = from_diffusers(state, net, folder / WEIGHTS)
    if not config["flip_sin_to_cos"]:  # its waves come sine first, knife's cosine first
        weights["embedding.linear1.weight"] = weights["embedding.linear1.weight"].roll(arch.width // 2, 1)
    return without_label(card, weights, told.label)


def recalled(told: Told, card: Card | None) -> Told:
    """Fill in what the user did not say from the card of the model that was exported, if there is one."""
    if card is None:
        return told
    return replace(
        told,
        value_range=told.value_range or card.spec.value_range,
        channels=told.channels or card.spec.channels,
        schedule=told.schedule or card.schedule,
    )


# --- Options ----------------------------------------------------------------------------------------------------------


def unet_config(arch: Architecture, channels: int, outputs: int, size: tuple[int, int] | None) -> dict[str, Any]:
    """Return the options with which `diffusers.UNet2DModel` is a U-Net of this architecture.

    Raises:
        SettingsError: if there are none, naming the setting that diffusers lacks.
    """
    if arch.stem != 1:
        raise SettingsError(f"stem {arch.stem}: diffusers has no stem of pixels as channels; train a preset without.")
    if arch.mult[0] != 1:
        raise SettingsError(
            f"mult {arch.mult}: diffusers embeds t in as many waves as the first level has channels, so that the first "
            f"multiplier must be 1."
        )
    attends = [2**level in arch.attention for level in range(len(arch.mult))]
    types = [BLOCK_TYPES[attend, arch.updown] for attend in attends]
    resampling = "resnet" if arch.updown else "conv"
    return DEFAULTS | {
        "sample_size": list(size) if size else None,
        "in_channels": channels,
        "out_channels": outputs,
        "down_block_types": [down for down, _ in types],
        "up_block_types": [up for _, up in reversed(types)],
        "block_out_channels": [arch.width * mult for mult in arch.mult],
        "layers_per_block": arch.res_blocks,
        "downsample_type": resampling,
        "upsample_type": resampling,
        "attention_head_dim": head_dim(arch),
        "norm_num_groups": arch.groups,
        "attn_norm_num_groups": arch.groups,  # its middle attention has no norm if this is None beside scale_shift
        "resnet_time_scale_shift": "scale_shift" if arch.scale_shift else "default",
        "num_class_embeds": arch.classes or None,
    }


def head_dim(arch: Architecture) -> int | None:
    """Return the channels a head, which diffusers wants equal in all attentions; None stands there for one head each.

    Raises:
        SettingsError: if they are not equal.
    """
    channels = [arch.width * mult for level, mult in enumerate(arch.mult) if 2**level in arch.attention]
    channels.append(arch.width * arch.mult[-1])  # the middle always attends
    heads = [width // arch.head_width if arch.head_width else arch.heads for width in channels]
    dims = sorted({width // count for width, count in zip(channels, heads, strict=True)})
    if len(dims) > 1 and set(heads) != {1}:
        option = f"head_width {arch.head_width}" if arch.head_width else f"heads {arch.heads}"
        widths = " and ".join(map(str, dims))
        raise SettingsError(f"{option}: makes heads of {widths} channels, and in diffusers all have as many.")
    return dims[0] if len(dims) == 1 else None


def read_network(config: Mapping[str, Any], tensors: int) -> tuple[Architecture, UNet]:
    """Return the architecture that diffusers' options describe, and the network without memory for its weights.

    Args:
        config: what `read_config` returned.
        tensors: how many the folder has; no network of more blocks is built.

    Raises:
        SettingsError: if it is none of knife's, naming every option that differs.
    """
    try:
        if config["layers_per_block"] * len(config["block_out_channels"]) > tensors:
            raise SettingsError(f"layers_per_block {config['layers_per_block']}: more than the file has weights.")
        arch = possible(read_architecture(config))
        ends = config["in_channels"], config["out_channels"]
        wanted, found = unet_config(arch, *ends, None), canonical(config, arch)
        differing = [key for key in wanted if found[key] != wanted[key]]
        with torch.device("meta"):
            net = UNet(arch, *ends)
    except KnifeError:
        raise
    except Exception as error:  # options of wrong types and impossible sizes fail in many ways
        raise SettingsError(f"its options fit no network ({type(error).__name__}: {error}).") from error
    if differing:
        raise SettingsError("; ".join(f"{key} is {config[key]} instead of {wanted[key]}" for key in differing) + ".")
    return arch, net


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture that comes nearest to diffusers' options."""
    widths, types, dim = config["block_out_channels"], config["down_block_types"], config["attention_head_dim"]
    plain = [name for name in types[:-1] if not name.startswith("Attn")]  # these have their resampling in the name
    if any(width % widths[0] for width in widths):
        raise SettingsError(f"block_out_channels {widths}: only multiples of the first are possible.")
    return Architecture(
        widths[0],
        mult=tuple(width // widths[0] for width in widths),
        res_blocks=config["layers_per_block"],
        attention=tuple(2**level for level, name in enumerate(types) if name.startswith("Attn")),
        head_width=dim,
        scale_shift=config["resnet_time_scale_shift"] == "scale_shift",
        updown="ResnetDownsampleBlock2D" in plain if plain else config["downsample_type"] == "resnet",
        groups=config["norm_num_groups"],
        classes=config["num_class_embeds"] or 0,
    )


def canonical(config: Mapping[str, Any], arch: Architecture) -> dict[str, Any]:
    """Return options spelt as `unet_config` spells them: what has no effect, or two names, is made the same."""
    found = {**config, "sample_size": None, "dropout": 0.0, "flip_sin_to_cos": True, "num_train_timesteps": None}
    for way in ("down", "up"):
        *others, last = config[f"{way}_block_types"]
        plain, resnet = (BLOCK_TYPES[False, updown][way == "up"] for updown in (False, True))
        if last in (plain, resnet):  # which are the same where the grid changes no more
            found[f"{way}_block_types"] = [*others, resnet if arch.updown else plain]
        if not any(name.startswith("Attn") for name in others):  # the others have it in their name
            found[f"{way}sample_type"] = "resnet" if arch.updown else "conv"
    if arch.updown or len(arch.mult) == 1:
        found["downsample_padding"] = 1
    if found["time_embedding_dim"] == 4 * arch.width:
        found["time_embedding_dim"] = None
    if found["act_fn"] == "swish":
        found["act_fn"] = "silu"
    if found["attention_head_dim"] is None:
        found["attention_head_dim"] = head_dim(arch)
    if found["attn_norm_num_groups"] is None and not arch.scale_shift:
        found["attn_norm_num_groups"] = found["norm_num_groups"]
    return found


def read_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return height and width as diffusers' options say them, or None if they do not."""
    match config["sample_size"]:
        case int(side) | [int(side)] if side > 0:
            return side, side
        case [int(height), int(width)] if min(height, width) > 0:
            return height, width
    return None


# --- Names and weights ------------------------------------------------------------------------------------------------


def tensor_names(net: UNet) -> dict[str, str]:
    """Return diffusers' name for every tensor of a network's state dict, by knife's; `to_qkv` stands for three."""
    modules = dict(module_names(net))
    split = (name.rpartition(".") for name in net.state_dict())
    return {f"{module}.{leaf}": f"{modules[module]}.{leaf}" for module, _, leaf in split}


def module_names(net: UNet) -> Iterator[tuple[str, str]]:
    """Yield knife's and diffusers' names of all layers."""
    yield from ENDS.items()
    last = sum(name.endswith("_down") for name in net.down.blocks)  # levels count from the other end on the way up
    yield from block_names("down.middle0", "mid_block", "block0")
    yield from block_names("down.middle1", "mid_block", "block1")
    for name in net.down.blocks:
        level, place = name.removeprefix("level").split("_")
        yield from block_names(f"down.blocks.{name}", f"down_blocks.{level}", place)
    for name in net.up:
        level, place = name.removeprefix("level").split("_")
        yield from block_names(f"up.{name}", f"up_blocks.{last - int(level)}", place)


def block_names(ours: str, theirs: str, place: str) -> Iterator[tuple[str, str]]:
    """Yield the names of the layers of one block; `place` in its level is block0, block1, ..., down or up."""
    index = place.removeprefix("block")
    block = f"{theirs}.{place}samplers.0" if place in ("down", "up") else f"{theirs}.resnets.{index}"
    yield ours, f"{block}.conv"  # if it is a convolution alone
    for our, their in BLOCK.items():
        yield f"{ours}.{our}", f"{block}.{their}"
    for our, their in ATTENTION.items():
        yield f"{ours}.{our}", f"{theirs}.attentions.{index}.{their}"


def to_diffusers(net: UNet) -> dict[str, Tensor]:
    """Return the weights of a network under diffusers' names."""
    state, weights = net.state_dict(), dict[str, Tensor]()
    for ours, theirs in tensor_names(net).items():
        if ".to_qkv." in theirs:
            parts = state[ours].unflatten(0, (heads(net, ours), 3, -1)).unbind(1)
            weights |= {name: part.flatten(0, 1) for name, part in zip(three(theirs), parts, strict=True)}
        else:
            weights[theirs] = state[ours]
    return weights


def from_diffusers(state: Mapping[str, Tensor], net: UNet, path: Path) -> dict[str, Tensor]:
    """Return diffusers' weights in float32 under the names of a network of knife.

    Raises:
        ModelError: if they are those of another network, naming every difference, or not finite.
    """
    found = [*differences({name: tensor.shape for name, tensor in to_diffusers(net).items()}, state)]
    if found:
        raise ModelError(f"{path}: not the network that its {CONFIG} describes: {'; '.join(found)}; save both anew.")
    check_finite(state, path)
    weights = {}
    for ours, theirs in tensor_names(net).items():
        if ".to_qkv." in theirs:
            parts = [state[name].unflatten(0, (heads(net, ours), -1)) for name in three(theirs)]
            tensor = torch.stack(parts, 1).flatten(0, 2)
        else:
            tensor = state[theirs]
        weights[ours] = tensor.to(torch.float32, copy=True)
    return weights


def three(name: str) -> list[str]:
    """Return diffusers' names of the tensors of queries, keys and values."""
    return [name.replace("to_qkv", f"to_{letter}") for letter in "qkv"]


def heads(net: nn.Module, name: str) -> int:
    """Return how many heads the attention has to which a tensor of `qkv` belongs."""
    attention = net.get_submodule(name.rpartition(".qkv.")[0])
    assert isinstance(attention, Attention)
    return attention.heads


# --- Files ------------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """Read the options of a diffusers folder, with diffusers' own where the file says none.

    Raises:
        ModelError: if there are none, or they are those of no UNet2DModel.
    """
    path = folder / CONFIG
    if not path.is_file():
        advice = f"give {folder / 'unet'}" if (folder / "unet" / CONFIG).is_file() else "give a folder that has one"
        raise ModelError(f"{path}: no such file; {advice}.")
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(LONGEST_CONFIG))
        name = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: not written by diffusers, or damaged ({type(error).__name__}).") from error
    if name != "UNet2DModel":
        raise ModelError(f"{path}: describes a {name}; of diffusers' networks only UNet2DModel can be imported.")
    return DEFAULTS | {key: value for key, value in config.items() if key in DEFAULTS}


def read_weights(path: Path) -> tuple[dict[str, Tensor], Card | None]:
    """Read the weights of a diffusers folder, and the card that `export_diffusers` put in.

    Raises:
        ModelError: if they are missing or damaged.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; save the network with save_pretrained, in one safetensors file.")
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safe_open is no dict
            about = (file.metadata() or {}).get("card")
        card = Card.from_json(json.loads(about)) if about else None
    except (
        SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
        MemoryError, KnifeError,
    ) as error:  # fmt: skip
        raise ModelError(f"{path}: damaged ({type(error).__name__}); copy it anew.") from error
    if not state or not all(map(is_weight, state.keys(), state.values())):
        raise ModelError(f"{path}: {contents(state)}, not the weights of a network; save it anew.")
    return state, card
