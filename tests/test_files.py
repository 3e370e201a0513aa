"""What lies below every format: paths in messages, hostile files, writing that survives a crash."""

import os
from pathlib import Path

import pytest

from knife.errors import InputError
from knife.files import refusing, regular, shown, write_safely


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("a b.nii", "a b.nii"), ("[/red]-x", "[/red]-x"), ("a\nb", r"a\nb"), ("a\x1b[31mb", r"a\x1b[31mb"),
        (os.fsdecode(b"\xff.png"), r"\udcff.png"), ("über", "über"), ("a\u202eb", r"a\u202eb"),
    ],
)  # fmt: skip
def test_names_fit_on_one_line(name: str, want: str) -> None:
    assert shown(name) == want


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (FileNotFoundError(2, "x"), "f.nii: no such file"), (MemoryError(), "f.nii: needs more memory"),
        (OverflowError("too\nbig."), r"f.nii: cannot be read as a file \(too big\); "), (EOFError(), r"\(EOFError\)"),
        (PermissionError(13, "Permission denied"), r"\(Permission denied\)"), (InputError("own words."), "^own words"),
    ],
)  # fmt: skip
def test_whatever_is_raised_becomes_one_sentence(raised: Exception, said: str) -> None:
    with pytest.raises(InputError, match=said), refusing(Path("f.nii"), "a file"):
        raise raised


def test_interrupts_pass() -> None:
    with pytest.raises(KeyboardInterrupt), refusing(Path("f"), "a file"):
        raise KeyboardInterrupt


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"hello")
    with regular(tmp_path / "x") as file:
        assert file.read() == b"hello"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match="no regular file"), regular(path):
            pass
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError), regular(tmp_path / "dangling"):
        pass


def test_writing_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.bin"
    for data in (b"one", b"two"):
        write_safely(path, data)
        assert path.read_bytes() == data
    assert [p.name for p in path.parent.iterdir()] == ["x.bin"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "x").symlink_to("other")
    write_safely(tmp_path / "x", b"new")
    assert (tmp_path / "other").read_bytes() == b"other"
    assert not (tmp_path / "x").is_symlink()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_safely(tmp_path / "x", b"old")
    monkeypatch.setattr(f"os.{call}", full)
    with pytest.raises(OSError, match="No space"):
        write_safely(tmp_path / "x", b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x": b"old"}
