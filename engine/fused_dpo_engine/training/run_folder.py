"""The folder of a run: whether it can be written, what in it is ours, and what is left alone."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fused_dpo_engine.checkpoint.export import remove_model
from fused_dpo_engine.errors import SaveError, UserError

FILES = ("config.json", "metrics.jsonl", "summary.json")
EVENTS = "events.out.tfevents.*"
"""Names of what TensorBoard's writer leaves in tensorboard/."""
MODELS = ("model", "best")
RUN_FILES = (*FILES, "tensorboard", *MODELS)
"""All that a run writes, but for MARKER."""
MARKER = ".fused-dpo-run.json"
"""Says that these names in the folder are a run's. Without it nothing there is ever replaced."""


def check_output(output: Path, overwrite: bool) -> None:
    """Find out whether a run can be written to a folder, and leave the folder as it was.

    Raises:
        UserError: it cannot be written; it holds a run and `overwrite` is False; or it holds files that have a run's
            names and that no run has written.
    """
    with _writable(output):
        for folder in (output, *output.parents):
            if folder.exists() and not folder.is_dir():
                raise UserError(f"--output {output}: {folder} is a file; give a folder.")
        _try_to_create(output)
        there = ", ".join(name for name in RUN_FILES if (output / name).exists())
    if there and not (output / MARKER).is_file():
        raise UserError(
            f"--output {output} holds {there}, which no run of fused-dpo has marked as its own (there is no {MARKER}); "
            f"choose another --output, or move them away."
        )
    if there and not overwrite:
        raise UserError(f"{output} already holds a run ({there}); choose another --output or --overwrite.")


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
    """Make and mark the folder, without what an earlier run has written there; other files stay.

    Raises:
        UserError: it cannot be written.
    """
    with _writable(output):
        output.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (output / name).unlink(missing_ok=True)
        board = output / "tensorboard"
        for events in board.glob(EVENTS):
            events.unlink()
        if board.is_dir() and not any(board.iterdir()):
            board.rmdir()
        for name in MODELS:
            remove_model(output / name)
        note = "made by fused-dpo train; --overwrite replaces these and nothing else"
        write(output / MARKER, json.dumps({"note": note, "files": RUN_FILES}, indent=1))


def write(path: Path, text: str) -> None:
    """Write a file of a run, complete or not at all.

    Raises:
        SaveError: the system refuses; what was there before still is.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_text(text + "\n", encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise SaveError(path, error) from error
