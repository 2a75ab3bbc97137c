"""The folder of a run: what it holds, and whether it can be written."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fused_dpo_engine.errors import UserError

RUN_FILES = ("config.json", "metrics.jsonl", "summary.json", "tensorboard", "model", "best")


def check_output(output: Path, overwrite: bool) -> None:
    """Find out whether a run can be written to a folder, and leave the folder as it was.

    Raises:
        UserError: it cannot be written, or it holds a run and `overwrite` is False.
    """
    with _writable(output):
        for folder in (output, *output.parents):
            if folder.exists() and not folder.is_dir():
                raise UserError(f"--output {output}: {folder} is a file; give a folder.")
        _try_to_create(output)
        there = [name for name in RUN_FILES if (output / name).exists()]
    if there and not overwrite:
        raise UserError(f"{output} already holds a run ({', '.join(there)}); choose another --output or --overwrite.")


def _try_to_create(output: Path) -> None:
    """Make the folder and something in it, as permissions alone do not tell, and leave nothing behind."""
    missing = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    finally:
        for folder in missing:
            if folder.exists():
                folder.rmdir()


@contextmanager
def _writable(output: Path) -> Iterator[None]:
    """Turn what the system says about the folder in the block into a message."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be written: {error.strerror or error}; give another folder."
        ) from None


def open_output(output: Path) -> None:
    """Make the folder, without the files of an earlier run.

    Raises:
        UserError: it cannot be written.
    """
    with _writable(output):
        output.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            path = output / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
