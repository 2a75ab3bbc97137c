"""The training loop: steps of a fixed number of pairs, split into micro-batches by tokens."""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fused_dpo import DPOLoss, LossOutput
from fused_dpo_engine.checkpoint import save_model
from fused_dpo_engine.config import TrainConfig
from fused_dpo_engine.errors import TrainingDivergedError
from fused_dpo_engine.metrics import MetricsWriter, PairMetrics, peak_memory_gib
from fused_dpo_engine.optimizer import build_optimizer
from fused_dpo_engine.packing import PackedBatch, pack_all
from fused_dpo_engine.pairs import TokenPair
from fused_dpo_engine.policy import Policy
from fused_dpo_engine.reference import ReferenceLogps


@dataclass
class Summary:
    """What a run came to; written to summary.json."""

    steps: int = 0
    planned_steps: int = 0
    pairs: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Time in training steps, without evaluation and saving."""
    tokens_per_second: float = 0.0
    peak_memory_gib: float = 0.0
    stopped: str = "all steps done"
    eval_before: dict[str, float] = field(default_factory=dict)
    eval_after: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    best_value: float | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def total_steps(config: TrainConfig, num_pairs: int) -> int:
    """Optimizer steps of the run."""
    per_epoch = math.ceil(num_pairs / config.run.pairs_per_step)
    return config.run.max_steps or max(1, math.ceil(config.run.epochs * per_epoch))


def steps_of(num_pairs: int, pairs_per_step: int, seed: int, steps: int) -> Iterator[list[int]]:
    """Pair indices of each step: every epoch a fresh shuffle, a function of seed and epoch alone."""
    done, epoch = 0, 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(num_pairs).tolist()
        for start in range(0, num_pairs, pairs_per_step):
            if done == steps:
                return
            yield order[start : start + pairs_per_step]
            done += 1
        epoch += 1


def first_pass(config: TrainConfig, pairs: list[TokenPair]) -> tuple[Iterator[PackedBatch], int]:
    """The micro-batches in which training sees each pair for the first time, and the number of pairs in them."""
    run = config.run
    steps = min(total_steps(config, len(pairs)), math.ceil(len(pairs) / run.pairs_per_step))
    seen = list(steps_of(len(pairs), run.pairs_per_step, run.seed, steps))
    batches = (batch for indices in seen for batch in pack_all(pairs, indices, run.tokens_per_batch))
    return batches, sum(map(len, seen))


class Trainer:
    """Trains a policy; call `train` once.

    Args:
        policy: the model to train.
        config: the run's settings.
        tokenizer: saved beside the model.
        pairs: training pairs.
        reference: their reference log-probs; None for a loss that takes none.
        held_out: held-out pairs, possibly none.
        held_out_reference: likewise.
        output: the run's folder.
    """

    def __init__(
        self,
        policy: Policy,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        pairs: list[TokenPair],
        reference: ReferenceLogps | None,
        held_out: list[TokenPair],
        held_out_reference: ReferenceLogps | None,
        output: Path,
    ) -> None:
        self.policy, self.config, self.tokenizer, self.output = policy, config, tokenizer, output
        self.pairs, self.reference = pairs, reference
        self.held_out, self.held_out_reference = held_out, held_out_reference
        self.loss: DPOLoss = config.loss.module().to(policy.device)
        self.total_steps = total_steps(config, len(pairs))
        self.optimizer, self.schedule = build_optimizer(policy.parameters(), config.optimizer, self.total_steps)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.summary = Summary(planned_steps=self.total_steps)
        self._evaluations_without_gain = 0

    def train(self) -> Summary:
        """Run all steps, or until early stopping; saves model/ at the end, however that comes about.

        Raises:
            TrainingDivergedError: loss or gradient is not a number; the weights before that step are in model/.
        """
        run = self.config.run
        writer = MetricsWriter(self.output, tensorboard=run.tensorboard)
        steps = steps_of(len(self.pairs), run.pairs_per_step, run.seed, self.total_steps)
        bar = tqdm(
            total=self.total_steps, desc="training", unit="step", mininterval=0.1 if sys.stderr.isatty() else 10.0
        )
        try:
            if self.held_out:
                self.summary.eval_before = self.evaluate()
                writer.plot(0, self.summary.eval_before)
            for step, indices in enumerate(steps, start=1):
                metrics = self._step(step, indices)
                last = step == self.total_steps
                if self.held_out and (last or (run.eval_steps and step % run.eval_steps == 0)):
                    metrics |= self._evaluate_and_keep_best(step)
                    if self._evaluations_without_gain >= run.early_stopping_patience > 0:
                        self.summary.stopped, last = f"early stopping after step {step}", True
                writer.write(step, metrics)
                bar.set_postfix(
                    loss=f"{metrics['loss']:.4f}",
                    accuracy=f"{metrics['rewards/accuracies']:.2f}",
                    margin=f"{metrics['rewards/margins']:.3f}",
                    tokens_s=f"{metrics['tokens_per_second']:.0f}",
                )
                bar.update()
                if last:
                    break
                if run.save_steps and step % run.save_steps == 0:
                    self._save("model")
        except BaseException:
            self.summary.stopped = "interrupted"
            raise
        finally:
            # Whatever stopped the run, the weights are those of the last whole step: a step changes them at its end.
            bar.close()
            writer.close()
            self._save("model")
            self.summary.peak_memory_gib = peak_memory_gib(self.policy.device)
        return self.summary

    def _step(self, step: int, indices: list[int]) -> dict[str, float]:
        """One optimizer step on the mean loss of the pairs at `indices`."""
        started = time.perf_counter()
        device = self.policy.device
        batches = pack_all(self.pairs, indices, self.config.run.tokens_per_batch)
        chosen_tokens = sum(self.pairs[i].chosen_length for i in indices)
        sums = PairMetrics()
        outputs: list[tuple[PackedBatch, LossOutput]] = []
        for host_batch in batches:
            batch = host_batch.to(device)
            logps = self.policy(batch)
            output = self._loss_of(batch, logps, self.reference, len(indices), chosen_tokens)
            output.loss.backward()
            sums.add(output, logps, batch)
            outputs.append((batch, output))
        limit = self.config.optimizer.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        learning_rate = self.schedule.get_last_lr()[0]
        metrics = sums.read(grad_norm=grad_norm)
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            self.optimizer.zero_grad()
            raise self._diverged(step, metrics, outputs)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

        tokens = sum(batch.num_tokens for batch in batches)
        seconds = time.perf_counter() - started
        summary = self.summary
        summary.steps, summary.pairs, summary.tokens = step, summary.pairs + len(indices), summary.tokens + tokens
        summary.seconds += seconds
        summary.tokens_per_second = summary.tokens / summary.seconds
        return metrics | {
            "learning_rate": learning_rate,
            "epoch": summary.pairs / len(self.pairs),
            "pairs": len(indices),
            "tokens": tokens,
            "micro_batches": len(batches),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gib": peak_memory_gib(device),
        }

    def _loss_of(
        self,
        batch: PackedBatch,
        logps: Tensor,
        reference: ReferenceLogps | None,
        num_pairs: int,
        num_chosen_tokens: int,
    ) -> LossOutput:
        ref_chosen, ref_rejected = (None, None) if reference is None else reference.of(batch, logps.device)
        return self.loss(
            logps[0::2],
            logps[1::2],
            ref_chosen,
            ref_rejected,
            chosen_lengths=batch.chosen_lengths,
            rejected_lengths=batch.rejected_lengths,
            num_pairs=num_pairs,
            num_chosen_tokens=num_chosen_tokens,
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics of the held-out pairs, each name with `eval_` before it."""
        sums = PairMetrics()
        chosen_tokens = sum(pair.chosen_length for pair in self.held_out)
        self.loss.eval()
        for host_batch in pack_all(self.held_out, range(len(self.held_out)), self.config.run.tokens_per_batch):
            batch = host_batch.to(self.policy.device)
            logps = self.policy(batch)
            output = self._loss_of(batch, logps, self.held_out_reference, len(self.held_out), chosen_tokens)
            sums.add(output, logps, batch)
        self.loss.train()
        return {f"eval_{name}": value for name, value in sums.read().items()}

    def _evaluate_and_keep_best(self, step: int) -> dict[str, float]:
        metrics = self.evaluate()
        name = self.config.run.best_metric
        value, best = metrics[name], self.summary.best_value
        sign = -1 if name == "eval_loss" else 1
        self._evaluations_without_gain += 1
        if math.isfinite(value) and (best is None or sign * value > sign * best):
            self.summary.best_step, self.summary.best_value = step, value
            self._evaluations_without_gain = 0
            self._save("best")
        self.summary.eval_after = metrics
        return metrics

    def _save(self, name: str) -> None:
        save_model(self.policy.model, self.tokenizer, self.output / name)

    def _diverged(
        self, step: int, metrics: dict[str, float], outputs: list[tuple[PackedBatch, LossOutput]]
    ) -> TrainingDivergedError:
        culprits = [
            self.pairs[batch.pair_indices[i]].where
            for batch, output in outputs
            for i in (~output.losses.isfinite()).nonzero().flatten().tolist()
        ]
        pairs = ", ".join(culprits[:8]) + (f" and {len(culprits) - 8} more" if len(culprits) > 8 else "")
        return TrainingDivergedError(
            f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}: training has diverged, in "
            f"{'pairs ' + pairs if culprits else 'the gradient alone'}. The weights before this step are in "
            f"{self.output / 'model'}. A lower --learning-rate or --dtype float32 usually helps."
        )
