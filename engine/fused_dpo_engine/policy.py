"""The model as DPO sees it: packed pairs in, sequence log-probs out."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fused_dpo import KernelOptions, fused_dpo_logps, fused_token_logps, get_batch_logps, head_of
from fused_dpo.autograd import sequence_sum
from fused_dpo.losses import desensitized_weights
from fused_dpo.precision import has_bf16_units
from fused_dpo_engine.attention import ATTENTION_NAME, check_packable
from fused_dpo_engine.config import LoraOptions, ModelOptions
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.packing import PackedBatch


class Policy(nn.Module):
    """A causal language model that scores packed pairs without building their logits.

    Its forward is the whole differentiable path from weights to log-probs, so that whatever wraps this module (data
    parallelism, compilation) sees all of it.

    Args:
        model: a `transformers` causal LM that attends through `fused_dpo`, bare or wrapped by `peft`.
        compute_dtype: autocast's dtype, or the dtype of the weights for none.
        workspace_mib: see `fused_dpo.KernelOptions`.
        ld_alpha: weight of response tokens beyond the shorter response's length (LD-DPO); None for plain sums.
    """

    def __init__(
        self, model: nn.Module, compute_dtype: torch.dtype, *, workspace_mib: int = 128, ld_alpha: float | None = None
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.compute_dtype = compute_dtype
        self.options = KernelOptions(workspace_mib=workspace_mib)
        self.ld_alpha = ld_alpha

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def causal_lm(self) -> Any:
        """The `transformers` model below any `peft` wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, batch: PackedBatch) -> Tensor:
        """Log-probs [2B] of the batch's sequences, `[chosen 0, rejected 0, chosen 1, ...]`, fp32."""
        return self._score(batch, self.ld_alpha)

    def _score(self, batch: PackedBatch, ld_alpha: float | None) -> Tensor:
        with self.autocast():
            hidden = self.causal_lm.base_model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=None,
                use_cache=False,
                fused_dpo_plan=batch.attention,
            ).last_hidden_state[0]
            # Rows that predict a response, found on the host: nothing else reaches the head.
            rows = hidden.index_select(0, batch.scored_rows)
            arguments: Any = (rows, head_of(self.causal_lm), batch.targets)
            settings: Any = {"cu_seqlens": batch.cu_scored, "shift": False, "options": self.options}
            if ld_alpha is None:
                return fused_dpo_logps(*arguments, **settings)
            lengths = batch.chosen_lengths.tolist(), batch.rejected_lengths.tolist()
            weights = desensitized_weights(*lengths, ld_alpha)
            token_logps = fused_token_logps(*arguments, **settings).logps
        return sequence_sum(token_logps * weights.to(rows.device), batch.cu_scored.long())

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the model computes in."""
        if self.compute_dtype.itemsize > 2:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def as_reference(self) -> AbstractContextManager[Any]:
        """Within the block the policy is its own reference: adapters off. Without adapters, only before training."""
        return self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext()

    @torch.no_grad()
    def self_test(self, batch: PackedBatch) -> None:
        """Compare the packed, fused path with the model's own forward and logits, one sequence at a time.

        What goes wrong in a model's attention or head (sequences that see each other, an unknown factor on the logits)
        is silent everywhere else.

        Raises:
            UserError: mean token log-probs differ by more than 0.001 in float32, or 0.1 in bfloat16 (where the model's
                own logits are rounded to 8 bits; sequences that see each other are off by several nats).
        """
        packed = self._score(batch, None)
        counts = torch.stack((batch.chosen_lengths, batch.rejected_lengths), dim=1).flatten()
        bound = 1e-3 if self.compute_dtype == torch.float32 else 0.1
        scored = torch.full_like(batch.input_ids[0], -100)
        scored[batch.scored_rows + 1] = batch.targets
        for index, (start, stop) in enumerate(batch.attention.segments):
            ids, labels = batch.input_ids[:, start:stop], scored[None, start:stop]
            with self.autocast():
                logits = self.causal_lm(input_ids=ids, use_cache=False).logits
            own = get_batch_logps(logits, labels)[0]
            difference = float((packed[index] - own).abs() / counts[index])
            # Without a plan the attention function runs plain causal attention: packing is what is compared.
            if not difference <= bound:
                raise UserError(
                    f"{type(self.causal_lm).__name__} does not score packed sequences as it scores them one by one: "
                    f"mean token log-prob {float(packed[index] / counts[index]):.4f} packed, "
                    f"{float(own / counts[index]):.4f} alone (bound {bound}); this architecture is not supported."
                )


def choose_device(options: ModelOptions) -> torch.device:
    """The device that `--device` means here."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device; use --device cpu or install a CUDA build.")
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(options.device)


def choose_dtype(options: ModelOptions, device: torch.device) -> torch.dtype:
    """The compute dtype that `--dtype` means on this device."""
    if options.dtype == "auto":
        return torch.bfloat16 if has_bf16_units(device) else torch.float32
    return getattr(torch, options.dtype)


def load_tokenizer(name: str, options: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        UserError: there is none.
    """
    _check_source(name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise UserError(
            f"no tokenizer could be loaded from {name}: {_first_line(error)} A model folder needs the tokenizer files "
            f"(tokenizer.json, tokenizer_config.json) beside the weights; save them there with save_pretrained."
        ) from error


def load_model(name: str, options: ModelOptions, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A causal language model that attends through `fused_dpo`, dropout off, checked to be packable.

    Raises:
        UserError: it cannot be loaded, or its architecture cannot run packed.
    """
    _check_source(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=options.trust_remote_code)
        _switch_dropout_off(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=options.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, info = loaded
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"no causal language model could be loaded from {name}: {_first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"the weights in {name} lack {len(missing)} tensors that its configuration asks for, such as {missing[0]}; "
            f"they would be random."
        )
    check_packable(model)
    try:
        head_of(model)
    except (NotImplementedError, TypeError) as error:
        raise UserError(f"{name}: {_first_line(error)}") from error
    return model.to(device)


def _switch_dropout_off(config: Any) -> None:
    """Policy and reference have to be the same function, so neither drops anything: no module, and no call without."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            if isinstance(value, float) and ("drop" in name or name.endswith("pdrop")):
                setattr(part, name, 0.0)


def build_policy(
    options: ModelOptions, lora: LoraOptions, device: torch.device, *, ld_alpha: float | None = None
) -> Policy:
    """Load the model to train: fp32 weights, computed in `options.dtype`, or adapters on a frozen model in it."""
    compute_dtype = choose_dtype(options, device)
    model: Any = load_model(options.model, options, compute_dtype if lora.lora_rank else torch.float32, device)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora.lora_rank:
        model = _with_adapters(model, lora)
    model.train()
    return Policy(model, compute_dtype, workspace_mib=options.workspace_mib, ld_alpha=ld_alpha)


def _with_adapters(model: PreTrainedModel, lora: LoraOptions) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = list(lora.lora_target_modules)
    config = LoraConfig(
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha or 2 * lora.lora_rank,  # pyright: ignore[reportArgumentType]
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora-target-modules {' '.join(targets)}: {_first_line(error)}") from error


def _check_source(name: str) -> None:
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise UserError(f"model folder {name} does not exist.")


def _first_line(error: BaseException) -> str:
    line = str(error).strip().split("\n")[0]
    return line if line.endswith(".") else f"{line}."
