"""How good an 8-bit screen would be: a forward that multiplies in fp8 or int8 and computes again what matters.

    python -m benchmarks.screens --out FILE [--tokens 4096] [--hidden FILE]

A coarse product of all columns chooses those of each block of 128 rows that some row may give more than 2^-12; their
logits are taken as exact, and the sum over the rest as the coarse product has it. That is what the filter does on CPUs
with a product in bf16. Eight bits are emulated here; the numbers are errors, not times. FILE is a results file. (The
file of hidden states holds its head in 8 bits, so int8 without a rotation would look better than it is.)

Ways to get more out of eight bits: *centred*, by `h w = (h - m)(w - c) + m w + (h - m) c`, where any m and c are right
and only the first product is coarse; *projected*, by `h w = h' w' + (h u)(w u)`, where h' and w' are without their
components along the unit vector u, here the mean weight's, and only the first product is coarse; *balanced*, hidden
channels scaled up and the weight's down by the square root of the ratio of their sizes (Xiao et al., 2023, SmoothQuant,
arXiv 2211.10438, equation 4); *rotated*, both factors by random signs and a Hadamard matrix (Ashkboos et al., 2024,
QuaRot, arXiv 2404.00456, section 4). Centred and balanced take means over the batch, so a sequence's log-prob would
depend on what else is in it; projected does not.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.arguments import hidden_file, out_file, positive_int
from benchmarks.heads.replay import SHARED_HIDDEN, Replay, replay
from benchmarks.reporting import records

EPS = 2**-12
ROWS = 128
"""Rows of a block; none straddles two sequences."""
ROTATED = 64
"""Order of the Hadamard matrix: the largest power of two that divides SmolLM2's hidden size."""
MARGINS = (1, 4)
"""Columns are kept above EPS over this."""
Quantise = Callable[[Tensor], Tensor]


def e4m3(x: Tensor) -> Tensor:
    """Round to fp8 with a scale a row."""
    scale = x.abs().amax(1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def int8(x: Tensor) -> Tensor:
    """Round to 255 steps with a scale a row."""
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).round() * scale


class Coarse(NamedTuple):
    """`hidden @ weight.T + of_columns + of_rows + outer(along_rows, along_columns)`, rounded to bf16 if `rounded`."""

    hidden: Tensor
    weight: Tensor
    of_columns: Tensor | None = None
    of_rows: Tensor | None = None
    along_columns: Tensor | None = None
    along_rows: Tensor | None = None
    rounded: bool = False

    def logits(self, rows: slice) -> Tensor:
        """Compute [rows, V] in fp32."""
        z = self.hidden[rows] @ self.weight.T
        if self.of_columns is not None and self.of_rows is not None:
            z += self.of_columns + self.of_rows[rows, None]
        if self.along_columns is not None and self.along_rows is not None:
            z += self.along_columns * self.along_rows[rows, None]
        return z.bfloat16().float() if self.rounded else z


def hadamard(order: int) -> Tensor:
    """Make an orthogonal matrix, of a power of two, by Sylvester's doubling."""
    h = torch.ones(1, 1)
    while len(h) < order:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / math.sqrt(order)


