"""The reference store's file: exact, whole after kills and full disks, right with many writers, refused if damaged."""

import itertools
import os
import signal
import sqlite3
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fused_dpo_engine.errors import UserError
from fused_dpo_engine.reference import store as module
from fused_dpo_engine.reference.store import Scored, Store, StoreWriteError
from tests.fresh_process import ROOT

MODEL = {"model": "a", "dtype": "float32"}
OTHER = {"model": "b", "dtype": "float32"}


def key(number: int) -> bytes:
    return struct.pack("<qq", number * 2654435761 % 2**31, number)


def value(number: int) -> Scored:
    return Scored(float(np.float32(-number / 7)), 1 + number % 5)


def rows(*numbers: int) -> dict[bytes, Scored]:
    return {key(number): value(number) for number in numbers}


def look_up(store: Store, settings: dict[str, str], keys: list[bytes]) -> list[Scored | None]:
    """Look keys up, check that both columns agree on what is missing, and give None for that."""
    known = store.look_up(settings, keys)
    assert known.logps.dtype == np.float32
    assert ((known.tokens == 0) == np.isnan(known.logps)).all()
    values = zip(known.logps.tolist(), known.tokens.tolist(), strict=True)
    return [Scored(logp, tokens) if tokens else None for logp, tokens in values]


def found(path: Path, count: int) -> list[int]:
    """Which of the first numbers a store has, each with its value."""
    store = Store(str(path))
    looked_up = look_up(store, MODEL, [key(number) for number in range(count)])
    store.close()
    there = [number for number, scored in enumerate(looked_up) if scored is not None]
    assert [looked_up[number] for number in there] == [value(number) for number in there]
    return there


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logps.db"


class TestValues:
    @pytest.mark.parametrize("logp", [-1e-45, -0.0, 0.0, -123.456, -3.4e38, 2**-126])
    def test_bits_come_back(self, path: Path, logp: float) -> None:
        exact = struct.pack("<f", logp)
        store = Store(str(path))
        store.add(MODEL, {key(1): Scored(struct.unpack("<f", exact)[0], 3)})
        store.close()
        (scored,) = look_up(Store(str(path)), MODEL, [key(1)])
        assert scored is not None
        assert (struct.pack("<f", scored.logp), scored.tokens) == (exact, 3)

    def test_many_keys_in_any_order(self, path: Path) -> None:
        """More than one query holds, some of them twice, some unknown."""
        store = Store(str(path))
        store.add(MODEL, rows(*range(2500)))
        asked = [*range(2999, -1, -1), 5, 5]
        assert look_up(store, MODEL, [key(number) for number in asked]) == [
            value(number) if number < 2500 else None for number in asked
        ]
        assert look_up(store, MODEL, []) == []

    def test_scorers_are_apart(self, path: Path) -> None:
        store = Store(str(path))
        assert look_up(store, MODEL, [key(1)]) == [None]
        store.add(MODEL, rows(1, 2))
        assert look_up(store, OTHER, [key(1)]) == [None]
        store.add(OTHER, {key(1): Scored(-9.0, 1)})
        assert look_up(store, MODEL, [key(1)]) == [value(1)]
        assert look_up(store, OTHER, [key(1), key(2)]) == [Scored(-9.0, 1), None]
        assert store.scorers() == [(MODEL, 2), (OTHER, 1)]
        assert look_up(store, dict(reversed(MODEL.items())), [key(2)]) == [value(2)]

    def test_what_is_there_stays_and_differences_are_told(self, path: Path) -> None:
        store = Store(str(path))
        assert store.add(MODEL, rows(1, 2)) == 0
        assert store.add(MODEL, rows(2, 3)) == 0, "the same again"
        apart = value(2)._replace(logp=value(2).logp - 4)
        assert store.add(MODEL, {key(2): apart, key(4): value(4)}) == pytest.approx(4 / value(2).tokens ** 0.5)
        assert look_up(store, MODEL, [key(2), key(4)]) == [value(2), value(4)]


