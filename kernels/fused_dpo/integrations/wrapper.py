"""A model as a module that gives the log-prob of each sequence, for training loops of one's own."""

from typing import Any

from torch import Tensor, nn

from fused_dpo.integrations.model_forward import add_scoring
from fused_dpo.integrations.pairs import scored_mask, totals


class LogpsModel(nn.Module):
    """A causal language model whose forward returns log-probs [N]: what a loop prepares, wraps and calls.

    Autocast, DDP, FSDP and the hooks of Accelerate act on a model's own call. Its backbone called beside it is out of
    their reach: gradients stay unreduced under DDP, and mixed precision is off.

    The model itself is `.model`: `wrapped.model.save_pretrained(folder)` and `wrapped.model.state_dict()` are those of
    Hugging Face, without the prefix `model.` that this module's own `state_dict()` has.

    Args:
        model: a causal language model of transformers, before or within peft; it stays what it is to other calls.
        packed: see `Scorer`.
        average: divide by the number of scored tokens (at least 1).
        settings: see `Scorer`.

    Raises:
        RuntimeError, NotImplementedError, TypeError, ValueError: see `add_scoring`.
    """

    def __init__(self, model: nn.Module, packed: bool = True, average: bool = False, **settings: Any) -> None:
        super().__init__()
        self.model, self.average = model, average
        self.counts = add_scoring(model, packed=packed, **settings)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **inputs: Any
    ) -> Tensor:
        """Score sequences.

        Args:
            input_ids: int [N, S].
            attention_mask: [N, S], 1 where there is a token; None for everywhere.
            labels: int [N, S], not shifted, -100 where nothing is scored.
            inputs: what else the model takes.

        Returns:
            fp32 [N], in nats.
        """
        if labels is None:
            raise TypeError("LogpsModel needs labels [N, S]: what is scored; call .model for logits.")
        scored = self.model(input_ids=input_ids, attention_mask=attention_mask, fused_dpo_labels=labels, **inputs)
        sums = totals(scored.tokens.logps)
        return sums / scored_mask(labels).sum(1).clamp(min=1).to(sums.device) if self.average else sums
