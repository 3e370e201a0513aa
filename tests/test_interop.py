"""Foreign weights: the same outputs as the original's networks, and no harm from hostile files."""

import io
import os
import pickle
import re
import tarfile
import tokenize
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from knife import checkpoint, interop
from knife.checkpoint import Card
from knife.errors import ModelError, SettingsError
from knife.interop import UNETS, Told, convert, foreign_names, foreign_shape, import_guided_diffusion, read_state_dict
from knife.schedule import Schedule
from knife.spec import PRESETS, ImageSpec, Preset, Training
from knife.tasks import task
from knife.unet import Architecture, Encoder

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # the original spells torch.amp's decorators the old way
    from guided_diffusion import unet as original

PLAIN = Architecture(32, (1, 2), res_blocks=1, attention=(2,), heads=2)
RICH = Architecture(32, (1, 2, 2), 2, (2, 4), head_width=16, scale_shift=True, updown=True)
POOLS = {"attention": "attention", "mean": "adaptive", "spatial": "spatial", "spatial-norm": "spatial_v2"}
NETWORKS = {
    "U-Net": ("diffusion", PLAIN),
    "U-Net with every option": ("diffusion", RICH),
    "class-conditional U-Net": ("diffusion", replace(PLAIN, classes=2)),
    "segmenter": ("segment", replace(PLAIN, res_blocks=2, outputs=8, classes=2)),
    "attention pool": ("regress", RICH),
    "attention pool, plain blocks": ("classify", replace(PLAIN, head_width=32)),
    "adaptive pool": ("regress", replace(PLAIN, pool="mean")),
    "spatial pool": ("classify", replace(RICH, pool="spatial")),
    "normed spatial pool": ("classify", replace(PLAIN, pool="spatial-norm")),
}
SIZE = 16
ZERO_TO_ONE = Told(value_range=(0.0, 1.0))


def card(kind, arch, channels=3, size=SIZE):
    spec = ImageSpec(tuple("abcdefgh"[:channels]), (size, size), arch, arch)
    config = {"classes": ["0", "1"]} if kind == "classify" else {}
    return Card(kind, "data", spec, Schedule(), config)


def theirs(kind, arch, channels=3, size=SIZE, draw=True):
    """Build the original's network with every weight drawn anew: those that start at zero would hide mistakes."""
    options = {
        "image_size": size,
        "in_channels": channels,
        "model_channels": arch.width,
        "num_res_blocks": arch.res_blocks,
        "attention_resolutions": arch.attention,
        "channel_mult": arch.mult,
        "num_heads": arch.heads,
        "num_head_channels": arch.head_width or -1,
        "use_scale_shift_norm": arch.scale_shift,
        "resblock_updown": arch.updown,
    }
    if kind in UNETS:
        outputs = arch.outputs or 2 * channels
        net = original.UNetModel(out_channels=outputs, num_classes=arch.classes or None, **options)
    else:
        outputs = 2 if kind == "classify" else 1
        net = original.EncoderUNetModel(out_channels=outputs, pool=POOLS[arch.pool], **options)
    if not draw:
        return net
    generator = torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        spread = 1.0 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = centre + spread * torch.randn(parameter.shape, generator=generator)
    return net.eval().requires_grad_(False)


def asked(net, x, t, label):
    """Ask the original as an imported network is asked by default: with the mean of the classes, if it has any."""
    if net.num_classes is None:
        return net(x, t)
    table = torch.nn.Embedding.from_pretrained(net.label_emb.weight.mean(0, keepdim=True))
    net.label_emb, label = table, torch.zeros_like(label)
    return net(x, t, label)


def images(channels=3, size=SIZE):
    x = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 17, 999]), torch.tensor([0, 1, 1])


def relative(ours, expected):
    return ((ours - expected).norm() / expected.norm()).item()


def saved(net, path):
    torch.save(net.state_dict(), path)
    return path


