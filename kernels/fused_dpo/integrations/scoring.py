"""Log-probs of a trainer's batch, within the forward of its model: the backbone, packed if it can be, and the head."""

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_dpo.api import TokenLogps, fused_token_logps
from fused_dpo.head import LMHead
from fused_dpo.models.check import check_head
from fused_dpo.models.fused_head import FusedHead
from fused_dpo.models.parts import backbone_of
from fused_dpo.options import KernelOptions

IGNORE_INDEX = -100
"""The label of what is not scored, as Hugging Face has it."""
_TOKENS = {"input_ids", "attention_mask", "position_ids"}
_OF_ONE_ROW = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
"""What variable-length attention is told of the sequences in one row: packed anew, they have other ones."""
_SETTINGS = {"use_cache", "return_dict", "output_router_logits"}


class Scored(NamedTuple):
    """What a call for log-probs returns."""

    tokens: TokenLogps
    """In the shape of the labels [N, S]: entry i belongs to the token that position i predicts, so the last one is 0.
    With `shift=False` entry i belongs to label i."""
    hidden: Tensor
    """[T, D], the last hidden states, of every slot of the batch or of the packed row."""
    row_of_slot: Tensor | None
    """int64 [N * S], where in `hidden` a slot of the batch has its row; None: there they are the slots themselves."""
    router_logits: tuple[Tensor, ...] | None = None
    """[N * S, E] of each layer with experts, if they were asked for, as a forward of the batch as it is gives them.
    What stands at padding is of no meaning."""


@dataclass
class Counts:
    """What the calls of a scorer took; a test that packing took place looks here."""

    calls: int = 0
    packed_calls: int = 0
    slots: int = 0
    """Token slots that backbones computed."""


