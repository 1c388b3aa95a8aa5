"""One process per folder: refused while another lives, free when it is dead."""

import errno
import logging
import signal
import subprocess
import sys

import pytest

from hdpo_train.run import lock as locks
from hdpo_train.run.lock import LOCK_FILE, lock, locked, unlock

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("pid 77 on elsewhere", file=file, flush=True)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=[""])
def other(request, tmp_path):
    """Another process that holds tmp_path, or a file in it."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / LOCK_FILE) + request.param]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_lock_refuses_a_folder_of_a_living_process_and_names_it(other, tmp_path):
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    with pytest.raises(FileExistsError, match=r"in use by another process .pid 77 on elsewhere"):
        lock(link)
    other.send_signal(signal.SIGKILL)
    other.wait()
    with locked(tmp_path):
        assert str(locks.os.getpid()) in (tmp_path / LOCK_FILE).read_text()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", ["-a.jsonl"], indirect=True)
def test_lock_of_a_file_leaves_other_files_and_the_folder_to_others(other, tmp_path):
    with pytest.raises(FileExistsError, match=r"a.jsonl is in use by another process .* choose another output$"):
        lock(tmp_path, "a.jsonl")
    with locked(tmp_path, "b.jsonl"), locked(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {
            f"{LOCK_FILE}{end}" for end in ("", "-a.jsonl", "-b.jsonl")
        }
    assert [path.name for path in tmp_path.iterdir()] == [f"{LOCK_FILE}-a.jsonl"]


def test_lock_may_be_taken_again_by_its_process_and_is_free_after_unlock(tmp_path):
    lock(tmp_path)
    lock(tmp_path)
    try_it = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", try_it, str(tmp_path / LOCK_FILE)]
    assert "BlockingIOError" in subprocess.run(command, capture_output=True, text=True).stderr
    for folder in (tmp_path, tmp_path, tmp_path / "new"):
        lock(tmp_path / "new")
        unlock(folder)
    assert list(tmp_path.iterdir()) == []  # nothing was written there
    assert subprocess.run(command).returncode == 0


def test_lock_without_file_locks_warns_and_goes_on(tmp_path, monkeypatch, caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", refuse)
    with locked(tmp_path / "nfs"):
        pass
    monkeypatch.setattr(locks, "fcntl", None)
    with locked(tmp_path / "windows"):
        pass
    assert "nfs cannot be locked (No locks available)" in caplog.text and "no file locks" in caplog.text
    assert not list(tmp_path.rglob(LOCK_FILE))