# --- The same outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_original(name, tmp_path):
    kind, arch = NETWORKS[name]
    net, described = theirs(kind, arch), card(kind, arch)
    state = convert(read_state_dict(saved(net, tmp_path / "ema_0.9999_050000.pt")), described, tmp_path)
    ours = described.build().eval()
    ours.load_state_dict(state)
    x, t, label = images()
    labels = (label,) if arch.classes else ()
    with torch.no_grad():
        expected = net(x, t, *labels)
        assert relative(ours(x, t, *labels), expected) < 1e-5
        assert expected.std(0).min() > 1e-3  # the three images, levels and labels do not all give the same


@pytest.mark.parametrize("name", NETWORKS)
def test_in_float64_the_outputs_are_those_of_the_original_to_rounding(name, tmp_path, monkeypatch):
    kind, arch = NETWORKS[name]
    net, described = theirs(kind, arch).double(), card(kind, arch)
    net.dtype = torch.float64
    single, embed = torch.Tensor.float, original.timestep_embedding  # it computes norms, softmax and these in float32
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else single(x))
    monkeypatch.setattr(original, "timestep_embedding", lambda *arguments: embed(*arguments).double())
    ours = described.build().double().eval()
    ours.load_state_dict(convert(net.state_dict(), described, tmp_path))
    x, t, label = images()
    labels = (label,) if arch.classes else ()
    with torch.no_grad():
        assert relative(ours(x.double(), t, *labels), net(x.double(), t, *labels)) < 1e-12


@pytest.mark.parametrize(
    ("preset", "kind"),
    [("paper-faces", "diffusion"), ("paper-faces", "regress"), ("paper-brats", "segment"), ("paper-brats", "classify")],
)
def test_every_weight_of_the_paper_has_its_place(preset, kind):
    row = PRESETS[preset]
    names = interop.channel_names(row.channels)
    spec = row.spec(kind, names)
    arch = spec.unet if kind in ("diffusion", "segment") else spec.encoder
    described = Card(kind, "data", spec, Schedule(), {"classes": ["0", "1"]})
    with torch.device("meta"):
        ours, other = described.build(), theirs(kind, arch, row.channels, row.size[0], draw=False)
    assert list(interop.visible_differences(ours, foreign_names(ours), other.state_dict())) == []


def test_names_of_a_small_network_stand_side_by_side():
    with torch.device("meta"):
        names = foreign_names(Encoder(replace(PLAIN, mult=(1,), attention=()), 1, 1, (4, 4)))
    assert [name for name in names.items() if name[0].endswith("weight")] == [
        ("embedding.linear1.weight", "time_embed.0.weight"),
        ("embedding.linear2.weight", "time_embed.2.weight"),
        ("down.conv_in.weight", "input_blocks.0.0.weight"),
        ("down.blocks.level0_block0.norm1.weight", "input_blocks.1.0.in_layers.0.weight"),
        ("down.blocks.level0_block0.conv1.weight", "input_blocks.1.0.in_layers.2.weight"),
        ("down.blocks.level0_block0.affine.weight", "input_blocks.1.0.emb_layers.1.weight"),
        ("down.blocks.level0_block0.norm2.weight", "input_blocks.1.0.out_layers.0.weight"),
        ("down.blocks.level0_block0.conv2.weight", "input_blocks.1.0.out_layers.3.weight"),
        ("down.middle0.norm1.weight", "middle_block.0.in_layers.0.weight"),
        ("down.middle0.conv1.weight", "middle_block.0.in_layers.2.weight"),
        ("down.middle0.affine.weight", "middle_block.0.emb_layers.1.weight"),
        ("down.middle0.norm2.weight", "middle_block.0.out_layers.0.weight"),
        ("down.middle0.conv2.weight", "middle_block.0.out_layers.3.weight"),
        ("down.middle0.attention.norm.weight", "middle_block.1.norm.weight"),
        ("down.middle0.attention.qkv.weight", "middle_block.1.qkv.weight"),
        ("down.middle0.attention.out.weight", "middle_block.1.proj_out.weight"),
        ("down.middle1.norm1.weight", "middle_block.2.in_layers.0.weight"),
        ("down.middle1.conv1.weight", "middle_block.2.in_layers.2.weight"),
        ("down.middle1.affine.weight", "middle_block.2.emb_layers.1.weight"),
        ("down.middle1.norm2.weight", "middle_block.2.out_layers.0.weight"),
        ("down.middle1.conv2.weight", "middle_block.2.out_layers.3.weight"),
        ("norm_out.weight", "out.0.weight"),
        ("head.qkv.weight", "out.2.qkv_proj.weight"),
        ("head.out.weight", "out.2.c_proj.weight"),
    ]


