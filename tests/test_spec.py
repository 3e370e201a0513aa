"""Image specs and the table of presets."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from knife.errors import SettingsError
from knife.spec import MOST, MOST_BLOCKS, PRESETS, ImageSpec, Training, attending, possible, preset, rows
from knife.unet import Architecture

UNET = Architecture(32, (1, 2), res_blocks=1, attention=(2,))
SPEC = ImageSpec(("t1", "flair"), (8, 12), UNET, replace(UNET, pool="spatial", head_width=16), (0.0, 1.0))


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, crop=True)], ids=["padded", "cropped"])
def test_a_spec_survives_json(spec):
    assert ImageSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_images_are_padded_and_reach_from_minus_one_to_one_if_nothing_else_is_said():
    spec = ImageSpec(("grey",), (8, 12), UNET, UNET)
    assert (spec.value_range, spec.crop) == ((-1.0, 1.0), False)
    assert preset("small-64").spec("regress", ("grey",)).value_range == (-1.0, 1.0)
    values = spec.to_json()
    del values["crop"]  # of a time when there was no choice
    assert ImageSpec.from_json(values) == spec


@pytest.mark.parametrize("record", [SPEC, Training(1), preset("small-64")], ids=lambda record: type(record).__name__)
def test_records_stay_what_they_are(record):
    name = next(iter(vars(record)))
    with pytest.raises(FrozenInstanceError):
        setattr(record, name, getattr(record, name))


@pytest.mark.parametrize("name", PRESETS)
def test_the_specs_of_presets_survive_json(name):
    row = preset(name)
    spec = row.spec("diffusion", tuple("abcd"[: row.channels or 2]))
    assert ImageSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_settings_that_a_later_knife_adds_to_an_architecture_are_passed_over():
    values = SPEC.to_json()
    values["unet"]["colour"] = "green"
    assert ImageSpec.from_json(values) == SPEC


IMPOSSIBLE = {
    "width": 0, "mult": [], "res_blocks": 10**9, "heads": -1, "head_width": 2.5, "groups": "8", "stem": True,
    "classes": -3, "outputs": 10**9,
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_networks_that_cannot_be_are_no_spec(name):
    values = SPEC.to_json()
    values["unet"][name] = IMPOSSIBLE[name]
    with pytest.raises(ValueError, match=r"is no network|too many"):
        ImageSpec.from_json(values)


def test_the_limits_themselves_are_networks():
    assert MOST == 16_384
    for values in ({"width": MOST}, {"mult": (MOST,)}, {"res_blocks": MOST_BLOCKS // 2}, {"mult": (1,) * 500}):
        arch = replace(UNET, **{"res_blocks": 2} | values)
        assert possible(arch) == arch
    for values in ({"width": MOST + 1}, {"mult": (MOST + 1,)}, {"res_blocks": 1001, "mult": (1,)}):
        with pytest.raises(ValueError, match=r"is no network|too many"):
            possible(replace(UNET, **{"res_blocks": 2} | values))


@pytest.mark.parametrize(
    ("change", "channels"),
    [
        ({}, [24]), ({"attention": (1,)}, [8, 24]), ({"attention": (4, 2)}, [16, 24, 24]),
        ({"attention": (4,), "stem": 2}, [16, 24]), ({"attention": (1,), "stem": 2}, [24]),
    ],
)  # fmt: skip
def test_heads_divide_the_channels_of_every_attention(change, channels):
    arch = replace(Architecture(8, (1, 2, 3), groups=4), **change)
    assert attending(arch) == channels
    for how in ({"heads": 5}, {"heads": 8, "head_width": 5}):
        with pytest.raises(ValueError, match=f"heads do not divide the {channels[0]} channels"):
            possible(replace(arch, **how))
    for how in ({"heads": 8}, {"heads": 5, "head_width": 8}):
        assert possible(replace(arch, **how)).attention == arch.attention


def test_a_tower_of_levels_is_no_network():
    values = SPEC.to_json()
    values["encoder"]["mult"] = [1] * 2000
    with pytest.raises(ValueError, match="2000 levels of 1 blocks are too many"):
        ImageSpec.from_json(values)


@pytest.mark.parametrize("change", [{"channels": ["a", 2]}, {"size": [8, "x"]}, {"value_range": [0, float("nan")]}])
def test_images_that_cannot_be_are_no_spec(change):
    with pytest.raises((TypeError, ValueError)):
        ImageSpec.from_json(SPEC.to_json() | change)


def test_networks_have_the_channels_of_the_spec():
    x, t = torch.zeros(1, 2, 8, 12), torch.tensor([0])
    assert SPEC.build_unet(3)(x, t).shape == (1, 3, 8, 12)
    assert SPEC.build_encoder(5)(x, t).shape == (1, 5)


@pytest.mark.parametrize("size", [(9, 8), (8, 7), (1, 1)])
def test_sizes_that_the_levels_do_not_divide_are_refused(size):
    with pytest.raises(SettingsError, match=rf"size {size[0]}x{size[1]}: this network needs sides divisible by 2"):
        replace(SPEC, size=size)


def test_the_encoder_has_a_say_in_the_size():
    with pytest.raises(SettingsError, match="divisible by 8"):
        replace(SPEC, encoder=replace(UNET, mult=(1, 1, 1, 2)))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_every_kind(name):
    row = preset(name)
    channels = tuple("abcd"[: row.channels or 4])
    with torch.device("meta"):
        for kind in row.kinds:
            spec = row.spec(kind, channels)
            assert sum(p.numel() for p in spec.build_unet(2 * len(channels)).parameters()) > 0
            assert sum(p.numel() for p in spec.build_encoder(1).parameters()) > 0
            assert row.settings(kind).steps > 0


def test_a_segmenter_may_have_another_architecture_than_the_diffusion_model():
    row = preset("small-64")
    assert row.spec("segment", ("a",)).unet == row.segmenter != row.spec("diffusion", ("a",)).unet == row.diffusion
    assert row.settings("segment") == row.settings("regress") != row.settings("diffusion")


def test_a_preset_of_other_channels_is_refused():
    with pytest.raises(SettingsError, match=r"paper-faces: made for 3 channels, the images have 2 \(t1, flair\)"):
        preset("paper-faces").spec("diffusion", ("t1", "flair"))


@pytest.mark.parametrize("name", PRESETS)
def test_judges_are_other_networks_than_guides_and_diffusion_models(name):
    row = preset(name)
    guides = [row.spec(kind, tuple("abcd"[: row.channels or 4])) for kind in row.kinds]
    for spec in guides:
        judge = spec.for_judge()
        assert judge.unet not in {guide.unet for guide in guides}
        assert judge.encoder not in {guide.encoder for guide in guides}
        assert judge.unet.width < spec.unet.width
        assert judge.encoder.width < spec.encoder.width
        assert judge.unet.attention == judge.encoder.attention == ()
        assert replace(judge, unet=spec.unet, encoder=spec.encoder) == spec
        assert ImageSpec.from_json(json.loads(json.dumps(judge.to_json()))) == judge == judge.for_judge()


@pytest.mark.parametrize(
    ("size", "stem", "levels"),
    [
        ((64, 64), 1, 4), ((128, 128), 2, 4), ((256, 256), 4, 4), ((240, 240), 4, 3), ((64, 192), 4, 4),
        ((16, 16), 1, 4), ((12, 20), 1, 3), ((8, 12), 1, 3), ((2, 6), 1, 2), ((7, 9), 1, 1), ((130, 130), 2, 1),
    ],
)  # fmt: skip
def test_a_judge_sees_every_pixel_of_small_images_and_fits_any_size(size, stem, levels):
    plain = Architecture(8, (1,), groups=4)
    judge = ImageSpec(("a",), size, plain, plain).for_judge()
    for arch in (judge.unet, judge.encoder):
        assert (arch.stem, len(arch.mult)) == (stem, levels)
    x, t = torch.zeros(1, 1, *size), torch.tensor([0])
    if max(size) <= 64:
        assert judge.build_unet(1)(x, t).shape == (1, 1, *size)
        assert judge.build_encoder(3)(x, t).shape == (1, 3)


def test_the_settings_of_the_paper():
    for name, kind, steps in (("paper-faces", "diffusion", 500_000), ("paper-brats", "segment", 20_000)):
        assert preset(name).settings(kind) == Training(steps, batch=10, lr=1e-4, ema=0.9999)


def test_rows_tell_the_size_of_every_network_that_a_preset_has():
    table = {(row["name"], row["kind"]): row for row in rows()}
    every = ["diffusion", "regress", "classify", "segment"]
    for name, kinds in (("paper-faces", every[:2]), ("paper-brats", every), ("small-64", every), ("small-128", every)):
        assert [row["kind"] for row in table.values() if row["name"] == name] == kinds
    about = {"name": "paper-faces", "kind": "diffusion", "channels": 3, "size": [128, 128], "parameters": 85_606_150}
    assert table["paper-faces", "diffusion"] == about
    counts = {kind: table["paper-brats", kind]["parameters"] for kind in every}
    assert counts["diffusion"] == counts["segment"] == 113_681_160
    assert counts["regress"] == 5_452_833
    assert table["small-64", "regress"]["channels"] is None
    for kind, outputs in (("diffusion", 8), ("regress", 1), ("classify", 2), ("segment", 1)):
        small = preset("small-64").spec(kind, tuple("abcd"))
        with torch.device("meta"):
            net = (small.build_unet if kind in ("diffusion", "segment") else small.build_encoder)(outputs)
        assert table["small-64", kind]["parameters"] == sum(p.numel() for p in net.parameters())


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(SettingsError, match=r"--preset large: there is none .* paper-faces, paper-brats, small-64"):
        preset("large")
