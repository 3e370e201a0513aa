"""Stored models come back as they were, damaged ones are refused by name, a write that fails leaves the old file."""

import io
import json
import os
import struct
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as serialise

from knife import checkpoint
from knife.checkpoint import (
    Card,
    Stored,
    check_fit,
    describe,
    digest,
    file_name,
    load,
    load_model,
    save,
    stored_models,
)
from knife.errors import DiskError, KnifeError, ModelError, TaskError, UnreadableError
from knife.schedule import Schedule
from knife.spec import ImageSpec
from knife.unet import Architecture

TINY = Architecture(8, (1, 2), res_blocks=1, groups=4, pool="mean")
SPEC = ImageSpec(("t1", "flair"), (16, 16), TINY, TINY)
CARD = Card(
    kind="diffusion",
    dataset="squares",
    spec=SPEC,
    schedule=Schedule("cosine", 200),
    config={"label": "age", "low": 0.1, "classes": ["a", "b"]},
    guidance={"gradient": 1.5e-3},
    training={"step": 7, "settings": {"lr": 1e-4, "label": None}, "command": "knife train"},
)


def store(path: Path, card: Card = CARD) -> torch.nn.Module:
    """Store a network of random weights; return it."""
    torch.manual_seed(0)
    net = checkpoint.ready(card.build(), "cpu").eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save(path, net.state_dict(), card.to_json())
    return net


def refused(path: Path) -> str:
    """Check that a file is refused by name, wherever it is read, and by nothing but a ModelError."""
    with pytest.raises(ModelError) as refusal:
        load_model(path)
    assert str(path) in str(refusal.value)
    return str(refusal.value)


# ---------------------------------------------------------------------------------------------------------- round trip


def test_a_card_is_the_same_after_json() -> None:
    assert Card.from_json(json.loads(json.dumps(CARD.to_json()))) == CARD


def test_the_card_of_a_calibrated_judge_is_the_same_after_json() -> None:
    card = replace(CARD, kind="regress", calibration={"levels": [0, 100]}, judge=True)
    values = json.loads(json.dumps(card.to_json()))
    assert Card.from_json(values) == card
    assert values["schedule"] == {"kind": "cosine", "T": 200, "digest": CARD.schedule.digest}


def test_a_card_without_details_is_the_same_after_json() -> None:
    card = Card("regress", "x", SPEC, Schedule())
    values = json.loads(json.dumps(card.to_json()))
    assert Card.from_json(values) == card
    del values["calibration"], values["judge"]  # of a time when there was neither
    assert Card.from_json(values) == card
    assert (card.calibration, card.judge) == ({}, False)


@pytest.mark.parametrize(
    ("record", "name"), [(CARD, "kind"), (Stored(Path("x"), CARD), "path")], ids=["card", "stored"]
)
def test_what_was_read_stays_as_it_was(record: object, name: str) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(record, name, "other")


def test_the_shipped_models_are_whole() -> None:
    """They were written by an earlier knife, so that this also tells whether files still mean what they meant."""
    found = stored_models(checkpoint.STARTER)
    assert {stored.card.kind for stored in found} >= {"diffusion", "regress"}
    for stored in found:
        weights = checkpoint.read_tensors(stored.path)
        assert sum(tensor.numel() for tensor in weights.values()) > 1000