def test_a_network_of_another_kind_has_no_foreign_names():
    with pytest.raises(ModelError, match="no Linear"):
        foreign_names(torch.nn.Linear(1, 1))


def test_half_precision_weights_are_widened(tmp_path):
    net, described = theirs("regress", RICH).half(), card("regress", RICH)
    state = convert(read_state_dict(saved(net, tmp_path / "model.pt")), described, tmp_path)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert torch.equal(state["down.conv_in.weight"], net.input_blocks[0][0].weight.float())


# --- From a file to a model of knife ----------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """Offer a preset small enough for tests."""
    training = {"diffusion": Training(1), "task": Training(1)}
    row = Preset("tiny", (SIZE, SIZE), 4, replace(PLAIN, classes=2), RICH, replace(PLAIN, outputs=8), training)
    monkeypatch.setitem(PRESETS, "tiny", row)
    return row


@pytest.mark.parametrize("kind", ["diffusion", "regress", "classify", "segment"])
def test_an_imported_file_becomes_a_model_that_loads(tiny, tmp_path, kind):
    arch = {"diffusion": tiny.diffusion, "segment": tiny.segmenter}.get(kind, tiny.encoder)
    net = theirs(kind, arch, channels=4)
    described, state = import_guided_diffusion(saved(net, tmp_path / "model.pt"), kind, "scans", ZERO_TO_ONE, "tiny")
    assert (described.kind, described.dataset, described.schedule) == (kind, "scans", Schedule("linear", 1000))
    spec = tiny.spec(kind, ("t1", "t1ce", "t2", "flair"), (0.0, 1.0))
    assert described.spec == replace(spec, unet=replace(spec.unet, classes=0))
    assert described.training["imported"] == "model.pt"
    assert described.training["sha256"] == checkpoint.digest(tmp_path / "model.pt")
    stored = tmp_path / "models" / "scans" / f"{kind}.safetensors"
    checkpoint.save(stored, state, described.to_json())
    assert checkpoint.describe(stored).card == described
    x, t, label = images(channels=4)
    with torch.no_grad():
        expected = net(x, t) if kind not in UNETS else asked(net, x, t, label)
        assert relative(checkpoint.load_model(stored)(x, t), expected) < 1e-5


def test_imported_tasks_understand_targets(tiny, tmp_path):
    values = saved(theirs("regress", RICH, channels=4), tmp_path / "values.pt")
    described, _ = import_guided_diffusion(values, "regress", "scans", ZERO_TO_ONE, "tiny")
    regress = task("regress")
    assert regress.target("0.3", None, described.spec, described.config).item() == pytest.approx(0.3)
    assert regress.target("+", None, described.spec, described.config).item() == 1
    classes = saved(theirs("classify", RICH, channels=4), tmp_path / "classes.pt")
    described, _ = import_guided_diffusion(classes, "classify", "scans", ZERO_TO_ONE, "tiny")
    assert described.config["classes"] == ["0", "1"]
    assert task("classify").target("1", None, described.spec, described.config).item() == 1


