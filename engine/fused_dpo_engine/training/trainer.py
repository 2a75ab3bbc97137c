"""The training loop: steps of pairs, split into forward passes by tokens."""

import math
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fused_dpo import DPOLoss, LossOutput
from fused_dpo.losses import loss_spec
from fused_dpo_engine.batching.batch import PairBatch
from fused_dpo_engine.batching.planning import PlannedBatch, build_batch, count_rows
from fused_dpo_engine.batching.schedule import Schedule, Step
from fused_dpo_engine.checkpoint.export import save_model
from fused_dpo_engine.checkpoint.folder import Checkpoint, Checkpoints
from fused_dpo_engine.config.commands import TrainConfig
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.distributed.failures import interrupts
from fused_dpo_engine.distributed.gradients import clip_gradients
from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.distributed.strategy import Strategy
from fused_dpo_engine.errors import SaveError, TrainingDivergedError
from fused_dpo_engine.model.parallel import weights_to_save
from fused_dpo_engine.model.policy import Policy, SequenceLogps
from fused_dpo_engine.reference.scoring import ReferenceLogps
from fused_dpo_engine.training.divergence import broken_weight, error_of_step, error_of_update
from fused_dpo_engine.training.keeper import Keeper
from fused_dpo_engine.training.memory import explain_out_of_memory
from fused_dpo_engine.training.metrics import MetricsWriter, NoWriter, PairMetrics, SlotMetrics, peak_memory_gib
from fused_dpo_engine.training.optimizer import build_optimizer
from fused_dpo_engine.training.splitting import Splitting
from fused_dpo_engine.training.state import RunState
from fused_dpo_engine.training.summary import DONE, EARLY, Summary


