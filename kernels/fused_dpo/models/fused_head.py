"""Compute log-probs within the call of a head's own layer, where hooks on it have its weight whole."""

import types
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from fused_dpo.api import TokenLogps, fused_token_logps
from fused_dpo.head import LMHead
from fused_dpo.models.adapters import unwrapped
from fused_dpo.models.head import head_of
from fused_dpo.models.head_layer import HEAD_FORWARD
from fused_dpo.models.parts import causal_model, head_layer


class FusedHead:
    """Call a model's head for log-probs, through the call of its own layer.

    `head_of(model)` reads a weight; FSDP2, FSDP1 and accelerate's offloading have it whole only while the layer that
    owns it is called, and reduce its gradient by hooks on that call. This handle makes that call: `head(hidden_states,
    labels)` calls the layer, whatever is wrapped around it, and in its forward `fused_token_logps` runs with what
    `head_of` reads there. No collective is added: a rank with nothing scored takes part like all others.

    The layer stays in its place, with its name, parameters and hooks; its forward gets a step in front of it. Called
    with hidden states alone, as `model(...).logits` does, the layer computes what it did. Copies of the model and
    pickles have that step too, and take a handle of their own. Several handles of a model share it.

    The call belongs within the forward of what is wrapped (DDP, FSDP): it runs the hooks of the head's layer, not
    those around the model.

    Args:
        model: as `head_of` takes it, before or after `fully_shard`, FSDP1's wrapping and accelerate's hooks. Adapters
            come first: `peft` puts another layer in the place of the one it adapts.

    Raises:
        TypeError, NotImplementedError: its head cannot be read, see `head_of`; or is no module to be called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        head_of(model)
        layer = unwrapped(head_layer(causal_model(model)))
        if not isinstance(layer, nn.Module):
            raise TypeError(
                f"the head is a {type(layer).__name__}, which is no module whose hooks could gather its weight; call "
                f"fused_token_logps(hidden_states, head_of(model), labels)."
            )
        self.shared = _name_of_ours(layer) is not None
        """The layer had the forward already, of another handle or of the model that this one is a copy of."""
        if not self.shared:
            name = _innermost(layer)
            setattr(layer, name, _HeadForward(layer, vars(layer).get(name)))

    def __call__(self, hidden_states: Tensor, labels: Tensor, **settings: Any) -> TokenLogps:
        """Compute the log-prob of every token.

        Args:
            hidden_states: see `fused_token_logps`; a mixed-precision policy of the layer casts them.
            labels: see `fused_token_logps`.
            settings: everything else that `fused_token_logps` takes by name.

        Raises:
            RuntimeError: see `run`.
            ValueError, TypeError, NotImplementedError: see `fused_token_logps` and `head_of`.
        """
        return self.run(_token_logps, hidden_states, labels=labels, **settings)

    def run(self, function: Callable[..., Any], hidden_states: Tensor, **arguments: Any) -> Any:
        """Call `function(head, hidden_states, **arguments)` with the head as it is within the call of its layer.

        Args:
            function: what it returns holds its tensors in tuples, lists, dictionaries or named tuples, as the hooks
                look for them there. It keeps no tensor of the head.
            hidden_states: what the layer is called with; hooks may cast or move it.
            arguments: of the function; tensors among them may be moved.

        Raises:
            RuntimeError: the forward was taken off, or another layer stands in the head's place by now.
        """
        layer, _ = self._layer()
        return layer(hidden_states, fused_dpo_call=partial(_with_head, self.model, function), **arguments)

    def remove(self) -> None:
        """Give the layer its own forward back, for every handle of the model.

        Raises:
            RuntimeError: see `run`; or somebody has put a forward of theirs around it since, which would be lost.
        """
        wrapped, name = self._layer()
        layer = unwrapped(wrapped)
        before = vars(layer)[name].before
        if before is None and name != "forward":
            before = types.MethodType(type(layer).forward, layer)
        delattr(layer, name)
        if before is not None:
            setattr(layer, name, before)

    def _layer(self) -> tuple[nn.Module, str]:
        """Find the head's layer with what is around it now, as FSDP1 exchanges it, and where our forward is."""
        layer = head_layer(causal_model(self.model))
        name = _name_of_ours(unwrapped(layer))
        if name is None:
            raise RuntimeError(
                f"the head ({type(layer).__name__}) has not the forward that FusedHead(model) has put into it: it was "
                f"removed, or replaced, or another layer took its place (adapters, resized embeddings); undo that, or "
                f"make a new FusedHead."
            )
        return layer, name


class _HeadForward:
    """The forward of a head's layer, or on its way in a function that takes the head.

    An object, as a bound method with another name than that of its class cannot be pickled.
    """

    def __init__(self, layer: nn.Module, before: Callable[..., Any] | None) -> None:
        self.layer, self.before = layer, before
        setattr(self, HEAD_FORWARD, True)

    def __call__(
        self, hidden_states: Tensor, *args: Any, fused_dpo_call: Callable[..., Any] | None = None, **kwargs: Any
    ) -> Any:
        if fused_dpo_call is not None:
            return fused_dpo_call(hidden_states, *args, **kwargs)
        if self.before is not None:
            return self.before(hidden_states, *args, **kwargs)
        return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)


def _token_logps(head: LMHead, hidden_states: Tensor, *, labels: Tensor, **settings: Any) -> TokenLogps:
    tokens = fused_token_logps(hidden_states, head, labels, **settings)
    # Not a view: in-place operations on a view would drop FSDP2's hook on it, which gathers the weight for backward.
    return tokens._replace(logps=tokens.logps.clone())


def _with_head(model: nn.Module, function: Callable[..., Any], hidden_states: Tensor, **arguments: Any) -> Any:
    return function(head_of(model), hidden_states, **arguments)


def _innermost(layer: nn.Module) -> str:
    """Name the attribute that holds a layer's forward: accelerate's hook keeps it aside, and calls it there."""
    return "_old_forward" if hasattr(layer, "_hf_hook") and "_old_forward" in vars(layer) else "forward"


def _name_of_ours(layer: Any) -> str | None:
    """Name the attribute of a layer that holds our forward, whoever came first; None for none."""
    own = getattr(layer, "__dict__", {})
    return next((name for name in ("forward", "_old_forward") if isinstance(own.get(name), _HeadForward)), None)
