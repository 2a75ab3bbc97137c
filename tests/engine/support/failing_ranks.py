"""A run in which a rank comes to grief: torchrun ... -m tests.engine.support.failing_ranks WHAT [options of train]."""

import os
import signal
import sys
from typing import Any

import torch

from fused_dpo_engine.cli import main
from fused_dpo_engine.training.trainer import Trainer

FAILING_RANK, FAILING_STEP = 1, 2


def fail_in(what: str) -> None:
    """Let something happen to one rank at the beginning of step 2."""
    step = Trainer._step

    def failing(self: Trainer, number: int, *arguments: Any) -> dict[str, float]:
        if number == FAILING_STEP and self.ranks.rank == FAILING_RANK:
            if what == "raise":
                raise RuntimeError("the second step went wrong")
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        if what == "stop" and number == FAILING_STEP and self.ranks.is_main:
            os.kill(os.getppid(), signal.SIGTERM)  # as a scheduler does with what it has started, here torchrun
        if what == "stop" and number == 50:
            raise RuntimeError("nothing has stopped the run")
        return step(self, number, *arguments)

    Trainer._step = failing


if __name__ == "__main__":
    torch.set_num_threads(1)
    fail_in(sys.argv[1])
    sys.exit(main(["train", *sys.argv[2:]]))
