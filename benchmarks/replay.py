"""Hidden states and heads with realistic logits, at any number of tokens, hidden size and vocabulary.

Real-logit replay: real hidden states and their head keep their logits under a semi-orthogonal lift to a larger hidden
size (`(h Q)(w Q)ᵀ = h wᵀ` for `Q Qᵀ = I`), up to the rounding of the lifted numbers to bf16. The vocabulary grows by
rows that are means of two real ones, moved down along the mean hidden state, so that their logits fall into the tail,
as those of a larger vocabulary's rare tokens do.

Without the file, a synthetic distribution stands in: a Zipf-like bias, on a constant hidden dimension, plus normal
logits that the tokens of a sequence share in part, fitted to the entropy, the tail and the kept columns of the real.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SHARED_HIDDEN = Path(__file__).parents[1] / "../shared/data/hidden/smollm2_helpful.safetensors"
ZIPF, NORMAL, SHARED = 1.4, 4.0, 0.5
"""Exponent of the bias, standard deviation of the other logits, and the share of their variance that a sequence has in
common. Against the real file at its own size: entropy 2.4 for 2.2 nats, tail 0.033 for 0.031, kept in a block of 128
rows 7.6 % for 7.1 %."""
LOWERED = 1.5
"""Nats by which added rows are moved down at the mean hidden state."""


class Replay(NamedTuple):
    """A problem of aligned rows; sequences are 64 tokens long."""

    hidden: Tensor
    """bf16 [N, D]."""
    weight: Tensor
    """bf16 [V, D]."""
    target: Tensor
    """int64 [N]."""
    source: str


def replay(N: int, D: int, V: int, *, hidden_file: Path | None = None, device: str = "cpu", seed: int = 0) -> Replay:
    """N tokens of hidden size D (at least that of the file) over V tokens, deterministic from the seed."""
    path = hidden_file or SHARED_HIDDEN
    generator = torch.Generator(device).manual_seed(seed)
    if path.is_file():
        from safetensors.torch import load_file

        data = {name: tensor.to(device) for name, tensor in load_file(path).items()}
        if data["hidden"].shape[1] <= D:
            return _real(data, N, D, V, generator)
    return _synthetic(N, D, V, generator)


def _real(data: dict[str, Tensor], N: int, D: int, V: int, generator: torch.Generator) -> Replay:
    device = generator.device
    rows = torch.arange(N, device=device) % data["hidden"].shape[0]  # beyond the file's tokens they repeat
    hidden, target = data["hidden"][rows].float(), data["target"][rows].long()
    weight = data["weight_int8"].float() * data["weight_scale"][:, None]
    known, small = weight.shape
    if known > V:
        weight, target = weight[:V], target % V
    else:
        pairs = torch.randint(known, (2, V - known), generator=generator, device=device)
        mean = hidden.mean(0)
        added = (weight[pairs[0]] + weight[pairs[1]]) / 2 - LOWERED * mean / mean.square().sum()
        weight = torch.cat((weight, added))
    if small < D:
        lift = torch.linalg.qr(torch.randn(D, small, generator=generator, device=device))[0]
        hidden, weight = hidden @ lift.T, weight @ lift.T
    return Replay(hidden.bfloat16(), weight.bfloat16(), target, "real-logit replay")


def _synthetic(N: int, D: int, V: int, generator: torch.Generator) -> Replay:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    common = normal(-(-N // 64), D).repeat_interleave(64, 0)[:N]
    hidden = SHARED**0.5 * common + (1 - SHARED) ** 0.5 * normal(N, D)
    weight = normal(V, D).mul_(NORMAL / D**0.5)
    hidden[:, 0] = 1.0
    weight[:, 0] = -ZIPF * torch.arange(1, V + 1, device=generator.device).log()
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    targets = [
        torch.multinomial((part.float() @ weight.float().T).softmax(-1), 1, generator=generator).squeeze(1)
        for part in hidden.split(256)
    ]
    return Replay(hidden, weight, torch.cat(targets), "synthetic logits")


def describe(problem: Replay, eps: float = 2**-12, rows: int = 1024) -> dict[str, float]:
    """What the logits of the first rows are like: entropy, tail and columns kept, by row and by block of 128 rows."""
    entropy, tail, kept, blocks = [], [], [], []
    for part in problem.hidden[:rows].split(128):
        p = (part.float() @ problem.weight.float().T).softmax(-1)
        above = p > eps
        entropy.append(torch.special.entr(p).sum(-1).mean())
        tail.append(p.masked_fill(above, 0.0).sum(-1).mean())
        kept.append(above.sum(-1).double().mean())
        blocks.append(above.any(0).double().mean())
    columns = {"entropy_nats": entropy, "tail": tail, "kept_per_row": kept, "kept_fraction_of_block": blocks}
    return {name: float(torch.stack(values).mean()) for name, values in columns.items()}
