"""Everything that computes log-probs of answers from hidden states and a head: ours, the usual code, and other kernels.

Each is called as its users call it, on the scored rows alone. Unsloth's head is missing: importing it patches torch and
transformers under everything else that is measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.heads.replay import Replay
from benchmarks.heads.truth import BF16_LOGITS, EXACT, FILTERED, IN_FLOAT32, Budget
from fused_dpo import DPOLoss, KernelOptions, fused_dpo_logps

BETA = 0.1
Logps = Callable[[Replay, Tensor, Tensor], Tensor]
"""Of a problem and leaves for its hidden states [N, D] and weight [V, D]: log-probs of its sequences, [S]."""


@dataclass(frozen=True)
class Implementation:
    """One way to the log-probs."""

    name: str
    logps: Logps | None
    budget: Budget
    module: str | None = None
    """What has to be importable for it."""
    missing: bool = False
    """Whether this torch or this device lacks it."""
    bf16_alone: bool = False
    """Whether it is something else than the others in bfloat16 alone."""
    own_loss: Callable[[Replay, Tensor, Tensor], Tensor] | None = None
    """A fused DPO loss of its own, for an implementation that has no log-probs to give."""

    def budget_in(self, dtype: str) -> Budget:
        """Choose its budget on a case in this dtype."""
        return IN_FLOAT32[self.budget] if dtype == "float32" else self.budget

    def untimed(self, dtype: str) -> str | None:
        """Say why it is not timed in this dtype; None if it is."""
        if self.bf16_alone and dtype != "bfloat16":
            return "not timed: this device has no bf16 units, and bf16 products take up to a hundred times as long"
        return None

    def absent(self) -> str | None:
        """Say why it cannot be measured here, if so."""
        if self.module and not find_spec(self.module):
            return f"{self.module} is not installed"
        return "not in this torch or on this device" if self.missing else None

    def loss(self, problem: Replay, hidden: Tensor, weight: Tensor, ref_logps: Tensor) -> Tensor:
        """Compute the mean sigmoid DPO loss of the pairs."""
        if self.own_loss:
            return self.own_loss(problem, hidden, weight)
        assert self.logps is not None
        logps = self.logps(problem, hidden, weight)
        return DPOLoss(beta=BETA)(logps[0::2], logps[1::2], ref_logps[0::2], ref_logps[1::2]).loss


def per_sequence(token_logps: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Logps:
    """Make a function of a problem that sums one of (hidden, weight, target) over the sequences."""

    def logps(problem: Replay, hidden: Tensor, weight: Tensor) -> Tensor:
        values = token_logps(hidden, weight, problem.target).float()
        return torch.segment_reduce(values, "sum", offsets=problem.cu_seqlens.long(), unsafe=True)

    return logps


def naive_upcast(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Score as trainers do: logits in the model's dtype, log-softmax of all of them in fp32."""
    return F.log_softmax((hidden @ weight.T).float(), dim=-1).gather(1, target[:, None]).squeeze(1)


