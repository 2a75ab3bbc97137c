"""The model as DPO sees it: pairs in, sequence log-probs out."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_dpo import FusedHead, KernelOptions, backbone_of, sequence_sum
from fused_dpo.hardware import tag_compiled_code
from fused_dpo.losses import desensitized_weights
from fused_dpo_engine.attention.call import Backend
from fused_dpo_engine.attention.choice import load_backend
from fused_dpo_engine.attention.interface import packed_call
from fused_dpo_engine.batching.batch import PairBatch
from fused_dpo_engine.model.dropout import Stated, as_stated
from fused_dpo_engine.model.offload import ActivationOffload
from fused_dpo_engine.model.router_loss import RouterLoss


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
    router: Tensor | None = None
    """Load-balancing loss of the experts, without its coefficient; None without gradients, or where there is none."""


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
        router_loss: load-balancing loss to compute in training; None for none.
        offload: where the backbone keeps what it saves for its backward pass; None for the device.
        stated: values of the configuration that saving it is to show.
        reference_has_adapters: the model came with its adapters, so that they belong to the reference too.
        notes: lines for the user on what the model is and what is done with it.
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
        router_loss: RouterLoss | None = None,
        offload: ActivationOffload | None = None,
        stated: Sequence[Stated] = (),
        reference_has_adapters: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.compute_dtype = compute_dtype
        self.options = KernelOptions(workspace_mib=workspace_mib)
        self.ld_alpha = ld_alpha
        self.attention_name = attention_name
        self.attention: Backend = load_backend(attention_name)
        self.grad_mode = grad_mode
        self.router_loss, self.offload, self.stated, self.notes = router_loss, offload, stated, notes
        self.reference_has_adapters = reference_has_adapters
        self.compiled = False
        self.computes_on: torch.device | None = None
        """Set where that is another device than the one that the weights are kept on."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.computes_on or next(self.model.parameters()).device

    @property
    def causal_lm(self) -> Any:
        """The `transformers` model below any `peft` wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @cached_property
    def head(self) -> FusedHead:
        """The head, called through its own layer; made at the first call, or before the model is cut into shares."""
        return FusedHead(self.causal_lm)

    def forward(self, batch: PairBatch) -> SequenceLogps:
        """Compute the log-probs of the batch's sequences, and what the head saw on the way."""
        with self.autocast():
            hidden, router = self._hidden(**batch.model_inputs(self.attention))
            call = batch.head_call(hidden)
            tokens = self.head(
                call.hidden_states,
                call.labels,
                **call.settings,
                with_stats=("tail", "kept_fraction"),
                grad_mode=self.grad_mode,
                options=self.options,
            )
        assert tokens.tail is not None
        assert tokens.kept_fraction is not None
        count = (batch.chosen_lengths + batch.rejected_lengths).sum()
        head = HeadStats(batch.spread(tokens.tail).sum(), batch.spread(tokens.kept_fraction).sum(), count)
        token_logps = batch.spread(tokens.logps)
        plain = sequence_sum(token_logps.flatten(), batch.offsets)
        if self.ld_alpha is None:
            return SequenceLogps(plain, plain, head, router)
        weights = desensitized_weights(batch.scored_lengths[0::2], batch.scored_lengths[1::2], self.ld_alpha)
        weights = weights.to(token_logps.device, token_logps.dtype, non_blocking=True)
        weighted = token_logps * batch.lay_out(weights, token_logps)
        return SequenceLogps(sequence_sum(weighted.flatten(), batch.offsets), plain, head, router)

    def _hidden(self, **inputs: Any) -> tuple[Tensor, Tensor | None]:
        """Compute the last hidden states of the backbone, and in training the load-balancing loss of its experts.

        Compiled code for training and for inference may round differently, so compiled the graph of training is taken
        throughout: the reference is then the same function as the policy.
        """
        wanted = torch.is_grad_enabled()
        if self.router_loss is not None:
            inputs["output_router_logits"] = wanted or self.compiled
        no_masks = packed_call() if "fused_dpo_plan" in inputs else nullcontext()
        saved = self.offload.hooks(inputs["input_ids"].numel()) if self.offload and wanted else nullcontext()
        with torch.set_grad_enabled(wanted or self.compiled), no_masks, saved:
            output = backbone_of(self.causal_lm)(**inputs, use_cache=False)
        if not wanted:
            return output.last_hidden_state.detach(), None
        router = self.router_loss and self.router_loss(output.router_logits, inputs["attention_mask"])
        return output.last_hidden_state, router

    def compile_backbone(self, backend: str = "inductor", layers: Sequence[nn.Module] = ()) -> None:
        """Run the backbone through `torch.compile` from now on, for rows of any length.

        Args:
            backend: of torch.compile.
            layers: parts to compile one by one in the place of the whole, so that hooks on their calls stay outside.
        """
        tag_compiled_code()
        for layer in layers:
            layer.forward = torch.compile(layer.forward, backend=backend, dynamic=True)
        if not layers:
            backbone_of(self.causal_lm).compile(backend=backend, dynamic=True)
        self.compiled = True

    def autocast(self) -> AbstractContextManager[Any]:
        """Set the precision that the model computes in."""
        if self.compute_dtype.itemsize > 2:
            return nullcontext()
        # The cache would hold copies of all weights until the pass ends, checkpoints or not; each is used once.
        return torch.autocast(self.device.type, dtype=self.compute_dtype, cache_enabled=False)

    def as_reference(self) -> AbstractContextManager[Any]:
        """Make the policy its own reference within the block: new adapters off. Without such, only before training."""
        if self.reference_has_adapters or not hasattr(self.model, "disable_adapter"):
            return nullcontext()
        return self.model.disable_adapter()

    def as_saved(self) -> AbstractContextManager[None]:
        """Let the configuration say within the block what it said before training: dropout is off meanwhile."""
        return as_stated(self.stated)
