"""When a run writes a checkpoint, and what is in it."""

import time
from collections.abc import Mapping
from typing import Any

from fused_dpo_engine.checkpoint.folder import Checkpoint, Checkpoints
from fused_dpo_engine.config.commands import TrainConfig
from fused_dpo_engine.errors import SaveError
from fused_dpo_engine.training.metrics import MetricsWriter, NoWriter
from fused_dpo_engine.training.resume import environment
from fused_dpo_engine.training.state import RunState


class Keeper:
    """Writes the checkpoints of a run, on all ranks together.

    Args:
        config: says how often.
        checkpoints: where; None for nowhere.
        state: what decides how the run goes on.
        identity: what it trains on.
    """

    def __init__(
        self,
        config: TrainConfig,
        checkpoints: Checkpoints | None,
        state: RunState,
        identity: Mapping[str, str | None],
    ) -> None:
        self.config, self.checkpoints, self.state, self.identity = config, checkpoints, state, identity
        self.last_step: int | None = None
        """The last step of the last checkpoint."""
        self.wanted = False
        """Whether the main rank's clock asks for one after this step."""
        self._last_time = time.monotonic()

    @property
    def time_is_up(self) -> bool:
        """Whether it is time for one on this rank's clock."""
        minutes = self.config.run.checkpoint_minutes
        return minutes > 0 and time.monotonic() - self._last_time >= 60 * minutes

    def due(self, step: int) -> bool:
        """Tell whether a checkpoint is to be written after a step; the same on all ranks."""
        every = self.config.run.checkpoint_every
        return self.wanted or (every > 0 and step % every == 0)

    def keep(self, step: int, progress: Mapping[str, Any], writer: MetricsWriter | NoWriter) -> None:
        """Write a checkpoint after a step, unless there is one, or none are written.

        Args:
            step: the last one that is done.
            progress: what the trainer counts, for JSON.
            writer: of the run's metrics.

        Raises:
            SaveError: on all ranks alike; those that are there stay.
        """
        if self.checkpoints is None or step == 0 or self.last_step == step:
            return
        place, reason = {}, None
        try:
            place = writer.place()
        except SaveError as error:
            reason = error.reason
        if reason := self.state.ranks.gather_objects(reason)[0]:
            raise SaveError(self.checkpoints.folder, OSError(reason))
        record = {
            **progress,
            **self.state.numbers(),
            "metrics": place,
            "settings": self.config.flat(),
            "identity": dict(self.identity),
            "environment": environment(self.config),
        }
        self._last_time = time.monotonic()  # also of one that fails: it is not tried again after every step
        self.checkpoints.save(step, self.state.tensors(), record)
        self.last_step, self._last_time = step, time.monotonic()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put back the state of a checkpoint.

        Raises:
            UserError: see `RunState.restore`.
        """
        self.state.restore(checkpoint)
        self.last_step = checkpoint.step
