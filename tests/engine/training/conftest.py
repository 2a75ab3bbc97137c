"""Fixtures of the tests of runs that are cut off."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import pytest

from fused_dpo_engine.training.trainer import Trainer


class Cut(BaseException):
    """Ends a process as a kill would: nothing of ours handles it."""


@pytest.fixture
def cut(monkeypatch) -> Callable[[int], AbstractContextManager[None]]:
    """Let the run in the block end before a step, with nothing saved after that."""

    @contextmanager
    def before_step(number: int) -> Iterator[None]:
        step = Trainer._step

        def cut_off(self: Trainer, at: int, *more: Any) -> Any:
            if at == number:
                raise Cut
            return step(self, at, *more)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", cut_off)
            patch.setattr(Trainer, "_save_what_is_there", lambda *_: None)
            with suppress(Cut):
                yield

    return before_step
