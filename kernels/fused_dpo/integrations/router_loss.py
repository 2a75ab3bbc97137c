"""The load-balancing loss of a mixture of experts, of a batch that was called for log-probs."""

import sys
from typing import Any

from torch import Tensor

from fused_dpo.integrations.scoring import Scored


def load_balancing_loss(model: Any, scored: Scored, mask: Tensor | None) -> Tensor:
    """Compute the loss that the model's own forward does, without its coefficient, by the function of its class.

    Args:
        model: a causal language model of transformers with experts.
        scored: what its call for log-probs returned.
        mask: [N, S], 1 where the batch has a token; None for everywhere. In a packed row too, each token counts as
            often as the batch has it.

    Raises:
        NotImplementedError: the class has none that is known here, or the model gave no router logits.
    """
    function = getattr(sys.modules.get(type(model).__module__), "load_balancing_loss_func", None)
    config = model.config.get_text_config()
    top_k = getattr(model, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None)
    if function is None or top_k is None or scored.router_logits is None:
        raise NotImplementedError(
            f"{type(model).__name__} has no load-balancing loss that is known here; switch it off in the trainer."
        )
    return function(scored.router_logits, scored.router_logits[0].shape[-1], top_k, mask)
