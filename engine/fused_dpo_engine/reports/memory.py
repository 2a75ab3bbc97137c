"""What a step takes, for a person and for programs: `fused-dpo estimate`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table

from fused_dpo_engine.analysis.memory import GIB, MemoryEstimate, ModelShape

COLUMNS = ("weights", "gradients", "optimizer", "gathered", "activations", "head or layer")
_COLUMN_OF = {
    "gathered weights": "gathered",
    "gradients to reduce": "gathered",
    "copies of weights": "activations",
    "head": "head or layer",
    "layer in work": "head or layer",
}


class Way(NamedTuple):
    """One way to train the model."""

    name: str
    estimate: MemoryEstimate
    fits: bool


def memory_table(shape: ModelShape, ways: Sequence[Way], title: str) -> Table:
    """Show what each way takes on a rank, in GiB."""
    trained = "" if shape.trained == shape.parameters else f", {shape.trained:,} trained"
    table = Table(title=f"{shape.name}: {shape.parameters:,} weights{trained}; {title}")
    table.add_column("GiB on each GPU")
    for name in (*COLUMNS, "peak", "on the host", "fits"):
        table.add_column(name, justify="right")
    for way in ways:
        sums: dict[str, int] = dict.fromkeys(COLUMNS, 0)
        for part, size in way.estimate.parts.items():
            sums[_COLUMN_OF.get(part, part)] += size
        numbers = [*sums.values(), way.estimate.peak_bytes, way.estimate.host_bytes]
        table.add_row(way.name, *(f"{size / GIB:.1f}" if size else "" for size in numbers), "yes" if way.fits else "no")
    table.caption = "activations: with autocast's copies of weights; gathered: what FSDP2 makes whole for a while"
    return table


def memory_json(shape: ModelShape, ways: Sequence[Way], advice: str) -> dict[str, Any]:
    """Give the same as plain values, in bytes."""
    return {
        "model": shape.name,
        "parameters": shape.parameters,
        "trained": shape.trained,
        "ways": [
            {
                "name": way.name,
                "parts": dict(way.estimate.parts),
                "peak_bytes": way.estimate.peak_bytes,
                "host": dict(way.estimate.host),
                "fits": way.fits,
            }
            for way in ways
        ],
        "advice": advice,
    }
