"""The folder of a run's checkpoints: written whole or not at all, checked when they are read, the oldest removed."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from fused_dpo_engine.checkpoint.files import sync, write
from fused_dpo_engine.checkpoint.tensors import save_tensors
from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.errors import SaveError, UserError, first_line

FOLDER = "checkpoints"
"""In the folder of a run."""
RECORD = "run.json"
"""In a checkpoint: all that is no tensor."""
CHECKSUMS = "checksums.json"
"""In a checkpoint, written last: size and checksum of every other file."""
FORMAT = 1
"""Of a checkpoint; another number is not read."""
_NAME = re.compile(r"step-(\d+)")
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are what was written."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The last step that is in it."""
        return self.record["step"]


class Checkpoints:
    """Those of one run.

    Args:
        output: folder of the run, seen by all ranks.
        kept: how many to keep.
        ranks: the processes, all of which call each method but `remove_later`.
    """

    def __init__(self, output: Path, kept: int, ranks: Ranks) -> None:
        self.folder, self.kept, self.ranks = output / FOLDER, kept, ranks

    def save(self, step: int, tensors: dict[str, Tensor], record: Mapping[str, Any]) -> Path:
        """Write a checkpoint beside the others, then give it its name, then remove those that are too many.

        An interruption at any moment leaves the others, and this one whole or without its name. Another one of the
        same step is replaced.

        Args:
            step: the last one that is in it.
            tensors: see `save_tensors`.
            record: for JSON; that of the main rank counts.

        Raises:
            SaveError: on all ranks alike; the other checkpoints are as they were.
        """
        folder = self.folder / f"step-{step:08d}"
        fresh = folder.with_name(f".{folder.name}.new")
        try:
            self._together(lambda: self._make_room(fresh))
            save_tensors(fresh, tensors, self.ranks)
            checksums: dict[str, Any] = {}
            self._together(lambda: checksums.update(_checksums(list(filter(self._is_ours, fresh.iterdir())))))
            shares = self.ranks.gather_objects(checksums)
            whole = {name: entry for share in shares for name, entry in share.items()}
            self._together(lambda: self._finish(fresh, folder, whole, {"format": FORMAT, "step": step, **record}))
        except SaveError:
            if self.ranks.is_main:  # on a full disk what is there of it would be in the way
                shutil.rmtree(fresh, ignore_errors=True)
            raise
        return folder

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Find the newest checkpoint that is whole, and say what is wrong with those after it."""
        damaged: list[str] = []
        for folder in reversed(list(self._all())):
            try:
                return open_checkpoint(folder, self.ranks), damaged
            except UserError as error:
                damaged.append(str(error))
        return None, damaged

    def remove_later(self, step: int) -> None:
        """Remove checkpoints after a step, from which the run goes on another way; and what was never finished."""
        for folder in self._all():
            if _step_of(folder) > step:
                shutil.rmtree(folder, ignore_errors=True)
        for unfinished in self.folder.glob(".step-*.new"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def _all(self) -> Iterator[Path]:
        """Walk the checkpoints by their steps, ascending."""
        there = (path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())
        return iter(sorted(there, key=_step_of))

    def _make_room(self, fresh: Path) -> None:
        if self.ranks.is_main:
            for unfinished in self.folder.glob(".step-*.new"):
                shutil.rmtree(unfinished)
            fresh.mkdir(parents=True)

    def _is_ours(self, path: Path) -> bool:
        """Tell whether this rank has written a file: its number is in the name; the main one has the others."""
        parts = path.name.split("_")
        return parts[2] == str(self.ranks.rank) if path.name.startswith("__") else self.ranks.is_main

    def _finish(self, fresh: Path, folder: Path, checksums: dict[str, Any], record: dict[str, Any]) -> None:
        if not self.ranks.is_main:
            return
        if missing := [name for name in checksums if not (fresh / name).is_file()]:
            raise SaveError(
                fresh, OSError(f"{missing[0]} is on another machine; --output has to be a folder that all machines see")
            )
        write(fresh / RECORD, json.dumps(record))
        write(fresh / CHECKSUMS, json.dumps(checksums | _checksums([fresh / RECORD]), indent=1))
        if folder.exists():  # damaged, or left from a run that went on from before
            shutil.rmtree(folder)
        fresh.rename(folder)
        sync(self.folder)
        for old in list(self._all())[: -self.kept]:
            shutil.rmtree(old, ignore_errors=True)

    def _together(self, work: Any) -> None:
        """Do something on every rank, and fail on all of them if it fails on one."""
        reason = None
        try:
            work()
        except OSError as error:
            reason = error.strerror or first_line(error)
        except SaveError as error:
            reason = error.reason
        reason = next(filter(None, self.ranks.gather_objects(reason)), None)
        if reason is not None:
            raise SaveError(self.folder, OSError(reason))


def open_checkpoint(folder: Path, ranks: Ranks) -> Checkpoint:
    """Check all files of a checkpoint, each rank its share of them, and read its record.

    Raises:
        UserError: one is missing, torn or damaged; the same on all ranks.
    """
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        names = sorted(checksums)[ranks.rank :: ranks.size]
        sizes = {name: (folder / name).stat().st_size for name in names}
        short = [name for name in names if sizes[name] != checksums[name]["bytes"]]
        seen = {} if short else _checksums([folder / name for name in names])
        bad = short or [name for name in names if seen[name] != checksums[name]]
        reason = f"{bad[0]} is not what was written" if bad else None
        record = {} if bad else json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if not bad and record["format"] != FORMAT:
            reason = f"its format is {record['format']}, and this release reads {FORMAT}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        record, reason = {}, first_line(error).rstrip(".")
    reason = next(filter(None, ranks.gather_objects(reason)), None)
    if reason is not None:
        raise UserError(f"checkpoint {folder} is damaged: {reason}.")
    return Checkpoint(folder, record)


def _checksums(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Compute size and xxh3-128 of files, several side by side."""

    def checksum(path: Path) -> dict[str, Any]:
        seen, size = xxhash.xxh3_128(), 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                seen.update(block)
                size += len(block)
        return {"bytes": size, "xxh3_128": seen.hexdigest()}

    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip([path.name for path in files], pool.map(checksum, files), strict=True))


def _step_of(folder: Path) -> int:
    return int(folder.name.partition("-")[2])
