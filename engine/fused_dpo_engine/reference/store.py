"""The reference store: log-probs of scored sequences in one file that survives kills, power cuts and many writers."""

import json
import os
import sqlite3
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import xxhash

from fused_dpo_engine.errors import UserError

APPLICATION = 0x46444C50
"""SQLite's application_id of such a file; `FDLP`."""
FORMAT = 1
"""SQLite's user_version: how the tables are laid out."""
PATIENCE = 60.0
"""Seconds to wait for another process that writes."""
CHUNK = 900
"""Keys a query: SQLite before 3.32 takes at most 999."""
_TABLES = """
CREATE TABLE scorers (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, settings TEXT NOT NULL);
CREATE TABLE logps (scorer INTEGER NOT NULL REFERENCES scorers, sequence BLOB NOT NULL, value BLOB NOT NULL,
                    PRIMARY KEY (scorer, sequence)) WITHOUT ROWID;
"""
_VALUE = np.dtype([("logp", "<f4"), ("tokens", "<u4"), ("check", "<u4")])
"""A value; the check is the CRC-32 of the sequence's key and the two numbers, as SQLite has no checks of its own."""
Result = TypeVar("Result")


class Scored(NamedTuple):
    """A sequence's log-prob."""

    logp: float
    """An fp32 number; finite."""
    tokens: int
    """How many tokens it is the sum over, at least 1."""


class Found(NamedTuple):
    """Holds the stored log-probs and token counts of the sequences that were looked up."""

    logps: np.ndarray
    """fp32 [sequences], NaN where nothing is known."""
    tokens: np.ndarray
    """int64 [sequences], 0 there."""


class StoreWriteError(RuntimeError):
    """The store takes no more; what it holds is whole, and what was computed can be used."""


