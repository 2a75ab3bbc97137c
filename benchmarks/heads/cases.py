"""What is measured: heads of known models, numbers of tokens, mixes of lengths, and what is asked of the head."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.heads.replay import Replay, random_logits, replay

HEADS = {
    "SmolLM2": (576, 49152),
    "Gemma-3-270M": (640, 262144),
    "Gemma-2-2B": (2304, 256000),
    "Llama-3-8B": (4096, 128256),
    "Qwen3-8B": (4096, 151936),
}
"""Hidden size D and vocabulary V of models' heads (their published configurations)."""

BARE = "bare matmuls"
"""The matrix products alone, with results in the dtype of the case: the floor of whoever computes everything."""
FORWARD = "forward"
"""Log-probs without gradient: scoring by the reference model."""
TRAIN = "forward+backward"
"""Log-probs, and the gradients for one given gradient a sequence."""
LOSS = "dpo loss"
"""Log-probs, the sigmoid DPO loss against given reference log-probs, and the gradients."""
PHASES = (FORWARD, TRAIN, LOSS)


@dataclass(frozen=True)
class Case:
    """A head and the tokens it scores."""

    model: str
    N: int
    D: int
    V: int
    lengths: str = "hh_helpful"
    """Data set whose answers give the sequence lengths."""
    logits: str = "real"
    """"real" (replayed, or synthetic where the file of hidden states is absent) or "random"."""
    trainable: bool = True
    """Whether the head's weight wants a gradient."""
    dtype: str = "bfloat16"
    """What holds the numbers, which are those of bfloat16 in float32 too."""

    @property
    def name(self) -> str:
        """Model, tokens, and what is not as usual."""
        unusual = (
            self.lengths * (self.lengths != "hh_helpful"),
            self.logits * (self.logits != "real"),
            "frozen" * (not self.trainable),
            self.dtype * (self.dtype != "bfloat16"),
        )
        return "-".join((self.model, f"N{self.N}", *filter(None, unusual)))

    def problem(self, hidden_file: Path | None, device: str) -> Replay:
        """Make the tensors of the case, the same in every call."""
        if self.logits == "random":
            problem = random_logits(self.N, self.D, self.V, lengths=self.lengths, device=device)
        else:
            problem = replay(self.N, self.D, self.V, lengths=self.lengths, hidden_file=hidden_file, device=device)
        dtype = getattr(torch, self.dtype)
        return problem._replace(hidden=problem.hidden.to(dtype), weight=problem.weight.to(dtype))

    def passes(self, phase: str) -> int:
        """Count the matrix products of N x D x V that the phase cannot do without."""
        return 1 if phase == FORWARD else 2 + self.trainable

    def describe(self) -> dict[str, object]:
        """Describe the case as a row holds it."""
        fields = ("model", "N", "D", "V", "lengths", "trainable", "dtype")
        return {"case": self.name, **{field: getattr(self, field) for field in fields}}


def head(model: str, N: int) -> Case:
    """Make the case of the head of a known model."""
    return Case(model, N, *HEADS[model])


def head_cases(gpu: bool, dtype: str = "bfloat16") -> list[tuple[Case, str]]:
    """List cases and phases of the head benchmark, the most telling first; for a GPU, or small enough for a CPU."""
    return [(replace(case, dtype=dtype), phase) for case, phase in _head_cases(gpu)]


def _head_cases(gpu: bool) -> list[tuple[Case, str]]:
    if not gpu:
        small = head("SmolLM2", 1024)
        cases = [(head("SmolLM2", 4096), TRAIN), (small, FORWARD), (small, LOSS)]
        cases += [(replace(small, trainable=False), TRAIN), (replace(small, logits="random"), TRAIN)]
        return [*cases, (head("Gemma-3-270M", 512), TRAIN)]
    main = head("Qwen3-8B", 8192)
    cases = [(main, TRAIN), (main, FORWARD), (main, LOSS), (replace(main, trainable=False), TRAIN)]
    cases += [(replace(main, lengths="dpo_en"), TRAIN), (replace(main, logits="random"), TRAIN)]
    others = [("Llama-3-8B", 16384), ("Gemma-2-2B", 8192), ("Gemma-3-270M", 32768), ("SmolLM2", 4096)]
    return cases + [(head(*other), TRAIN) for other in others]


AXES = ("N", "D", "V")
SCALED = (BARE, "fused filtered", "fused exact", "naive fp32-upcast", "Cut Cross-Entropy")
"""What has scaling curves."""
STAGED = (
    *("fused filtered", "fused exact", "naive fp32-upcast"),
    *("fused exact, kept", "fused filtered, library", "fused exact, library"),
)
"""What is split into stages."""


def scaling_cases(axis: str, gpu: bool, dtype: str = "bfloat16") -> list[Case]:
    """List cases that differ along one axis."""
    middle = Case("scaling", *((8192, 4096, 151936) if gpu else (1024, 576, 49152)), dtype=dtype)
    values = {
        "N": (1024, 2048, 4096, 8192, 16384, 32768) if gpu else (256, 512, 1024, 2048, 4096, 8192),
        "D": (1024, 2048, 4096, 8192) if gpu else (576, 1152, 2304, 4608),
        "V": (32768, 65536, 131072, 262144) if gpu else (16384, 32768, 65536, 131072, 262144),
    }
    return [replace(middle, **{axis: value}) for value in values[axis]]
