"""The load-balancing loss of a mixture of experts, as the model's class and configuration have it."""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fused_dpo_engine.errors import UnsupportedModelError

_KNOWN = {"gate_logits", "num_experts", "top_k", "attention_mask"}


class RouterLoss:
    """`E * sum_e f_e P_e` of a mixture of E experts, by the function that its class uses in transformers.

    f_e is how often a token is routed to expert e, P_e the mean of its probability, both over all layers and over the
    rows that a forward pass computes: all of a packed row, where a prompt that sequences share stands once; all but the
    padding of padded batches. With perfect balance it is the number of experts a token is routed to.

    Args:
        function: `load_balancing_loss_func` of the class.
        top_k: experts that a token is routed to.
        coefficient: weight in the loss, positive.

    Source:
        Fedus et al., 2021, Switch Transformers, arXiv 2101.03961, equations 4 to 6.
    """

    def __init__(self, function: Callable[..., Any], top_k: int, coefficient: float) -> None:
        self.function, self.top_k, self.coefficient = function, top_k, coefficient

    def __call__(self, router_logits: Sequence[Tensor] | None, attention_mask: Tensor | None) -> Tensor | None:
        """Compute the loss of a forward pass, without its coefficient; None if no layer has a router.

        Args:
            router_logits: of each layer, [..., E].
            attention_mask: 1 where a row holds a token, [B, S]; None if all do.

        Raises:
            UnsupportedModelError: the backbone does not return them at all.
        """
        if router_logits is None:
            raise UnsupportedModelError(
                "the configuration asks for the load-balancing loss of its experts (output_router_logits), but the "
                "model's forward returns no router logits with this release of transformers; install a newer one, or "
                "set output_router_logits to false in config.json."
            )
        if not router_logits:
            return None
        experts = router_logits[0].shape[-1]
        flat = tuple(logits.reshape(-1, experts) for logits in router_logits)
        return self.function(flat, experts, self.top_k, attention_mask)


def router_loss_of(model: Any) -> tuple[RouterLoss | None, str | None]:
    """Find the load-balancing loss that a causal language model's configuration asks for.

    Returns:
        The loss, or None; and a line on it for the user, or None if the model has no experts.
    """
    config = model.config.get_text_config()
    top_k = getattr(model, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None)
    if not top_k:
        return None, None
    coefficient = _coefficient(model, config)
    left_out = "router: no load-balancing loss is added, as"
    function = getattr(sys.modules.get(type(model).__module__), "load_balancing_loss_func", None)
    if function is None or set(inspect.signature(function).parameters) != _KNOWN:
        return None, f"{left_out} {type(model).__name__} has none that is known here"
    if not getattr(config, "output_router_logits", False):
        return None, f"{left_out} the model's configuration does not ask for it (output_router_logits is not true)"
    if not coefficient > 0:
        return None, f"{left_out} the model's configuration gives it no weight (router_aux_loss_coef is {coefficient})"
    line = f"router: {coefficient:g} times its load-balancing loss is added, as the model's configuration asks for it"
    return RouterLoss(function, top_k, coefficient), line


def _coefficient(model: Any, config: Any) -> float:
    """Read the weight in the loss by the names that transformers has for it."""
    for holder in (model, config):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):  # the second is JetMoe's
            value = getattr(holder, name, None)
            if isinstance(value, (int, float)):
                return float(value)
    return 0.0
