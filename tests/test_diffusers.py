"""Folders of diffusers: the same outputs there and here, and every option that knife's networks lack is refused."""

import inspect
import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from knife import checkpoint, interop
from knife.checkpoint import Card
from knife.diffusers import (
    CONFIG,
    DEFAULTS,
    WEIGHTS,
    export_diffusers,
    from_diffusers,
    import_diffusers,
    read_network,
    tensor_names,
    to_diffusers,
    unet_config,
)
from knife.errors import ModelError, SettingsError
from knife.interop import Told
from knife.schedule import Schedule
from knife.spec import PRESETS, ImageSpec
from knife.unet import Architecture, UNet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its own dependencies are warned of
    from diffusers import UNet2DModel

PLAIN = Architecture(32, (1, 2), res_blocks=1, attention=(2,), heads=2, groups=8)
RICH = Architecture(32, (1, 2, 2), 2, (2, 4), head_width=16, scale_shift=True, updown=True)
ARCHITECTURES = {
    "plain": PLAIN,
    "every option": RICH,
    "one head in attentions of several widths": replace(PLAIN, attention=(1, 2), heads=1),
    "head width in attentions of several widths": replace(PLAIN, attention=(1, 2), head_width=8),
    "head width with scale and shift": replace(PLAIN, head_width=16, scale_shift=True),
    "attention at the first and last of three levels": replace(RICH, attention=(1, 4), groups=16),
    "attention in the middle alone": replace(PLAIN, attention=()),
    "attention at no level whose blocks change the grid": replace(RICH, attention=(4,)),
    "one level": replace(PLAIN, mult=(1,), attention=(1,)),
    "classes": replace(PLAIN, classes=3),
    "no learned sigma": replace(PLAIN, outputs=3),
}
SIZE = 16
TOLD = Told(size=(SIZE, SIZE))
COSINE = Schedule("cosine", 500)