def test_meaning_and_names_can_be_given(tiny, tmp_path):
    path = saved(theirs("regress", RICH, channels=4), tmp_path / "model.pt")
    age = {"label": "age", "low": 1, "high": 100, "mean": 0.0, "std": 1.0}
    told = Told(channels=("a", "b", "c", "d"), config=age, schedule=Schedule("cosine", 100))
    described, _ = import_guided_diffusion(path, "regress", "x", told, "tiny")
    assert described.schedule == Schedule("cosine", 100)
    assert described.config == age
    assert described.spec.channels == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "regression"}, "--as regression: no such kind"),
        ({"preset": "huge"}, "--preset huge"),
        ({"told": Told(channels=("a", "b"))}, "made for 4 channels, the images have 2"),
        ({"told": Told(size=(16, 16))}, "--size: --preset tiny says it; leave it out"),
        ({"told": Told(head_width=16)}, "--head-width: --preset tiny says it"),
        ({"told": Told(label=0)}, "--class 0: there are no classes; leave it out"),
        ({"told": Told(channels=("a", "b")), "preset": None}, "channels a, b: .* was made for 4; name each"),
        ({"told": Told(head_width=48), "preset": None}, "--head-width 48: does not divide the 64 channels"),
        ({"told": Told(heads=3), "preset": None}, "--heads 3: does not divide the 64 channels"),
    ],
)
def test_impossible_options_are_refused(tiny, tmp_path, changes, words):
    options = {"kind": "regress", "dataset": "x", "preset": "tiny"} | changes
    with pytest.raises(SettingsError, match=words):
        import_guided_diffusion(saved(theirs("regress", RICH, channels=4), tmp_path / "model.pt"), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"value_range": (1.0, 0.0)}, "--value-range 1,0"),
        ({"value_range": (0.0, float("nan"))}, "--value-range 0,nan"),
        ({"heads": 2, "head_width": 16}, "--heads and --head-width"),
        ({"heads": 0}, "--heads 0: give a number above 0"),
        ({"head_width": -1}, "--head-width -1: give"),
        ({"size": (16, 0)}, "--size 0: give"),
    ],
)
def test_impossible_words_are_refused(options, words):
    with pytest.raises(SettingsError, match=words):
        Told(**options)


# --- Classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["diffusion", "segment"])
@pytest.mark.parametrize("label", [0, 2])
@pytest.mark.parametrize("preset", ["tiny", None])
def test_one_class_is_kept(monkeypatch, tmp_path, kind, label, preset):
    arch = replace(PLAIN, classes=3, outputs=8 if kind == "segment" else None)
    row = Preset("tiny", (SIZE, SIZE), 4, arch, RICH, arch, {"diffusion": Training(1), "task": Training(1)})
    monkeypatch.setitem(PRESETS, "tiny", row)
    net, x, t = theirs(kind, arch, channels=4), *images(channels=4)[:2]
    told = Told(label=label, heads=None if preset else 2)
    described, state = import_guided_diffusion(saved(net, tmp_path / "model.pt"), kind, "x", told, preset)
    assert described.training["class"] == label
    assert described.spec.unet.classes == 0
    ours = described.build().eval()
    ours.load_state_dict(state)
    with torch.no_grad():
        expected = [net(x, t, torch.full_like(t, y)) for y in range(3)]
        assert relative(ours(x, t), expected[label]) < 1e-5
        assert relative(ours(x, t), expected[1]) > 1e-3


def test_without_a_word_the_mean_of_the_classes_is_kept(tmp_path):
    net, (x, t, label) = theirs("diffusion", replace(PLAIN, classes=2)), images()
    told = Told(heads=2)
    described, state = import_guided_diffusion(saved(net, tmp_path / "model.pt"), "diffusion", "x", told)
    assert described.training["class"] == "mean"
    ours = described.build().eval()
    ours.load_state_dict(state)
    with torch.no_grad():
        assert relative(ours(x, t), net(x, t, label)) > 1e-3
        assert relative(ours(x, t), asked(net, x, t, label)) < 1e-5


