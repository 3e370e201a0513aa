import json
import threading
from pathlib import Path

import pytest
import torch

from knife import prepared as p
from knife.data import Case, Form, Loaded
from knife.errors import InputError
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


@pytest.mark.parametrize("damage", ["cut", "index", "entry"])
def test_a_damaged_set_is_refused(tmp_path, damage):
    folder = tmp_path / "key"
    p.prepared(folder, entries(3), FORM, Decoder(), no_progress)
    if damage == "cut":
        (folder / "pixels.f32").write_bytes((folder / "pixels.f32").read_bytes()[:-4])
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
    with pytest.raises(InputError, match=r"decoded images need 0.0; make room"):
        p.prepared(tmp_path / "key", entries(3), FORM, decode, no_progress)
    assert decode.calls == 0


def test_no_image_at_all_is_an_empty_set(tmp_path):
    loaded = p.prepared(tmp_path / "key", entries(5)[4:], FORM, Decoder(), no_progress)
    assert loaded.cases == []
    assert loaded.skipped == {"x4.png": "damaged"}
