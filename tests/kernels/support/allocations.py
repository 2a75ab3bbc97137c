"""What a call allocates, measured with torch's profiler."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile

MIB = 2**20


class Allocations(NamedTuple):
    """In MiB, of everything that a call allocated."""

    largest: float
    peak: float
    """Most that was alive at one time."""
    kept: float
    """Alive at the end: the results."""
    sizes: list[float]


def allocations_of(call: Callable[[], object]) -> Allocations:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = call()
    inner = profiler.profiler
    assert inner is not None
    assert inner.kineto_results is not None
    events: list[Any] = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    assert events
    assert results is not None
    alive, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    sizes = [event.nbytes() / MIB for event in events if event.nbytes() > 0]
    return Allocations(max(sizes), peak / MIB, alive / MIB, sizes)