@pytest.mark.parametrize("label", [-1, 2])
def test_a_class_that_is_not_there_is_refused(tmp_path, label):
    path = saved(theirs("diffusion", replace(PLAIN, classes=2)), tmp_path / "model.pt")
    with pytest.raises(SettingsError, match=f"--class {label}: there are 0 to 1"):
        import_guided_diffusion(path, "diffusion", "x", Told(heads=2, label=label))


# --- Architectures read from shapes -----------------------------------------------------------------------------------


def read(state, kind, **options):
    return interop.read_spec(state, kind, Told(**options), Path("model.pt"))


def visible(arch):
    """Return an architecture without what the family lacks (stem, groups), and with one way to say heads."""
    attention = tuple(factor // arch.stem for factor in arch.attention)
    return replace(arch, heads=1 if arch.head_width else arch.heads, groups=32, stem=1, attention=attention)


def heads(arch):
    return {"head_width": arch.head_width} if arch.head_width else {"heads": arch.heads}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_architecture_is_read_from_shapes(name):
    kind, arch = NETWORKS[name]
    with torch.device("meta"):
        state = theirs(kind, arch, draw=False).state_dict()
    spec = read(state, kind, size=(SIZE, SIZE), **heads(arch))
    assert spec == ImageSpec(("r", "g", "b"), (SIZE, SIZE), visible(arch), visible(arch))


@pytest.mark.parametrize(("preset", "kind"), [(name, kind) for name, row in PRESETS.items() for kind in row.kinds])
def test_the_architectures_of_the_presets_are_read_from_shapes(preset, kind):
    row = PRESETS[preset]
    names = interop.channel_names(row.channels or 4)
    arch = row.spec(kind, names).unet if kind in UNETS else row.encoder
    arch = visible(replace(arch, width=arch.width if arch.width % 32 == 0 else 64))
    described = card(kind, arch, len(names), row.size[0])
    with torch.device("meta"):
        net = described.build()
    theirs_of = foreign_names(net)
    state = {theirs_of[k]: v.reshape(foreign_shape(k, v.shape)) for k, v in net.state_dict().items()}
    spec = read(state, kind, size=row.size, **heads(arch))
    assert spec == ImageSpec(names, row.size, arch, arch)


def test_a_model_without_learned_sigma_is_seen():
    state = theirs("diffusion", replace(PLAIN, outputs=3)).state_dict()
    assert read(state, "diffusion", heads=2).unet == replace(PLAIN, outputs=3)


def test_what_shapes_do_not_tell_is_the_papers_and_is_recorded(tmp_path):
    path = saved(theirs("diffusion", replace(PLAIN, heads=1), channels=4), tmp_path / "model.pt")
    described, _ = import_guided_diffusion(path, "diffusion", "scans")
    assert described.spec.size == (256, 256)
    assert described.training["assumed"] == {
        "--heads": "1",
        "--size": "256",
        "--schedule": "linear",
        "--value-range": "-1,1",
    }
    told = Told(heads=2, size=(32, 32), schedule=Schedule("cosine"), value_range=(0.0, 1.0))
    assert import_guided_diffusion(path, "diffusion", "scans", told)[0].training["assumed"] == {}


def test_an_attention_pool_tells_the_size(tmp_path):
    path = saved(theirs("regress", replace(RICH, width=64)), tmp_path / "model.pt")
    described, _ = import_guided_diffusion(path, "regress", "faces")
    assert described.spec.size == (SIZE, SIZE)
    assert described.training["assumed"].keys() == {"--head-width", "--schedule", "--value-range"}
    assert described.training["assumed"]["--head-width"] == "64"
    with pytest.raises(
        ModelError, match=r"out.2.positional_embedding is \[128, 17\] instead of \[128, 65\]; --size may"
    ):
        import_guided_diffusion(path, "regress", "faces", Told(size=(32, 32)))


def test_an_image_size_that_nothing_tells_must_be_given():
    with torch.device("meta"):
        state = theirs("diffusion", PLAIN, channels=5, draw=False).state_dict()
    with pytest.raises(SettingsError, match="--size: not told by weights for 5 channels"):
        read(state, "diffusion", heads=2)
    assert read(state, "diffusion", heads=2, size=(8, 8)).channels == ("0", "1", "2", "3", "4")
    with pytest.raises(SettingsError, match="size 9x9: this network needs sides divisible by 2"):
        read(state, "diffusion", heads=2, size=(9, 9))


@pytest.mark.parametrize(
    ("built", "kind", "words"),
    [
        (("diffusion", PLAIN), "regress", "model.pt: holds a U-Net, and --as regress is none; give --as diffusion or"),
        (("regress", RICH), "diffusion", "holds an encoder, and --as diffusion is none; give --as regress or --as cl"),
        (("segment", replace(PLAIN, outputs=1)), "diffusion", "has 1 outputs, and --as diffusion needs 3 or 6; give"),
        (("classify", RICH), "regress", "has 2 outputs, and --as regress needs 1; give the kind"),
        (("regress", RICH), "classify", "has 1 outputs, and --as classify needs 2; give the kind"),
    ],
)
def test_another_kind_of_network_is_refused(built, kind, words):
    state = theirs(*built).state_dict()
    with pytest.raises(ModelError, match=words):
        read(state, kind, size=(SIZE, SIZE), head_width=16)


def test_shapes_that_fit_several_networks_are_refused():
    """Blocks that halve the grid look like any other: five without attention are 2 levels of 2 or 3 of 1."""
    arch = replace(PLAIN, mult=(1, 1), res_blocks=2, attention=(), updown=True, pool="mean")
    with torch.device("meta"):
        state = theirs("regress", arch, draw=False).state_dict()
    words = r"fit several networks \(levels x blocks: 1 x 5, 2 x 2, 3 x 1\); give --size"
    with pytest.raises(ModelError, match=words):
        read(state, "regress", size=(SIZE, SIZE), heads=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.clear(), "its layers have other names or widths"),
        (lambda state: state.pop("input_blocks.2.0.op.weight"), "comes nearest differs: it lacks"),
        (lambda state: state.update({"time_embed.0.weight": torch.zeros(3)}), "other names or widths"),
        (lambda state: state.update({"extra": torch.zeros(3)}), "differs: it also has extra"),
        (lambda state: state.update({"out.2.bias": torch.zeros(5)}), r"out.2.bias is \[5\] instead of \[6\]"),
    ],
)
def test_what_is_no_network_of_the_family_is_refused(change, words):
    state = dict(theirs("diffusion", PLAIN).state_dict())
    change(state)
    state.setdefault("output_blocks.0", torch.zeros(1)) if not state else None
    with pytest.raises(ModelError, match=f"model.pt: no network of the guided-diffusion family; .*{words}"):
        read(state, "diffusion", size=(SIZE, SIZE), heads=2)


