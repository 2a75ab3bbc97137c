"""What tensors take: bytes alive now, and the most so far."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

# Not public, but what torch's documents name for modes that see every operation.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Ledger(TorchDispatchMode):
    """Counts the memory of every tensor that is made within it, by storage, until that is freed.

    Args:
        others: tensors that were there before, which are not counted.
        substitutes: what to run in the place of operations, by the names that these have in torch.
    """

    def __init__(
        self, others: Iterable[Tensor] = (), substitutes: Mapping[str, Callable[..., Tensor]] = MappingProxyType({})
    ) -> None:
        super().__init__()
        self._substitutes = substitutes
        self.alive = 0
        """Bytes."""
        self.peak = 0
        """Most of `alive` since the last call of `most`."""
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in others)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and take in what it returns."""
        result = self._substitutes.get(func.name(), func)(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.device.type != "meta":
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.alive -= size

    def most(self) -> int:
        """Read the peak since the last call, and begin anew."""
        peak, self.peak = self.peak, self.alive
        return peak
