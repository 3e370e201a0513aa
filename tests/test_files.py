"""What lies below every format: paths in messages, hostile files, writing that survives a crash."""

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from knife import files
from knife.errors import InputError
from knife.files import make_folder, refusing, regular, remove_left_behind, room, sha256_of, shown, write_safely


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


def test_a_long_reason_is_cut() -> None:
    with pytest.raises(InputError) as refusal, refusing(Path("f"), "a file"):
        raise ValueError("y" * 159 + "xz")
    assert f"({'y' * 159}x);" in str(refusal.value)


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
    (tmp_path / "empty").touch()
    with pytest.raises(InputError, match="the file is empty"), regular(tmp_path / "empty"):
        pass
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError), regular(tmp_path / "dangling"):
        pass


def test_the_hash_is_that_of_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_of(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    with pytest.raises(FileNotFoundError):
        sha256_of(tmp_path / "g")


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


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    write_safely(tmp_path / "x", b"old")
    monkeypatch.setattr(f"os.{call}", full)
    with pytest.raises(OSError, match="No space"):
        write_safely(tmp_path / "x", b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x": b"old"}


def test_a_file_is_as_private_as_others_and_leaves_nothing_open(tmp_path: Path) -> None:
    def next_descriptor() -> int:
        descriptor = os.open(os.devnull, os.O_RDONLY)
        os.close(descriptor)
        return descriptor

    mask, before = os.umask(0), next_descriptor()
    try:
        for bits in (0o077, 0o000):
            os.umask(bits)
            write_safely(tmp_path / "x", b"new")
            assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~bits
    finally:
        os.umask(mask)
    assert next_descriptor() == before


def test_the_first_of_two_errors_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(os, "unlink", refused)
    with pytest.raises(OSError, match="No space"):
        write_safely(tmp_path / "x", b"new")


def test_the_old_file_goes_where_it_shall_be_kept(tmp_path: Path) -> None:
    for number in range(3):
        write_safely(tmp_path / "x", b"%d" % number, before=tmp_path / "old")
        assert (tmp_path / "x").read_bytes() == b"%d" % number
        assert [p.read_bytes() for p in tmp_path.glob("old")] == [b"%d" % (number - 1)][: bool(number)]


def test_data_are_written_however_few_the_system_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    write_safely(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_folders_that_cannot_be_opened_are_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "os", SimpleNamespace(name="nt"))  # where nothing else may be asked for
    files.sync(tmp_path)


def test_another_process_may_be_quicker_to_make_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = os.mkdir

    def twice(folder: Path) -> None:
        mkdir(folder)
        mkdir(folder)

    monkeypatch.setattr(os, "mkdir", twice)
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_link_that_leads_nowhere_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "link" / "a")


def test_unfinished_files_are_removed_when_nobody_can_be_writing_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda path: None)  # as if it were killed
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            write_safely(tmp_path / "x", b"new")
    (left,) = tmp_path.iterdir()
    (tmp_path / "mine.tmp").touch()
    remove_left_behind(tmp_path)
    assert left.exists()
    monkeypatch.setattr(time, "time", lambda: 1e9)
    for age, there in ((3600, True), (3601, False)):  # an hour
        for path in (left, tmp_path / "mine.tmp"):
            os.utime(path, (1e9 - age, 1e9 - age))
        remove_left_behind(tmp_path)
        assert left.exists() == there
    assert [p.name for p in tmp_path.iterdir()] == ["mine.tmp"]


def test_unfinished_files_that_cannot_be_removed_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".knife-1.tmp", ".knife-2.tmp"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    unlink = os.unlink
    monkeypatch.setattr(os, "unlink", lambda path: full() if path.name.endswith("1.tmp") else unlink(path))
    remove_left_behind(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".knife-1.tmp"]


def test_room_is_told_of_folders_that_are_still_to_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage(path))
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "a" / "b", Path("a"), Path("a/b/c"), Path()):
        assert 0 < room(folder) < 2**60
    assert asked == [tmp_path] * 5


def test_there_is_no_room_where_nobody_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "loop"):
        with pytest.raises(NotADirectoryError, match="no folder that can be written to") as refusal:
            room(tmp_path / name / "a" / "b")
        assert refusal.value.filename == str(tmp_path / name)
    for allowed in (os.W_OK, os.X_OK, 0):
        monkeypatch.setattr(os, "access", lambda path, mode, allowed=allowed: mode & ~allowed == 0)
        with pytest.raises(PermissionError, match="no folder that can be written to"):
            room(tmp_path)