def rotate(x: Tensor) -> Tensor:
    """Multiply by random signs, the same in every call, and a Hadamard matrix on each ROTATED channels."""
    signs = torch.randint(2, (x.shape[1],), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return ((x * signs).view(len(x), -1, ROTATED) @ hadamard(ROTATED)).view_as(x)


def prepared(hidden: Tensor, weight: Tensor, quantise: Quantise, *, balanced: bool = False) -> Coarse:
    """Centre, perhaps balance, and rotate, then quantise."""
    m, c = hidden.mean(0), weight.mean(0)
    of_columns, of_rows = weight @ m, (hidden - m) @ c
    h, w = hidden - m, weight - c
    if balanced:
        scale = (w.square().mean(0) / h.square().mean(0)) ** 0.25
        h, w = h * scale, w / scale
    return Coarse(quantise(rotate(h)), quantise(rotate(w)), of_columns, of_rows)


def projected(hidden: Tensor, weight: Tensor, quantise: Quantise) -> Coarse:
    """Take out of both their components along the mean weight, rotate, then quantise."""
    u = torch.nn.functional.normalize(weight.mean(0), dim=0)
    along_h, along_w = hidden @ u, weight @ u
    h, w = hidden - along_h[:, None] * u, weight - along_w[:, None] * u
    return Coarse(quantise(rotate(h)), quantise(rotate(w)), along_columns=along_w, along_rows=along_h)


SCREENS: dict[str, Callable[[Tensor, Tensor], Coarse]] = {
    "bf16 logits": lambda h, w: Coarse(h, w, rounded=True),
    "e4m3": lambda h, w: Coarse(e4m3(h), e4m3(w)),
    "e4m3, centred, rotated": lambda h, w: prepared(h, w, e4m3),
    "e4m3, projected, rotated": lambda h, w: projected(h, w, e4m3),
    "int8, projected, rotated": lambda h, w: projected(h, w, int8),
    "int8, centred, rotated": lambda h, w: prepared(h, w, int8),
    "int8, centred, balanced, rotated": lambda h, w: prepared(h, w, int8, balanced=True),
}


class Tally:
    """Errors of one screen and margin, block by block."""

    def __init__(self) -> None:
        self.kept: list[float] = []
        self.above, self.missed, self.largest_missed = 0, 0, 0.0
        self.logp_errors: list[Tensor] = []

    def block(self, p: Tensor, coarse: Tensor, target: Tensor, threshold: float) -> None:
        """Take in true probabilities and coarse exponentials in units of the true sums, both [rows, V] in float64."""
        keep = (coarse / coarse.sum(1, keepdim=True)).amax(0) > threshold
        keep[target] = True
        dropped = p[:, ~keep]
        self.kept.append(float(keep.double().mean()))
        self.above += int((p > EPS).sum())
        self.missed += int((dropped > EPS).sum())
        self.largest_missed = max(self.largest_missed, float(dropped.max()))
        self.logp_errors.append(-(p[:, keep].sum(1) + coarse[:, ~keep].sum(1)).log())


def rows_of(problem: Replay) -> Iterator[dict[str, Any]]:
    """Make a row a screen and margin: errors of logits and log-probs against float64, what is kept and missed."""
    hidden, weight = problem.hidden.float(), problem.weight.float()
    screens = {name: make(hidden, weight) for name, make in SCREENS.items()}
    tallies = {(name, margin): Tally() for name in screens for margin in MARGINS}
    squares = dict.fromkeys(screens, 0.0)
    offsets = problem.cu_seqlens.tolist()
    for start, stop in pairwise(offsets):
        for first in range(start, stop, ROWS):
            rows = slice(first, min(first + ROWS, stop))
            z = hidden[rows].double() @ weight.double().T
            log_sum = z.logsumexp(1, keepdim=True)
            p = (z - log_sum).exp()
            for name, screen in screens.items():
                coarse = screen.logits(rows).double()
                squares[name] += float((coarse - z).square().sum())
                coarse = (coarse - log_sum).exp_()
                for margin in MARGINS:
                    tallies[name, margin].block(p, coarse, problem.target[rows], EPS / margin)
    for (name, margin), tally in tallies.items():
        token_errors = torch.cat(tally.logp_errors)
        of_sequences = torch.stack([part.sum() for part in token_errors.split([b - a for a, b in pairwise(offsets)])])
        yield {
            "id": f"screens/{name}/above 2^-12 over {margin}",
            "suite": "screens",
            "implementation": f"{name}, above 2^-12 / {margin}",
            "tokens": len(hidden),
            "logits": problem.source,
            "logit_error_rms_nat": math.sqrt(squares[name] / (len(hidden) * len(weight))),
            "kept_fraction": sum(tally.kept) / len(tally.kept),
            "missed_fraction": tally.missed / tally.above,
            "largest_missed_over_eps": tally.largest_missed / EPS if tally.missed else 0.0,
            "worst_token_error_nat": float(token_errors.abs().max()),
            "worst_logp_error_nat": float(of_sequences.abs().max()),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, required=True, help="results file to write")
    parser.add_argument("--tokens", type=positive_int, default=4096, help="tokens of real answers (default: 4096)")
    parser.add_argument("--hidden", type=hidden_file, help="file of real hidden states (default: the shared one)")
    options = parser.parse_args(arguments)
    if not options.hidden and not SHARED_HIDDEN.is_file():
        parser.error(
            f"{SHARED_HIDDEN} is not there, and errors of made-up logits would tell nothing; name --hidden FILE"
        )
    try:
        problem = replay(options.tokens, 576, 49152, hidden_file=options.hidden or SHARED_HIDDEN)
    except ValueError as error:
        parser.error(str(error))
    with torch.no_grad():
        rows = list(rows_of(problem))
    records.write(options.out, rows)
    for row in rows:
        print(
            f"{row['implementation']:48} logits {row['logit_error_rms_nat']:.4f} rms, kept {row['kept_fraction']:.2%}, "
            f"missed {row['missed_fraction']:.2%} (up to {row['largest_missed_over_eps']:.2f} eps), "
            f"worst sequence {row['worst_logp_error_nat']:.4f} nat"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
