"""A run that comes to grief in step 2: torchrun ... -m tests.engine.support.failing_ranks WHAT [options of train]."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from fused_dpo_engine.cli import main
from fused_dpo_engine.training.trainer import Trainer

FAILING_RANK, FAILING_STEP = 1, 2
MESSAGE = "the second step went wrong"


def moment_of(output: Path) -> Path:
    """The file that is written when it happens."""
    return output.with_suffix(".moment")


def fail_in_step(what: str) -> None:
    """Raise on one rank ("raise"), kill it ("kill"), or let a scheduler stop the whole job ("stop")."""
    step = Trainer._step

    def failing(self: Trainer, number: int, *arguments: Any) -> dict[str, float]:
        if number == FAILING_STEP and self.ranks.rank == FAILING_RANK:
            moment_of(self.output).touch()
            if what == "raise":
                raise RuntimeError(MESSAGE)
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "stop":
                os.kill(os.getppid(), signal.SIGTERM)  # torchrun, which passes it on
        return step(self, number, *arguments)

    setattr(Trainer, "_step", failing)  # noqa: B010, as type checkers mind


if __name__ == "__main__":
    torch.set_num_threads(1)
    fail_in_step(sys.argv[1])
    sys.exit(main(["train", *sys.argv[2:]]))
