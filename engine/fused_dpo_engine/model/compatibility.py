"""Which models can be trained, told from class and configuration."""

import re
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from fused_dpo import backbone_of
from fused_dpo_engine.errors import UnsupportedModelError, UserError

_LANGUAGE_MODELS = ("CausalLM", "ConditionalGeneration", "PreTraining", "LMHead")
"""What follows "For" in the names of classes with a language model's head."""
_OTHER_HEADS = ("score", "classifier", "qa_outputs", "reward_head", "regression_head")
"""Names of heads in transformers that are no language model's."""


def check_architecture(config: Any, name: str) -> None:
    """Refuse checkpoints of another head than a language model's, which would be made up or taken from elsewhere.

    Args:
        config: the model's.
        name: its folder or name.

    Raises:
        UnsupportedModelError: naming the architecture.
    """
    architectures = [str(each) for each in getattr(config, "architectures", None) or []]
    which = architectures[0] if architectures else type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name}: {which} is an encoder-decoder; only causal language models are trained.")
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):  # its authors say that it is one
        return
    head = re.search(r"For([A-Z]\w*)$", which)
    if head and not head[1].startswith(_LANGUAGE_MODELS):
        raise UnsupportedModelError(
            f"{name} holds a {which}, which has another head than a language model's; give the causal language model "
            f"that it was made from."
        )


def check_weights_left(info: dict[str, Any], name: str) -> None:
    """Refuse weights that lack a part of the model, or have a head that it has no place for.

    Args:
        info: `from_pretrained`'s loading info.
        name: the model's folder or name.

    Raises:
        UserError: naming a tensor.
    """
    other = sorted(key for key in info["unexpected_keys"] if key.split(".")[0] in _OTHER_HEADS)
    if other:
        raise UnsupportedModelError(
            f"the weights in {name} have another head than a language model's ({other[0]}); give the causal language "
            f"model that they were made from."
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"the weights in {name} lack {len(missing)} tensors that its configuration asks for, such as {missing[0]}; "
            f"they would be random."
        )


def causal_class_of(config: Any) -> type[nn.Module] | None:
    """Find the class that transformers loads for a configuration; None if it comes with the model, or there is none."""
    if getattr(config, "auto_map", None):
        return None
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    classes = found if isinstance(found, (tuple, list)) else [found]
    named = [cls for cls in classes if cls and cls.__name__ in (getattr(config, "architectures", None) or [])]
    return (named or classes)[0]


def check_backbone(model: Any) -> None:
    """Refuse a model of which no part is known to make the hidden states that its head takes.

    Raises:
        UnsupportedModelError: naming its class.
    """
    try:
        backbone_of(model)
    except TypeError as error:
        raise UnsupportedModelError(f"{error} It cannot be trained here.") from error
