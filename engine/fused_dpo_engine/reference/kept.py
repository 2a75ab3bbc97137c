"""A reference store as a run uses it: what it has of one scorer, and what this run adds, over all ranks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.errors import SaveError, UserError
from fused_dpo_engine.reference.keys import sequence_keys
from fused_dpo_engine.reference.store import Scored, Store, StoreWriteError


class Kept:
    """What a store keeps of one scorer. Its methods are called on all ranks.

    The first rank alone has the file open: on several machines it need be on one. It looks everything up and tells the
    others, who tell it after every forward pass what they have scored; they make as many passes as it does.

    Args:
        path: the file.
        settings: makes the scorer's settings; called on the first rank, as it reads the weights.
        ld_alpha: see `Policy`.
        ranks: the processes.
        console: for warnings.
        strict: end with an error where the file takes no more, in the place of going on without it.

    Raises:
        UserError: see `Store`.
    """

    def __init__(
        self,
        path: str,
        settings: Callable[[], Mapping[str, Any]],
        ld_alpha: float | None,
        ranks: Ranks,
        console: Console,
        *,
        strict: bool = False,
    ) -> None:
        self.path, self.ld_alpha, self.ranks, self._console, self._strict = path, ld_alpha, ranks, console, strict
        self._store: Store | None = None
        self._settings: Mapping[str, Any] = {}
        self._unwritten: dict[bytes, Scored] = {}
        self._failed: StoreWriteError | None = None
        self._apart = 0.0
        if ranks.is_main:
            self._store = Store(path)
            for warning in self._store.warnings:
                console.print(warning)
            self._settings = settings()
            if strict and self._store.read_only:
                self._console.print(f"reference store {path} cannot be written: it is only read")

    def look_up(self, pairs: Sequence[TokenPair]) -> Tensor:
        """Find the log-probs of pairs: fp32 [pairs, 2], chosen and rejected, NaN where nothing is known.

        Raises:
            UserError: the file is damaged.
        """
        found = torch.full((len(pairs), 2), torch.nan)
        if self._store is not None:
            keys = [key for pair in pairs for key in sequence_keys(pair, self.ld_alpha)]
            known = self._store.look_up(self._settings, keys)
            lengths = np.array([(pair.chosen_length, pair.rejected_length) for pair in pairs], np.int64).reshape(-1)
            wrong = np.flatnonzero((known.tokens != 0) & (known.tokens != lengths))
            if len(wrong):
                at = wrong[0]
                raise UserError(
                    f"reference store {self.path} is damaged: it has {known.tokens[at]} scored tokens for a sequence "
                    f"of {lengths[at]}. Move it away, and a new one is filled in its place."
                )
            found = torch.from_numpy(known.logps).view(-1, 2)
        return self.ranks.fill_in(found)

    def keep(self, pairs: Sequence[TokenPair], indices: Sequence[int], logps: Tensor) -> None:
        """Write what every rank has scored in a pass.

        Args:
            pairs: all pairs of this side of the data.
            indices: those of this rank's pass.
            logps: fp32 [indices, 2].

        Raises:
            SaveError: the file takes no more, and the store is `strict`.
        """
        shares = self.ranks.gather_objects((list(indices), logps.tolist()))
        if self._store is None:
            return
        for share, values in shares:
            for index, sides in zip(share, values, strict=True):
                pair = pairs[index]
                keys, lengths = sequence_keys(pair, self.ld_alpha), (pair.chosen_length, pair.rejected_length)
                for key, logp, length in zip(keys, sides, lengths, strict=True):
                    self._unwritten.setdefault(key, Scored(logp, length))
        if self._failed is None:  # another try costs up to a minute, and there is one at the end
            self._write(self._store)

    def finish(self) -> None:
        """Write what could not be written before, say what is lost, and close the file."""
        if self._store is None:
            return
        if self._failed is not None:
            self._write(self._store)
        if self._unwritten:
            self._console.print(
                f"warning: {len(self._unwritten)} log-probs are not in the store: {self._failed}; this run has them, "
                f"the next one computes them again"
            )
        self._store.close()

    @property
    def apart(self) -> float:
        """Largest difference to what another run has written meanwhile, see `Store.add`; on the first rank."""
        return self._apart

    def others(self) -> list[str]:
        """Say which settings of the same model's other scorers in the file differ, one text each; on the first rank."""
        found = []
        for settings, count in [] if self._store is None else self._store.scorers():
            differs = [name for name, value in self._settings.items() if settings.get(name) != value]
            if differs and settings.get("model") == self._settings["model"]:
                what = ", ".join(f"{name} {settings.get(name)}" for name in differs)
                found.append(f"{count} sequences with {what}")
        return found

    def _write(self, store: Store) -> None:
        try:
            self._apart = max(self._apart, store.add(self._settings, self._unwritten))
            self._unwritten = {}
        except StoreWriteError as error:
            if self._strict:
                raise SaveError(self.path, error.__cause__ or error) from error
            if self._failed is None:
                self._console.print(f"warning: {error}; the reference is computed and kept in memory alone")
            self._failed = error