class Store:
    """A reference store, open. One connection: of one process and one thread.

    Any number of processes of a machine may read and write one file at once. What `add` has written is there after the
    process is killed. A power cut may lose the last seconds, and damages nothing.

    Args:
        path: the file; made where there is none.

    Raises:
        UserError: no such folder, another kind of file, of a later release, or damaged.

    Source: https://www.sqlite.org/wal.html
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.warnings: list[str] = []
        """What the user should know of how it is open."""
        file = Path(path)
        if file.is_dir():
            raise UserError(f"reference store {path} is a folder; name a file.")
        if not file.absolute().parent.is_dir():
            raise UserError(f"reference store {path}: there is no folder {file.absolute().parent}; make it first.")
        with self._told():
            self.read_only = file.exists() and not os.access(file, os.W_OK)
            self._database = self._connect(file)
            self._check_format()
            self._check_journal()

    def close(self) -> None:
        """Close the file; what was written is in it."""
        with suppress(sqlite3.Error):
            self._database.close()

    def look_up(self, settings: Mapping[str, Any], sequences: Sequence[bytes]) -> Found:
        """Find what a scorer has given sequences.

        Args:
            settings: of the scorer.
            sequences: keys of 16 bytes.

        Returns:
            Log-probs and numbers of tokens in the order of the keys.

        Raises:
            UserError: the file is damaged.
        """
        places = dict(zip(sequences, range(len(sequences)), strict=True))
        wanted, values, there = sorted(places), list[bytes](), list[int]()
        with self._told():
            scorer = self._scorer(settings)
            for at in range(0, 0 if scorer is None else len(wanted), CHUNK):
                part = wanted[at : at + CHUNK]
                marks = ",".join("?" * len(part))
                query = f"SELECT sequence, value FROM logps WHERE scorer = ? AND sequence IN ({marks})"
                for key, value in self._database.execute(query, (scorer, *part)):
                    _check(key, value)
                    values.append(value)
                    there.append(places[key])
        numbers = np.frombuffer(b"".join(values), _VALUE)
        found = Found(np.full(len(sequences), np.nan, np.float32), np.zeros(len(sequences), np.int64))
        found.logps[there], found.tokens[there] = numbers["logp"], numbers["tokens"]
        if len(places) == len(sequences):
            return found
        first = [places[key] for key in sequences]  # equal ones share the place of the last
        return Found(found.logps[first], found.tokens[first])

    def add(self, settings: Mapping[str, Any], scored: Mapping[bytes, Scored]) -> float:
        """Write log-probs, all or none of them; those that are there already stay as they are.

        Args:
            settings: of the scorer.
            scored: by the sequences' keys.

        Returns:
            The largest difference to what was there already, in nat by the square root of the tokens; 0 where there was
            nothing.

        Raises:
            StoreWriteError: the system refuses, or another process keeps the file to itself.
            UserError: the file is damaged.
        """
        rows = [(key, _packed(key, value)) for key, value in scored.items()]

        def write() -> int:
            scorer = self._scorer(settings)
            if scorer is None:
                row = (digest_of(settings), json.dumps(settings, sort_keys=True))
                scorer = self._database.execute("INSERT INTO scorers (digest, settings) VALUES (?, ?)", row).lastrowid
            query = f"INSERT INTO logps VALUES ({scorer}, ?, ?) ON CONFLICT DO NOTHING"
            return self._database.executemany(query, rows).rowcount

        with self._told():
            if self._written(write) == len(rows):
                return 0.0
        before = self.look_up(settings, list(scored))
        apart = np.array([value.logp for value in scored.values()], np.float32) - before.logps
        return float(np.nanmax(np.abs(apart) / np.sqrt(before.tokens.clip(1)), initial=0.0))

    def scorers(self) -> list[tuple[dict[str, Any], int]]:
        """List the settings of all scorers that have an entry, with the number of sequences of each."""
        query = "SELECT settings, (SELECT count(*) FROM logps WHERE scorer = id) FROM scorers ORDER BY id"
        with self._told():
            return [(json.loads(settings), count) for settings, count in self._database.execute(query)]

    def _scorer(self, settings: Mapping[str, Any]) -> int | None:
        row = self._database.execute("SELECT id FROM scorers WHERE digest = ?", (digest_of(settings),)).fetchone()
        return None if row is None else row[0]

    def _connect(self, file: Path) -> sqlite3.Connection:
        mode = "ro" if self.read_only else "rwc"
        address = f"{file.absolute().as_uri()}?mode={mode}"
        if self.read_only and not os.access(file.absolute().parent, os.W_OK) and not _journal(file).exists():
            address += "&immutable=1"  # SQLite could not make the files beside it by which processes agree
        database = sqlite3.connect(address, uri=True, timeout=PATIENCE, isolation_level=None)
        database.execute("PRAGMA synchronous = NORMAL")
        return database

    def _check_format(self) -> None:
        """Find out that the file is such a store, and make it one if it is new."""
        if self._marks() == (0, 0) and not self._database.execute("SELECT 1 FROM sqlite_master").fetchone():
            if self.read_only:
                raise UserError(f"reference store {self.path} is empty and cannot be written; give another file.")
            self._make()
        application, version = self._marks()
        if application != APPLICATION:
            raise UserError(f"{self.path} is a database of another program, and no reference store; give another file.")
        if version != FORMAT:
            raise UserError(
                f"reference store {self.path} has format {version}, and this release reads format {FORMAT}; give "
                f"another file, which is filled anew, or take the release that has made it."
            )

    def _marks(self) -> tuple[int, int]:
        pragmas = ("application_id", "user_version")
        application, version = (self._database.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas)
        return application, version

    def _make(self) -> None:
        with suppress(sqlite3.OperationalError):  # see `_check_journal`
            self._patiently(lambda: self._database.execute("PRAGMA journal_mode = WAL").fetchone())

        def fill() -> None:
            if self._marks() == (0, 0):  # or else another process has just done so
                for statement in _TABLES.split(";"):
                    self._database.execute(statement)
                self._database.execute(f"PRAGMA application_id = {APPLICATION}")
                self._database.execute(f"PRAGMA user_version = {FORMAT}")

        try:
            self._written(fill)
        except StoreWriteError as error:
            raise UserError(f"{error}; give another --reference-store, or leave it out.") from error

    def _check_journal(self) -> None:
        """Say so where the file system cannot have SQLite's write-ahead log."""
        (mode,) = self._database.execute("PRAGMA journal_mode").fetchone()
        if mode != "wal" and not self.read_only:
            # The rollback journal waits for the disk in every transaction, or a power cut could damage the file.
            self._database.execute("PRAGMA synchronous = FULL")
            self.warnings.append(
                f"warning: reference store {self.path} lies where SQLite's write-ahead log cannot be shared between "
                f"processes, as on a network file system; its rollback journal is taken, which is slower"
            )

    def _written(self, write: Callable[[], Result]) -> Result:
        """Write in one transaction, all or nothing."""
        try:
            self._patiently(lambda: self._database.execute("BEGIN IMMEDIATE"))
            try:
                result = write()
                self._database.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:
            raise StoreWriteError(f"reference store {self.path} cannot be written: {error}") from error
        return result

    def _patiently(self, call: Callable[[], Result]) -> Result:
        """Call until no other process is in the way; SQLite does not wait by itself where locks cross."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return call()
            except sqlite3.OperationalError as error:
                if not str(error).startswith("database is locked") or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what SQLite says of the file into a message."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise UserError(
                f"reference store {self.path} cannot be opened or read: {error}; check permissions, or give another "
                f"file."
            ) from error
        except sqlite3.DatabaseError as error:
            if "not a database" in str(error):
                raise UserError(
                    f"{self.path} is no reference store, nor any SQLite database; give another file."
                ) from error
            raise self._damaged(str(error)) from error
        except (_DamagedValueError, json.JSONDecodeError) as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, reason: str) -> UserError:
        return UserError(
            f"reference store {self.path} is damaged: {reason}. Move it away, and a new one is filled in its place; "
            f"`sqlite3 {self.path} .recover` may save what can be read."
        )


class _DamagedValueError(ValueError):
    """A value that is not what was written."""


def digest_of(settings: Mapping[str, Any]) -> bytes:
    """Digest a scorer's settings into 16 bytes; the order of their names makes no difference."""
    return xxhash.xxh3_128_digest(json.dumps(settings, sort_keys=True).encode())


def _journal(file: Path) -> Path:
    """Name the file in which SQLite keeps what is not in `file` yet."""
    return file.with_name(f"{file.name}-wal")


def _packed(key: bytes, scored: Scored) -> bytes:
    body = struct.pack("<fI", scored.logp, scored.tokens)
    return body + zlib.crc32(key + body).to_bytes(4, "little")


def _check(key: bytes, value: bytes) -> None:
    """Find out that a value is what was written for a key."""
    if len(value) != _VALUE.itemsize or value[8:] != zlib.crc32(key + value[:8]).to_bytes(4, "little"):
        raise _DamagedValueError(f"the value of sequence {key.hex()} fails its check")
