"""The model as DPO sees it: pairs in, sequence log-probs out."""

import dataclasses
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fused_dpo import KernelOptions, fused_token_logps, head_of
from fused_dpo.autograd import sequence_sum
from fused_dpo.hardware import tag_compiled_code
from fused_dpo.losses import desensitized_weights
from fused_dpo_engine.attention.call import Backend
from fused_dpo_engine.attention.choice import available_backends, candidates, load_backend
from fused_dpo_engine.attention.gather import gather_rows
from fused_dpo_engine.attention.verify import verify_backend
from fused_dpo_engine.batching.batch import PairBatch
from fused_dpo_engine.batching.packing import PackedBatch
from fused_dpo_engine.batching.padding import IGNORED, PaddedBatch
from fused_dpo_engine.config.options import LoraOptions, ModelOptions
from fused_dpo_engine.errors import UserError, first_line
from fused_dpo_engine.liger import apply_liger
from fused_dpo_engine.loading import choose_dtype, load_model
from fused_dpo_engine.support import attention_needs, backbone_of


class HeadStats(NamedTuple):
    """What the head saw of a batch, summed over its scored tokens; on the device and detached."""

    tail: Tensor
    """Probability of the tokens that the filter calls small, see `fused_dpo.stats.FilterStats`."""
    kept_fraction: Tensor
    """Fraction of the vocabulary that it does not."""
    tokens: Tensor
    """How many tokens are scored."""


class SequenceLogps(NamedTuple):
    """Log-probs [2B] of a batch's sequences, `[chosen 0, rejected 0, chosen 1, ...]`, fp32."""

    logps: Tensor
    """What the preference loss compares: under LD-DPO the longer response's tail counts less."""
    plain: Tensor
    """The sums without such weights; the same tensor where there are none."""
    head: HeadStats


