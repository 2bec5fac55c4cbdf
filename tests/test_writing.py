"""Folders that appear whole or not at all, whatever else runs or lies beside them."""

import os
import stat
import threading
from pathlib import Path

import pytest

from lorma import InputError, files
from lorma.files import FolderKind, check_directory, check_output, write_atomic, write_folder


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


def test_a_pipe_is_written_and_stays_one(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (pipe, link):
        check_output(path, False, kind=None)
        write_atomic(path, "content")
        assert os.read(reader, 100) == b"content"
        assert pipe.is_fifo()
        assert link.is_symlink()
    os.close(reader)


def test_a_link_to_a_file_is_followed(tmp_path):
    link = tmp_path / "link"
    (tmp_path / "disk").mkdir()
    link.symlink_to(tmp_path / "disk" / "file")
    for content in ("one", "two"):
        write_atomic(link, content)
        assert link.is_symlink()
        assert (tmp_path / "disk" / "file").read_text() == content
    assert names(tmp_path / "disk") == ["file"]


KIND = FolderKind("a thing", ("content", "part-*.bin", "inner/*.txt"))


def test_a_folder_of_the_kind_may_be_replaced(tmp_path):
    out = tmp_path / "out"
    (out / "inner").mkdir(parents=True)
    for name in ("content", "part-1.bin", "inner/a.txt"):
        (out / name).touch()
    check_output(out, True, kind=KIND)
    with pytest.raises(InputError, match="out' exists; give --overwrite to replace it"):
        check_output(out, False, kind=KIND)


@pytest.mark.parametrize(
    "name", ["thesis.txt", ".hidden", "part-1.bin.old", "inner/deep/a.txt", "inner/content", "a.txt"]
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_with_anything_else_is_not_replaced(name, overwrite, tmp_path):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.touch()
    (tmp_path / "out" / "content").touch()
    shown = name.replace("/a.txt", "") if "deep" in name else name
    with pytest.raises(
        InputError, match=f"holds other files than those of a thing \\('{shown}'\\); name a new directory"
    ):
        check_output(tmp_path / "out", overwrite, kind=KIND)


def test_folders_and_links_under_the_names_of_files_are_foreign(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "one" / "content").mkdir(parents=True)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "content").symlink_to(tmp_path / "file")
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "inner").symlink_to(tmp_path)
    for name in ("one", "two", "three"):
        with pytest.raises(InputError, match="holds other files than those of a thing"):
            check_output(tmp_path / name, True, kind=KIND)


def test_the_current_directory_and_home_are_not_replaced(tmp_path, monkeypatch):
    here, home = tmp_path / "a" / "here", tmp_path / "b" / "home"
    for folder in (here, home):
        folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(here)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    for path in ("", ".", "..", "../here/", here, tmp_path / "link", here.parent, "/"):
        with pytest.raises(InputError, match="is the current directory, or holds it; name a new directory"):
            check_output(Path(path), True, kind=KIND)
    for path in (home, home.parent):
        with pytest.raises(InputError, match="is the home directory, or holds it"):
            check_output(path, True, kind=KIND)


def test_an_input_is_no_output_however_it_is_spelled(tmp_path, monkeypatch):
    data = tmp_path / "data.csv"
    data.touch()
    (tmp_path / "link").symlink_to(data)
    os.link(data, tmp_path / "second-name")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("data.csv", "link", "second-name", "folder/../data.csv"):
        with pytest.raises(InputError, match="is '.*data.csv', which is read; choose another output"):
            check_output(Path(path), True, data, kind=None)


def test_directories_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="output='.*/file' is a file; name a directory"):
        check_directory(tmp_path / "file")
    for path in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(InputError, match="its directory cannot be written: '.*/file' is a file"):
            check_directory(path)
    check_directory(tmp_path / "deep" / "new")
    assert names(tmp_path) == ["file"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InputError, match="output='.*/new': its directory cannot be written"):
        check_directory(tmp_path / "deep" / "new")
    with pytest.raises(InputError, match=f"output='{tmp_path}' cannot be written"):
        check_directory(tmp_path)
