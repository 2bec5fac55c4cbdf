"""Folders that appear whole or not at all, whatever else runs or lies beside them."""

import os
import stat
import threading

import pytest

from lorma import InputError, files
from lorma.files import write_folder


def holding(content):
    def fill(folder):
        folder.mkdir()
        (folder / "content").write_text(content)

    return fill


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_folder_is_replaced_whole_and_nothing_is_left(tmp_path):
    out = tmp_path / "out"
    write_folder(out, holding("one"))
    (out / "more").write_text("")
    write_folder(out, holding("two"))
    assert names(out) == ["content"]
    assert (out / "content").read_text() == "two"
    assert names(tmp_path) == ["out"]


def test_permissions_are_those_of_any_folder(tmp_path):
    (tmp_path / "plain").mkdir()
    write_folder(tmp_path / "out", holding(""))
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_old_folder_comes_back_if_the_new_one_cannot_be_put_there(tmp_path, monkeypatch):
    out, renamed = tmp_path / "out", []
    write_folder(out, holding("old"))

    def replace(source, target):
        renamed.append(target)
        if len(renamed) == 2:
            raise OSError(28, "No space left on device")
        os.rename(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        write_folder(out, holding("new"))
    assert (out / "content").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_what_fails_leaves_the_old_folder(tmp_path):
    out = tmp_path / "out"
    write_folder(out, holding("old"))

    def fail(folder):
        holding("new")(folder)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        write_folder(out, fail)
    assert (out / "content").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_two_runs_at_once_do_not_mix(tmp_path):
    out, begun, written = tmp_path / "out", threading.Event(), threading.Event()

    def slow(folder):
        holding("slow")(folder)
        begun.set()
        assert written.wait(60)
        (folder / "last").write_text("slow")

    thread = threading.Thread(target=write_folder, args=(out, slow))
    thread.start()
    assert begun.wait(60)
    write_folder(out, holding("quick"))
    assert names(out) == ["content"]
    written.set()
    thread.join()
    assert names(out) == ["content", "last"]
    assert (out / "content").read_text() == "slow"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", [".out.tmp", ".out.old"])
def test_a_users_own_hidden_folder_stays(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes").write_text("mine")
    write_folder(tmp_path / "out", holding(""))
    assert (tmp_path / name / "notes").read_text() == "mine"


def test_a_link_to_a_folder_is_followed(tmp_path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "disk" / "real")
    for content in ("one", "two"):
        write_folder(link, holding(content))
        assert link.is_symlink()
        assert (tmp_path / "disk" / "real" / "content").read_text() == content
    assert names(tmp_path / "disk") == ["real"]
    assert names(tmp_path) == ["disk", "out"]


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/out' cannot be written: "):
        write_folder(tmp_path / "file" / "out", lambda folder: pytest.fail("work was done"))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_are_readable_as_any_new_file_is(umask, mode, tmp_path):
    def fill(folder):
        (folder / "inner").mkdir(parents=True)
        for name in ("one", "inner/two"):
            os.close(os.open(folder / name, os.O_CREAT | os.O_WRONLY, 0o600))

    before = os.umask(umask)
    try:
        write_folder(tmp_path / "out", fill)
    finally:
        os.umask(before)
    for name in ("one", "inner/two"):
        assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == mode
    assert names(tmp_path / "out") == ["inner", "one"]
