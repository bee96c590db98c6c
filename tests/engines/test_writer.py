"""Nothing but a whole engine ever appears at the destination, and nothing is left behind."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ingot.builder.heads.folder import claimed
from ingot.builder.journal import Journal
from ingot.engines import writer
from ingot.engines.errors import BuildError
from ingot.engines.manifest import FILE_NAME
from ingot.engines.writer import engine_directory


def fill(folder, text="new"):
    (folder / "model.onnx").write_text(text)
    (folder / FILE_NAME).write_text("{}")


def test_appears_whole_with_its_parents(tmp_path):
    out = tmp_path / "a" / "b" / "engine"
    with engine_directory(out) as folder:
        fill(folder)
        assert not out.exists()
    assert (out / "model.onnx").read_text() == "new"
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["engine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, BuildError("x"), OSError(errno.EIO, "x"), ZeroDivisionError])
@pytest.mark.parametrize("exists", [False, True])
def test_an_error_leaves_nothing_behind(tmp_path, error, exists):
    out = tmp_path / "deep" / "engine" if not exists else tmp_path / "engine"
    if exists:
        with engine_directory(out) as folder:
            fill(folder, "old")
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        with engine_directory(out, force=True) as folder:
            fill(folder)
            raise error
    if exists:
        assert (out / "model.onnx").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == (["engine"] if exists else [])


def test_a_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(BuildError, match="is full"):
        with engine_directory(tmp_path / "engine"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_build_without_manifest_is_a_bug(tmp_path):
    with pytest.raises(RuntimeError):
        with engine_directory(tmp_path / "engine") as folder:
            (folder / "model.onnx").write_text("")
    assert not list(tmp_path.iterdir())


def test_only_an_engine_is_replaced_and_only_by_force(tmp_path):
    out = tmp_path / "engine"
    with engine_directory(out) as folder:
        fill(folder, "old")
        (folder / "old-only").write_text("")
    with pytest.raises(BuildError, match="--force"), engine_directory(out):
        pass
    with engine_directory(out, force=True) as folder:
        fill(folder)
    assert sorted(p.name for p in out.iterdir()) == [FILE_NAME, "model.onnx"]
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]


@pytest.mark.parametrize("manifest, words", [(FILE_NAME, "pass --force"), ("notes.txt", "is not an engine")])
def test_what_came_there_during_the_build_is_kept(tmp_path, manifest, words):
    out = tmp_path / "engine"
    with pytest.raises(BuildError, match=words), engine_directory(out, force=manifest != FILE_NAME) as folder:
        fill(folder)
        out.mkdir()
        (out / manifest).write_text("another's")
    assert (out / manifest).read_text() == "another's"
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_is_no_engine_is_never_touched(tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.tex").write_text("years of work")
    with pytest.raises(BuildError, match="not an engine"), engine_directory(out, force=True):
        pass
    assert (out / "chapter1.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(BuildError, match="not a directory"), engine_directory(tmp_path / "file", force=True):
        pass
    with pytest.raises(BuildError, match="cannot be made"), engine_directory(tmp_path / "file" / "engine"):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BuildError, match="is a symbolic link"), engine_directory(tmp_path / "link", force=True):
        pass
    with engine_directory(tmp_path / "empty") as folder:
        fill(folder)
    assert (tmp_path / "empty" / FILE_NAME).exists()


BUILD = """
import os, signal, sys
from pathlib import Path
from ingot.engines.writer import engine_directory
with engine_directory(sys.argv[1], force=True) as folder:
    (folder / "weights").write_text("half")
    print("building", flush=True)
    sys.stdin.read()
"""


def building(out):
    """A process that has begun to write an engine there, and waits."""
    process = subprocess.Popen([sys.executable, "-c", BUILD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"building\n"
    return process


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path):
    out = tmp_path / "engine"
    killed, alive, another = building(out), building(out), building(tmp_path / "engine.partial-1")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (tmp_path / "engine.partial-mine").mkdir()
    with engine_directory(out) as folder:
        names = {path.name for path in tmp_path.iterdir()}
        fill(folder)
    assert names == {
        "engine.partial-mine", folder.name, f"engine.partial-{alive.pid}", f"engine.partial-1.partial-{another.pid}",
    }  # fmt: skip
    for process in (alive, another):
        process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("exchanges", [True, False])
def test_there_is_an_engine_at_any_moment(tmp_path, monkeypatch, exchanges):
    """Where file systems can: a build that is killed while it replaces an engine leaves the one or the other."""
    out, calls = tmp_path / "engine", []
    with engine_directory(out) as folder:
        fill(folder, "old")
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: (calls.append(self.name), rename(self, to))[1])
    if not exchanges:
        monkeypatch.setattr(writer, "_exchange", lambda one, other: False)
    elif not (os.uname().sysname == "Linux" and probe(tmp_path)):
        pytest.skip("the file system cannot exchange folders")
    with engine_directory(out, force=True) as folder:
        fill(folder)
    assert (out / "model.onnx").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["engine"]
    assert bool(calls) != exchanges


def probe(folder):
    one, other = folder / "one", folder / "other"
    one.mkdir(), other.mkdir()
    found = writer._exchange(one, other)
    one.rmdir(), other.rmdir()
    return found


def test_a_place_that_cannot_be_written_is_told_of_before_the_build(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BuildError, match="e cannot be made .*file is not a directory.; give `-o` a place that can"):
        writer.check_destination(tmp_path / "file" / "a" / "e", False)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(BuildError, match="e cannot be made .* may not be written.; give `-o` a place that can be"):
        writer.check_destination(tmp_path / "a" / "e", False)
    writer.check_destination(Path("e"), False)


def test_a_mounted_disk_is_told_of_before_the_build(tmp_path, monkeypatch):
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "volume")
    with pytest.raises(BuildError, match="volume is where a disk is mounted, .*; give `-o` a directory in it"):
        writer.check_destination(tmp_path / "volume", False)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """What is done in a folder is done without; what somebody may be at work in is left alone."""

    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(writer.fcntl, "flock", none)
    (tmp_path / "engine.partial-1").mkdir()
    with engine_directory(tmp_path / "engine") as folder:
        fill(folder)
    assert {path.name for path in tmp_path.iterdir()} == {"engine", "engine.partial-1"}
    with claimed(tmp_path / "head", force=False):
        (tmp_path / "head" / "model.safetensors").touch()
    with Journal(tmp_path / "calibration", {}):
        assert (tmp_path / "calibration").is_dir()
    assert not (tmp_path / "calibration").exists() and (tmp_path / "head").is_dir()