class TestFiles:
    def test_it_is_marked(self, path: Path) -> None:
        Store(str(path)).close()
        database = sqlite3.connect(path)
        pragmas = [database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "journal_mode")]
        assert pragmas == [module.APPLICATION, "wal"]

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="is a folder"):
            Store(str(tmp_path))
        with pytest.raises(UserError, match="there is no folder"):
            Store(str(tmp_path / "none" / "x.db"))

    def test_something_else(self, path: Path) -> None:
        path.write_text("prompt,chosen,rejected\n" * 100)
        with pytest.raises(UserError, match="no reference store, nor any SQLite"):
            Store(str(path))
        assert path.read_text().startswith("prompt"), "it is left alone"

    def test_a_database_of_others(self, path: Path) -> None:
        database = sqlite3.connect(path)
        database.execute("CREATE TABLE logps (x)")
        database.commit()
        before = path.read_bytes()
        with pytest.raises(UserError, match="database of another program"):
            Store(str(path))
        assert path.read_bytes() == before

    def test_a_later_format(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as later:
            later.setattr(module, "FORMAT", 2)
            Store(str(path)).close()
        with pytest.raises(UserError, match="has format 2, and this release reads format 1"):
            Store(str(path))

    def test_an_empty_file_becomes_one(self, path: Path) -> None:
        path.touch()
        Store(str(path)).add(MODEL, rows(1))
        assert found(path, 2) == [1]

    def test_a_flipped_bit_of_a_value(self, path: Path) -> None:
        """SQLite alone would give it out."""
        store = Store(str(path))
        store.add(MODEL, rows(1, 2))
        store.close()
        content = bytearray(path.read_bytes())
        at = content.index(module._packed(key(2), value(2)))
        content[at + 1] ^= 4
        path.write_bytes(content)
        store = Store(str(path))
        assert look_up(store, MODEL, [key(1)]) == [value(1)]
        with pytest.raises(UserError, match="is damaged: the value of sequence"):
            look_up(store, MODEL, [key(2)])

    @pytest.mark.parametrize("damage", ["zeros", "cut"])
    def test_damaged_pages(self, path: Path, damage: str) -> None:
        store = Store(str(path))
        store.add(MODEL, rows(*range(3000)))
        store.close()
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] if damage == "cut" else content[:4096] + b"\7" * (len(content) - 4096))
        with pytest.raises(UserError, match=r"is damaged.*\.recover"):
            look_up(Store(str(path)), MODEL, [key(number) for number in range(3000)])

    def test_read_only(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What it has is read, also where its folder cannot be written; nothing is added."""
        Store(str(path)).add(MODEL, rows(1))
        for refused in (lambda file, mode: False, lambda file, mode: Path(file) != path):
            with monkeypatch.context() as patch:
                patch.setattr(os, "access", refused)
                store = Store(str(path))
                assert look_up(store, MODEL, [key(1), key(2)]) == [value(1), None]
                with pytest.raises(StoreWriteError, match="readonly"):
                    store.add(MODEL, rows(2))
                assert look_up(store, MODEL, [key(1), key(2)]) == [value(1), None]
        empty = path.with_name("empty.db")
        empty.touch()
        monkeypatch.setattr(os, "access", lambda file, mode: False)
        with pytest.raises(UserError, match="is empty and cannot be written"):
            Store(str(empty))

    def test_without_shared_memory(self, path: Path) -> None:
        """A file whose journal could not become a log works, waits for the disk, and says so."""
        store = Store(str(path))
        assert store.warnings == []
        store.close()
        database = sqlite3.connect(path)
        database.execute("PRAGMA journal_mode = DELETE")
        database.close()
        store = Store(str(path))
        assert "network file system" in store.warnings[0]
        assert store._database.execute("PRAGMA synchronous").fetchone() == (2,)
        store.add(MODEL, rows(1))
        assert found(path, 2) == [1]


def writer(body: str, path: Path) -> subprocess.Popen[str]:
    """A process that has `store` open and the helpers of this file."""
    code = f"from tests.engine.reference.test_store import *\nstore = Store({str(path)!r})\n{body}"
    roots = os.pathsep.join(str(ROOT / part) for part in ("kernels", "engine", ""))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": roots},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


ENDLESS = """
for start in itertools.count(0, 50):
    store.add(MODEL, rows(*range(start, start + 50)))
    print(start + 50, flush=True)
"""


class TestProcesses:
    def test_killed_while_writing(self, path: Path) -> None:
        """What a writer has reported is there, whatever it was doing when it was killed; another one goes on."""
        for kills in range(5):
            process = writer(ENDLESS, path)
            assert process.stdout is not None
            for _ in range(3 + 7 * kills):
                line = process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            reported = int(([line, *process.stdout.read().split()])[-1])
            assert process.wait() == -signal.SIGKILL
            there = found(path, reported + 200)
            assert there == list(range(len(there)))
            assert len(there) >= reported, "nothing that was written is lost"
            assert len(there) % 50 == 0, "nor is half a pass there"

    def test_many_writers_at_once(self, path: Path) -> None:
        """Four processes, which make the file, too, write what overlaps; nothing is lost, and nobody fails."""
        body = """
mine = int({number})
for start in range(0, 600, 20):
    store.add(MODEL, rows(*range(start + mine * 300, start + mine * 300 + 20)))
    look_up(store, MODEL, [key(n) for n in range(0, 1500, 7)])
"""
        processes = [writer(body.replace("{number}", str(number)), path) for number in range(4)]
        with ThreadPoolExecutor(4) as pool:
            for process, (_, error) in zip(
                processes, pool.map(lambda each: each.communicate(timeout=300), processes), strict=True
            ):
                assert process.returncode == 0, error
        assert found(path, 1600) == list(range(1500))

    def test_a_full_disk(self, path: Path) -> None:
        """What was written before is whole, and the writer is told."""
        body = """
import resource
store.add(MODEL, rows(*range(50)))
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
try:
    for start in itertools.count(50, 50):
        store.add(MODEL, rows(*range(start, start + 50)))
except StoreWriteError as error:
    print(start, error)
"""
        pytest.importorskip("resource", reason="limits of POSIX")
        process = writer(body, path)
        output, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        start, _, message = output.partition(" ")
        assert "cannot be written" in message
        assert found(path, int(start) + 50) == list(range(int(start)))
        assert int(start) >= 100

    def test_another_process_keeps_the_file(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is waited for, and not for ever."""
        monkeypatch.setattr(module, "PATIENCE", 0.1)
        store = Store(str(path))
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreWriteError, match="locked"):
            store.add(MODEL, rows(1))
        other.execute("ROLLBACK")
        store.add(MODEL, rows(1))
        assert found(path, 3) == [1]


def test_helpers_of_the_writers() -> None:
    """They are imported by name there."""
    assert next(itertools.count(3)) == 3
    assert len({key(number) for number in range(5000)}) == 5000
