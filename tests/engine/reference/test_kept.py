"""What a run does with a store that fails for a while, or that another run writes to meanwhile."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.errors import SaveError
from fused_dpo_engine.reference.kept import Kept
from fused_dpo_engine.reference.store import Store, StoreWriteError
from tests.engine.support.toys import make_pairs

PAIRS = make_pairs((5, 7, 3), (12, 1, 16), (1, 9, 9))
LOGPS = torch.tensor([[-1.5, -2.5], [-3.0, -4.0], [-5.0, -6.0]])


class Run:
    """One run's view of a store, and what it said."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.said = io.StringIO()
        console = Console(file=self.said, soft_wrap=True)
        self.kept = Kept(str(path), lambda: {"model": "a", "dtype": "float32"}, None, Ranks(), console, **settings)

    def keep(self, *indices: int, shift: float = 0.0) -> None:
        self.kept.keep(PAIRS, indices, LOGPS[list(indices)] + shift)

    def found(self) -> list[bool]:
        logps = self.kept.look_up(PAIRS)
        there = ~logps.isnan()
        assert torch.equal(logps[there], LOGPS[there])
        return there.all(1).tolist()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the system refuses to write now, and how often it was asked."""
    add, state = Store.add, [True]

    def refused(self: Store, *arguments: Any) -> float:
        state.append(state[0])
        if state[0]:
            raise StoreWriteError("no space")
        return add(self, *arguments)

    monkeypatch.setattr(Store, "add", refused)
    return state


def test_what_could_not_be_written_is_written_at_the_end(path: Path, failing: list[bool]) -> None:
    """Between, nobody waits for it again."""
    run = Run(path)
    run.keep(0)
    run.keep(1)
    assert len(failing) == 2, "one try"
    assert run.said.getvalue().count("kept in memory alone") == 1
    failing[0] = False
    run.keep(2)
    run.kept.finish()
    assert "are not in the store" not in run.said.getvalue()
    assert Run(path).found() == [True] * 3


def test_what_is_lost_is_said(path: Path, failing: list[bool]) -> None:
    run = Run(path)
    run.keep(0, 1)
    run.kept.finish()
    assert "4 log-probs are not in the store: no space" in run.said.getvalue()
    failing[0] = False
    assert Run(path).found() == [False] * 3


@pytest.mark.usefixtures("failing")
def test_a_strict_one_ends(path: Path) -> None:
    with pytest.raises(SaveError, match="could not be written: no space"):
        Run(path, strict=True).keep(0)


def test_two_runs_at_once(path: Path) -> None:
    """Each goes on with its own numbers; the first to write stays, and a difference is known."""
    one, other = Run(path), Run(path)
    one.keep(0, 1)
    other.keep(1, 2, shift=0.0)
    assert other.kept.apart == 0
    other.keep(0, shift=3.0)
    assert other.kept.apart == pytest.approx(3 / 3**0.5), "of the shorter sequence, of three tokens"
    assert Run(path).found() == [True] * 3


def test_no_pairs(path: Path) -> None:
    run = Run(path)
    run.kept.keep(PAIRS, [], torch.empty(0, 2))
    assert run.kept.look_up([]).shape == (0, 2)
    assert run.found() == [False] * 3
