"""What a run says of memory: one line before it where it will not do, and what to change where it did not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fused_dpo_engine.analysis.advice import advise, rank, sentence
from fused_dpo_engine.analysis.memory import GIB, ModelShape, Strategy, estimate_memory, shape_of
from fused_dpo_engine.config.commands import TrainConfig
from fused_dpo_engine.errors import OutOfMemoryError, first_line
from fused_dpo_engine.model.source import find_source, read_config

_NO_MEMORY_ON_A_CPU = "DefaultCPUAllocator"
"""Begins what torch says, in a RuntimeError, where the system gives no memory."""
_MAY_HELP = "--gradient-checkpointing, --offload-activations, --optimizer adamw8bit, --offload, fewer tokens a pass"


def settings_of(
    config: TrainConfig,
    *,
    strategy: Strategy = "ddp",
    gpus: int = 1,
    offload: bool = False,
    reduces_every_pass: bool = True,
    cuda: bool = True,
) -> dict[str, Any]:
    """Give a run's settings as `estimate_memory` takes them; `gpus` share the weights under fsdp2."""
    return {
        "tokens_per_batch": config.packing.tokens_per_batch,
        "strategy": strategy,
        "gpus": gpus,
        "offload": offload,
        "reduces_every_pass": reduces_every_pass,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "offload_activations": config.model.offload_activations,
        "optimizer": config.optimizer.optimizer,
        "half": config.model.dtype == "bfloat16",
        "workspace_mib": config.model.workspace_mib,
        "cuda": cuda,
    }


def shape_of_run(config: TrainConfig) -> ModelShape:
    """Count the weights of the model that a run trains.

    Raises:
        UserError: there is no such model.
    """
    model = read_config(find_source(config.model.model), config.model)
    return shape_of(config.model.model, model, config.lora, config.parallel.tensor_parallel)


def fits(config: TrainConfig, device: torch.device, **parallel: Any) -> bool:
    """Tell whether a step is expected to fit a device; True where that cannot be told, and on a CPU.

    Args:
        config: the run's settings, automatic choices made.
        device: that it runs on.
        parallel: as in `memory_warning`.
    """
    if device.type != "cuda" or config.model.load_in_4bit:
        return True
    try:
        expected = estimate_memory(shape_of_run(config), **settings_of(config, **parallel))
    except Exception:  # as in `memory_warning`, which says so
        return True
    return expected.fits(torch.cuda.get_device_properties(device).total_memory)


def memory_warning(config: TrainConfig, device_bytes: float, **parallel: Any) -> str | None:
    """Say before a run that a step is not expected to fit, and what to change; None if it is, or cannot be told.

    Args:
        config: the run's settings, automatic choices made.
        device_bytes: memory of each GPU.
        parallel: `strategy`, `gpus`, `offload` and `reduces_every_pass` of `estimate_memory`.
    """
    if config.model.load_in_4bit:  # quantised weights are not in the estimate
        return None
    settings = settings_of(config, **parallel)
    try:
        shape = shape_of_run(config)
        expected = estimate_memory(shape, **settings)
        if expected.fits(device_bytes):
            return None
        advice = sentence(advise(shape, settings, device_bytes), device_bytes)
    except Exception as error:  # code that comes with a model may look at values, which a rehearsal does not have
        return f"memory: no estimate for {config.model.model}: {first_line(error)}"
    return (
        f"warning: by the estimate a step takes {expected.peak_bytes / GIB:.1f} GiB, and the device has "
        f"{device_bytes / GIB:.1f}. {advice}"
    )


@contextmanager
def explain_out_of_memory(config: TrainConfig, tokens: int, *, cuda: bool, **parallel: Any) -> Iterator[None]:
    """Turn an allocation that fails within the block into a message with what to change.

    Args:
        config: the run's settings.
        tokens: slots of the forward pass in the block.
        cuda: it runs on a GPU.
        parallel: as in `memory_warning`.

    Raises:
        OutOfMemoryError: in the place of torch's and Python's errors.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(error, config, tokens, cuda, parallel) from error
    except RuntimeError as error:
        if _NO_MEMORY_ON_A_CPU not in str(error):
            raise
        raise _out_of_memory(error, config, tokens, cuda, parallel) from error


def _out_of_memory(
    error: BaseException, config: TrainConfig, tokens: int, cuda: bool, parallel: dict[str, Any]
) -> OutOfMemoryError:
    where = f"out of memory in a forward pass of {tokens} tokens (--tokens-per-batch {config.packing.tokens_per_batch})"
    what = first_line(error) if str(error) else "an allocation failed."
    try:
        changes = rank(shape_of_run(config), settings_of(config, cuda=cuda, **parallel))
    except Exception:  # as above; the first error is the one to tell of
        return OutOfMemoryError(f"{where}: {what} What may help: {_MAY_HELP}.", tokens)
    helps = ", ".join(f"{change.option} ({change.saves / GIB:.2g} GiB)" for change in changes) or "a smaller model"
    return OutOfMemoryError(f"{where}: {what} By the estimate, what saves most first: {helps}.", tokens)
