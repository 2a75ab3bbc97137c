"""What would make a step fit, in the order of what it saves by the estimate."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fused_dpo_engine.analysis.memory import GIB, USABLE, MemoryEstimate, ModelShape, estimate_memory

FEWEST_TOKENS = 2048
"""Below it a pass is not worth advising: a pair of a thousand tokens each takes so many."""


class Change(NamedTuple):
    """A setting to change."""

    option: str
    """As on the command line."""
    settings: Mapping[str, Any]
    """Arguments of `estimate_memory`."""
    saves: int
    """Bytes, after the changes before it."""


class Advice(NamedTuple):
    """Changes that were tried one after the other until a step fits."""

    changes: list[Change]
    estimate: MemoryEstimate
    """With all of them."""
    fits: bool


def advise(shape: ModelShape, settings: Mapping[str, Any], device_bytes: float) -> Advice:
    """Find changes after which a step fits a device, at each time the one that saves most.

    Args:
        shape: the model.
        settings: arguments of `estimate_memory` as they are now.
        device_bytes: what the device has.

    Returns:
        No changes if it fits already; with all changes that help if it does not fit with these either.
    """
    settings, changes = dict(settings), []
    estimate = estimate_memory(shape, **settings)
    while not estimate.fits(device_bytes):
        options = []
        for option, change in _possible(settings).items():
            peak = estimate_memory(shape, **{**settings, **change}).peak_bytes
            options.append(Change(option, change, estimate.peak_bytes - peak))
        best = max(options, key=lambda change: change.saves, default=None)
        if best is None or best.saves < 0.01 * estimate.peak_bytes:
            return Advice(changes, estimate, False)
        changes.append(best)
        settings.update(best.settings)
        estimate = estimate_memory(shape, **settings)
    return Advice(changes, estimate, True)


def rank(shape: ModelShape, settings: Mapping[str, Any]) -> list[Change]:
    """List the changes that save anything, each by itself, those that save most first."""
    now = estimate_memory(shape, **settings).peak_bytes
    found = [
        Change(option, change, now - estimate_memory(shape, **{**settings, **change}).peak_bytes)
        for option, change in _possible(settings).items()
    ]
    return sorted((each for each in found if each.saves > 0.01 * now), key=lambda change: -change.saves)


def largest_batch(shape: ModelShape, settings: Mapping[str, Any], device_bytes: float) -> int:
    """Find the most tokens of a pass that fit, a multiple of 1,024; 0 if none do."""

    def fits(thousands: int) -> bool:
        return estimate_memory(shape, **{**settings, "tokens_per_batch": 1024 * thousands}).fits(device_bytes)

    fitting, beyond = 0, 1
    while beyond <= 1024 and fits(beyond):
        fitting, beyond = beyond, 2 * beyond
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        fitting, beyond = (middle, beyond) if fits(middle) else (fitting, middle)
    return 1024 * fitting


def sentence(advice: Advice, device_bytes: float) -> str:
    """Say in plain words what to change."""
    takes = f"{advice.estimate.peak_bytes / GIB:.1f} GiB of {USABLE * device_bytes / GIB:.1f} that tensors may take"
    if not advice.changes:
        return f"It fits: {takes}." if advice.fits else f"It does not fit ({takes}), and nothing here would help."
    steps = ", then ".join(f"{change.option} (saves {change.saves / GIB:.1f} GiB)" for change in advice.changes)
    if advice.fits:
        return f"It does not fit. Change, in this order: {steps}. Then it takes {takes}."
    return (
        f"It does not fit, nor with {steps}: {takes}. Give more or larger GPUs (--strategy fsdp2), or train adapters "
        f"alone (--lora-rank)."
    )


def _possible(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """List what may still be changed, by option; on a CPU nothing moves to the host."""
    cuda = settings.get("cuda", True)
    found: dict[str, dict[str, Any]] = {}
    if not settings.get("gradient_checkpointing"):
        found["--gradient-checkpointing"] = {"gradient_checkpointing": True}
    elif cuda and not settings.get("offload_activations"):
        found["--offload-activations"] = {"offload_activations": True}
    if settings.get("optimizer", "adamw") == "adamw" and not settings.get("offload"):
        found["--optimizer adamw8bit"] = {"optimizer": "adamw8bit"}
    if settings.get("strategy", "ddp") == "ddp" and settings.get("gpus", 1) > 1:
        found["--strategy fsdp2"] = {"strategy": "fsdp2"}
    elif cuda and not settings.get("offload"):
        found["--offload"] = {"strategy": "fsdp2", "offload": True}
    tokens = settings.get("tokens_per_batch", 8192)
    if tokens // 2 >= FEWEST_TOKENS:
        found[f"--tokens-per-batch {tokens // 2}"] = {"tokens_per_batch": tokens // 2}
    return found
