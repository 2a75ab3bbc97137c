"""How the kernels run: implementation and memory, apart from what they compute."""

from dataclasses import dataclass

IMPLEMENTATIONS = ("reference", "streaming", "triton", "library")


@dataclass(frozen=True)
class KernelOptions:
    """How a call is computed: choices of time, memory and, for the filtered gradients, of precision.

    Raises:
        ValueError: an unknown implementation, a workspace that is not positive, a threshold that is no probability.
    """

    impl: str | None = None
    """`"triton"` (CUDA), `"library"` (CUDA: the same kernels on products that the library's matmul computes 32 MiB at a
    time), `"streaming"` (vocabulary slices in torch, any device), `"reference"` (full logits, the oracle,
    differentiable any number of times, in forward mode and by `torch.func`), or None: triton on CUDA, streaming
    elsewhere, for float64 and where triton is not installed. A named implementation is never replaced silently."""
    workspace_mib: int = 128
    """Bound on temporary memory in MiB, beyond the per-row state (a few numbers a token) and the fp32 accumulator of
    the hidden states' gradient (4 bytes x scored tokens x D). One slice of the head with its gradient and one tile of
    logits have to fit, so very small bounds run with narrow slices, not with an error; filtered gradients hold logits
    or probabilities of at least 32 rows over the whole vocabulary, and both in a bf16 screen (128·V bytes either way).
    The width of the slices, and with it the last bits of the result, depends on this bound and never on the number of
    tokens."""
    filter_eps: float = 2**-12
    """With `grad_mode="filtered"`: how small a probability has to be for its column to be dropped in a block of rows.
    It counts relative to `1 - p` of the targets, the probability that the rows leave to all other tokens. Errors of the
    gradients grow with its square root (theorem in `fused_dpo.filtering`). 0 drops nothing."""
    tail_guard: float = 2**-4
    """With `grad_mode="filtered"`: how much the dropped probabilities of a row may sum to, on the average of its block.
    A block with more is computed exactly."""
    reuse_exponentials: bool = False
    """With exact gradients by `"triton"`: allocate the weight's gradient in the forward already, and save exponentials
    of the logits there until it is written, of as many scored rows as fit: D, or 2·D where the weight is in fp32 under
    autocast. The backward does not compute the logits of these rows again, one pass over the head in four. The peak
    stays as it is, but the gradient's V·D numbers are held from the forward to the backward, by every call that waits
    for its own. The exponentials are rounded to the dtype of the hidden states, as dz is. Without effect where the
    weight is frozen, with a softcap or the softmax's stats, under `torch.compile`, and in a second backward."""

    def __post_init__(self) -> None:
        if self.impl is not None and self.impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl must be None or one of {IMPLEMENTATIONS}, got {self.impl!r}.")
        if self.workspace_mib < 1:
            raise ValueError(f"workspace_mib must be at least 1 (MiB), got {self.workspace_mib}.")
        if not 0 <= self.filter_eps < 0.5:
            raise ValueError(f"filter_eps must be a probability in [0, 0.5), got {self.filter_eps}.")
        if not 0 <= self.tail_guard <= 1:
            raise ValueError(f"tail_guard must be a probability in [0, 1], got {self.tail_guard}.")
