"""What is measured, and where it is written: sums on the device, token slots, metrics.jsonl, trackers, memory."""

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_dpo import LossOutput
from fused_dpo_engine.batching.batch import PairBatch
from fused_dpo_engine.config.commands import TrainConfig
from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.errors import SaveError
from fused_dpo_engine.model.policy import HeadStats
from fused_dpo_engine.training.trackers import Trackers

METRICS = "metrics.jsonl"
"""In the folder of a run: a JSON object a step."""


class PairMetrics:
    """Means over the pairs of a step or an evaluation on all ranks, added up on the device and read once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(
        self,
        output: LossOutput,
        logps: Tensor,
        batch: PairBatch,
        head: HeadStats | None = None,
        aux_loss: Tensor | None = None,
        counted: bool = True,
    ) -> None:
        """Take in a micro-batch.

        Args:
            output: its loss is already a share of the whole.
            logps: [2B], plain sums over the tokens of each sequence.
            batch: the pairs.
            head: what the head saw, or None to leave it out.
            aux_loss: the micro-batch's share of the step's load-balancing loss, or None if there is none.
            counted: False for pairs that another rank has; their numbers come in as zeros.
        """
        chosen, rejected = logps.detach()[0::2], logps.detach()[1::2]
        likelier = chosen / batch.chosen_lengths > rejected / batch.rejected_lengths
        per_pair = {
            "rewards/chosen": output.chosen_rewards,
            "rewards/rejected": output.rejected_rewards,
            "rewards/accuracies": output.chosen_rewards > output.rejected_rewards,
            "rewards/margins": output.chosen_rewards - output.rejected_rewards,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            # Share of pairs whose chosen response is the likelier one per token, without looking at the reference.
            "logps/accuracies": likelier,
            "lengths/gap": (batch.chosen_lengths - batch.rejected_lengths),
        }
        sums = {"loss": output.loss.detach().float()}
        if "nll_loss" in output.metrics:
            sums["nll_loss"] = output.metrics["nll_loss"]
        if aux_loss is not None:
            sums["aux_loss"] = aux_loss.detach()
        sums |= {name: values.sum(dtype=torch.float32) for name, values in per_pair.items()}
        if head is not None:
            sums |= {"head/tail": head.tail, "head/kept": head.kept_fraction, "head/tokens": head.tokens}
        for name, value in sums.items():
            value = value if counted else torch.zeros_like(value)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def read(
        self, pairs: int, ranks: Ranks, **others: Tensor | float
    ) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Read the means, and other numbers that each share of the pairs has, in one transfer.

        Args:
            pairs: how many there are on all ranks.
            ranks: processes that share them.
            others: numbers by name, on the device or the host.

        Returns:
            (means, numbers of each share); the same on all ranks.
        """
        shares = ranks.gather_numbers({**self._sums, **others})
        sums = {name: sum(share[name] for share in shares) for name in self._sums}
        tokens = sums.pop("head/tokens", 1.0)
        counts = {"head/tail": tokens, "head/kept": tokens, **dict.fromkeys(("loss", "nll_loss", "aux_loss"), 1.0)}
        return {name: value / max(counts.get(name, pairs), 1) for name, value in sums.items()}, shares


class SlotMetrics:
    """What forward passes on all ranks did with their token slots; all of it is known on the host.

    Args:
        tokens_per_batch: slots that a forward pass may have.
    """

    COUNTS = ("passes", "slots", "tokens", "padded")

    def __init__(self, tokens_per_batch: int) -> None:
        self.tokens_per_batch = tokens_per_batch
        self.passes = self.slots = self.tokens = self.padded = 0

    def add(self, batch: PairBatch, *, counted: bool = True) -> None:
        """Take in a forward pass; one that is not counted did nothing with its slots."""
        self.passes += 1
        if counted:
            self.slots += batch.num_slots
            self.tokens += batch.num_tokens
            self.padded += batch.num_padding

    def numbers(self) -> dict[str, float]:
        """Give all counts by name, for `take`."""
        return {name: float(getattr(self, name)) for name in self.COUNTS}

    def take(self, shares: Iterable[Mapping[str, float]]) -> None:
        """Add up the counts of other ranks."""
        for share in shares:
            for name in self.COUNTS:
                setattr(self, name, getattr(self, name) + int(share[name]))

    @property
    def fill(self) -> float:
        """Slots taken over slots allowed."""
        return self.slots / max(self.passes * self.tokens_per_batch, 1)

    @property
    def padding(self) -> float:
        """Share of the slots that hold no token."""
        return self.padded / max(self.slots, 1)

    @property
    def shared(self) -> float:
        """Share of the tokens (of whole sequences) that are not computed, as another sequence has them."""
        return 1 - (self.slots - self.padded) / max(self.tokens, 1)


class MetricsWriter:
    """Appends one JSON object a step to metrics.jsonl, each line complete once written, and feeds the trackers."""

    def __init__(self, folder: Path, config: TrainConfig, resumed: Mapping[str, Any] | None = None) -> None:
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        trackers = None if resumed is None else resumed["trackers"]
        self._trackers = Trackers(config.run.report_to, folder, json.loads(config.as_json()), trackers)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record a step's metrics.

        Raises:
            SaveError: the system refuses.
        """
        try:
            if not os.fstat(self._file.fileno()).st_nlink:
                self._begin_anew()
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        except OSError as error:
            raise SaveError(self._file.name, error) from error
        self.plot(step, metrics)

    def _begin_anew(self) -> None:
        """Make another file, where somebody has removed the one that was being written, or its folder."""
        path = Path(self._file.name)
        warnings.warn(f"{path} was removed under the run, which goes on; the steps so far are lost.", stacklevel=3)
        self._file.close()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def plot(self, step: int, metrics: Mapping[str, float]) -> None:
        """Feed the trackers alone."""
        self._trackers.log({_tag(name): value for name, value in metrics.items()}, step)

    def place(self) -> dict[str, Any]:
        """Wait until all is on the disk, and tell what a run that goes on from here has to know.

        Raises:
            SaveError: the system refuses.
        """
        self._trackers.flush()
        try:
            os.fsync(self._file.fileno())
            return {"bytes": os.fstat(self._file.fileno()).st_size, "trackers": self._trackers.ids}
        except OSError as error:
            raise SaveError(self._file.name, error) from error

    def close(self) -> None:
        """Finish the file and the trackers; what could not be written has raised its error before."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._trackers.finish()


class NoWriter:
    """What ranks other than the main one write: nothing."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def plot(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def place(self) -> dict[str, Any]:
        """Tell nothing."""
        return {}

    def close(self) -> None:
        """Do nothing."""


def _tag(name: str) -> str:
    """Tell where trackers show a metric: those without a group of their own under train or eval."""
    if "/" in name:
        return name
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def peak_memory_gib(device: torch.device) -> float:
    """Measure the most memory held at any time so far in GiB: of the allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":  # which has no module `resource`
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