# --- Other architectures ----------------------------------------------------------------------------------------------


def refusal(state, described):
    with pytest.raises(ModelError) as refused:
        convert(state, described, "file.pt")
    return str(refused.value)


def test_every_difference_is_named_at_once():
    state = dict(theirs("diffusion", PLAIN).state_dict())
    del state["out.2.bias"], state["middle_block.1.qkv.weight"]
    state["label_emb.weight"] = torch.zeros(2, 128)
    state["extra"] = torch.zeros(1)
    state["time_embed.0.weight"] = torch.zeros(128, 16)
    state["input_blocks.0.0.weight"] = torch.zeros(32, 5, 3, 3)
    message = refusal(state, card("diffusion", PLAIN))
    assert message.startswith("file.pt: not the diffusion network that the preset describes: ")
    assert "it lacks middle_block.1.qkv.weight, out.2.bias; " in message
    assert "it also has label_emb.weight, extra; " in message
    assert "time_embed.0.weight is [128, 16] instead of [128, 32]; " in message
    assert "input_blocks.0.0.weight is [32, 5, 3, 3] instead of [32, 3, 3, 3]." in message


def test_a_shape_is_compared_as_it_stands_in_the_file():
    state = dict(theirs("regress", RICH).state_dict())
    state["out.2.qkv_proj.weight"] = torch.zeros(192, 64)
    message = refusal(state, card("regress", RICH))
    assert "out.2.qkv_proj.weight is [192, 64] instead of [192, 64, 1]." in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 64}, "time_embed.0.weight is"),
        ({"mult": (1, 2, 2)}, "it lacks"),
        ({"res_blocks": 2}, "it lacks"),
        ({"attention": ()}, "it also has input_blocks.3.1.norm.weight"),
        ({"attention": (1, 2)}, "it lacks input_blocks.1.1.norm.weight"),
        ({"scale_shift": True}, "input_blocks.1.0.emb_layers.1.weight is"),
        ({"updown": True}, "it also has input_blocks.2.0.op.weight"),
        ({"classes": 2}, "it lacks label_emb.weight"),
        ({"groups": 8}, "norms have 32 groups in the file and 8 in the preset"),
        ({"stem": 2}, "the file has no stem"),
        ({"outputs": 7}, "out.2.weight is"),
    ],
)
def test_every_setting_that_shows_is_checked(change, words):
    message = refusal(theirs("diffusion", PLAIN).state_dict(), card("diffusion", replace(PLAIN, **change)))
    assert words in message


