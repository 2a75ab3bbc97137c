"""What the tests of the reference's sources share: passes and models counted, and stores read."""

import sqlite3
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_dpo_engine.model import build
from fused_dpo_engine.model.policy import Policy
from fused_dpo_engine.reference import run


@dataclass
class Counts:
    """Counts the pairs scored, the passes taken and the models loaded for a run's reference."""

    scored: list[int] = field(default_factory=list)
    """Pairs of each scoring pass over a side of the data."""
    without_gradients: int = 0
    """Forward passes without gradients: scoring, trying, the set-up test, evaluation."""
    loaded: list[str] = field(default_factory=list)
    """Models, by name."""


@contextmanager
def counted() -> Iterator[Counts]:
    """Count within the block."""
    counts = Counts()
    with pytest.MonkeyPatch.context() as patch:
        score, load, forward = run.score_reference, build.load_model, Policy.forward

        def counted_score(policy: Policy, pairs: Any, batches: Any, total: int, *more: Any) -> Any:
            counts.scored.append(total)
            return score(policy, pairs, batches, total, *more)

        def counted_load(name: str, *more: Any, **settings: Any) -> Any:
            counts.loaded.append(name)
            return load(name, *more, **settings)

        def counted_forward(self: Policy, batch: Any) -> Any:
            counts.without_gradients += not torch.is_grad_enabled()
            return forward(self, batch)

        patch.setattr(run, "score_reference", counted_score)
        patch.setattr(build, "load_model", counted_load)
        patch.setattr(Policy, "forward", counted_forward)
        yield counts


def stored(path: Path) -> dict[bytes, bytes]:
    """All values of a store of one scorer, by the sequences' keys."""
    database = sqlite3.connect(path)
    assert database.execute("SELECT count(*) FROM scorers").fetchone() == (1,)
    rows = dict(database.execute("SELECT sequence, value FROM logps").fetchall())
    database.close()
    return rows


def overwrite(path: Path, shift: float) -> None:
    """Shift every log-prob of a store, with checks that fit: numbers of another model."""
    from fused_dpo_engine.reference.store import Scored, _packed

    database = sqlite3.connect(path)
    for key, value in database.execute("SELECT sequence, value FROM logps").fetchall():
        logp, tokens, _ = struct.unpack("<fII", value)
        shifted = _packed(key, Scored(logp + shift, tokens))
        database.execute("UPDATE logps SET value = ? WHERE sequence = ?", (shifted, key))
    database.commit()
    database.close()
