"""What of a run decides how it goes on: gathered for a checkpoint, and put back."""

import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fused_dpo_engine.checkpoint.folder import Checkpoint
from fused_dpo_engine.checkpoint.tensors import load_tensors, shapes_in
from fused_dpo_engine.distributed.ranks import Ranks
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.reference.scoring import ReferenceLogps


class RunState:
    """Weights that are trained, the optimizer's means, its learning rates, the loss's own buffers, random numbers.

    Frozen weights are those of the model that the run started from, which a checkpoint names.

    Args:
        model: what is trained.
        optimizer: of its parameters.
        lr_scheduler: of the optimizer.
        loss: has a running mean for some losses.
        references: log-probs by the name of their pairs; None where there are none.
        ranks: the processes, all of which call each method.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        loss: nn.Module,
        references: Mapping[str, ReferenceLogps | None],
        ranks: Ranks,
    ) -> None:
        self.optimizer, self.lr_scheduler, self.loss, self.ranks = optimizer, lr_scheduler, loss, ranks
        self.references = references
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def tensors(self) -> dict[str, Tensor]:
        """Gather all tensors by name. Those that a rank has for itself have its number in their name."""
        tensors: dict[str, Tensor] = {f"weights.{name}": p.detach() for name, p in self.trained.items()}
        tensors |= {name: value for name, value in self._means() if isinstance(value, Tensor)}
        tensors |= self._own(self.ranks.rank)
        for name, reference in self.references.items():
            if reference is not None:
                tensors[_reference(name)] = reference.logps
        return tensors

    def numbers(self) -> dict[str, Any]:
        """Gather all else, for JSON."""
        return {
            "learning_rate": self.lr_scheduler.get_last_lr()[0],  # all groups have the same
            "scheduler": {name: self.lr_scheduler.state_dict()[name] for name in ("last_epoch", "_step_count")},
            "optimizer": {name: value for name, value in self._means() if not isinstance(value, Tensor)},
            "random": self.ranks.gather_objects(_random_state()),
            "processes": self.ranks.size,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put back what `tensors` and `numbers` gave.

        With another number of ranks each takes its part of the whole, and what ranks had for themselves is taken from
        one that was there.

        Raises:
            UserError: the checkpoint belongs to another model or optimizer; or to another number of ranks, and holds
                8-bit means, which are cut from shards.
        """
        record, there = checkpoint.record, shapes_in(checkpoint.folder)
        self._prime()
        for name, parameter in self.trained.items():
            prefix = f"optimizer.{name}."
            kept = {key for key in (*there, *record["optimizer"]) if key.startswith(prefix)}
            if not kept:  # it has had no gradient so far
                self.optimizer.state.pop(parameter, None)
        means = dict(self._means())
        if record["processes"] != self.ranks.size and any(map(_OF_SHARD.match, (*there, *means))):
            raise UserError(
                f"checkpoint {checkpoint.folder} holds 8-bit means of shards: go on with {record['processes']} "
                f"processes, from whose shards they are cut."
            )
        if unknown := [name for name in means if name not in there and name not in record["optimizer"]]:
            raise UserError(f"checkpoint {checkpoint.folder} lacks {unknown[0]}; another optimizer has written it.")
        rank = self.ranks.rank % record["processes"]
        own = self._own(rank)
        tensors = {f"weights.{name}": p.detach() for name, p in self.trained.items()}
        tensors |= {name: value for name, value in means.items() if isinstance(value, Tensor)}
        load_tensors(checkpoint.folder, tensors | {name: own[name] for name in own if name in there}, self.ranks)
        self._set_numbers(record["optimizer"])
        self._set_own(own, rank, record["random"][rank])
        of_groups = {"lr_lambdas": [None], "_last_lr": [record["learning_rate"]]}
        of_groups = {name: one * len(self._groups) for name, one in of_groups.items()}
        self.lr_scheduler.load_state_dict({**record["scheduler"], **of_groups})
        for group in self._groups:
            group["lr"] = record["learning_rate"]

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _means(self) -> Iterator[tuple[str, Any]]:
        """Walk the optimizer's state, by the names of parameters."""
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                # 8-bit means of a shard: plain tensors, another one on every rank.
                alone = isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.ndim
                alone = alone and not isinstance(value, DTensor)
                yield f"optimizer.{name}.{f'rank{self.ranks.rank}.' if alone else ''}{key}", value

    def _prime(self) -> None:
        """Let the optimizer make its state, by a step that changes nothing."""
        rates = [group["lr"] for group in self._groups]
        for parameter in self.trained.values():
            parameter.grad = torch.zeros_like(parameter)
        for group in self._groups:
            group["lr"] = 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()
        for group, rate in zip(self._groups, rates, strict=True):
            group["lr"] = rate

    def _set_numbers(self, numbers: Mapping[str, Any]) -> None:
        for name, parameter in self.trained.items():
            state = self.optimizer.state.get(parameter, {})
            for key in state:
                if f"optimizer.{name}.{key}" in numbers:
                    state[key] = numbers[f"optimizer.{name}.{key}"]

    def _own(self, rank: int) -> dict[str, Tensor]:
        """Gather what a rank has for itself."""
        own = {f"loss.rank{rank}.{name}": value for name, value in self.loss.state_dict().items()}
        own[f"random.rank{rank}.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            own[f"random.rank{rank}.cuda"] = torch.cuda.get_rng_state()
        return own

    def _set_own(self, own: Mapping[str, Tensor], rank: int, others: Mapping[str, Any]) -> None:
        torch.set_rng_state(own[f"random.rank{rank}.cpu"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(own[f"random.rank{rank}.cuda"])
        prefix = f"loss.rank{rank}."
        self.loss.load_state_dict({n.removeprefix(prefix): v for n, v in own.items() if n.startswith(prefix)})
        version, numbers, gauss = others["python"]
        random.setstate((version, tuple(numbers), gauss))
        kind, keys, *rest = others["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


_OF_SHARD = re.compile(r"optimizer\..*\.rank\d+\.")


def read_reference(checkpoint: Checkpoint, name: str, pairs: int, ranks: Ranks) -> ReferenceLogps | None:
    """Read the reference log-probs of some pairs from a checkpoint; None where it has none."""
    if _reference(name) not in shapes_in(checkpoint.folder):
        return None
    logps = torch.full((pairs, 2), torch.nan)
    load_tensors(checkpoint.folder, {_reference(name): logps}, ranks)
    return ReferenceLogps(logps)


def _reference(name: str) -> str:
    return f"reference.{name}"


def _random_state() -> dict[str, Any]:
    """Give the state of the generators that are no tensors, for JSON."""
    kind, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}
