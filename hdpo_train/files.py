"""Files that are whole or not there, and sizes to read."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Written beside its place and moved there: a reader, or a kill, finds the old text or the new one.

    Raises OSError with the path, for a disk that takes no more.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from error


def readable(size: float) -> str:
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.3g} {units[0]}"
