"""Files that are there whole or not at all, whatever ends the process or the machine."""

import os
from contextlib import suppress
from pathlib import Path

from fused_dpo_engine.errors import SaveError


def write(path: Path, text: str) -> None:
    """Write a text file and wait until it is on the disk; what was there before is replaced at once.

    Raises:
        SaveError: the system refuses; what was there before still is.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):  # the folder is gone, or cannot be written any more
            fresh.unlink(missing_ok=True)
        raise SaveError(path, error) from error


def sync_all(folder: Path) -> None:
    """Wait until everything below a folder is on the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file is on the disk, or the names in a folder, where the system has a way to ask for that."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
