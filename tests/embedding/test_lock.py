import errno
import getpass
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import nullcontext, suppress
from pathlib import Path

import filelock
import pytest

from nopad.embedding.lock import FolderLock, LockedError, LostLockError, check_owner

HOLD = """
import sys
from nopad.embedding.lock import FolderLock
with FolderLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen:
    arguments = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_killed_process_frees_the_folder_and_a_living_one_is_named(tmp_path):
    process = holder(tmp_path)
    try:
        who = rf"{re.escape(str(tmp_path))} is being written by another job: process {process.pid} of \S.* on "
        with pytest.raises(LockedError, match=who + re.escape(socket.gethostname()) + r", since \d{4}-\d\d-\d\dT"):
            FolderLock(tmp_path).acquire()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with FolderLock(tmp_path):  # what the killed process left says nothing
        assert json.loads((tmp_path / ".nopad" / "owner.json").read_text())["pid"] == os.getpid()


def test_a_process_that_ends_leaves_no_owner(tmp_path):
    holder(tmp_path).communicate()
    assert [path.name for path in (tmp_path / ".nopad").iterdir()] == ["lock"]


def test_two_locks_of_one_process(tmp_path):
    with FolderLock(tmp_path).acquire() as first:
        with pytest.raises(LockedError, match=f"process {os.getpid()} "):
            FolderLock(tmp_path).acquire()
        assert first.acquire() is first
    with FolderLock(tmp_path), pytest.raises(LockedError):
        FolderLock(tmp_path).acquire()


def test_releasing_twice_frees_no_other_holder(tmp_path):
    first = FolderLock(tmp_path).acquire()
    first.release()
    with FolderLock(tmp_path):
        first.release()
        with pytest.raises(LockedError):
            FolderLock(tmp_path).acquire()


def test_another_thread_may_release(tmp_path):
    lock = FolderLock(tmp_path).acquire()
    thread = threading.Thread(target=lock.release)
    thread.start()
    thread.join()
    assert not (tmp_path / ".nopad" / "owner.json").exists()
    FolderLock(tmp_path).acquire().release()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_child_cannot_release(tmp_path):
    with FolderLock(tmp_path) as lock:
        child = multiprocessing.get_context("fork").Process(target=lock.release)
        child.start()
        child.join()
        assert child.exitcode == 0
        with pytest.raises(LockedError, match=f"process {os.getpid()} "):
            FolderLock(tmp_path).acquire()


def test_the_lock_file_stays_the_same_file(tmp_path):
    lock = tmp_path / ".nopad" / "lock"
    with FolderLock(tmp_path):
        first = lock.stat().st_ino
    with FolderLock(tmp_path):
        assert lock.stat().st_ino == first


def test_an_error_leaves_no_folder_that_was_made_for_the_lock(tmp_path):
    def refused(folder, *names):
        with suppress(ValueError), FolderLock(folder):
            for name in names:
                (folder / name).write_text("")
            raise ValueError("refused")
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))

    assert refused(tmp_path / "new") == []
    assert refused(tmp_path) == []
    used = ["used", "used/.nopad", "used/.nopad/job.json", "used/.nopad/lock"]
    assert refused(tmp_path / "used", ".nopad/job.json") == used
    assert refused(tmp_path / "used") == used


@pytest.mark.parametrize("owner", [None, b"", b"\xff\xfe", b"[]", b"3", b'{"pid": 1}'])
def test_an_owner_file_that_tells_nothing(tmp_path, owner):
    with FolderLock(tmp_path):
        path = tmp_path / ".nopad" / "owner.json"
        path.unlink() if owner is None else path.write_bytes(owner)
        with pytest.raises(LockedError, match=r"a process that is not in .*owner\.json"):
            FolderLock(tmp_path).acquire()


@pytest.mark.parametrize("error", [KeyError("uid not found"), OSError("no username"), ImportError("no pwd")])
def test_a_user_without_a_name(tmp_path, monkeypatch, error):
    def getuser():
        raise error

    monkeypatch.setattr(getpass, "getuser", getuser)
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / ".nopad" / "owner.json").read_text())["user"] == f"user {os.getuid()}"


# Permissions do not bind root, and a read-only file system cannot be mounted here: the system's answer is played.
@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EROFS, "Read-only file system; it lies on a read-only"),
        (errno.EACCES, "Permission denied; it may not be written by this user"),
        (errno.ENOLCK, "No locks available; its file system has no file locks"),
    ],
)
@pytest.mark.parametrize("where", ["folder", "lock"])
def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch, number, advice, where):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    owner = (Path, "mkdir") if where == "folder" else (filelock.FileLock, "acquire")
    monkeypatch.setattr(*owner, refuse)
    with pytest.raises(OSError, match=f"{re.escape(str(tmp_path))}: {advice}") as caught:
        FolderLock(tmp_path).acquire()
    assert caught.value.errno == number
    assert not isinstance(caught.value, LockedError)


def test_a_full_disk_leaves_the_folder_free(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="free space on its disk"):
            FolderLock(tmp_path).acquire()
    FolderLock(tmp_path).acquire().release()


def test_lock_of_a_folder_that_was_removed_is_lost(tmp_path):
    folder = tmp_path / "out"
    with FolderLock(folder) as first:
        first.check()
        check_owner(folder, first.token)
        shutil.rmtree(folder)
        with pytest.raises(LostLockError, match=rf"{folder}: removed or begun anew while this job ran"):
            first.check()
        with pytest.raises(LostLockError, match="removed or begun anew"):
            check_owner(folder, first.token)
        with FolderLock(folder) as second:
            second.check()
            with pytest.raises(LostLockError):
                first.check()
            with pytest.raises(LostLockError):
                check_owner(folder, first.token)
            first.release()
            check_owner(folder, second.token)  # what the second has written is left alone


def test_lock_file_that_was_replaced_is_lost(tmp_path):
    with FolderLock(tmp_path) as lock:
        (tmp_path / ".nopad" / "lock").unlink()
        (tmp_path / ".nopad" / "lock").touch()
        with pytest.raises(LostLockError):
            lock.check()


@pytest.mark.parametrize("name", ["lock", "owner.json"])
def test_links_are_not_written_through(tmp_path, name):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out" / ".nopad").mkdir(parents=True)
    (tmp_path / "out" / ".nopad" / name).symlink_to(tmp_path / "mine")
    refused = pytest.raises(OSError, match=str(tmp_path / "out")) if name == "lock" else nullcontext()
    with refused, FolderLock(tmp_path / "out"):
        assert not (tmp_path / "out" / ".nopad" / name).is_symlink()
    assert (tmp_path / "mine").read_text() == "mine"


def test_own_folder_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.part").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".nopad").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match=r"out: \.nopad in it is a link, and would be written through"):
        FolderLock(tmp_path / "out").acquire()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["a.part"]
