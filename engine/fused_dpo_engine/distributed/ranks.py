"""The processes of a job: which one this is, and what they tell each other."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from fused_dpo_engine.errors import OtherRankFailedError, UserError

DATA, TENSOR = "data", "tensor"
"""Dimensions of the mesh: ranks that differ along the first have other pairs, along the second other parts of them."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its job; without arguments one process alone, which needs no process group."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Which of the processes on its machine it is, and so which of the machine's devices it takes."""
    tensor_parallel: int = 1
    """Ranks that share the same pairs; neighbours."""
    mesh: DeviceMesh | None = None
    """[DATA, TENSOR]; None before `use`, and for one process without a process group."""
    host: Any = None
    """Process group for what is on the host."""
    timeout: timedelta = timedelta(minutes=30)
    """How long the others are waited for."""

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and writes files."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the pairs this process has."""
        return self.rank // self.tensor_parallel

    @property
    def data_size(self) -> int:
        """Into how many shares the pairs are split."""
        return self.size // self.tensor_parallel

    def use(self, device: torch.device) -> tuple["Ranks", torch.device]:
        """Take a device of a kind for this process, and lay out the mesh.

        Raises:
            UserError: this machine has fewer of them than processes.
        """
        if device.type == "cuda" and self.size > 1:
            if self.local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"process {self.local_rank + 1} of this machine has no CUDA device: there are "
                    f"{torch.cuda.device_count()}; give torchrun --nproc-per-node as many, or --device cpu."
                )
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            return self, device
        shape = (self.data_size, self.tensor_parallel)
        return replace(self, mesh=init_device_mesh(device.type, shape, mesh_dim_names=(DATA, TENSOR))), device

    def gather_numbers(self, numbers: Mapping[str, Tensor | float]) -> list[dict[str, float]]:
        """Read numbers of every share of the pairs, with one collective and one transfer from the device.

        Args:
            numbers: by name, the same names in the same order on every rank; tensors of one element.

        Returns:
            Those of each share, the same list on all ranks.
        """
        on_device = {name: value for name, value in numbers.items() if isinstance(value, Tensor)}
        on_host = {name: value for name, value in numbers.items() if name not in on_device}
        row = torch.tensor(list(on_host.values()), dtype=torch.double)
        if on_device:
            device = next(iter(on_device.values())).device
            known = [value.detach().reshape(()).to(device, torch.double) for value in on_device.values()]
            row = torch.cat((torch.stack(known), row.to(device, non_blocking=True)))
        rows = [row]
        if self.size > 1:  # those that share pairs too, which have to know the very same
            rows = [torch.empty_like(row) for _ in range(self.size)]
            dist.all_gather(rows, row)
        # Of those that share pairs the largest: all have the same of these, and each its memory and its signals.
        shares = torch.stack(rows).view(self.data_size, self.tensor_parallel, -1).amax(1)
        return [dict(zip([*on_device, *on_host], values, strict=True)) for values in shares.tolist()]

    def fill_in(self, values: Tensor) -> Tensor:
        """Put what other ranks have where this one has NaN; all that have a number have the same."""
        if self.size == 1:
            return values
        whole = values.masked_fill(values.isnan(), -torch.inf)
        dist.all_reduce(whole, dist.ReduceOp.MAX, group=self.host)
        return whole.masked_fill(whole == -torch.inf, torch.nan)

    def gather_objects(self, value: Any) -> list[Any]:
        """Give every rank the values of all."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host)
        return values

    def barrier(self) -> None:
        """Wait until all ranks are here.

        Raises:
            RuntimeError: some have not come in time; names them.
        """
        if self.size > 1:
            dist.monitored_barrier(self.host, timeout=self.timeout, wait_all_ranks=True)


def join_ranks(tensor_parallel: int, timeout: timedelta, *, alone: bool) -> Ranks:
    """Find the other processes that torchrun's environment names, and make the process group.

    A process group that is there already is taken as it is.

    Args:
        tensor_parallel: see `Ranks`.
        timeout: how long a collective waits for the other ranks.
        alone: make a process group of one process too.

    Raises:
        UserError: processes that do not divide into groups of `tensor_parallel`.
        OtherRankFailedError: in its place, on all but the first.
    """
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if size % tensor_parallel:
        if int(os.environ.get("RANK", "0")):  # the first says it
            raise OtherRankFailedError
        raise UserError(f"--tensor-parallel {tensor_parallel} does not divide the {size} processes of this job.")
    if size == 1 and not alone:
        return Ranks()
    # gloo beside nccl: for what FSDP2 keeps on the host, and for what this class sends from there.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    if not dist.is_initialized() and size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    elif not dist.is_initialized():
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    host = dist.new_group(backend="gloo", timeout=timeout)
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else 0
    return Ranks(dist.get_rank(), size, local_rank, tensor_parallel, host=host, timeout=timeout)