@pytest.mark.parametrize("pool", ["mean", "spatial", "spatial-norm"])
def test_another_pool_is_another_architecture(pool):
    state = theirs("regress", RICH).state_dict()
    assert "it lacks out." in refusal(state, card("regress", replace(RICH, pool=pool)))


def test_an_attention_pool_for_another_size_is_another_architecture():
    message = refusal(theirs("regress", RICH).state_dict(), card("regress", RICH, size=32))
    assert "out.2.positional_embedding is [64, 17] instead of [64, 65]" in message


def test_weights_that_are_not_finite_are_refused():
    state = dict(theirs("regress", RICH).state_dict())
    state["out.0.bias"] = torch.full((64,), torch.nan)
    assert "out.0.bias hold values that are not finite" in refusal(state, card("regress", RICH))


def test_weights_that_share_memory_are_taken_apart(tmp_path):
    state = dict(theirs("regress", RICH).state_dict())
    state["middle_block.0.in_layers.0.weight"] = state["middle_block.0.in_layers.0.bias"]
    converted = convert(state, card("regress", RICH), tmp_path)
    assert len({tensor.data_ptr() for tensor in converted.values()}) == len(converted)


# --- Hostile files ----------------------------------------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("new_format", [True, False])
def test_an_evil_pickle_is_refused_and_does_nothing(tmp_path, monkeypatch, new_format, force):
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, trace = tmp_path / "model.pt", tmp_path / "trace"
    torch.save({"weight": torch.zeros(1), "evil": Evil(trace)}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ModelError, match=r"perhaps a program|no other is opened"):
        read_state_dict(path)
    assert not trace.exists()