def lively(net):
    """Draw every weight anew: those that start at zero would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        spread = 1.0 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = centre + spread * torch.randn(parameter.shape, generator=generator)
    return net.eval().requires_grad_(False)


def images(channels=3):
    x = torch.randn(3, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 17, 999]), torch.tensor([0, 1, 2])


def card(arch, kind="diffusion", channels=("r", "g", "b"), schedule=COSINE):
    return Card(kind, "faces", ImageSpec(channels, (SIZE, SIZE), arch, arch, (0.0, 1.0)), schedule)


def stored(folder, described):
    """Store a network of a card, and return it with its file."""
    net = lively(described.build())
    path = folder / "models" / "faces" / f"{described.kind}.safetensors"
    checkpoint.save(path, net.state_dict(), described.to_json())
    return path, net


def theirs(folder, **changes):
    """Let diffusers build a network and save it to a folder: the options of PLAIN but for the changes."""
    options = {**unet_config(PLAIN, 3, 6, (SIZE, SIZE)), **changes}
    net = lively(UNet2DModel(**options))
    net.save_pretrained(folder)
    return net


def imported(folder, kind="diffusion", told=TOLD):
    described, weights = import_diffusers(folder, kind, "faces", told)
    net = described.build().eval()
    net.load_state_dict(weights)
    return described, net


def assert_same(ours, theirs, labels=()):
    """Assert that two networks agree to rounding: to 2e-6 in float32 and to 1e-12 in float64."""
    x, t, _ = images(theirs.config.in_channels)
    with torch.no_grad():
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
            net, other = ours.to(dtype), theirs.to(dtype)
            expected = other(x.to(dtype), t, *labels).sample
            assert expected.std(0).min() > 1e-3  # the images and timesteps do not all give the same
            difference = net(x.to(dtype), t, *labels) - expected
            assert (difference.norm() / expected.norm()).item() < tolerance


# --- The same outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_network_of_knife_is_the_same_there(name):
    arch = ARCHITECTURES[name]
    ours = lively(UNet(arch, 3, 6))
    config = unet_config(arch, 3, arch.outputs or 6, (SIZE, SIZE))
    other = UNet2DModel(**config).eval()
    other.load_state_dict(to_diffusers(ours))
    assert_same(ours, other, images()[2:] if arch.classes else ())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_there_and_back_is_the_same_network(name, tmp_path):
    arch = ARCHITECTURES[name]
    ours = lively(UNet(arch, 3, 6))
    config, weights = unet_config(arch, 3, arch.outputs or 6, None), to_diffusers(ours)
    found, net = read_network(config, len(weights))
    back = from_diffusers(weights, net, tmp_path)
    assert replace(found, heads=1, head_width=None) == replace(arch, heads=1, head_width=None, outputs=None)
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("arch", [PLAIN, RICH, replace(PLAIN, classes=2)])
def test_an_exported_folder_opens_there(tmp_path, arch):
    path, net = stored(tmp_path, card(arch))
    assert export_diffusers(path, tmp_path / "out").spec.unet == arch
    assert {file.name for file in (tmp_path / "out").iterdir()} == {CONFIG, WEIGHTS}
    other, report = UNet2DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert (other.config.sample_size, other.config.out_channels) == ([SIZE, SIZE], 6)
    assert_same(net, other)  # without a label, as knife asks


def test_an_exported_segmenter_opens_there_and_comes_back(tmp_path):
    path, net = stored(tmp_path, card(RICH, "segment", channels=("t1", "t1ce", "t2", "flair")))
    export_diffusers(path, tmp_path / "out")
    other = UNet2DModel.from_pretrained(tmp_path / "out")
    assert other.config.out_channels == 1
    assert_same(net, other)
    described, back = imported(tmp_path / "out", "segment")
    assert described.spec.unet == RICH
    assert_same(back, other)


def test_what_was_exported_is_known_again(tmp_path):
    path, net = stored(tmp_path, card(RICH, channels=("t1", "flair", "t2")))
    export_diffusers(path, tmp_path / "out")
    described, back = imported(tmp_path / "out", told=Told())
    assert described.spec == card(RICH, channels=("t1", "flair", "t2")).spec
    assert described.schedule == COSINE
    assert described.training["imported"] == WEIGHTS
    assert described.training["sha256"] == checkpoint.digest(tmp_path / "out" / WEIGHTS)
    assert described.training["assumed"] == {}
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in net.state_dict().items())
    told = Told(value_range=(-1.0, 1.0), channels=("a", "b", "c"), schedule=Schedule("linear"), size=(32, 32))
    described, _ = imported(tmp_path / "out", told=told)
    assert described.spec == ImageSpec(("a", "b", "c"), (32, 32), RICH, RICH)
    assert described.schedule == Schedule("linear")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"act_fn": "swish", "dropout": 0.1, "time_embedding_dim": 128, "attn_norm_num_groups": None},
        {"flip_sin_to_cos": False},
        {"attention_head_dim": None},
        {"attention_head_dim": 64, "sample_size": SIZE},
        {"out_channels": 3, "sample_size": None},
        {"up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"]},  # the same where the grid changes no more
        {"downsample_type": "resnet"},  # without effect: no level that halves the grid attends
        {
            "down_block_types": ["AttnDownBlock2D"] * 2,
            "up_block_types": ["AttnUpBlock2D"] * 2,
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "norm_num_groups": 4,
            "attn_norm_num_groups": None,
        },
        {
            "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [32, 96, 64],
            "layers_per_block": 2,
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "downsample_padding": 0,
            "resnet_time_scale_shift": "scale_shift",
            "attention_head_dim": 8,
        },
    ],
    ids=lambda changes: ", ".join(changes) or "none",
)
def test_a_network_of_diffusers_is_the_same_here(tmp_path, changes):
    other = theirs(tmp_path, **changes)
    described, net = imported(tmp_path)
    assert described.spec.size == (SIZE, SIZE)
    assert_same(net, other)


@pytest.mark.parametrize("label", [None, 0, 2])
def test_one_class_or_the_mean_of_all_is_kept(tmp_path, label):
    other = theirs(tmp_path, num_class_embeds=3)
    described, net = imported(tmp_path, told=replace(TOLD, label=label))
    assert described.training["class"] == ("mean" if label is None else label)
    table = other.class_embedding.weight
    other.class_embedding.weight.data = table.mean(0, keepdim=True) if label is None else table[label : label + 1]
    assert described.spec.unet.classes == 0
    x, t, _ = images()
    with torch.no_grad():
        expected = other(x, t, torch.zeros_like(t)).sample
        assert ((net(x, t) - expected).norm() / expected.norm()).item() < 2e-6


def test_what_a_folder_does_not_tell_is_the_usual_and_recorded(tmp_path):
    theirs(tmp_path, sample_size=None)
    described, _ = imported(tmp_path, told=Told())
    assert described.spec.channels == ("r", "g", "b")
    assert described.training["assumed"] == {"--size": "128", "--schedule": "linear", "--value-range": "-1,1"}


def test_half_precision_weights_are_widened(tmp_path):
    other = theirs(tmp_path).half()
    other.save_pretrained(tmp_path)
    _, net = imported(tmp_path)
    assert torch.equal(net.down.conv_in.weight, other.conv_in.weight.float())


# --- The tables -------------------------------------------------------------------------------------------------------


def test_the_defaults_are_diffusers_own():
    parameters = inspect.signature(UNet2DModel.__init__).parameters
    own = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()} == DEFAULTS


@pytest.mark.parametrize("preset", ["paper-faces", "paper-brats"])
def test_every_weight_of_the_paper_has_its_place(preset):
    arch, channels = PRESETS[preset].diffusion, PRESETS[preset].channels
    with torch.device("meta"):
        ours, other = UNet(arch, channels, 2 * channels), UNet2DModel(**unet_config(arch, channels, 2 * channels, None))
    shapes = {name: tensor.shape for name, tensor in to_diffusers(ours).items()}
    assert shapes == {name: tensor.shape for name, tensor in other.state_dict().items()}


def test_names_of_a_small_network_stand_side_by_side():
    with torch.device("meta"):
        names = tensor_names(UNet(replace(PLAIN, mult=(1, 2), attention=()), 1, 2))
    weights = [name for name in names.items() if name[0].endswith("weight") and "norm" not in name[0]]
    assert weights == [
        ("embedding.linear1.weight", "time_embedding.linear_1.weight"),
        ("embedding.linear2.weight", "time_embedding.linear_2.weight"),
        ("down.conv_in.weight", "conv_in.weight"),
        ("down.blocks.level0_block0.conv1.weight", "down_blocks.0.resnets.0.conv1.weight"),
        ("down.blocks.level0_block0.affine.weight", "down_blocks.0.resnets.0.time_emb_proj.weight"),
        ("down.blocks.level0_block0.conv2.weight", "down_blocks.0.resnets.0.conv2.weight"),
        ("down.blocks.level0_down.weight", "down_blocks.0.downsamplers.0.conv.weight"),
        ("down.blocks.level1_block0.conv1.weight", "down_blocks.1.resnets.0.conv1.weight"),
        ("down.blocks.level1_block0.affine.weight", "down_blocks.1.resnets.0.time_emb_proj.weight"),
        ("down.blocks.level1_block0.conv2.weight", "down_blocks.1.resnets.0.conv2.weight"),
        ("down.blocks.level1_block0.skip.weight", "down_blocks.1.resnets.0.conv_shortcut.weight"),
        ("down.middle0.conv1.weight", "mid_block.resnets.0.conv1.weight"),
        ("down.middle0.affine.weight", "mid_block.resnets.0.time_emb_proj.weight"),
        ("down.middle0.conv2.weight", "mid_block.resnets.0.conv2.weight"),
        ("down.middle0.attention.qkv.weight", "mid_block.attentions.0.to_qkv.weight"),
        ("down.middle0.attention.out.weight", "mid_block.attentions.0.to_out.0.weight"),
        ("down.middle1.conv1.weight", "mid_block.resnets.1.conv1.weight"),
        ("down.middle1.affine.weight", "mid_block.resnets.1.time_emb_proj.weight"),
        ("down.middle1.conv2.weight", "mid_block.resnets.1.conv2.weight"),
        *(
            (f"up.level{1 - level}_block{i}.{ours}.weight", f"up_blocks.{level}.resnets.{i}.{their}.weight")
            for level, i in ((0, 0), (0, 1))
            for ours, their in (("conv1",) * 2, ("affine", "time_emb_proj"), ("conv2",) * 2, ("skip", "conv_shortcut"))
        ),
        ("up.level1_up.weight", "up_blocks.0.upsamplers.0.conv.weight"),
        *(
            (f"up.level{1 - level}_block{i}.{ours}.weight", f"up_blocks.{level}.resnets.{i}.{their}.weight")
            for level, i in ((1, 0), (1, 1))
            for ours, their in (("conv1",) * 2, ("affine", "time_emb_proj"), ("conv2",) * 2, ("skip", "conv_shortcut"))
        ),
        ("conv_out.weight", "conv_out.weight"),
    ]


# --- What cannot travel -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        (replace(PLAIN, stem=2, attention=(4,)), "stem 2: diffusers has no stem of pixels as channels"),
        (replace(PLAIN, mult=(2, 4)), r"mult \(2, 4\): .* first multiplier must be 1"),
        (replace(PLAIN, attention=(1, 2)), "heads 2: makes heads of 16 and 32 channels, and in diffusers all"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(tmp_path, arch, words):
    path, _ = stored(tmp_path, card(arch))
    with pytest.raises(ModelError, match=f"cannot be exported to diffusers: {words}"):
        export_diffusers(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_encoder_cannot_be_exported_or_imported(tmp_path):
    arch = replace(PLAIN, pool="spatial")
    path, _ = stored(tmp_path, replace(card(arch, "regress"), config=interop.LABELS["regress"]))
    with pytest.raises(ModelError, match="a regress network, and only a U-Net"):
        export_diffusers(path, tmp_path / "out")
    with pytest.raises(SettingsError, match=r"--as regress: .* give one of diffusion, segment"):
        import_diffusers(tmp_path, "regress", "faces")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    path, _ = stored(tmp_path, card(PLAIN))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for taken in ("out", "file"):
        with pytest.raises(SettingsError, match=f"{taken}: is there already; give a new or empty folder"):
            export_diffusers(path, tmp_path / taken)
    (tmp_path / "empty").mkdir()
    export_diffusers(path, tmp_path / "empty")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06 instead of 1e-05"),
        ({"freq_shift": 1}, "freq_shift is 1 instead of 0"),
        ({"downsample_padding": 0}, "downsample_padding is 0 instead of 1"),
        ({"norm_eps": 1e-6, "freq_shift": 1}, "freq_shift is 1 instead of 0; norm_eps is"),
        ({"center_input_sample": True}, "center_input_sample is True instead of False"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is fourier"),
        ({"time_embedding_dim": 64}, "time_embedding_dim is 64"),
        ({"mid_block_type": None}, "mid_block_type is None"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor is 2"),
        ({"add_attention": False}, "add_attention is False"),
        ({"act_fn": "gelu"}, "act_fn is gelu instead of silu"),
        ({"class_embed_type": "timestep"}, "class_embed_type is timestep"),
        ({"attn_norm_num_groups": 4}, "attn_norm_num_groups is 4 instead of 8"),
        ({"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": None}, "attn_norm_num_groups is None"),
        ({"upsample_type": "resnet"}, "upsample_type is resnet instead of conv"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift is spatial"),
        ({"attention_head_dim": 48}, "heads do not divide the 64 channels of an attention"),
        ({"attention_head_dim": 21}, "heads do not divide the 64 channels of an attention"),
        ({"block_out_channels": [32, 48]}, "block_out_channels .* only multiples of the first"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "up_block_types is"),
        ({"up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D"]}, "up_block_types is"),
        ({"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, "down_block_types is"),
        ({"down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2,
          "downsample_type": "resnet"}, "upsample_type is conv instead of resnet"),
        ({"layers_per_block": 10**9}, "layers_per_block 1000000000: more than the file has weights"),
        ({"norm_num_groups": 5}, "its options fit no network"),
        ({"block_out_channels": []}, "its options fit no network"),
        ({"block_out_channels": "wide"}, "its options fit no network"),
        ({"down_block_types": None}, "its options fit no network"),
    ],
)  # fmt: skip
def test_what_knife_is_not_is_refused(tmp_path, changes, words):
    theirs(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text()) | changes
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"config.json: no network of knife: .*{words}"):
        imported(tmp_path)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (Told(heads=2), "--heads: .*config.json says it; leave it out"),
        (Told(head_width=16), "--head-width: .*config.json says it"),
        (Told(channels=("a",)), "channels a: .* was made for 3; name each"),
        (Told(label=1), "--class 1: there are no classes"),
        (Told(size=(15, 15)), "size 15x15: this network needs sides divisible by 2"),
    ],
)
def test_impossible_options_are_refused(tmp_path, told, words):
    theirs(tmp_path)
    with pytest.raises(SettingsError, match=words):
        imported(tmp_path, told=told)


def test_outputs_that_no_diffusion_model_has_are_refused(tmp_path):
    theirs(tmp_path, out_channels=5)
    with pytest.raises(ModelError, match="has 5 outputs, and --as diffusion needs 3 or 6"):
        imported(tmp_path)
    assert imported(tmp_path, "segment")[0].spec.unet.outputs == 5


# --- Folders that are none --------------------------------------------------------------------------------------------


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"config.json: no such file; give a folder that has one"):
        imported(tmp_path)
    theirs(tmp_path / "unet")
    with pytest.raises(ModelError, match=r"config.json: no such file; give .*unet"):
        imported(tmp_path)
    (tmp_path / "unet" / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=f"{WEIGHTS}: no such file; save the network with save_pretrained"):
        imported(tmp_path / "unet")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        ("[" * 100_000, "damaged"),
        (" " * 2_000_000 + "{}", "damaged"),
        ('{"_class_name": "UNet2DConditionModel"}', "describes a UNet2DConditionModel; of diffusers' networks only"),
    ],
)
def test_other_options_are_refused(tmp_path, text, words):
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ModelError, match=f"config.json: .*{words}"):
        imported(tmp_path)


def test_other_weights_are_refused(tmp_path):
    theirs(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    bias = state.pop("mid_block.attentions.0.to_k.bias")
    save_file({**state, "extra": bias, "conv_in.bias": torch.zeros(5)}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError) as refused:
        imported(tmp_path)
    message = str(refused.value)
    assert "not the network that its config.json describes: it lacks mid_block.attentions.0.to_k.bias; " in message
    assert "it also has extra; conv_in.bias is [5] instead of [32]" in message
    save_file({**state, "mid_block.attentions.0.to_k.bias": bias * torch.nan}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match=r"to_k\.bias hold values that are not finite"):
        imported(tmp_path)
    save_file({"steps": torch.zeros(1, dtype=torch.int64)}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match="a dict in which steps are no weights"):
        imported(tmp_path)


@pytest.mark.parametrize("about", ["{", "[]", "{}", '{"kind": 1}'])
def test_a_damaged_card_is_refused(tmp_path, about):
    theirs(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, {"card": about})
    with pytest.raises(ModelError, match="damaged"):
        imported(tmp_path)


def test_damaged_weights_are_refused(tmp_path):
    theirs(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="damaged"):
        imported(tmp_path)


def test_the_weights_say_their_framework(tmp_path):
    path, _ = stored(tmp_path, card(PLAIN))
    export_diffusers(path, tmp_path / "out")
    with safe_open(tmp_path / "out" / WEIGHTS, "pt") as file:
        assert file.metadata()["format"] == "pt"
