"""`fused-dpo estimate` as a function: what training a model takes, from its configuration alone."""

import json
from typing import Any

from rich.console import Console

from fused_dpo_engine.analysis.advice import advise, sentence
from fused_dpo_engine.analysis.memory import GIB, estimate_memory, shape_of
from fused_dpo_engine.config.commands import EstimateConfig
from fused_dpo_engine.model.loading import check_model
from fused_dpo_engine.model.source import read_config
from fused_dpo_engine.reports.memory import Way, memory_json, memory_table


def estimate(config: EstimateConfig) -> None:
    """Print what a step takes on each GPU, with these settings and with others, whether it fits, and what to change.

    Raises:
        UserError: there is no such model, or it cannot be trained or split so.
    """
    source = check_model(config.model_options, config.lora)
    model = read_config(source, config.model_options)
    shape = shape_of(config.model, model, config.lora, config.tensor_parallel)
    device = config.gpu_memory * GIB
    given: dict[str, Any] = {
        "tokens_per_batch": config.tokens_per_batch,
        "gpus": config.gpus // config.tensor_parallel,
        "strategy": "fsdp2" if config.offload or config.strategy == "fsdp2" else "ddp",
        "offload": config.offload,
        "gradient_checkpointing": config.gradient_checkpointing,
        "offload_activations": config.offload_activations,
        "optimizer": config.optimizer,
        "half": config.dtype == "bfloat16",
        "workspace_mib": config.workspace_mib,
        "pairs": config.pairs,
    }
    if config.strategy == "auto" and given["gpus"] > 1 and not estimate_memory(shape, **given).fits(device):
        given["strategy"] = "fsdp2"
    advice = advise(shape, given, device)
    settings = [("these settings", given)]
    for name, change in _OTHERS.items():
        other = given | change
        if other != given and other not in [known for _, known in settings] and _possible(other, config):
            settings.append((name, other))
    changed = dict(given)
    for change in advice.changes:
        changed |= change.settings
    if changed not in [known for _, known in settings]:
        settings.append((" ".join(change.option for change in advice.changes), changed))
    found = [(name, estimate_memory(shape, **chosen)) for name, chosen in settings]
    ways = [Way(name, memory, memory.fits(device)) for name, memory in found]
    words = sentence(advice, device)
    if config.json:
        print(json.dumps(memory_json(shape, ways, words), indent=2))
        return
    console = Console(highlight=False)
    wide = console if console.is_terminal else Console(highlight=False, width=160)
    gpus = f"{config.gpus} GPU{'s' * (config.gpus > 1)} of {config.gpu_memory:g} GiB"
    wide.print(memory_table(shape, ways, f"{gpus}, {config.tokens_per_batch} tokens a pass, {given['strategy']}"))
    wide.print(words, soft_wrap=True)


_CHECKPOINTS = {"gradient_checkpointing": True}
_OTHERS: dict[str, dict[str, Any]] = {
    "--gradient-checkpointing": _CHECKPOINTS,
    "and --offload-activations": {**_CHECKPOINTS, "offload_activations": True},
    "--gradient-checkpointing --optimizer adamw8bit": {**_CHECKPOINTS, "optimizer": "adamw8bit"},
    "--gradient-checkpointing --strategy ddp": {**_CHECKPOINTS, "strategy": "ddp", "offload": False},
    "--gradient-checkpointing --strategy fsdp2": {**_CHECKPOINTS, "strategy": "fsdp2", "offload": False},
    "--gradient-checkpointing --offload": {**_CHECKPOINTS, "strategy": "fsdp2", "offload": True},
}
"""Other ways to look at, by the options that they change."""


def _possible(settings: dict[str, Any], config: EstimateConfig) -> bool:
    """Tell whether a way is worth a row: on one GPU there is nothing to share out, unless it is offloaded."""
    return config.gpus > config.tensor_parallel or settings["offload"] or settings["strategy"] == "ddp"
