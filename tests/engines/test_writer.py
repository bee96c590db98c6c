"""Nothing but a whole engine ever appears at the destination, and nothing is left behind."""

import errno

import pytest
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
