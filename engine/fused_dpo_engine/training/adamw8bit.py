"""AdamW with its two means in 8 bits: bitsandbytes', made to take the shards of FSDP2 as well.

bitsandbytes, not torchao: it computes at once on CPUs and on CUDA, where torchao's compiles a kernel for every shape
of weight first, on a CPU with a C++ compiler; and it is there already, for `--load-in-4bit`. What torchao has and
bitsandbytes lacks is a way with DTensors. That takes the two methods below.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fused_dpo_engine.errors import UserError, first_line


def load_adamw8bit() -> type[torch.optim.Optimizer]:
    """Give the class of the optimizer, which takes what `torch.optim.AdamW` does, but for `fused`.

    Numerics:
        A block of 256 numbers is scaled by its maximum and rounded to 256 levels that lie denser towards 0 (Dettmers et
        al., 2022, arXiv 2110.02861). Weights and gradients stay as they are. Blocks are cut from shards, so that this
        rounding depends on the number of ranks.

    Raises:
        UserError: bitsandbytes is not there, or does not work here.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "--optimizer adamw8bit needs bitsandbytes: pip install 'fused-dpo[qlora]', or leave it out for AdamW."
        )
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(f"--optimizer adamw8bit: bitsandbytes does not work here: {first_line(error)}") from error

    class ShardedAdamW8bit(AdamW8bit):
        """Updates the shard of this rank, which is all that AdamW needs: it treats every number by itself."""

        def init_state(self, group: dict[str, Any], p: Any, gindex: int, pindex: int) -> None:
            local = _local(p)
            super().init_state(group, local, gindex, pindex)
            if local is not p:
                self.state[p] = self.state.pop(local)

        def update_step(self, group: dict[str, Any], p: Any, gindex: int, pindex: int) -> None:
            local = _local(p)
            if local is p:
                super().update_step(group, p, gindex, pindex)
            elif local.numel():  # more ranks than rows leave some without any
                assert local.is_contiguous(), "a copy would be updated in its place"
                local.grad = _local(p.grad)
                self.state[local] = self.state[p]
                super().update_step(group, local, gindex, pindex)
                del self.state[local]

    return ShardedAdamW8bit


def _local(tensor: Any) -> Any:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor
