"""One process per folder: a lock that ends with its process, however that ends.

`fcntl.lockf` locks belong to a process: the kernel drops them at its end, data workers that are forked do not inherit
them, and NFS servers keep them for all their clients. The file is empty of meaning otherwise: it tells the next process
who is there, and is deleted when the folder is free. One that a killed process has left locks nothing.
"""

import atexit
import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)
LOCK_FILE = "_lock"  # with an underscore: Trainer.push_to_hub leaves it out
_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # what file systems without locks answer
_held: dict[Path, int] = {}  # file descriptors
_made: set[Path] = set()  # folders that were not there before
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_held.clear)  # the lock is the parent's


def lock(folder: str | Path, file: str = "") -> bool:
    """Take the folder for this process until `unlock` or its end. Taking it twice does nothing.

    Returns whether this process has it; where the platform or the file system has no locks, one warning says so.
    file: take this one of its files only, and leave the others, and the folder, to other processes.

    Raises FileExistsError, naming the process that has it, if that is another one.
    """
    path = _lock_path(folder, file)
    if path in _held:
        return True
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _made.add(path.parent)
    if fcntl is None:
        logger.warning_once("this platform has no file locks: see to it that no two runs write to one folder")
        return False
    while path not in _held:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 500).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in _TAKEN:
                raise FileExistsError(
                    f"{Path(folder) / file} is in use by another process ({holder or 'it has not said which'}): wait "
                    f"until that has ended, or choose another {'output' if file else 'output_dir'}"
                ) from None
            if error.errno in _NO_LOCKS:
                logger.warning(
                    f"{folder} cannot be locked ({error.strerror}): see to it that no second run writes there"
                )
                path.unlink(missing_ok=True)
                return False
            raise
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            _held[path] = descriptor
        else:  # the process before deleted the file when it ended, after this one had opened it
            os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n".encode())
    return True


def unlock(folder: str | Path, file: str = "") -> None:
    """Let other processes have the folder, or its file; nothing happens if this one does not hold it.

    A folder that `lock` has made and nothing was written to goes too: a run that is refused leaves nothing.
    """
    _release(_lock_path(folder, file))


@contextlib.contextmanager
def locked(folder: str | Path, file: str = "") -> Iterator[bool]:
    """`lock`, then `unlock`."""
    has_it = lock(folder, file)
    try:
        yield has_it
    finally:
        unlock(folder, file)


def _lock_path(folder: str | Path, file: str) -> Path:
    return Path(folder).resolve() / (f"{LOCK_FILE}-{file}" if file else LOCK_FILE)


def _release(path: Path) -> None:
    if path in _held:
        path.unlink(missing_ok=True)  # first: nobody else can have locked this file yet
        os.close(_held.pop(path))
    if path.parent in _made:
        _made.discard(path.parent)
        with contextlib.suppress(OSError):  # it is not empty, or has been moved
            path.parent.rmdir()


@atexit.register
def _release_all() -> None:
    for path in list(_held):
        _release(path)