def naive_bf16(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Score without the cast to fp32: half the memory, and log-probs that are bf16 themselves."""
    return F.log_softmax(hidden @ weight.T, dim=-1).gather(1, target[:, None]).squeeze(1)


def compiled_naive(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Score by the usual code through `torch.compile`, for these very shapes."""
    return torch.compile(naive_upcast, dynamic=False)(hidden, weight, target)


def torch_linear_cross_entropy(chunked: bool) -> Logps:
    """Score by torch's own function (2.13 and later), over full logits or in chunks of its choice."""

    def logps(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        options: Any = {"options": torch.nn.LinearCrossEntropyOptions()} if chunked else {}
        return -F.linear_cross_entropy(hidden, weight, target, reduction="none", **options)

    return per_sequence(logps)


def trl_logps(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Score by TRL's fused head, with the chunk its trainer takes."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # pyright: ignore[reportMissingImports]

    outputs: Any = ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 32768, None, 1.0, ())
    return outputs[0]


def liger_logps(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Score by Liger's fused linear cross-entropy with a loss a token."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction  # pyright: ignore[reportMissingImports]

    losses: Any = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target)
    return -(losses[0] if isinstance(losses, tuple) else losses)


def liger_dpo_loss(problem: Replay, hidden: Tensor, weight: Tensor) -> Tensor:
    """Compute Liger's fused linear DPO loss: padded pairs, the reference scored with them (it takes no numbers)."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss  # pyright: ignore[reportMissingImports]

    lengths = problem.cu_seqlens.diff().long()
    sequences, length = len(lengths), int(lengths.max())
    column = torch.arange(length, device=hidden.device)
    scored = column < lengths[:, None]
    rows = torch.where(scored, problem.cu_seqlens[:-1, None] + column, 0)
    order = torch.arange(sequences, device=hidden.device).view(-1, 2).T.flatten()  # all chosen, then all rejected
    padded = hidden.index_select(0, rows[order].flatten()).view(sequences, length, -1)
    target = problem.target[rows[order]].masked_fill(~scored[order], -100)
    loss = LigerFusedLinearDPOLoss(beta=BETA, compiled=hidden.is_cuda)
    return loss(weight, padded, target, None, padded.detach(), weight.detach())[0]


def cut_cross_entropy(**settings: Any) -> Logps:
    """Cut Cross-Entropy (Wijmans et al., 2024, arXiv 2411.09009): its kernels on CUDA, inductor's elsewhere."""

    def logps(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

        impl = "cce" if hidden.is_cuda else "torch_compile"
        return -linear_cross_entropy(hidden, weight, target, reduction="none", impl=impl, **settings)

    return per_sequence(logps)


def ours(grad_mode: str, impl: str | None = None, *, reuse_exponentials: bool = False) -> Logps:
    """Score by `fused_dpo_logps` with its defaults and the scored rows given, as a trainer that packs has them."""

    def logps(problem: Replay, hidden: Tensor, weight: Tensor) -> Tensor:
        rows = torch.arange(len(hidden), device=hidden.device)
        return fused_dpo_logps(
            hidden,
            weight,
            problem.target,
            cu_seqlens=problem.cu_seqlens,
            shift=False,
            row_index=rows,
            grad_mode=grad_mode,
            options=KernelOptions(impl=impl, reuse_exponentials=reuse_exponentials),
        )

    return logps


NO_CUDA = not torch.cuda.is_available()
NO_LINEAR_CROSS_ENTROPY = not hasattr(F, "linear_cross_entropy")
IMPLEMENTATIONS = {
    way.name: way
    for way in (
        Implementation("fused filtered", ours("filtered"), FILTERED),
        Implementation("fused exact", ours("exact"), EXACT),
        Implementation("fused filtered, library", ours("filtered", "library"), FILTERED, missing=NO_CUDA),
        Implementation("fused exact, library", ours("exact", "library"), EXACT, missing=NO_CUDA),
        Implementation("fused exact, kept", ours("exact", reuse_exponentials=True), EXACT, missing=NO_CUDA),
        Implementation("naive fp32-upcast", per_sequence(naive_upcast), BF16_LOGITS),
        Implementation("naive bf16", per_sequence(naive_bf16), BF16_LOGITS, bf16_alone=True),
        Implementation("torch.compile naive", per_sequence(compiled_naive), BF16_LOGITS),
        Implementation(
            "F.linear_cross_entropy", torch_linear_cross_entropy(False), BF16_LOGITS, missing=NO_LINEAR_CROSS_ENTROPY
        ),
        Implementation(
            "F.linear_cross_entropy, chunked",
            torch_linear_cross_entropy(True),
            BF16_LOGITS,
            missing=NO_LINEAR_CROSS_ENTROPY or NO_CUDA,  # on a CPU 17 times as long as unchunked
        ),
        Implementation("TRL", per_sequence(trl_logps), BF16_LOGITS, module="trl"),
        Implementation("Liger", per_sequence(liger_logps), BF16_LOGITS, module="liger_kernel"),
        Implementation("Liger DPO", None, BF16_LOGITS, module="liger_kernel", own_loss=liger_dpo_loss),
        Implementation("Cut Cross-Entropy", cut_cross_entropy(), BF16_LOGITS, module="cut_cross_entropy"),
        Implementation(
            "Cut Cross-Entropy exact",
            cut_cross_entropy(filter_eps=None),
            BF16_LOGITS,
            module="cut_cross_entropy",
            missing=NO_CUDA,  # its path for other devices never filters
        ),
    )
}