class Scorer:
    """Computes log-probs within the forward of a model.

    Args:
        packed: lay the sequences of a batch into one row without padding, and compute once what they share. The batch
            is read on the host for it.
        temperature: what the logits are divided by.
        grad_mode: see `fused_dpo_logps`.
        options: see `fused_dpo_logps`.
        counts: where to count, by several models too.
    """

    def __init__(
        self,
        *,
        packed: bool = True,
        temperature: float = 1.0,
        grad_mode: str | None = None,
        options: KernelOptions | None = None,
        counts: Counts | None = None,
    ) -> None:
        self.packed, self.temperature = packed, temperature
        self.grad_mode, self.options = grad_mode, options
        self.counts = counts or Counts()
        self.before: Callable[..., Any] | None = None
        """What stood as `forward` on the model itself, such as accelerate's; None for nothing."""
        self.replaced: Callable[..., Any] | None = None
        """Forward that `replace_forward` has put on the model; None before that."""
        self._checked = False
        self._backends: dict[tuple[torch.device, torch.dtype], Any] = {}

    def prepare(self, model: Any) -> None:
        """Find out whether a model can be scored so, and let it attend to packed rows.

        Raises:
            NotImplementedError, TypeError: its head cannot be read.
            ValueError: packed, but its layers would let packed sequences see each other.
        """
        FusedHead(model)
        backbone_of(model)
        if not self.packed:
            return
        from fused_dpo_engine.attention.interface import ATTENTION_NAME
        from fused_dpo_engine.attention.models import check_packable, warn_of_lengths
        from fused_dpo_engine.errors import UnsupportedModelError

        try:
            check_packable(type(model), model.config)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{error} packed=False scores it in padded batches.") from None
        warn_of_lengths(model.config)
        model.set_attn_implementation(ATTENTION_NAME)

    def score(
        self,
        model: Any,
        inputs: dict[str, Any],
        labels: Tensor,
        *,
        shift: bool = True,
        with_stats: Collection[str] = (),
    ) -> Scored:
        """Compute the log-probs of the labels, and what is asked for beside them.

        Args:
            model: the causal language model below all wrappers, while its forward is called.
            inputs: what it is called with. Token ids with a mask, or in one row with positions that begin anew with
                each sequence, are packed; with anything else, such as images or embeddings, the batch is computed as it
                is, and a warning says so once.
            labels: int [N, S], IGNORE_INDEX where nothing is scored.
            shift: see `fused_dpo_logps`. Labels that are shifted already are those of sequences split over ranks, and
                not packed.
            with_stats: see `fused_token_logps`.

        Raises:
            ValueError: the log-probs of a few tokens are not those of the model's own logits, or the batch is none.
        """
        inputs = {name: value for name, value in inputs.items() if value is not None} | {"use_cache": False}
        if not self._checked:
            self._check(model, inputs)
        self.counts.calls += 1
        if self.packed and shift and self._can_pack(inputs):
            return self._score_packed(model, inputs, labels, with_stats)
        output = backbone_of(model)(**inputs)
        hidden = output.last_hidden_state
        self.counts.slots += hidden.shape[0] * hidden.shape[1]
        tokens = self._logps(model, hidden, labels, with_stats, shift=shift)
        return Scored(tokens, hidden.flatten(0, -2), None, _flat(output))

    def _check(self, model: Any, inputs: dict[str, Any]) -> None:
        """Compare the head with the model's own logits, of the first batch with token ids."""
        if "input_ids" not in inputs:
            return
        # By the forward of the class: accelerate's on the model is one autocast object, and entered again within itself
        # it would leave autocast switched on for good.
        forward = vars(model).pop("forward", None)
        try:
            check_head(model, inputs["input_ids"])
        finally:
            if forward is not None:
                model.forward = forward
        self._checked = True

    def _can_pack(self, inputs: dict[str, Any]) -> bool:
        ids, mask, positions = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        known = _TOKENS | _SETTINGS
        one_row = ids is not None and mask is None and positions is not None and len(ids) == 1
        if one_row:
            known |= _OF_ONE_ROW
        unknown = inputs.keys() - known
        if ids is None:
            unknown |= {"no input_ids"}
        elif positions is not None and not one_row:
            counted = (torch.ones_like(ids) if mask is None else mask).cumsum(-1) - 1
            if positions.shape != ids.shape or bool(((positions != counted) & (mask if mask is not None else 1)).any()):
                unknown |= {"position_ids of their own"}
        if unknown:
            warnings.warn(
                f"fused_dpo computes batches with {', '.join(sorted(unknown))} padded, as they come: what these change "
                f"in a packed row is not known.",
                stacklevel=2,
            )
        return not unknown

    def _score_packed(self, model: Any, inputs: dict[str, Any], labels: Tensor, with_stats: Collection[str]) -> Scored:
        from fused_dpo_engine.attention.gather import gather_rows
        from fused_dpo_engine.attention.interface import packed_call
        from fused_dpo_engine.batching.unpadding import repack, unpad

        ids: Tensor = inputs["input_ids"]
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is None and positions is not None and len(ids) == 1:
            batch = repack(ids, (positions[0] == 0).nonzero()[:, 0].tolist(), labels)
        else:
            batch = unpad(ids, mask, labels)
        batch = batch.to(ids.device)
        settings = {name: value for name, value in inputs.items() if name in _SETTINGS}
        with packed_call():
            output = backbone_of(model)(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=None,
                fused_dpo_plan=batch.attention,
                fused_dpo_backend=self._backend(model, ids.device),
                **settings,
            )
        hidden = output.last_hidden_state[0]
        self.counts.packed_calls += 1
        self.counts.slots += len(hidden)
        every_row = torch.arange(len(batch.targets), device=ids.device)
        packed = self._logps(
            model,
            gather_rows(hidden, batch.scored_rows),
            batch.targets,
            with_stats,
            shift=False,
            cu_seqlens=batch.cu_scored,
            row_index=every_row,
        )

        def spread(values: Tensor) -> Tensor:
            entries = batch.scored_slots - 1  # the position before a token predicts it
            return values.new_zeros(labels.numel()).index_copy(0, entries, values).view(labels.shape)

        stats = [None if values is None else spread(values) for values in packed[1:]]
        router = _flat(output)
        if router is not None:
            router = tuple(gather_rows(logits, batch.row_of_slot) for logits in router)
        return Scored(TokenLogps(spread(packed.logps), *stats), hidden, batch.row_of_slot, router)

    def with_head(self, model: Any, function: Callable[..., Any], hidden: Tensor, **arguments: Any) -> Any:
        """Call a function with a model's head as it is within the call of its layer, see `FusedHead.run`."""
        # Anew each time: the model may be a copy of the one that was prepared, or have got adapters since.
        return FusedHead(model).run(function, hidden, **arguments)

    def _logps(
        self, model: Any, hidden: Tensor, labels: Tensor, with_stats: Collection[str], **settings: Any
    ) -> TokenLogps:
        settings |= {"with_stats": with_stats, "grad_mode": self.grad_mode, "options": self.options}
        return self.with_head(model, self._on_its_device, hidden, labels=labels, **settings)

    def _on_its_device(self, head: LMHead, hidden: Tensor, *, labels: Tensor, **settings: Any) -> TokenLogps:
        head = replace(head, temperature=self.temperature)
        device = head.weight.device  # of a model that is split over devices, the head's
        settings = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in settings.items()}
        return fused_token_logps(hidden.to(device), head, labels.to(device), **settings)

    def _backend(self, model: Any, device: torch.device) -> Any:
        """Choose what computes the attention of packed rows, compared once with SDPA on this device."""
        from fused_dpo_engine.attention.choice import load_backend
        from fused_dpo_engine.attention.models import attention_for

        in_half = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if in_half else model.dtype
        if (device, dtype) not in self._backends:
            self._backends[device, dtype] = load_backend(attention_for(model, device, dtype, "auto"))
        return self._backends[device, dtype]


def _flat(output: Any) -> tuple[Tensor, ...] | None:
    """Take the router logits of each layer from what a backbone returns, [rows, E]; None if there are none."""
    router = getattr(output, "router_logits", None)
    return tuple(logits.reshape(-1, logits.shape[-1]) for logits in router) if router else None