def test_the_evil_pickle_would_have_run(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


def archive(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return path


def repacked(path, compression):
    """Write a good file anew with its entries compressed."""
    saved(torch.nn.Linear(256, 256), path)
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    return archive(path, entries, compression)


def test_a_deflated_bomb_is_refused_before_it_unfolds(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    path = repacked(tmp_path / "model.pt", zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelError, match="compressed entries"):
        read_state_dict(path)
    path = archive(tmp_path / "bomb.pt", {"a/data/0": bytes(10_000_000)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    with pytest.raises(ModelError, match="compressed entries"):
        read_state_dict(path)


def test_stored_entries_are_read(tmp_path):
    path = repacked(tmp_path / "model.pt", zipfile.ZIP_STORED)
    assert read_state_dict(path).keys() == {"weight", "bias"}


def test_entries_that_overlap_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data/0", bytes(100_000))
        file.filelist *= 50
    with pytest.raises(ModelError, match="claims to hold more"):
        read_state_dict(path)


def test_a_tensor_larger_than_its_bytes_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1).expand(10**12)}, tmp_path / "model.pt")
    with pytest.raises(ModelError, match="weight are no weights"):
        read_state_dict(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"step": 3}, "a dict in which step are no weights"),
        ({"model": {"weight": torch.zeros(1)}}, "a dict in which model are no weights"),
        ({"state": {}, "param_groups": []}, "a dict in which state, param_groups are no weights"),
        ({1: torch.zeros(1)}, "a dict in which 1 are no weights"),
        ({"count": torch.zeros(1, dtype=torch.int64)}, "a dict in which count are no weights"),
        ({"weight": torch.eye(2).to_sparse()}, "a dict in which weight are no weights"),
        ({str(i): i for i in range(9)}, "a dict in which 0, 1, 2, 3, 4, ... are no weights"),
        ({}, "an empty dict"),
        ([torch.zeros(1)], "a list"),
        (torch.zeros(1), "a Tensor"),
    ],
)
def test_what_is_no_plain_state_dict_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ModelError, match=words):
        read_state_dict(tmp_path / "model.pt")


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


@pytest.mark.parametrize("data", [b"", b"hello", pickle.dumps({"weight": 1}), tar(), bytes(1000)])
def test_other_formats_are_not_opened(tmp_path, monkeypatch, data):
    monkeypatch.setattr(torch, "load", None)
    (tmp_path / "model.pt").write_bytes(data)
    with pytest.raises(ModelError, match=r"model.pt: not in torch.save.* no other is opened"):
        read_state_dict(tmp_path / "model.pt")


def test_torchscript_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    for name in ("net/constants.pkl", "net/code/__torch__.py"):
        with pytest.raises(ModelError, match="TorchScript"):
            read_state_dict(archive(tmp_path / "model.pt", {"net/data.pkl": b"", name: b""}))


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(ModelError, match="no such file"):
            read_state_dict(path)


def test_an_archive_without_weights_is_refused(tmp_path):
    with pytest.raises(ModelError, match="damaged"):
        read_state_dict(archive(tmp_path / "model.pt", {"readme.txt": b"hello"}))


def test_a_truncated_file_is_refused(tmp_path):
    data = saved(torch.nn.Linear(8, 8), tmp_path / "model.pt").read_bytes()
    for length in range(0, len(data), 97):
        (tmp_path / "model.pt").write_bytes(data[:length])
        with pytest.raises(ModelError):
            read_state_dict(tmp_path / "model.pt")


def test_flipped_bits_are_refused_or_harmless(tmp_path):
    net = torch.nn.Linear(4, 4)
    data = saved(net, tmp_path / "model.pt").read_bytes()
    refused = 0
    for bit in torch.randint(8 * len(data), (200,), generator=torch.Generator().manual_seed(0)).tolist():
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "model.pt").write_bytes(flipped)
        try:
            state = read_state_dict(tmp_path / "model.pt")
        except ModelError:
            refused += 1
        else:
            assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in state.items())
    assert refused > 50


def test_pickles_are_opened_nowhere_else():
    package = Path(interop.__file__).parent
    sources = [path for path in package.rglob("*.py") if path.name != "interop.py"]
    opening = re.compile(r"torch\.load\b|\bpickle\b|allow_pickle=True")
    assert [path.name for path in sources if opening.search(without_comments(path))] == []


def without_comments(path):
    """Return a module's source without its comments and texts."""
    words = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return "".join(word.string for word in words if word.type not in (tokenize.COMMENT, tokenize.STRING))
