"""Files that are whole or not there, what is in them, and sizes to read."""

import hashlib
import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Written beside its place and moved there: a reader, or a kill, finds the old text or the new one.

    Raises OSError, naming the path, if the disk is full.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from error


def contents_digest(path: Path) -> str:
    """Short SHA-256 over the bytes of a file, or of all files of a folder; their times do not count."""
    sha = hashlib.sha256()
    for each in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if each.is_file():
            sha.update(str(each.relative_to(path)).encode())
            with each.open("rb") as file:
                while block := file.read(2**24):
                    sha.update(block)
    return sha.hexdigest()[:12]


def readable(size: float) -> str:
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.3g} {units[0]}"
