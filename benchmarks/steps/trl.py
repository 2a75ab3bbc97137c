"""The same step taken by TRL's own `DPOTrainer`, padded, through its `training_step`.

TRL 1.16 has one head, `ChunkedLogProbFunction` in tiles of the vocabulary, and no option to take another. It has no
packing and no prefix sharing. Where it has no Triton, as on a CPU, it scores every position, prompts and padding too;
1.15 scores what counts alone, everywhere. Both are measured, the second by telling 1.16 that it may.

Two things are given to it instead of computed: the pairs, as the token ids that every way gets, and the reference
log-probs, as its own precomputation would add them. Its gradient checkpointing, on by default, is a way of its own,
since ours is off by default.
"""

import importlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.steps.ways import BETA, Case, Outcome, gradient_norm
from fused_dpo_engine.batching.planning import build_batch
from fused_dpo_engine.config.options import PackingOptions
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.training.metrics import SlotMetrics


class Variant(NamedTuple):
    """How TRL is set up."""

    checkpointed: bool = False
    """Recompute the backbone's activations."""
    compact: bool = False
    """Score what counts alone."""


TRL = {
    "TRL": Variant(),
    "TRL, compact": Variant(compact=True),
    "TRL, checkpointed": Variant(checkpointed=True),
}


@contextmanager
def scored_alone() -> Iterator[None]:
    """Let TRL score what counts alone within the block, whatever the device."""
    utils: Any = importlib.import_module("trl.trainer.utils")
    own, utils._use_triton = utils._use_triton, lambda _device: True
    try:
        yield
    finally:
        utils._use_triton = own


def absent() -> str | None:
    """Say why TRL cannot be measured here, if so."""
    return None if find_spec("trl") else "trl is not installed"


def batch_size(pairs: Sequence[TokenPair], budget: int) -> int:
    """Find the most pairs a batch, one number for all as TRL has it, with which no padded batch exceeds the budget.

    Raises:
        ValueError: a pair alone does.
    """
    lengths = [max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    for size in range(len(pairs), 0, -1):
        if all(2 * size * max(lengths[i : i + size]) <= budget for i in range(0, len(pairs), size)):
            return size
    raise ValueError(f"a padded pair has more than {budget} token slots.")


class TrlStep:
    """Forward and backward over the pairs, in their order, by `DPOTrainer`; otherwise as `step_ways.OwnStep`.

    Its loss is the mean of the batches' means: a shorter last batch weighs as much as the others.

    Args:
        case: the step.
        variant: how it is set up.
        pairs: those of the case.
        ref_logps: fp32 [P, 2], what the reference gives.
    """

    def __init__(self, case: Case, variant: Variant, pairs: list[TokenPair], ref_logps: Tensor) -> None:
        from datasets import Dataset
        from trl.trainer.dpo_config import DPOConfig  # pyright: ignore[reportMissingImports]
        from trl.trainer.dpo_trainer import DPOTrainer  # pyright: ignore[reportMissingImports]

        class Trainer(DPOTrainer):
            """Takes pairs and reference log-probs as they come."""

            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

            def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

        self.variant = variant
        self.pairs, self.size = pairs, batch_size(pairs, case.budget)
        self.budget = case.budget
        self.folder = tempfile.TemporaryDirectory()
        arguments = DPOConfig(
            self.folder.name,
            per_device_train_batch_size=self.size,
            gradient_checkpointing=variant.checkpointed,
            beta=BETA,
            bf16=case.dtype == "bfloat16",
            use_cpu=case.device == "cpu",
            dataloader_pin_memory=case.device != "cpu",
            max_length=None,
            precompute_ref_log_probs=True,
            train_sampling_strategy="sequential",
            report_to="none",
            disable_tqdm=True,
        )
        rows = [
            {
                "prompt_ids": pair.chosen_ids[: pair.prompt_length].tolist(),
                "chosen_ids": pair.chosen_ids[pair.prompt_length :].tolist(),
                "rejected_ids": pair.rejected_ids[pair.prompt_length :].tolist(),
                "ref_chosen_logps": float(ref[0]),
                "ref_rejected_logps": float(ref[1]),
            }
            for pair, ref in zip(pairs, ref_logps, strict=True)
        ]
        model = case.policy(packing=False).causal_lm
        dataset = Dataset.from_list(rows)
        trainer: Any = Trainer(model, args=arguments, train_dataset=dataset, processing_class=_tokenizer())
        # What `train` does before its first step, without an optimizer.
        if variant.checkpointed:
            trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model: Any = trainer.accelerator.prepare(trainer.model)
        self.loader = trainer.get_train_dataloader()
        trainer.current_gradient_accumulation_steps = len(self.loader)
        self.trainer = trainer
        self.scored: list[Tensor] = []
        self.model.register_forward_hook(self._keep_logps)

    def _keep_logps(self, module: Any, inputs: Any, output: Any) -> None:
        chosen, rejected = output.log_probs.detach().float().sum(1).chunk(2)
        self.scored.append(torch.stack((chosen, rejected), dim=1))

    def __call__(self) -> Outcome:
        """Take the step; gradients of the one before are dropped first."""
        self.model.zero_grad()
        self.scored = []
        with scored_alone() if self.variant.compact else nullcontext():
            losses = [self.trainer.training_step(self.model, batch) for batch in self.loader]
        return Outcome(torch.stack(losses).sum(), torch.cat(self.scored))

    def describe(self) -> dict[str, Any]:
        """Describe what the slots held, the gradient, and the size of the batches."""
        slots = SlotMetrics(self.budget)
        for start in range(0, len(self.pairs), self.size):
            indices = range(len(self.pairs))[start : start + self.size]
            slots.add(build_batch(self.pairs, indices, PackingOptions(packing=False)))
        return {
            "tokens": slots.tokens,
            "slots": slots.slots,
            "forward_passes": slots.passes,
            "padding": slots.padding,
            "saved_by_sharing": 0.0,
            "grad_norm": gradient_norm(self.model),
            "pairs_per_batch": self.size,
        }


def _tokenizer() -> Any:
    """Make a tokenizer that the trainer asks for its padding token and nothing else."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    empty = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=empty, pad_token="<pad>", eos_token="<pad>")
