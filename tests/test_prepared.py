import json
import threading
from pathlib import Path

import pytest
import torch

from knife import prepared as p
from knife.data import Case, Form, Loaded
from knife.errors import DiskError, InputError
from knife.layouts import Entry

SHAPE = (2, 3, 5)
FORM = Form(("a", "b"), (3, 5), (-1.0, 1.0))


def entries(count: int) -> list[Entry]:
    return [Entry(f"x{i}.png", (Path(f"x{i}.png"),), values={"age": str(i)}) for i in range(count)]


def case(entry: Entry) -> Case:
    i = int(entry.values["age"])
    pixels = torch.arange(30.0).view(SHAPE) + 100 * i
    return Case(entry.name, pixels, torch.full((1, 3, 5), float(i % 2)) if i % 3 else None, entry.values)


class Decoder:
    """Decodes all but every fifth entry, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, part: list[Entry]) -> Loaded:
        self.calls += 1
        bad = {e.name: "damaged" for e in part if int(e.values["age"]) % 5 == 4}
        return Loaded([case(e) for e in part if e.name not in bad], bad)


def stumbling(part: list[Entry]) -> Loaded:
    """Decode all but x1 and x2, whose disk stumbles, and x4, which is damaged."""
    bad = {"x1.png": "input/output error", "x2.png": "input/output error", "x4.png": "damaged"}
    skipped = {e.name: bad[e.name] for e in part if e.name in bad}
    return Loaded([case(e) for e in part if e.name not in bad], skipped, skipped.keys() & {"x1.png", "x2.png"})


def no_progress(done: int) -> None:
    pass


def same(a: Case, b: Case) -> bool:
    masks = (a.mask is None) == (b.mask is None) and (a.mask is None or torch.equal(a.mask, b.mask))
    return a.name == b.name and dict(a.values) == dict(b.values) and torch.equal(a.pixels, b.pixels) and masks


def test_what_is_prepared_is_what_was_decoded_and_is_decoded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(p, "AT_ONCE", 4)
    decode, told = Decoder(), []
    first = p.prepared(tmp_path / "key", entries(11), FORM, decode, told.append)
    assert decode.calls == 3
    assert told == [4, 8, 11, 11]
    again = p.prepared(tmp_path / "key", entries(11), FORM, decode, no_progress)
    assert decode.calls == 3
    wanted = [case(e) for e in entries(11) if int(e.values["age"]) % 5 != 4]
    for loaded in (first, again):
        assert loaded.skipped == {"x4.png": "damaged", "x9.png": "damaged"}
        assert len(loaded.cases) == len(wanted)
        assert all(same(a, b) for a, b in zip(loaded.cases, wanted, strict=True))


def test_writing_to_a_prepared_image_leaves_the_file_alone(tmp_path):
    one = p.prepared(tmp_path / "key", entries(2), FORM, Decoder(), no_progress).cases[0]
    one.pixels.zero_()
    again = p.prepared(tmp_path / "key", entries(2), FORM, Decoder(), no_progress).cases[0]
    assert torch.equal(again.pixels, case(entries(1)[0]).pixels)


def test_what_the_disk_failed_at_is_tried_again(tmp_path):
    folder, wanted, tried = tmp_path / "key", entries(6), []

    def listening(part: list[Entry]) -> Loaded:
        tried.append([e.name for e in part])
        return stumbling(part)

    first = p.prepared(folder, wanted, FORM, stumbling, no_progress)
    assert set(first.skipped) == {"x1.png", "x2.png", "x4.png"}
    again = p.prepared(folder, wanted, FORM, listening, no_progress)  # the disk still stumbles: the set serves
    assert tried == [["x1.png", "x2.png"]]
    assert again.skipped == first.skipped
    whole = p.prepared(folder, wanted, FORM, Decoder(), no_progress)
    assert whole.skipped == {"x4.png": "damaged"}
    assert [one.name for one in whole.cases] == ["x0.png", "x1.png", "x2.png", "x3.png", "x5.png"]
    assert same(first.cases[0], case(wanted[0]))  # mapped before the set was made anew
    tried.clear()
    p.prepared(folder, wanted, FORM, listening, no_progress)
    assert tried == []
    assert [place.name for place in tmp_path.iterdir()] == ["key"]


def test_what_a_stumbling_disk_hid_may_turn_out_damaged(tmp_path):
    def judged(part: list[Entry]) -> Loaded:
        return Loaded([case(e) for e in part if e.name != "x1.png"], {"x1.png": "damaged"})

    p.prepared(tmp_path / "key", entries(3), FORM, stumbling, no_progress)
    assert p.prepared(tmp_path / "key", entries(3), FORM, judged, no_progress).skipped == {"x1.png": "damaged"}


def test_a_set_without_a_list_of_what_to_try_again_serves(tmp_path):
    p.prepared(tmp_path / "key", entries(6), FORM, Decoder(), no_progress)
    index = json.loads((tmp_path / "key" / "index.json").read_text())
    del index["passing"]
    (tmp_path / "key" / "index.json").write_text(json.dumps(index))
    decode = Decoder()
    assert p.prepared(tmp_path / "key", entries(6), FORM, decode, no_progress).skipped == {"x4.png": "damaged"}
    assert decode.calls == 0


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells its memory there")
def test_a_set_larger_than_memory_and_swap_is_mapped(tmp_path):
    """A file of holes takes no room on the disk; Linux refuses to map it privately if swap is to be reserved."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    memory = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("MemTotal:", "SwapTotal:")))
    count = memory // 4 + 2**20
    with (tmp_path / "x.f32").open("wb") as file:
        file.truncate(count * 4)
    x = p.tensor(tmp_path / "x.f32", [count])
    x[-1] = 5
    assert x[-1] == 5
    with (tmp_path / "x.f32").open("rb") as file:
        file.seek(-4, 2)
        assert file.read() == bytes(4)


