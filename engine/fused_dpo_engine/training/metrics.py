"""What is measured, and where it is written: sums on the device, token slots, metrics.jsonl, trackers, memory."""

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fused_dpo import LossOutput
from fused_dpo_engine.batching.batch import PairBatch
from fused_dpo_engine.config.commands import TrainConfig
from fused_dpo_engine.errors import SaveError
from fused_dpo_engine.model.policy import HeadStats
from fused_dpo_engine.training.trackers import Trackers


class PairMetrics:
    """Means over the pairs of a step or an evaluation, added up on the device and read once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._pairs = 0

    def add(
        self,
        output: LossOutput,
        logps: Tensor,
        batch: PairBatch,
        head: HeadStats | None = None,
        aux_loss: Tensor | None = None,
    ) -> None:
        """Take in a micro-batch.

        Args:
            output: its loss is already a share of the whole.
            logps: [2B], plain sums over the tokens of each sequence.
            batch: the pairs.
            head: what the head saw, or None to leave it out.
            aux_loss: the micro-batch's share of the step's load-balancing loss, or None if there is none.
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
        self._accumulate("loss", output.loss.detach().float())
        if "nll_loss" in output.metrics:
            self._accumulate("nll_loss", output.metrics["nll_loss"])
        if aux_loss is not None:
            self._accumulate("aux_loss", aux_loss.detach())
        for name, values in per_pair.items():
            self._accumulate(name, values.sum(dtype=torch.float32))
        if head is not None:
            self._accumulate("head/tail", head.tail)
            self._accumulate("head/kept", head.kept_fraction)
            self._accumulate("head/tokens", head.tokens)
        self._pairs += batch.num_pairs

    def _accumulate(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def read(self, **extra: Tensor) -> dict[str, float]:
        """Read the means, and whatever else is on the device, in one transfer."""
        tensors = {**self._sums, **extra}
        values = torch.stack([value.float().reshape(()) for value in tensors.values()]).tolist()
        sums = dict(zip(tensors, values, strict=True))
        tokens = sums.pop("head/tokens", 1.0)
        shares = ("loss", "nll_loss", "aux_loss", *extra)
        counts = {"head/tail": tokens, "head/kept": tokens, **dict.fromkeys(shares, 1.0)}
        return {name: value / max(counts.get(name, self._pairs), 1) for name, value in sums.items()}


class SlotMetrics:
    """What forward passes did with their token slots; all of it is known on the host.

    Args:
        tokens_per_batch: slots that a forward pass may have.
    """

    def __init__(self, tokens_per_batch: int) -> None:
        self.tokens_per_batch = tokens_per_batch
        self.passes = self.slots = self.tokens = self._padding = 0

    def add(self, batch: PairBatch) -> None:
        """Take in a forward pass."""
        self.passes += 1
        self.slots += batch.num_slots
        self.tokens += batch.num_tokens
        self._padding += batch.num_padding

    @property
    def fill(self) -> float:
        """Slots taken over slots allowed."""
        return self.slots / max(self.passes * self.tokens_per_batch, 1)

    @property
    def padding(self) -> float:
        """Share of the slots that hold no token."""
        return self._padding / max(self.slots, 1)

    @property
    def shared(self) -> float:
        """Share of the tokens (of whole sequences) that are not computed, as another sequence has them."""
        return 1 - (self.slots - self._padding) / max(self.tokens, 1)


class MetricsWriter:
    """Appends one JSON object a step to metrics.jsonl, each line complete once written, and feeds the trackers."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._trackers = Trackers(config.run.report_to, folder, json.loads(config.as_json()))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record a step's metrics.

        Raises:
            SaveError: the system refuses.
        """
        try:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        except OSError as error:
            raise SaveError(self._file.name, error) from error
        self.plot(step, metrics)

    def plot(self, step: int, metrics: Mapping[str, float]) -> None:
        """Feed the trackers alone."""
        self._trackers.log({_tag(name): value for name, value in metrics.items()}, step)

    def close(self) -> None:
        """Finish the file and the trackers; what could not be written has raised its error before."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._trackers.finish()


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
