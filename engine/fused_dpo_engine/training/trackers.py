"""Where the curves of a run go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio."""

import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fused_dpo_engine.errors import UserError, first_line

BOARD = "tensorboard"
"""Folder of event files, in that of the run."""
EVENTS = "events.out.tfevents.*"
"""Names of what TensorBoard's writer leaves there."""
DEFAULT_PROJECT = "fused-dpo"
"""Project on Weights & Biases and trackio, unless WANDB_PROJECT or TRACKIO_PROJECT names another."""


class Tracker(Protocol):
    """One place for curves."""

    @property
    def id(self) -> str | None:
        """By which it finds the run again; None if the folder or its name says that."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the metrics of a step; steps ascend."""

    def flush(self) -> None:
        """Let what was taken so far outlive the process, as far as this is in our hands."""

    def finish(self) -> None:
        """Write out what is left."""


class TensorBoard:
    """Event files in tensorboard/, the settings as a text beside the curves."""

    id = None

    def __init__(self, folder: Path, settings: Mapping[str, Any], resumed: str | None, *, goes_on: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / BOARD))
        if not goes_on:
            self._writer.add_text("settings", f"```json\n{json.dumps(settings, indent=2)}\n```")

    def flush(self) -> None:
        """Write out all points."""
        self._writer.flush()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a point to the curve of each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Close the event file."""
        self._writer.close()


class ProjectRun:
    """A run in a project; wandb and trackio are two packages with one interface.

    What their own environment variables say counts: WANDB_MODE, WANDB_ENTITY, WANDB_DIR, TRACKIO_SPACE_ID and so on.
    """

    def __init__(
        self, package: str, folder: Path, settings: Mapping[str, Any], resumed: str | None, *, goes_on: bool
    ) -> None:
        prefix = package.upper()
        more: dict[str, Any] = {"resume": "allow"} if goes_on else {}
        if resumed is not None:
            more["id"] = resumed
        self._run = importlib.import_module(package).init(
            project=os.environ.get(f"{prefix}_PROJECT") or DEFAULT_PROJECT,
            name=os.environ.get(f"{prefix}_NAME") or folder.resolve().name,
            config=dict(settings),
            **more,
        )
        self.id = getattr(self._run, "id", None) if package == "wandb" else None  # trackio's are found by name

    def flush(self) -> None:
        """Do nothing: the packages keep what they have not sent."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send the metrics; the packages do so in the background."""
        self._run.log(dict(metrics), step=step)

    def finish(self) -> None:
        """Wait until everything has been sent."""
        self._run.finish()


def cut_events(source: Path, target: Path, step: int) -> None:
    """Bring the event files of a run's folder into one, without what came after a step, and without repetitions.

    Args:
        source: folder of the run that has written them.
        target: folder of the run that goes on, possibly the same; its own files are replaced.
        step: the last one to keep.
    """
    files = sorted((source / BOARD).glob(EVENTS))
    if not files:
        return
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.summary.writer.record_writer import RecordWriter

    board = target / BOARD
    board.mkdir(exist_ok=True)
    fresh = board / ".cut"
    seen: set[tuple[int, str]] = set()
    with fresh.open("wb") as stream:
        records = RecordWriter(stream)
        for file in files:  # the end of one that was being written is torn, and left out
            for record in RawEventFileLoader(str(file)).Load():
                event = Event.FromString(record)
                keys = {(event.step, value.tag) for value in event.summary.value} or {(0, event.WhichOneof("what"))}
                if event.step <= step and not keys & seen:
                    records.write(record)
                    seen |= keys
    whole = board / f"{EVENTS[:-1]}0.before"  # sorts before what is written from now on
    old = [file for file in board.glob(EVENTS) if file != whole]
    fresh.replace(whole)
    for file in old:
        file.unlink()


def check_trackers(names: Collection[str]) -> None:
    """Find out whether the packages of the trackers are there, without loading them.

    Raises:
        UserError: one is missing.
    """
    for name in names:
        if name == "none":
            continue
        spec = importlib.util.find_spec(name)
        # A folder `wandb`, which earlier runs leave where they were started, passes for a package, but has no file.
        if spec is None or spec.origin is None:
            extra = "train" if name == "tensorboard" else name
            raise UserError(
                f"--report-to {name} needs the package {name}, which is not installed: pip install 'fused-dpo[{extra}]'"
            )


class Trackers:
    """All trackers of a run. One that fails is given up with a warning: training does not end for want of a network.

    Args:
        names: of `RunOptions.report_to`.
        folder: the run's; its name becomes the name of the run.
        settings: of the run, by option name.
        resumed: what `ids` gave for a run that goes on; None for a new one.
    """

    def __init__(
        self,
        names: Collection[str],
        folder: Path,
        settings: Mapping[str, Any],
        resumed: Mapping[str, str] | None = None,
    ) -> None:
        self._running: dict[str, Tracker] = {}
        with ExitStack() as stack:
            for name in names:
                if name == "none":
                    continue
                with self._spared(name):
                    start = TensorBoard if name == "tensorboard" else partial(ProjectRun, name)
                    before = (resumed or {}).get(name)
                    tracker = start(folder, settings, before, goes_on=resumed is not None)
                    self._running[name] = tracker
                    stack.callback(self._finish, name, tracker)
            self._open = stack.pop_all()  # an interruption before this line finishes those that have been started

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Give the metrics of a step to all that have not failed."""
        for name, tracker in list(self._running.items()):
            with self._spared(name):
                tracker.log(metrics, step)

    def flush(self) -> None:
        """Let what all have been given outlive the process."""
        for name, tracker in list(self._running.items()):
            with self._spared(name):
                tracker.flush()

    @property
    def ids(self) -> dict[str, str]:
        """What the trackers find this run by, where they need that."""
        return {name: tracker.id for name, tracker in self._running.items() if tracker.id is not None}

    def finish(self) -> None:
        """Finish all that have been started, also those that have failed since, and those behind an interruption."""
        self._open.close()

    def _finish(self, name: str, tracker: Tracker) -> None:
        failed = name not in self._running
        try:
            tracker.finish()
        except Exception as error:
            if not failed:
                self._warn(name, error)

    @contextmanager
    def _spared(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever other people's packages raise
            self._running.pop(name, None)
            self._warn(name, error)

    @staticmethod
    def _warn(name: str, error: Exception) -> None:
        warnings.warn(
            f"--report-to {name} failed ({type(error).__name__}: {first_line(error)}) It gets no more of this run, "
            f"which goes on; metrics.jsonl has every number.",
            stacklevel=2,
        )