@pytest.mark.parametrize("kind", ["diffusion", "regress", "classify", "segment"])
def test_a_stored_network_answers_as_before(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "models" / "squares" / f"{kind}.safetensors"
    net = store(path, replace(CARD, kind=kind))
    assert describe(path) == Stored(path, replace(CARD, kind=kind))
    again = load_model(str(path))
    x, t = torch.randn(3, 2, 16, 16), torch.tensor([0, 5, 199])
    assert torch.equal(again(x, t), net(x, t))
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_half_weights_are_read_as_float32(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save(path, {k: v.bfloat16() for k, v in CARD.build().state_dict().items()}, CARD.to_json())
    assert {p.dtype for p in load_model(path).parameters()} == {torch.float32}


def test_the_same_model_makes_the_same_file(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for path in paths:
        store(path)
    assert digest(paths[0]) == digest(paths[1])
    store(paths[1], replace(CARD, dataset="circles"))
    assert digest(paths[0]) != digest(paths[1])


def test_tensors_that_share_memory_are_stored(tmp_path: Path) -> None:
    tied = torch.randn(4, 4)
    learned = torch.nn.Parameter(tied)
    save(tmp_path / "tied", {"a": learned, "b": tied, "c": tied.t(), "d": tied[0], "e": torch.tensor(3)}, {})
    back = checkpoint.read_tensors(tmp_path / "tied")
    assert torch.equal(back["b"], tied)
    assert torch.equal(back["c"], tied.t())
    assert back["e"].shape == ()


def test_a_checksum_does_not_depend_on_the_order_of_things() -> None:
    one, other = torch.ones(2), torch.zeros(2, 2)
    first = checkpoint.seal({"a": 1, "b": {"c": 2, "d": 3}}, {"x": one, "y": other})
    assert checkpoint.seal({"b": {"d": 3, "c": 2}, "a": 1, "sha256": "x"}, {"y": other, "x": one}) == first
    changed = [({"x": other, "y": one}, 1), ({"x": one, "y": other.flatten()}, 1), ({"x": one, "y": other.int()}, 1)]
    for tensors, a in [*changed, ({"x": one, "y": other}, 2)]:
        assert checkpoint.seal({"a": a, "b": {"c": 2, "d": 3}}, tensors) != first


def test_weights_lie_as_convolutions_like_them(tmp_path: Path) -> None:
    store(tmp_path / "x")
    shapes = [p for p in load_model(tmp_path / "x").parameters() if p.ndim == 4 and min(p.shape) > 1]
    assert shapes
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in shapes)


def test_files_without_a_checksum_are_refused(tmp_path: Path) -> None:
    """Else a bit that changes in its name would let any other pass."""
    path = tmp_path / "plain.safetensors"
    path.write_bytes(serialise(CARD.build().state_dict(), {"knife": json.dumps(CARD.to_json())}))
    assert "its checksum differs" in refused(path)
    store(path)
    path.write_bytes(path.read_bytes().replace(b"sha256", b"sha254"))
    assert "its checksum differs" in refused(path)


# -------------------------------------------------------------------------------------------------------------- damage


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    store(path)
    whole = path.read_bytes()
    for share in range(32):
        path.write_bytes(whole[: len(whole) * share // 32])
        refused(path)
    path.write_bytes(whole[:-1])
    refused(path)
    path.write_bytes(whole + b"\0")
    refused(path)


def test_a_flipped_bit_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "flipped.safetensors"
    store(path)
    whole = path.read_bytes()
    random = torch.Generator().manual_seed(0)
    header = struct.unpack("<Q", whole[:8])[0]
    places = torch.randint(0, 8 * len(whole), (40,), generator=random).tolist()
    places += torch.randint(0, 8 * (8 + header), (40,), generator=random).tolist()
    for place in places:
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(KnifeError):  # a flip in the kind asks for a task that there is none of
            load_model(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\0" * 4096,
        b"no model, but a text",
        b"\xff" * 100,
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x04\0\0\0\0\0\0\0[[]]",
    ],
)
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "garbage.safetensors"
    path.write_bytes(content)
    assert "not written by knife" in refused(path) or "no model" in refused(path)


def test_missing_files_folders_and_fifos_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "gone.safetensors")
    assert "no such file" in refused(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "no such file" in refused(tmp_path / "fifo")
    with pytest.raises(ModelError, match="gone"):
        digest(tmp_path / "gone")


@pytest.mark.parametrize(
    ("length", "reason"),
    [(10**8, "SafetensorError"), (10**8 + 1, "a header of 100000001 bytes"), (1 << 56, f"a header of {1 << 56} bytes")],
)
def test_a_header_longer_than_safetensors_allows_is_refused_unread(tmp_path: Path, length: int, reason: str) -> None:
    (tmp_path / "long.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    assert f"({reason})" in refused(tmp_path / "long.safetensors")


@pytest.mark.parametrize("when", ["open", "get_tensor"])
def test_what_the_disk_refuses_to_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    path = tmp_path / "diffusion.safetensors"
    store(path)

    class Broken:
        def __enter__(self) -> "Broken":
            raise OSError(5, "Input/output error")

        def __exit__(self, *_: object) -> None: ...

    with monkeypatch.context() as patch:
        if when == "open":
            patch.setattr(Path, "open", lambda *_: Broken())
        else:
            patch.setattr(checkpoint, "safe_open", lambda *_: Broken())
        with pytest.raises(UnreadableError, match=r"cannot be read \(Input/output error\); .* try again") as refusal:
            load_model(path)
        assert refusal.value.exit_code == 4
    load_model(path)


def test_a_file_that_opens_but_cannot_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if size:
                raise OSError(5, "Input/output error")
            return b""

    path = tmp_path / "diffusion.safetensors"
    store(path)
    monkeypatch.setattr(Path, "open", lambda *_: Broken())
    with pytest.raises(UnreadableError, match=r"cannot be read \(Input/output error\)"):
        load_model(path)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_is_not_called_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "diffusion.safetensors"
    store(path)

    def full(*_: object) -> None:
        raise error

    for place, name in ((checkpoint, "safe_open"), (Card, "build")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            with pytest.raises(type(error)):
                load_model(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"card"', "null", "[" * 100_000, '{"format": 1}', "{}"])
def test_wrong_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(serialise({"a": torch.zeros(1)}, {"knife": text}))
    refused(path)


def test_a_card_of_a_later_format_asks_for_a_later_knife(tmp_path: Path) -> None:
    path = tmp_path / "later.safetensors"
    save(path, {}, {**CARD.to_json(), "format": 2})
    assert "update knife" in refused(path)


@pytest.mark.parametrize("wrong", [None, 3, "text", [], {}, [1, 2, 3], {"kind": 1}, -1, 1e300, True])
@pytest.mark.parametrize(
    "name",
    [
        "kind", "dataset", "spec", "schedule", "config", "guidance", "training", "spec.size", "spec.unet",
        "spec.unet.mult", "spec.channels",
    ],
)  # fmt: skip
def test_a_card_of_wrong_values_is_refused(tmp_path: Path, name: str, wrong: object) -> None:
    path = tmp_path / "card.safetensors"
    values = json.loads(json.dumps(CARD.to_json()))
    *outer, last = name.split(".")
    place = values
    for key in outer:
        place = place[key]
    if (name, wrong) == ("dataset", "text") or (name in ("config", "guidance", "training") and isinstance(wrong, dict)):
        return  # nothing is wrong about these
    place[last] = wrong
    save(path, CARD.build().state_dict(), values)
    with pytest.raises(TaskError if (name, wrong) == ("kind", "text") else ModelError):
        load_model(path)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save(path, replace(CARD, kind="segment").build().state_dict(), CARD.to_json())
    assert "do not fit its card" in refused(path)


def test_a_card_that_asks_for_more_weights_than_there_are_gets_no_memory_for_them(tmp_path: Path) -> None:
    path = tmp_path / "wide.safetensors"
    weights = CARD.build().state_dict()
    count = sum(tensor.numel() for tensor in weights.values())
    save(path, weights, replace(CARD, spec=replace(SPEC, unet=replace(TINY, width=4096))).to_json())
    assert f"do not fit its card, {count} instead of " in refused(path)


def test_a_network_that_cannot_be_built_is_refused_on_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save(path, {}, CARD.to_json())

    def build(card: Card) -> torch.nn.Module:
        raise RuntimeError("no\n  such network: " + "y" * 182 + "xz")

    monkeypatch.setattr(Card, "build", build)
    assert refused(path).endswith(f"do not fit its card: no such network: {'y' * 182}x.")


def test_a_training_state_is_no_model(tmp_path: Path) -> None:
    save(tmp_path / "x.resume.safetensors", {}, {"step": 3})
    assert "no model" in refused(tmp_path / "x.resume.safetensors")


# ------------------------------------------------------------------------------------------------------------- writing


def test_a_full_disk_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "models" / "squares" / "diffusion.safetensors"
    store(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskError, match=r"diffusion\.safetensors: cannot be written \(No space left on device\)"):
        store(path, replace(CARD, dataset="circles"))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(DiskError, match="cannot be written"):
        store(tmp_path / "models" / "squares" / "diffusion.safetensors")


# ------------------------------------------------------------------------------------------------------------- folders


def test_stored_models_are_sorted_and_training_states_left_out(tmp_path: Path) -> None:
    for name in ("b/segment", "b/diffusion", "a/regress", "a/regress.resume"):
        store(tmp_path / f"{name}.safetensors", replace(CARD, kind=name.split("/")[1].removesuffix(".resume")))
    assert [str(s.path.relative_to(tmp_path).with_suffix("")) for s in stored_models(tmp_path)] == [
        "a/regress",
        "b/diffusion",
        "b/segment",
    ]
    assert stored_models(tmp_path / "gone") == []


def test_the_name_of_a_file_tells_a_judge() -> None:
    assert file_name("segment") == file_name("segment", False) == "segment.safetensors"
    assert file_name("segment", judge=True) == "segment.judge.safetensors"


def test_judges_are_listed_with_the_guides_and_stay_judges(tmp_path: Path) -> None:
    for judge in (False, True):
        card = replace(CARD, kind="segment", judge=judge)
        store(tmp_path / "squares" / file_name("segment", judge), card)
    store(tmp_path / "squares" / "segment.judge.resume.safetensors")
    found = {stored.path.name: stored.card.judge for stored in stored_models(tmp_path)}
    assert found == {"segment.judge.safetensors": True, "segment.safetensors": False}


def test_a_damaged_model_does_not_hide_the_others(tmp_path: Path) -> None:
    store(tmp_path / "a" / "diffusion.safetensors")
    (tmp_path / "a" / "broken.safetensors").write_text("nothing")
    heard: list[ModelError] = []
    assert len(stored_models(tmp_path, heard.append)) == 1
    assert "broken" in str(heard[0])
    with pytest.raises(ModelError, match="broken"):
        stored_models(tmp_path)


def test_a_guide_of_the_same_images_and_levels_fits() -> None:
    guide = replace(CARD, kind="segment", spec=replace(SPEC, unet=replace(TINY, width=16)), dataset="circles")
    check_fit(Stored(Path("d"), CARD), Stored(Path("g"), guide))


DIFFERENT = {
    "schedule linear of 200 levels against cosine of 200 levels": replace(CARD, schedule=Schedule("linear", 200)),
    "schedule cosine of 100 levels against cosine of 200 levels": replace(CARD, schedule=Schedule("cosine", 100)),
    "channels flair, t1 against t1, flair": replace(CARD, spec=replace(SPEC, channels=("flair", "t1"))),
    "size 16 x 32 against 16 x 16": replace(CARD, spec=replace(SPEC, size=(16, 32))),
    "images cropped against padded": replace(CARD, spec=replace(SPEC, crop=True)),
    "value range 0.0 to 1.0 against -1.0 to 1.0": replace(CARD, spec=replace(SPEC, value_range=(0.0, 1.0))),
}


@pytest.mark.parametrize("said", DIFFERENT)
def test_a_guide_that_differs_is_refused_by_the_difference(said: str) -> None:
    with pytest.raises(ModelError) as refusal:
        check_fit(Stored(Path("d"), CARD), Stored(Path("g"), DIFFERENT[said]))
    assert str(refusal.value).startswith(f"g: does not fit d: {said}.")


def test_every_difference_is_named() -> None:
    spec = replace(SPEC, channels=("r",), size=(32, 32), value_range=(0.0, 1.0))
    with pytest.raises(ModelError) as refusal:
        check_fit(Stored(Path("d"), CARD), Stored(Path("g"), replace(CARD, spec=spec, schedule=Schedule())))
    for word in ("schedule", "channels", "size", "value range"):
        assert word in str(refusal.value)


def test_load_says_what_the_card_says(tmp_path: Path) -> None:
    path = tmp_path / "diffusion.safetensors"
    store(path)
    net = load(describe(path))
    assert net(torch.zeros(1, 2, 16, 16), torch.zeros(1)).shape == (1, 4, 16, 16)