class Trainer:
    """Trains a policy; call `train` once, on all ranks.

    Args:
        policy: the model to train.
        strategy: how the ranks hold it.
        ranks: processes that share every step.
        config: the run's settings.
        tokenizer: saved beside the model.
        schedule: of the training pairs.
        reference: their reference log-probs; None for a loss that takes none.
        held_out: held-out pairs, possibly none.
        held_out_reference: their reference log-probs; None for a loss that takes none.
        output: the run's folder.
        checkpoints: where the run is kept; None for a run that is not.
        identity: what the run trains on, for its checkpoints.
    """

    def __init__(
        self,
        policy: Policy,
        strategy: Strategy,
        ranks: Ranks,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        schedule: Schedule,
        reference: ReferenceLogps | None,
        held_out: list[TokenPair],
        held_out_reference: ReferenceLogps | None,
        output: Path,
        checkpoints: Checkpoints | None = None,
        identity: Mapping[str, str | None] = MappingProxyType({}),
    ) -> None:
        self.policy, self.strategy, self.ranks = policy, strategy, ranks
        self.config, self.tokenizer, self.output = config, tokenizer, output
        self.schedule, self.pairs, self.reference = schedule, schedule.pairs, reference
        self.held_out, self.held_out_reference = held_out, held_out_reference
        self.loss: DPOLoss = config.loss.module().to(policy.device)
        self.total_steps = schedule.total_steps
        self.optimizer, self.lr_scheduler = build_optimizer(policy.parameters(), config.optimizer, self.total_steps)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.summary = Summary(planned_steps=self.total_steps)
        self._slots = SlotMetrics(config.packing.tokens_per_batch)
        self.splitting = Splitting(
            self.pairs,
            config.packing,
            # Several ranks would part: each takes as many passes as the others, and one that fails alone has left the
            # collectives of the pass. FSDP2 with one rank is in the middle of gathering weights.
            allowed=ranks.size == 1
            and not strategy.weights_are_shared_out
            and policy.router_loss is None
            and not loss_spec(config.loss.loss_type).across_pairs,
        )
        self._evaluations_without_gain = 0
        self._stopped_together = ranks.size == 1
        """Whether what has ended the run has ended it on all ranks, between two steps."""
        self._asked_to_stop = False
        self._updating = False
        """Whether weights may be those of no step."""
        self._written = 0
        """The last step whose metrics are written."""
        self._keeper = Keeper(
            config,
            checkpoints,
            RunState(
                policy,
                self.optimizer,
                self.lr_scheduler,
                self.loss,
                {"pairs": reference, "held-out pairs": held_out_reference if held_out else None},
                ranks,
            ),
            identity,
        )
        self._resumed: Mapping[str, Any] | None = None
        """The record of the checkpoint from which the run goes on."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on after a checkpoint's last step; to be called before `train`, on all ranks.

        Raises:
            UserError: see `RunState.restore`.
        """
        record = self._resumed = checkpoint.record
        self._keeper.restore(checkpoint)
        self.summary = Summary(**{**record["summary"], "stopped": DONE})
        self._written = self.summary.steps
        self._slots.take([record["slots"]])
        self._evaluations_without_gain = record["evaluations_without_gain"]
        self.splitting.split_above = record["split_above"]

    def train(self) -> Summary:
        """Run all steps, or until early stopping; saves model/ at the end, however that comes about.

        What asks the run to stop is put off until the end of a step. Then a checkpoint is written, as it is after an
        error from which a run could go on. Where a rank fails alone, those that hold the whole model still save it;
        shares of it are not gathered then, and model/ stays as it was saved last.

        Raises:
            KeyboardInterrupt: the run was asked to stop; the message says where it goes on. Without a message it was
                asked twice, and nothing was saved.
            TrainingDivergedError: loss or gradient is not finite, and the weights before that step are in model/; or an
                update has left weights that are not, and model/ is as it was.
            SaveError: model/ or best/ could not be written; what was there before still is.
            OutOfMemoryError: the message says what would help; the weights before that step are in model/.
        """
        resumed = self._resumed and self._resumed["metrics"]
        try:
            writer = MetricsWriter(self.output, self.config, resumed) if self.ranks.is_main else NoWriter()
        except BaseException as error:  # trackers may ask for a login, or wait for a network
            self.summary.stopped = self._reason(error)
            raise
        alone = self.ranks.size == 1 and not self.strategy.weights_are_shared_out
        with interrupts.put_off(once=alone):
            return self._train(writer)

    def _train(self, writer: MetricsWriter | NoWriter) -> Summary:
        run, first = self.config.run, self.summary.steps + 1
        bar = tqdm(
            initial=first - 1,
            total=self.total_steps,
            desc="training",
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
            disable=not self.ranks.is_main,
        )
        try:
            if self.held_out and first == 1:
                self.summary.eval_before = self.evaluate()
                writer.plot(0, self.summary.eval_before)
            for number, step in enumerate(islice(self.schedule, first - 1, None), start=first):
                metrics = self._step(number, step)
                last = number == self.total_steps
                if self.held_out and (last or (run.eval_steps and number % run.eval_steps == 0)):
                    metrics |= self._evaluate_and_keep_best(number)
                    if self._evaluations_without_gain >= run.early_stopping_patience > 0:
                        self.summary.stopped, last = f"{EARLY} after step {number}", True
                writer.write(number, metrics)
                self._written = number
                bar.set_postfix(
                    loss=f"{metrics['loss']:.4f}",
                    accuracy=f"{metrics['rewards/accuracies']:.2f}",
                    margin=f"{metrics['rewards/margins']:.3f}",
                    tokens_s=f"{metrics['tokens_per_second']:.0f}",
                )
                bar.update()
                if last:
                    break
                if self._asked_to_stop or self._keeper.due(number):
                    self._keep(writer)
                if self._asked_to_stop:
                    self._stopped_together = True
                    raise KeyboardInterrupt(self._where_it_goes_on())
                if run.save_steps and number % run.save_steps == 0:
                    self._save("model")
            self._save("model")
        except BaseException as error:
            self.summary.stopped = self._reason(error)
            # Else, whatever stopped the run, the weights are those of the last whole step: it changes them at its end.
            if not (self._updating or interrupts.insisted):
                self._save_what_is_there(writer, error)
            raise
        finally:
            bar.close()
            writer.close()
            self.summary.peak_memory_gib = max(self.summary.peak_memory_gib, peak_memory_gib(self.policy.device))
        return self.summary

    def _save_what_is_there(self, writer: MetricsWriter | NoWriter, error: BaseException) -> None:
        """Save what a run can go on from after an error, and model/.

        If that fails too, say so, and let the first error be raised.
        """
        diverged = isinstance(error, TrainingDivergedError)  # and would again
        together = self._stopped_together
        try:
            if together and not diverged and self._written == self.summary.steps:
                self._keep(writer)
            readable = together or not self.strategy.weights_are_shared_out
            if readable and not self.summary.saved.get("model", "").startswith("failed"):
                self._save("model", together=together)
        except Exception as failure:  # a device that has failed, say, gives nothing any more
            warnings.warn(str(failure), stacklevel=2)

    def _keep(self, writer: MetricsWriter | NoWriter) -> None:
        """Write a checkpoint. One that cannot be written ends no run: those before it are still there.

        Raises:
            TrainingDivergedError: see `_refuse_broken_weights`.
        """
        progress = {
            "summary": self.summary.as_dict(),
            "slots": self._slots.numbers(),
            "evaluations_without_gain": self._evaluations_without_gain,
            "split_above": self.splitting.split_above,
        }
        self._refuse_broken_weights("checkpoint")  # nothing goes on from these, and it would take the place of others
        try:
            self._keeper.keep(self.summary.steps, progress, writer)
        except SaveError as error:
            warnings.warn(f"no checkpoint after step {self.summary.steps}: {error}", stacklevel=2)

    def _where_it_goes_on(self) -> str:
        """Say what a run that was asked to stop leaves."""
        done, kept = self.summary.steps, self._keeper.last_step
        if kept is None:
            return f"interrupted after step {done}; there is no checkpoint to go on from"
        return f"interrupted after step {done}; --resume auto goes on after step {kept}"

    def _reason(self, error: BaseException) -> str:
        """Say why the run stopped, for the summary."""
        if isinstance(error, TrainingDivergedError):
            return f"diverged at step {error.step}"
        if isinstance(error, SaveError):
            return "not saved"
        return "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {type(error).__name__}"

    def _step(self, number: int, step: Step) -> dict[str, float]:
        """Take one optimizer step, the run's `number`th, on the mean loss of its pairs."""
        started = time.perf_counter()
        device, packing, indices = self.policy.device, self.config.packing, step.indices
        batches, sums, here, outputs = self.splitting.attempt(
            number, step.batches, lambda batches: self._accumulate(step, batches)
        )
        grad_norm = clip_gradients(self.parameters, self.config.optimizer.max_grad_norm or math.inf)
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        others = {"grad_norm": grad_norm, "stop": float(interrupts.wanted), "memory": peak_memory_gib(device)}
        others["checkpoint"] = float(self.ranks.is_main and self._keeper.time_is_up)
        metrics, shares = sums.read(len(indices), self.ranks, **others, **here.numbers())
        metrics["grad_norm"] = shares[0]["grad_norm"]
        if not all(map(math.isfinite, (metrics["loss"], *(share["grad_norm"] for share in shares)))):
            self.optimizer.zero_grad()
            self._stopped_together = True
            self._refuse_broken_weights("model")  # no pair is to blame then
            raise error_of_step(number, metrics, outputs, self.pairs, self.output, self.ranks)
        self._asked_to_stop = any(share["stop"] for share in shares)
        self._keeper.wanted = any(share["checkpoint"] for share in shares)
        slots = SlotMetrics(packing.tokens_per_batch)
        for layout in (slots, self._slots):
            layout.take(shares)
        self._updating = True
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()

        seconds = time.perf_counter() - started
        summary, run_slots = self.summary, self._slots
        summary.steps, summary.pairs, summary.tokens = number, summary.pairs + len(indices), run_slots.tokens
        summary.fill, summary.padding, summary.shared = run_slots.fill, run_slots.padding, run_slots.shared
        self._updating = False
        summary.seconds += seconds
        summary.peak_memory_gib = max(share["memory"] for share in shares)
        summary.tokens_per_second = summary.tokens / summary.seconds
        return metrics | {
            "learning_rate": learning_rate,
            "epoch": summary.pairs / len(self.pairs),
            "pairs": len(indices),
            "tokens": slots.tokens,
            "micro_batches": len(batches),
            "packing/fill": slots.fill,
            "packing/padding": slots.padding,
            "packing/shared": slots.shared,
            "seconds": seconds,
            "tokens_per_second": slots.tokens / seconds,
            "peak_memory_gib": summary.peak_memory_gib,
        }

    def _accumulate(
        self, step: Step, batches: list[PlannedBatch]
    ) -> tuple[list[PlannedBatch], PairMetrics, SlotMetrics, list[tuple[PairBatch, LossOutput]]]:
        """Take forward and backward passes over batches that hold the step's pairs, from gradients of 0.

        Returns:
            The batches, and what was measured in them.
        """
        device, packing, indices = self.policy.device, self.config.packing, step.indices
        chosen_tokens = sum(self.pairs[i].chosen_length for i in indices)
        sums, here = PairMetrics(), SlotMetrics(packing.tokens_per_batch)
        self.optimizer.zero_grad()  # those of an attempt that failed
        outputs: list[tuple[PairBatch, LossOutput]] = []
        for planned in batches:
            last = planned is batches[-1]
            with self._explained(planned), self.strategy.micro_batch(last=last):
                batch = build_batch(self.pairs, planned.indices, packing).to(device)
                scores = self.strategy.module(batch)
                output = self._loss_of(batch, scores, self.reference, len(indices), chosen_tokens)
                aux_loss = None
                if self.policy.router_loss is not None and scores.router is not None:
                    # A mean over rows, so every pass weighs by the rows that it has of the step's.
                    aux_loss = scores.router * (count_rows(self.pairs, planned, packing) / step.rows)
                    output = output._replace(loss=output.loss + self.policy.router_loss.coefficient * aux_loss)
                # Gradients are averaged over ranks, and the loss is this rank's share of a sum.
                (output.loss * (self.ranks.data_size if planned.counted else 0)).backward()
            sums.add(output, scores.plain, batch, scores.head, aux_loss, counted=planned.counted)
            outputs.append((batch, output))
            here.add(batch, counted=planned.counted)
        return batches, sums, here, outputs

    def _explained(self, planned: PlannedBatch) -> AbstractContextManager[None]:
        """Say what to change where memory runs out in a forward pass within the block."""
        how: Any = {"cuda": self.policy.device.type == "cuda", **self.strategy.in_estimate}
        return explain_out_of_memory(self.config, planned.slots, **how)

    def _loss_of(
        self,
        batch: PairBatch,
        scores: SequenceLogps,
        reference: ReferenceLogps | None,
        num_pairs: int,
        num_chosen_tokens: int,
    ) -> LossOutput:
        logps, plain = scores.logps, scores.plain
        ref_chosen, ref_rejected = (None, None) if reference is None else reference.of(batch, logps.device)
        output: LossOutput = self.loss(
            logps[0::2],
            logps[1::2],
            ref_chosen,
            ref_rejected,
            chosen_lengths=batch.chosen_lengths,
            rejected_lengths=batch.rejected_lengths,
            margins=batch.margins,
            rankings=batch.rankings,
            num_pairs=num_pairs,
            num_chosen_tokens=num_chosen_tokens,
        )
        if self.loss.sft_weight > 0 and plain is not logps:
            # The SFT term is about all tokens alike: what LD-DPO's weights took from it comes back.
            rest = (logps - plain)[0::2].sum() / num_chosen_tokens
            nll_loss = output.metrics["nll_loss"] + rest.detach()
            metrics = {**output.metrics, "nll_loss": nll_loss}
            output = output._replace(loss=output.loss + self.loss.sft_weight * rest, metrics=metrics)
        return output

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Compute the metrics of the held-out pairs, each name with `eval_` before it."""
        sums = PairMetrics()
        chosen_tokens = sum(pair.chosen_length for pair in self.held_out)
        self.loss.eval()
        for planned in self.schedule.plan_share(self.held_out):
            with self._explained(planned):
                batch = build_batch(self.held_out, planned.indices, self.config.packing).to(self.policy.device)
                scores = self.policy(batch)
                output = self._loss_of(batch, scores, self.held_out_reference, len(self.held_out), chosen_tokens)
            sums.add(output, scores.plain, batch, counted=planned.counted)
        self.loss.train()
        means, _ = sums.read(len(self.held_out), self.ranks)
        return {f"eval_{name}": value for name, value in means.items()}

    def _evaluate_and_keep_best(self, number: int) -> dict[str, float]:
        metrics = self.evaluate()
        name = self.config.run.best_metric
        value, best = metrics[name], self.summary.best_value
        sign = -1 if name == "eval_loss" else 1
        self._evaluations_without_gain += 1
        if math.isfinite(value) and (best is None or sign * value > sign * best):
            self.summary.best_step, self.summary.best_value = number, value
            self._evaluations_without_gain = 0
            self._save("best")
        self.summary.eval_after = metrics
        return metrics

    def _save(self, name: str, *, together: bool = True) -> None:
        """Save the model by the main rank; the others wait for it and fail with it, unless it is called alone.

        Raises:
            SaveError: the system refuses.
            TrainingDivergedError: a weight is not finite; nothing is written.
        """
        folder, reason = self.output / name, None
        self._refuse_broken_weights(name, together=together)
        weights = weights_to_save(self.strategy, self.policy)
        if self.ranks.is_main:
            try:
                with self.policy.as_saved():
                    save_model(self.policy.model, self.tokenizer, folder, weights)
            except SaveError as error:
                reason = error.reason
        if together:
            self.ranks.barrier()
            reason = self.ranks.gather_objects(reason)[0]
        if reason is not None:
            self.summary.saved[name] = f"failed after step {self.summary.steps}: {reason}"
            self._stopped_together = together
            raise SaveError(folder, OSError(reason))
        self.summary.saved[name] = f"after step {self.summary.steps}"

    def _refuse_broken_weights(self, name: str, *, together: bool = True) -> None:
        """Raise TrainingDivergedError, in the place of a save as `name`, if the last update has left no numbers."""
        broken = broken_weight(self.policy.model, self.ranks, together=together)
        if broken is None:
            return
        saved, number = self.summary.saved, self.summary.steps
        error = error_of_update(number, broken, self.output, saved)
        saved |= dict.fromkeys({name, "model"} - {"checkpoint"}, f"failed after step {number}: {broken} is not finite")
        self._stopped_together = together
        raise error
