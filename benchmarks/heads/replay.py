"""Hidden states and heads with realistic logits, at any number of tokens, hidden size and vocabulary.

Real-logit replay: real hidden states and their head keep their logits under a semi-orthogonal lift to a larger hidden
size (`(h Q)(w Q)ᵀ = h wᵀ` for `Q Qᵀ = I`), up to the rounding of the lifted numbers to bf16. The vocabulary grows by
rows that are means of two real ones, moved down along the mean hidden state, so that their logits fall into the tail,
as those of a larger vocabulary's rare tokens do.

Without the file, a synthetic distribution stands in: a Zipf-like bias, on a constant hidden dimension, plus normal
logits that the tokens of a sequence share in part, fitted to the entropy, the tail and the kept columns of the real.

Random logits, of hidden states and weights as at initialisation, are what other benchmarks measure: their softmax is
nearly flat, so a filter that judges entries by their size alone drops it all.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SHARED_HIDDEN = Path(__file__).parents[2] / "../shared/data/hidden/smollm2_helpful.safetensors"
TENSORS = {"hidden", "target", "cu_seqlens", "weight_int8", "weight_scale"}
"""What a file of hidden states holds, among other things."""
LENGTHS: dict[str, list[list[int]]] = json.loads((Path(__file__).parents[1] / "lengths.json").read_text())
"""By data set, tokens of [prompt, chosen, rejected] of 128 real preference pairs (SmolLM2's tokenizer): Anthropic's
hh-rlhf helpful-online, FineGrainedRLHF's questions on long passages, and LLaMA-Factory's dpo_en_demo."""
ZIPF, NORMAL, SHARED = 1.4, 4.0, 0.5
"""Exponent of the bias, standard deviation of the other logits, and the share of their variance that a sequence has in
common. Against the real file at its own size: entropy 2.4 for 2.2 nats, tail 0.033 for 0.031, kept in a block of 128
rows 7.6 % for 7.1 %."""
LOWERED = 1.5
"""Nats by which added rows are moved down at the mean hidden state."""
INITIAL_STD = 0.02
"""Standard deviation of weights at initialisation (GPT-2, Llama)."""


class Replay(NamedTuple):
    """A problem of aligned rows."""

    hidden: Tensor
    """bf16 [N, D]."""
    weight: Tensor
    """bf16 [V, D]."""
    target: Tensor
    """int64 [N]."""
    cu_seqlens: Tensor
    """int32 [S + 1], S even: chosen and rejected answers in turn."""
    source: str


def sequence_offsets(N: int, lengths: str = "hh_helpful") -> Tensor:
    """Make offsets, int32 [S + 1], of whole answers of real pairs in their order, the last one cut to end at N."""
    answers = [length for _, chosen, rejected in LENGTHS[lengths] for length in (chosen, rejected)]
    ends = torch.tensor(answers * (N // sum(answers) + 1)).cumsum(0)
    return _even(torch.cat((torch.zeros(1), ends[ends < N], torch.tensor([N]))).int())


def _even(offsets: Tensor) -> Tensor:
    """Split the longest sequence if the number of sequences is odd."""
    if len(offsets) % 2 == 1 or offsets[-1] < 2:
        return offsets
    longest = int(offsets.diff().argmax())
    middle = (offsets[longest] + offsets[longest + 1]) // 2
    return torch.cat((offsets[: longest + 1], middle[None], offsets[longest + 1 :]))


def replay(
    N: int,
    D: int,
    V: int,
    *,
    lengths: str = "hh_helpful",
    hidden_file: Path | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Replay:
    """Replay real logits for N tokens of hidden size D (at least that of the file) over V tokens, by the seed.

    The file's own sequences are of hh_helpful; with other `lengths` its tokens follow each other in their order. Unless
    a file is named, logits are synthetic where the shared one is absent, or of a larger hidden size.

    Raises:
        FileNotFoundError: the file that is named is not there.
        ValueError: it has a larger hidden size.
    """
    path = hidden_file or SHARED_HIDDEN
    generator = torch.Generator(device).manual_seed(seed)
    if hidden_file or path.is_file():
        from safetensors.torch import load_file

        data = {name: tensor.to(device) for name, tensor in load_file(path).items()}
        small = data["hidden"].shape[1]
        if small <= D:
            return _real(data, N, D, V, lengths, generator)
        if hidden_file:
            raise ValueError(f"{path} has hidden size {small}, more than the {D} wanted; name a file of a smaller one.")
    return _synthetic(N, D, V, sequence_offsets(N, lengths), generator)


def random_logits(N: int, D: int, V: int, *, lengths: str = "hh_helpful", device: str = "cpu", seed: int = 0) -> Replay:
    """Draw normal hidden states, and a head as it is initialised."""
    rng = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(N, D, generator=rng, device=device).bfloat16()
    weight = torch.randn(V, D, generator=rng, device=device).mul_(INITIAL_STD).bfloat16()
    target = torch.randint(V, (N,), generator=rng, device=device)
    return Replay(hidden, weight, target, sequence_offsets(N, lengths).to(device), "random logits")


def _real(data: dict[str, Tensor], N: int, D: int, V: int, lengths: str, generator: torch.Generator) -> Replay:
    device = generator.device
    tokens = data["hidden"].shape[0]
    rows = torch.arange(N, device=device) % tokens  # beyond the file's tokens they repeat
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
    if lengths == "hh_helpful":
        own = data["cu_seqlens"][1:].cpu()
        ends = torch.cat([own + tokens * turn for turn in range(-(-N // tokens))])
        offsets = _even(torch.cat((torch.zeros(1), ends[ends < N], torch.tensor([N]))).int())
    else:
        offsets = sequence_offsets(N, lengths)
    return Replay(hidden.bfloat16(), weight.bfloat16(), target, offsets.to(device), "real-logit replay")


def _synthetic(N: int, D: int, V: int, offsets: Tensor, generator: torch.Generator) -> Replay:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    offsets = offsets.to(generator.device)
    common = normal(len(offsets) - 1, D).repeat_interleave(offsets.diff().long(), 0)
    hidden = SHARED**0.5 * common + (1 - SHARED) ** 0.5 * normal(N, D)
    weight = normal(V, D).mul_(NORMAL / D**0.5)
    hidden[:, 0] = 1.0
    weight[:, 0] = -ZIPF * torch.arange(1, V + 1, device=generator.device).log()
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    targets = [
        torch.multinomial((part.float() @ weight.float().T).softmax(-1), 1, generator=generator).squeeze(1)
        for part in hidden.split(256)
    ]
    return Replay(hidden, weight, torch.cat(targets), offsets, "synthetic logits")


def describe(problem: Replay, eps: float = 2**-12, rows: int = 1024) -> dict[str, float]:
    """Describe the logits of the first rows: entropy, tail and columns kept, by row and by block of 128 rows."""
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
