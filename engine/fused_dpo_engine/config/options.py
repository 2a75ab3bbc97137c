"""The groups of options: one dataclass a group, one docstring a field, checked where it is made."""

import math
import os
from dataclasses import dataclass
from typing import Any, Literal

from fused_dpo import DPOLoss
from fused_dpo.losses import loss_spec
from fused_dpo_engine.errors import UserError

Score = Literal["assistant", "last", "all"]
Pairing = Literal["best", "all"]
ReportTo = Literal["tensorboard", "wandb", "trackio", "none"]
Strategy = Literal["auto", "ddp", "fsdp2"]
BestMetric = Literal["eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"]


def require(condition: bool, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def _expand_home(options: Any, *names: str) -> None:
    """Put the home folder for `~` in options that no shell has expanded, as in files and after `--model=`."""
    for name in names:
        value = getattr(options, name)
        if value is not None:
            object.__setattr__(options, name, os.path.expanduser(value))  # frozen for everybody else


@dataclass(frozen=True)
class ModelOptions:
    """The model and how it computes."""

    model: str
    """Folder or Hugging Face name of the causal language model to train."""
    ref_model: str | None = None
    """Folder or name of the reference model; by default the model itself before its first update."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype to compute in; weights that are trained stay in float32.
    auto: bfloat16 where the hardware multiplies it (Ampere and later, CPUs with AVX512-BF16 or AMX), else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto takes a GPU if there is one."""
    attention: Literal["auto", "flash_attn_3", "flash_attn_4", "flash_attn_2", "varlen", "flex", "sdpa"] = "auto"
    """Kernel for packed attention: flash-attn (where installed), torch's variable-length or Flex attention, or SDPA a
    segment. auto takes the first of these that is there and can do what the model needs."""
    liger: bool = False
    """Use liger-kernel's RMSNorm, rotary embedding and gated MLP (CUDA only; needs the extra `liger`)."""
    compile: bool = False
    """Compile the model's backbone with torch.compile; the first steps take longer."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory for about a third more time."""
    offload_activations: bool = False
    """Keep what the backbone saves for its backward pass in host memory; with --gradient-checkpointing that is one
    tensor a layer. For sequences that fit no other way; changes no result."""
    workspace_mib: int = 128
    """Memory in MiB that the head may use for its slices of the vocabulary."""
    load_in_4bit: bool = False
    """Quantise the frozen weights to 4 bits with bitsandbytes (QLoRA; needs --lora-rank and the extra `qlora`)."""
    grad_mode: Literal["auto", "exact", "filtered"] = "auto"
    """Gradients of the head: filtered computes those of tokens that matter, within a stated error below that of bf16
    logits, in a fraction of the time. auto: filtered in bfloat16, exact in float32."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Only for models you trust."""

    def __post_init__(self) -> None:
        _expand_home(self, "model", "ref_model")
        require(self.workspace_mib >= 1, f"workspace-mib must be at least 1 (MiB), got {self.workspace_mib}.")


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters (needs no second model: the reference is the policy with its adapters off)."""

    lora_rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    lora_alpha: float | None = None
    """Scale of the adapters is lora-alpha / lora-rank; by default twice the rank."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the modules to adapt; all-linear: every linear layer but the head."""

    def __post_init__(self) -> None:
        require(self.lora_rank >= 0, f"lora-rank must be 0 (off) or positive, got {self.lora_rank}.")
        require(
            self.lora_alpha is None or 0 < self.lora_alpha < math.inf,
            f"lora-alpha must be positive and finite, got {self.lora_alpha}.",
        )
        require(
            self.lora_alpha is None or self.lora_rank > 0,
            "lora-alpha scales adapters: give --lora-rank too, or leave it out.",
        )


@dataclass(frozen=True)
class DataOptions:
    """The preference pairs."""

    data: str
    """Training pairs: a .jsonl, .json, .parquet, .csv or .tsv file, a folder of `datasets`, or a Hugging Face name."""
    split: str = "train"
    """Split to read from a folder or a Hugging Face name."""
    eval_data: str | None = None
    """Held-out pairs, in any form that --data takes."""
    eval_split: str = "test"
    """Split to read from --eval-data, if that is a folder or a Hugging Face name."""
    eval_fraction: float = 0.0
    """Share of the training pairs to hold out instead (0 to 1); pairs on the same prompt stay together."""
    max_length: int | None = None
    """Longest sequence (prompt + response) in tokens; by default half of tokens-per-batch, if the model allows it.
    Longer responses lose their end, and are counted."""
    truncate_prompts: bool = False
    """Cut what is longer than max-length from the beginning of the prompt, down to half of max-length, before responses
    lose their end. Without it responses alone are cut, and a prompt that leaves no room for one is an error."""
    pairs: Pairing = "best"
    """Pairs of a row with more than two answers: the best one against each other one, or all of different score."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used, and count them, instead of stopping with an error."""
    chat_template: str | None = None
    """File with a Jinja chat template to use instead of the tokenizer's, or the name of one of those that it has."""
    columns: tuple[str, ...] = ()
    """Names for columns that a row lacks under their usual names, such as prompt=question chosen=better."""
    score: Score = "assistant"
    """What is scored of an answer of several messages: the assistant's turns, the last of them, or all of it with tool
    results and other turns."""

    def __post_init__(self) -> None:
        _expand_home(self, "chat_template")
        for name in ("data", "eval_data"):
            require(
                getattr(self, name) != "", f"{name.replace('_', '-')} must name a file, folder or data set, got ''."
            )
        require(0 <= self.eval_fraction < 1, f"eval-fraction must lie in [0, 1), got {self.eval_fraction}.")
        require(
            not (self.eval_data and self.eval_fraction),
            "eval-data and eval-fraction both say what to hold out; give one of them.",
        )
        require(
            self.max_length is None or self.max_length >= 2,
            f"max-length must be at least 2 (tokens), got {self.max_length}.",
        )


@dataclass(frozen=True)
class LossOptions:
    """The preference loss."""

    beta: float = 0.1
    """Strength of the pull towards the reference (inverse temperature of the implicit reward), positive."""
    loss_type: str = "sigmoid"
    """Which loss; sigmoid is the one of the DPO paper.
    Others: sigmoid_norm, hinge, ipo, ipo_norm, robust, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down,
    aot, aot_unpaired, discopop, dpop, plackett_luce (whole rankings), simpo, orpo."""
    label_smoothing: float = 0.0
    """Share of the labels taken to be wrong, 0 to less than 0.5 (sigmoid: conservative DPO; robust: its noise rate)."""
    sft_weight: float = 0.0
    """Weight of a negative log-likelihood term on the chosen responses, per token."""
    simpo_gamma: float = 0.5
    """Target margin of the simpo loss."""
    dpop_lambda: float = 50.0
    """Weight of the penalty of the dpop loss (DPO-Positive) on chosen responses that become less likely."""
    odpo_alpha: float = 0.0
    """Offset of the sigmoid loss for each unit by which chosen scored better than rejected (ODPO); 0: no offset."""
    ld_alpha: float | None = None
    """Weight (0 to 1) of response tokens beyond the length of the shorter response (LD-DPO); by default off."""

    def __post_init__(self) -> None:
        try:
            self.module()
        except ValueError as error:
            raise UserError(str(error)) from None
        require(
            self.ld_alpha is None or not loss_spec(self.loss_type).ranked,
            f"ld-alpha compares the two lengths of a pair, {self.loss_type} all answers of a row; leave ld-alpha out.",
        )
        require(self.ld_alpha is None or 0 <= self.ld_alpha <= 1, f"ld-alpha must lie in [0, 1], got {self.ld_alpha}.")

    def module(self) -> DPOLoss:
        """Make the loss that these options describe."""
        return DPOLoss(
            self.beta,
            self.label_smoothing,
            self.loss_type,
            sft_weight=self.sft_weight,
            simpo_gamma=self.simpo_gamma,
            dpop_lambda=self.dpop_lambda,
            odpo_alpha=self.odpo_alpha,
        )


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW and the course of its learning rate."""

    learning_rate: float = 5e-6
    """Peak learning rate (full training: 5e-7 to 5e-6; LoRA: 5e-6 to 5e-5)."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps AdamW's two means in 8 bits, 2 bytes a weight instead of 8 (bitsandbytes; the extra `qlora`)."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after warm-up; linear and cosine end at 0."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises to its peak (0 to 1)."""
    weight_decay: float = 0.0
    """Decoupled weight decay per unit of learning rate, on matrices only."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this 2-norm; 0 does not clip."""

    def __post_init__(self) -> None:
        require(0 < self.learning_rate < math.inf, f"learning-rate must be positive, got {self.learning_rate}.")
        for name, beta in (("adam-beta1", self.adam_beta1), ("adam-beta2", self.adam_beta2)):
            require(0 <= beta < 1, f"{name} must lie in [0, 1), got {beta}.")
        require(0 < self.adam_epsilon < math.inf, f"adam-epsilon must be positive and finite, got {self.adam_epsilon}.")
        require(0 <= self.warmup_ratio <= 1, f"warmup-ratio must lie in [0, 1], got {self.warmup_ratio}.")
        require(self.max_grad_norm >= 0, f"max-grad-norm must not be negative, got {self.max_grad_norm}.")
        require(
            0 <= self.weight_decay < math.inf,
            f"weight-decay must not be negative, and finite, got {self.weight_decay}.",
        )


@dataclass(frozen=True)
class PackingOptions:
    """How pairs are put into forward passes."""

    tokens_per_batch: int = 8192
    """Tokens per forward pass: sets memory and speed, not the result of a step (but for aot, aot_unpaired and bco_pair,
    which compare the pairs of one forward pass). Steps are split to fit (accumulation)."""
    packing: bool = True
    """Put pairs side by side in one row without padding. --no-packing pads them to one width and takes the model's own
    attention, to compare, and for models that cannot be packed."""
    prefix_sharing: bool = True
    """Compute what the responses to a prompt have in common once. --no-prefix-sharing to compare."""
    batches_per_step: int | None = None
    """Make a step of so many full forward passes, instead of --pairs-per-step pairs; their number then varies."""
    plan_window: int = 1024
    """Shuffled pairs that are planned together with --batches-per-step: more fill better, fewer mix better."""

    def __post_init__(self) -> None:
        least = {"tokens_per_batch": 4, "batches_per_step": 1, "plan_window": 1}
        for name, least_value in least.items():
            value = getattr(self, name)
            require(
                value is None or value >= least_value,
                f"{name.replace('_', '-')} must be at least {least_value}, got {value}.",
            )


@dataclass(frozen=True)
class ParallelOptions:
    """Several processes, started by torchrun; they take the same steps as one."""

    strategy: Strategy = "auto"
    """How they hold the model: ddp, each the whole of it, or fsdp2, each its share of every weight. auto takes ddp."""
    tensor_parallel: int = 1
    """Processes that share the same pairs, each with a part of every layer and of the vocabulary, by transformers' own
    plan for the model. All others share the pairs out."""
    offload: bool = False
    """Keep weights, gradients and optimizer state in host memory, with one process too: less GPU memory, slower steps
    (FSDP2)."""
    timeout_minutes: float = 30.0
    """Minutes that processes wait for each other before the run ends with an error."""

    def __post_init__(self) -> None:
        require(self.tensor_parallel >= 1, f"tensor-parallel must be at least 1, got {self.tensor_parallel}.")
        require(
            not self.offload or self.tensor_parallel == 1,
            "offload is FSDP2's alone, which shares out whole weights; leave out --tensor-parallel.",
        )
        require(
            0 < self.timeout_minutes < math.inf,
            f"timeout-minutes must be positive and finite, got {self.timeout_minutes}.",
        )
        require(
            not self.offload or self.strategy != "ddp", "offload is FSDP2's; leave out --strategy ddp, or give fsdp2."
        )


@dataclass(frozen=True)
class RunOptions:
    """Length of the run, evaluation and output."""

    output: str
    """Folder for config.json, metrics.jsonl, summary.json, tensorboard/, checkpoints/, model/ and best/."""
    overwrite: bool = False
    """Write into an output folder that already holds a run; its files are replaced."""
    max_steps: int | None = None
    """Optimizer steps; epochs repeat until they are done. By default as many as --epochs takes."""
    epochs: float = 1.0
    """Passes over the training pairs, if max-steps is not given."""
    pairs_per_step: int = 16
    """Pairs per optimizer step; the loss is their mean. The last step of an epoch takes what is left."""
    seed: int = 0
    """Seed of the order of pairs, the held-out split and adapter initialisation."""
    eval_steps: int = 0
    """Evaluate every so many steps; 0: before the first and after the last step only."""
    save_steps: int = 0
    """Save model/ every so many steps; 0: at the end only."""
    resume: str = "never"
    """auto: go on from the newest checkpoint in --output that is whole, and begin where there is no run yet. PATH: from
    this checkpoint, or the newest of this run's folder. never: begin anew."""
    checkpoint_every: int = 0
    """Write a checkpoint every so many steps: all that a run needs to go on as if nothing had been, 12 bytes a trained
    weight."""
    checkpoint_minutes: float = 30.0
    """Write one when so many minutes have gone by since the last; 0: not by the clock. Unless both are 0, a run that is
    interrupted writes one too."""
    checkpoints_kept: int = 2
    """How many of them are kept; while one is written there is one more."""
    best_metric: BestMetric = "eval_loss"
    """Metric by which best/ is chosen (the lowest loss, or the highest accuracy or margin)."""
    early_stopping_patience: int = 0
    """Stop after so many evaluations in a row without a better best-metric; 0: never."""
    report_to: tuple[ReportTo, ...] = ("tensorboard",)
    """Where curves go beside metrics.jsonl, one or several: tensorboard, wandb, trackio (two extras); or none.
    The run has the output folder's name, in the project fused-dpo or what WANDB_PROJECT says."""

    def __post_init__(self) -> None:
        least_values = {"pairs_per_step": 1, "eval_steps": 0, "save_steps": 0, "checkpoint_every": 0}
        for name, least in {**least_values, "checkpoints_kept": 1}.items():
            value = getattr(self, name)
            require(value >= least, f"{name.replace('_', '-')} must be at least {least}, got {value}.")
        require(self.max_steps is None or self.max_steps >= 1, f"max-steps must be at least 1, got {self.max_steps}.")
        require(0 < self.epochs < math.inf, f"epochs must be positive and finite, got {self.epochs}.")
        require(0 <= self.seed < 2**63, f"seed must lie in [0, 2^63), got {self.seed}.")
        require(
            0 < len(set(self.report_to)) == len(self.report_to),
            f"report-to must name each tracker once, or none, got {' '.join(self.report_to) or 'nothing'}.",
        )
        require(
            "none" not in self.report_to or len(self.report_to) == 1,
            f"report-to none goes with no other tracker, got {' '.join(self.report_to)}.",
        )
        require(self.early_stopping_patience >= 0, "early-stopping-patience must not be negative.")
        require(
            0 <= self.checkpoint_minutes < math.inf,
            f"checkpoint-minutes must not be negative, and finite, got {self.checkpoint_minutes}.",
        )
        require(
            not (self.overwrite and self.resume == "auto"),
            "overwrite begins a run anew, resume auto goes on with it; give one of them.",
        )
        require(self.resume != "", "resume must be auto, never, or a folder, got ''.")
        _expand_home(self, "resume")


@dataclass(frozen=True)
class ReferenceOptions:
    """Where the log-probs of the reference come from, if they are not computed."""

    reference_store: str | None = None
    """File that keeps the reference's log-probs by what decides them (made if there is none): what it has is not
    computed again, by this run or by others, and what it lacks is written while it is computed."""
    reference_columns: Literal["auto", "never"] = "auto"
    """auto: take log-probs that the data brings in ref_chosen_logps and ref_rejected_logps (or reference_...) as the
    reference's, after some have been computed again and compared. never: leave them out."""

    def __post_init__(self) -> None:
        require(self.reference_store != "", "reference-store must name a file, got ''.")
        _expand_home(self, "reference_store")
