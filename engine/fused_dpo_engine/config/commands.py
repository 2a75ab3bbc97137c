"""What each command takes: groups of options, checked against each other."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from typing import Any, Literal

from fused_dpo.losses import loss_spec, needs_reference
from fused_dpo_engine.config.options import (
    DataOptions,
    LoraOptions,
    LossOptions,
    ModelOptions,
    OptimizerOptions,
    PackingOptions,
    ParallelOptions,
    ReferenceOptions,
    RunOptions,
    require,
)


def _require_room(data: DataOptions, packing: PackingOptions) -> None:
    require(
        data.max_length is None or 2 * data.max_length <= packing.tokens_per_batch,
        f"a pair takes up to 2 x max-length = {2 * (data.max_length or 0)} tokens, more than tokens-per-batch = "
        f"{packing.tokens_per_batch}; raise the one or lower the other.",
    )


@dataclass(frozen=True)
class TrainConfig:
    """Train a language model on preference pairs by Direct Preference Optimization."""

    model: ModelOptions
    lora: LoraOptions
    data: DataOptions
    loss: LossOptions
    optimizer: OptimizerOptions
    packing: PackingOptions
    parallel: ParallelOptions
    run: RunOptions
    reference: ReferenceOptions

    def __post_init__(self) -> None:
        run, data = self.run, self.data
        _require_room(data, self.packing)
        has_eval = bool(data.eval_data or data.eval_fraction)
        require(
            has_eval or not (run.eval_steps or run.early_stopping_patience),
            "eval-steps and early-stopping-patience need held-out pairs: give --eval-data or --eval-fraction.",
        )
        require(
            not run.early_stopping_patience or run.eval_steps > 0,
            "early-stopping-patience counts evaluations during training: give --eval-steps too.",
        )
        require(
            not (self.lora.lora_rank and self.model.ref_model),
            "with LoRA the reference is the model with its adapters off; leave out --ref-model.",
        )
        require(
            not self.model.load_in_4bit or self.lora.lora_rank > 0,
            "load-in-4bit: quantised weights cannot be trained; give --lora-rank, which trains adapters on them.",
        )
        require(
            not (self.model.load_in_4bit and (self.parallel.strategy == "fsdp2" or self.parallel.offload)),
            "load-in-4bit: quantised weights are not cut into shares; give --strategy ddp, without --offload.",
        )
        model = self.model
        require(
            self.parallel.tensor_parallel == 1 or not (model.compile or model.liger or model.offload_activations),
            "tensor-parallel: --compile, --liger and --offload-activations take no split model; leave them out.",
        )
        require(
            not self.model.ref_model or needs_reference(self.loss.loss_type),
            f"{self.loss.loss_type} takes no reference; leave out --ref-model, or give another --loss-type.",
        )
        require(
            not self.reference.reference_store or needs_reference(self.loss.loss_type),
            f"{self.loss.loss_type} takes no reference; leave out --reference-store, or give another --loss-type.",
        )
        require(
            data.pairs == "best" or not loss_spec(self.loss.loss_type).ranked,
            f"{self.loss.loss_type} takes the ranking of a row as a whole; leave out --pairs, or take a loss of pairs.",
        )
        require(
            has_eval or run.best_metric == "eval_loss",
            "best-metric looks at held-out pairs: give --eval-data or --eval-fraction, or leave it out.",
        )
        require(
            self.packing.packing or self.model.attention == "auto",
            "without packing the model takes its own attention; leave out --attention, or give --attention auto.",
        )

    @property
    def inputs(self) -> dict[str, str | None]:
        """What the run reads, by option: paths, or names on the Hub."""
        return {
            "--model": self.model.model,
            "--ref-model": self.model.ref_model,
            "--data": self.data.data,
            "--eval-data": self.data.eval_data,
            "--chat-template": self.data.chat_template,
        }

    def flat(self) -> dict[str, Any]:
        """List all settings by their option names (underscores for dashes); readable as a --config file."""
        return {key: value for group in vars(self).values() for key, value in dataclasses.asdict(group).items()}

    def as_json(self) -> str:
        """Write the settings as JSON."""
        return json.dumps(self.flat(), indent=2)


@dataclass(frozen=True)
class PlanConfig:
    """Plan the forward passes over preference pairs, and print what they take, without loading a model."""

    model: str
    """Folder or Hugging Face name of the model whose tokenizer makes the tokens."""
    data: DataOptions
    packing: PackingOptions
    pairs_per_step: int = 16
    """Pairs per optimizer step."""
    seed: int = 0
    """Seed of the order of pairs and the held-out split."""
    show: int = 0
    """Print so many pairs as they will be trained: prompt, answers, and what of them is scored."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Only for models you trust."""

    def __post_init__(self) -> None:
        require(self.pairs_per_step >= 1, f"pairs-per-step must be at least 1, got {self.pairs_per_step}.")
        require(0 <= self.seed < 2**63, f"seed must lie in [0, 2^63), got {self.seed}.")
        require(self.show >= 0, f"show must be 0 (none) or positive, got {self.show}.")
        _require_room(self.data, self.packing)

    @property
    def model_options(self) -> ModelOptions:
        """The model, as functions that load one take it."""
        return ModelOptions(model=self.model, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class ReferenceConfig:
    """Fill a reference store: score preference pairs by the reference of a run, before the run."""

    model: ModelOptions
    lora: LoraOptions
    data: DataOptions
    packing: PackingOptions
    parallel: ParallelOptions
    store: str
    """File that keeps the log-probs; made if there is none, and added to if there is."""
    ld_alpha: float | None = None
    """Weight (0 to 1) of response tokens beyond the length of the shorter response (LD-DPO); by default off."""
    verify: int = 0
    """Score so many of the data's stored sequences again, chosen by --seed, and print the largest difference."""
    export: str | None = None
    """Write --data with the columns ref_chosen_logps and ref_rejected_logps to this file (.jsonl or .parquet)."""
    overwrite: bool = False
    """Replace the file that --export names."""
    seed: int = 0
    """Seed of the sample that --verify takes, and of the held-out split."""

    def __post_init__(self) -> None:
        for name in ("store", "export"):
            value = getattr(self, name)
            require(value != "", f"{name} must name a file, got ''.")
            if value is not None:
                object.__setattr__(self, name, os.path.expanduser(value))  # frozen for everybody else
        require(self.verify >= 0, f"verify must be 0 (none) or positive, got {self.verify}.")
        require(0 <= self.seed < 2**63, f"seed must lie in [0, 2^63), got {self.seed}.")
        require(self.ld_alpha is None or 0 <= self.ld_alpha <= 1, f"ld-alpha must lie in [0, 1], got {self.ld_alpha}.")
        require(
            self.export is None or self.export.lower().endswith((".jsonl", ".parquet")),
            f"export writes .jsonl or .parquet, got {self.export}; give the file one of these endings.",
        )
        require(
            self.export is None or self.ld_alpha in (None, 1.0),
            "export writes plain sums of log-probs, which is what the columns mean elsewhere; leave out --ld-alpha.",
        )
        require(
            not (self.lora.lora_rank and self.model.ref_model),
            "with LoRA the reference is the model with its adapters off; leave out --ref-model.",
        )
        _require_room(self.data, self.packing)

    @property
    def scored(self) -> ModelOptions:
        """The model that is the reference."""
        return dataclasses.replace(self.model, model=self.model.ref_model or self.model.model, ref_model=None)


@dataclass(frozen=True)
class EstimateConfig:
    """Estimate what memory training a model takes, from its configuration alone: no weights are read."""

    model: str
    """Folder or Hugging Face name of the model, or of adapters on it."""
    lora: LoraOptions
    gpus: int = 1
    """GPUs in all."""
    gpu_memory: float = 80.0
    """Memory of each, in GiB; a part of it is left for what is not tensors."""
    tokens_per_batch: int = 8192
    """Tokens per forward pass of a GPU."""
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    """How several GPUs hold the model: ddp, each the whole of it, or fsdp2, each its share. auto: ddp if it fits."""
    tensor_parallel: int = 1
    """GPUs that share every layer and the head, among all."""
    offload: bool = False
    """Keep weights, gradients and optimizer state in host memory (FSDP2)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    offload_activations: bool = False
    """Keep what the backbone saves for its backward pass in host memory."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW with its two means in fp32, or in 8 bits."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype to compute in; weights that are trained stay in float32."""
    workspace_mib: int = 128
    """Memory in MiB that the head may use for its slices of the vocabulary."""
    pairs: int = 0
    """Preference pairs, whose reference log-probs are kept on the host."""
    json: bool = False
    """Print JSON, in bytes, in the place of a table."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Only for models you trust."""

    def __post_init__(self) -> None:
        for name, least in {
            "gpus": 1,
            "tensor_parallel": 1,
            "tokens_per_batch": 4,
            "workspace_mib": 1,
            "pairs": 0,
        }.items():
            value = getattr(self, name)
            require(value >= least, f"{name.replace('_', '-')} must be at least {least}, got {value}.")
        require(0 < self.gpu_memory < math.inf, f"gpu-memory must be positive and finite (GiB), got {self.gpu_memory}.")
        require(
            self.gpus % self.tensor_parallel == 0,
            f"tensor-parallel {self.tensor_parallel} does not divide gpus {self.gpus}; give a divisor of it.",
        )
        require(
            not self.offload or self.strategy != "ddp", "offload is FSDP2's; leave out --strategy ddp, or give fsdp2."
        )

    @property
    def model_options(self) -> ModelOptions:
        """The model, as functions that load one take it."""
        return ModelOptions(model=self.model, trust_remote_code=self.trust_remote_code)