class Policy(nn.Module):
    """A causal language model that scores pairs without building their logits.

    Calling it is the one differentiable path from weights to log-probs. Whatever wraps a module (DDP, FSDP2, hooks)
    acts on that call, so training, evaluation, reference and the set-up test all go through it.

    Args:
        model: a `transformers` causal LM, bare or wrapped by `peft`; for packed batches it attends through `fused_dpo`.
        compute_dtype: autocast's dtype, or the dtype of the weights for none.
        workspace_mib: see `fused_dpo.KernelOptions`.
        ld_alpha: weight of response tokens beyond the shorter response's length (LD-DPO); None for plain sums.
        attention_name: of the backend for packed rows, one of `fused_dpo_engine.attention.choice.ORDER`.
        grad_mode: see `fused_dpo.fused_dpo_logps`.
    """

    def __init__(
        self,
        model: nn.Module,
        compute_dtype: torch.dtype,
        *,
        workspace_mib: int = 128,
        ld_alpha: float | None = None,
        attention_name: str = "sdpa",
        grad_mode: str | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.compute_dtype = compute_dtype
        self.options = KernelOptions(workspace_mib=workspace_mib)
        self.ld_alpha = ld_alpha
        self.attention_name = attention_name
        self.attention: Backend = load_backend(attention_name)
        self.grad_mode = grad_mode
        self.compiled = False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def causal_lm(self) -> Any:
        """The `transformers` model below any `peft` wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, batch: PairBatch) -> SequenceLogps:
        """Compute the log-probs of the batch's sequences, and what the head saw on the way."""
        with self.autocast():
            if isinstance(batch, PaddedBatch):
                hidden = self._hidden(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
                arguments: Any = (hidden, head_of(self.causal_lm), batch.labels)
                settings: Any = {"options": self.options}
            else:
                assert isinstance(batch, PackedBatch)
                hidden = self._hidden(
                    input_ids=batch.input_ids,
                    position_ids=batch.position_ids,
                    attention_mask=None,
                    fused_dpo_plan=batch.attention,
                    fused_dpo_backend=self.attention,
                )
                # Rows that predict a response, found on the host: nothing else reaches the head.
                arguments = (gather_rows(hidden[0], batch.scored_rows), head_of(self.causal_lm), batch.targets)
                # All of these rows are scored; the head would wait for the device to find that out.
                every_row = torch.arange(len(batch.targets), device=batch.targets.device)
                options = dataclasses.replace(self.options, row_index=every_row)
                settings = {"cu_seqlens": batch.cu_scored, "shift": False, "options": options}
            settings |= {"with_stats": ("tail", "kept_fraction"), "grad_mode": self.grad_mode}
            tokens = fused_token_logps(*arguments, **settings)
        assert tokens.tail is not None
        assert tokens.kept_fraction is not None
        count = (batch.chosen_lengths + batch.rejected_lengths).sum()
        head = HeadStats(tokens.tail.sum(), tokens.kept_fraction.sum(), count)
        token_logps = tokens.logps
        if isinstance(batch, PaddedBatch):
            offsets = torch.arange(0, token_logps.numel() + 1, token_logps.shape[1], device=token_logps.device)
        else:
            offsets = batch.cu_scored.long()
        plain = sequence_sum(token_logps.flatten(), offsets)
        if self.ld_alpha is None:
            return SequenceLogps(plain, plain, head)
        weighted = token_logps * self._token_weights(batch, self.ld_alpha, token_logps)
        return SequenceLogps(sequence_sum(weighted.flatten(), offsets), plain, head)

    @staticmethod
    def _token_weights(batch: PairBatch, ld_alpha: float, token_logps: Tensor) -> Tensor:
        """What each token counts in LD-DPO, in the layout of `token_logps`."""
        weights = desensitized_weights(batch.scored_lengths[0::2], batch.scored_lengths[1::2], ld_alpha)
        weights = weights.to(token_logps.device, token_logps.dtype, non_blocking=True)
        if not isinstance(batch, PaddedBatch):
            return weights
        scored = nn.functional.pad(batch.labels[:, 1:] != IGNORED, (0, 1))  # by the row that predicts it
        return torch.zeros_like(token_logps).masked_scatter(scored, weights)

    def _hidden(self, **inputs: Any) -> Tensor:
        """Last hidden states of the backbone.

        Compiled code for training and for inference may round differently, so compiled the graph of training is taken
        throughout: the reference is then the same function as the policy.
        """
        wanted = torch.is_grad_enabled()
        with torch.set_grad_enabled(wanted or self.compiled):
            hidden = backbone_of(self.causal_lm)(**inputs, use_cache=False).last_hidden_state
        return hidden if wanted else hidden.detach()

    def compile_backbone(self, backend: str = "inductor") -> None:
        """Run the backbone through `torch.compile` from now on, for rows of any length."""
        tag_compiled_code()
        backbone_of(self.causal_lm).compile(backend=backend, dynamic=True)
        self.compiled = True

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the model computes in."""
        if self.compute_dtype.itemsize > 2:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def as_reference(self) -> AbstractContextManager[Any]:
        """Within the block the policy is its own reference: adapters off. Without adapters, only before training."""
        return self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext()


def attention_for(model: Any, device: torch.device, dtype: torch.dtype, wanted: str) -> str:
    """Name of the attention backend for a model's packed rows on this device; `wanted` as in `ModelOptions`.

    Raises:
        UserError: the one that is wanted is not there, cannot serve the model, fails or computes something else. Of
            those that nobody asked for by name, such a one is passed over with a warning.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    needs = attention_needs(model)
    names = candidates(needs, device, dtype, capability, available_backends(), wanted)
    for name in names:
        if name == "sdpa":  # what the others are compared with
            break
        try:
            verify_backend(name, load_backend(name), needs, device, dtype)
        except UserError as reason:
            if wanted != "auto":
                raise
            warnings.warn(f"passed over: {reason}", stacklevel=2)
        else:
            return name
    return "sdpa"


def build_policy(
    options: ModelOptions,
    lora: LoraOptions,
    device: torch.device,
    *,
    ld_alpha: float | None = None,
    packing: bool = True,
) -> Policy:
    """Load the model to train: fp32 weights, computed in `options.dtype`, or adapters on a frozen model in it."""
    compute_dtype = choose_dtype(options, device)
    weights_dtype = compute_dtype if lora.lora_rank else torch.float32
    model: Any = load_model(options.model, options, weights_dtype, device, packing=packing)
    attention_name = attention_for(model, device, compute_dtype, options.attention) if packing else "sdpa"
    if options.liger:
        apply_liger(model, device)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora.lora_rank:
        model = _with_adapters(model, lora)
    model.train()
    return Policy(
        model,
        compute_dtype,
        workspace_mib=options.workspace_mib,
        ld_alpha=ld_alpha,
        attention_name=attention_name,
        grad_mode=None if options.grad_mode == "auto" else options.grad_mode,
    )


def _with_adapters(model: PreTrainedModel, lora: LoraOptions) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = list(lora.lora_target_modules)
    config = LoraConfig(
        r=lora.lora_rank,
        lora_alpha=2 * lora.lora_rank if lora.lora_alpha is None else lora.lora_alpha,  # pyright: ignore[reportArgumentType]
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora-target-modules {' '.join(targets)}: {first_line(error)}") from error
