"""What may change in the settings of a run between its beginning and where it goes on."""

from collections.abc import Mapping
from typing import Any

from fused_dpo.losses import loss_spec

FREE = frozenset(
    {"output", "overwrite", "resume", "checkpoint_every", "checkpoint_minutes", "checkpoints_kept", "save_steps"}
    | {"report_to", "timeout_minutes", "trust_remote_code", "reference_store", "reference_columns"}
)
"""Changes nothing that is trained; a checkpoint has the reference's log-probs, wherever they came from."""
BY_CONTENT = frozenset(
    {"model", "ref_model", "data", "split", "eval_data", "eval_split", "eval_fraction", "max_length"}
    | {"truncate_prompts", "pairs", "skip_bad_rows", "chat_template", "columns", "score"}
)
"""Says where models and pairs come from, which are compared themselves."""
ROUNDING = frozenset(
    {"device", "attention", "liger", "compile", "gradient_checkpointing", "offload_activations", "workspace_mib"}
    | {"tokens_per_batch", "packing", "prefix_sharing", "strategy", "tensor_parallel", "offload"}
)
"""How the same numbers are computed, up to their rounding."""
PASSES = frozenset({"tokens_per_batch", "packing", "prefix_sharing"})
"""What decides which pairs share a forward pass."""


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compare the settings that a run began with and those it is to go on with.

    Args:
        before, now: by option name, as `TrainConfig.flat` gives them; lists and tuples are the same.

    Returns:
        What must not change and has, and what changes results by their rounding alone, each as
        `--option: was, is now`.
    """
    refused: list[str] = []
    rounded: list[str] = []
    across = loss_spec(now["loss_type"]).across_pairs or now["batches_per_step"] is not None
    for name in sorted(before.keys() & now.keys()):  # another release may have others
        was, is_now = _plain(before[name]), _plain(now[name])
        if was == is_now or name in FREE | BY_CONTENT:
            continue
        line = f"--{name.replace('_', '-')}: {was}, is now {is_now}"
        if name in ROUNDING and not (across and name in PASSES):
            rounded.append(line)
        else:
            refused.append(line)
    return refused, rounded


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
