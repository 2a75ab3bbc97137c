"""The folder of a run: whether it can be written, what in it is ours, and what is left alone."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fused_dpo_engine.checkpoint.export import recover_model, remove_model
from fused_dpo_engine.checkpoint.files import write
from fused_dpo_engine.checkpoint.folder import FOLDER as CHECKPOINTS
from fused_dpo_engine.checkpoint.folder import Checkpoint, Checkpoints
from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.training.metrics import METRICS
from fused_dpo_engine.training.trackers import BOARD, EVENTS, cut_events

CONFIG, SUMMARY = "config.json", "summary.json"
FILES = (CONFIG, METRICS, SUMMARY)
MODELS = ("model", "best")
RUN_FILES = (*FILES, BOARD, CHECKPOINTS, *MODELS)
"""All that a run writes, but for MARKER."""
MARKER = ".fused-dpo-run.json"
"""Says that these names in the folder are a run's. Without it nothing there is ever replaced."""


def check_output(output: Path, *, replaced: bool) -> str:
    """Find out whether a run can be written to a folder, and leave the folder as it was.

    Args:
        output: the folder.
        replaced: what another run has written there may be replaced, or continued.

    Returns:
        Names of what a run has written there.

    Raises:
        UserError: it cannot be written; it holds a run that may not be replaced; or it holds files that have a run's
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
    if there and not replaced:
        raise UserError(
            f"{output} already holds a run ({there}); choose another --output, --resume auto to go on with it, or "
            f"--overwrite."
        )
    return there


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
        board, checkpoints = output / BOARD, Checkpoints(output, 1, Ranks())
        for events in board.glob(EVENTS):
            events.unlink()
        checkpoints.remove_later(-1)
        for folder in (board, checkpoints.folder):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        for name in MODELS:
            recover_model(output / name)
            remove_model(output / name)
    note = "made by fused-dpo train; --overwrite replaces these and nothing else"
    write(output / MARKER, json.dumps({"note": note, "files": RUN_FILES}, indent=1))


def reopen_output(output: Path, checkpoint: Checkpoint) -> str | None:
    """Bring a folder to where the run was when a checkpoint was written: without what came after it.

    Args:
        output: folder of the run that goes on. If it is not the one of the checkpoint, it gets what that run had
            written.
        checkpoint: from which it goes on.

    Returns:
        A warning if the metrics of earlier steps are not what they were.

    Raises:
        UserError: it cannot be written.
    """
    source, length = checkpoint.folder.parent.parent, checkpoint.record["metrics"]["bytes"]
    try:
        written = (source / METRICS).read_bytes()[:length]
    except OSError:
        written = b""
    with _writable(output):
        if source.resolve() != output.resolve():
            open_output(output)
            for name in filter(lambda name: (source / name).is_dir(), MODELS):
                shutil.copytree(source / name, output / name, dirs_exist_ok=True)
        for name in MODELS:
            recover_model(output / name)
        Checkpoints(output, 1, Ranks()).remove_later(checkpoint.step)  # first, as they go on from more metrics
        fresh = output / f".{METRICS}.new"
        fresh.write_bytes(written[: written.rfind(b"\n") + 1])
        fresh.replace(output / METRICS)
        cut_events(source, output, checkpoint.step)
    if len(written) == length:
        return None
    return f"warning: {source / METRICS} lacks steps before the checkpoint; the run goes on, and so does the gap"