def test_the_key_follows_content_and_form():
    inventory = {"a": "1", "b": "2"}
    forms = [FORM, FORM._replace(size=(5, 3)), FORM._replace(crop=True), FORM._replace(min_brain=0.1)]
    keys = [p.key(inventory, form) for form in forms]
    keys += [p.key({"a": "1", "b": "3"}, FORM), p.key({"a": "1"}, FORM)]
    assert len(set(keys)) == 6
    assert p.key(dict(reversed(inventory.items())), FORM) == keys[0]


def test_a_decoder_that_fails_leaves_nothing_behind(tmp_path):
    def fail(part: list[Entry]) -> Loaded:
        raise InputError("broken")

    with pytest.raises(InputError, match="broken"):
        p.prepared(tmp_path / "sets" / "key", entries(3), FORM, fail, no_progress)
    assert list((tmp_path / "sets").iterdir()) == []


def test_two_writers_at_once_end_with_one_whole_set(tmp_path):
    together, results = threading.Barrier(2), []

    def decode(part: list[Entry]) -> Loaded:
        together.wait(10)
        return Decoder()(part)

    def work() -> None:
        results.append(p.prepared(tmp_path / "key", entries(7), FORM, decode, no_progress))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(loaded.cases) for loaded in results] == [6, 6]
    assert [folder.name for folder in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("damage", ["cut", "bit", "mask", "index", "entry"])
def test_a_damaged_set_is_refused(tmp_path, damage):
    folder = tmp_path / "key"
    p.prepared(folder, entries(3), FORM, Decoder(), no_progress)
    if damage == "cut":
        (folder / "pixels.f32").write_bytes((folder / "pixels.f32").read_bytes()[:-4])
    elif damage in ("bit", "mask"):
        file = folder / ("pixels.f32" if damage == "bit" else "masks.f32")
        data = bytearray(file.read_bytes())
        data[5] ^= 1
        file.write_bytes(data)
    elif damage == "index":
        (folder / "index.json").write_text("{")
    else:
        index = json.loads((folder / "index.json").read_text())
        del index["cases"][0]["name"]
        (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="key: this prepared data set is damaged; remove the folder"):
        p.prepared(folder, entries(3), FORM, Decoder(), no_progress)


def test_a_full_disk_is_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    decode = Decoder()
    monkeypatch.setattr(p, "room", lambda place: 10)
    with pytest.raises(DiskError, match=r"decoded images need 0.0; make room"):
        p.prepared(tmp_path / "key", entries(3), FORM, decode, no_progress)
    assert decode.calls == 0


def test_no_image_at_all_is_an_empty_set(tmp_path):
    loaded = p.prepared(tmp_path / "key", entries(5)[4:], FORM, Decoder(), no_progress)
    assert loaded.cases == []
    assert loaded.skipped == {"x4.png": "damaged"}
