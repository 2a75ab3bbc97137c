"""One DPO step, forward and backward without optimizer, in different ways, and when a way counts as right."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from benchmarks.steps.random_model import PREFIX, build_random_policy
from benchmarks.steps.random_model import token_pairs as random_pairs
from fused_dpo import DPOLoss, backbone_of, head_of
from fused_dpo_engine.attention.interface import packed_call
from fused_dpo_engine.batching.batch import PairBatch
from fused_dpo_engine.batching.planning import build_batch, plan_pairs
from fused_dpo_engine.config.options import LoraOptions, ModelOptions, PackingOptions
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.data.sources import read_rows
from fused_dpo_engine.data.tokenization import tokenize_pairs
from fused_dpo_engine.model.build import build_policy
from fused_dpo_engine.model.loading import load_tokenizer
from fused_dpo_engine.model.policy import HeadStats, Policy, SequenceLogps
from fused_dpo_engine.training.metrics import SlotMetrics

BETA = 0.1


@dataclass(frozen=True)
class Case:
    """A step."""

    model: str
    """Folder or Hugging Face name, or `random:NAME` (see `benchmarks.steps.random_model`)."""
    data: str
    """File of preference pairs; for a random model the name of a mix of lengths."""
    pairs: int = 16
    budget: int = 8192
    """Token slots that a forward pass may have; a sequence may have half of them."""
    dtype: str = "bfloat16"
    device: str = "cpu"
    hidden_file: Path | None = None
    """File of real hidden states, for a random model; see `replay`."""

    @property
    def name(self) -> str:
        """Model, data, pairs, and what is not as usual."""
        model = self.model if self.random else Path(self.model).name
        unusual = (f"{self.budget}slots" * (self.budget != 8192), self.dtype * (self.dtype != "bfloat16"))
        return "-".join((model, Path(self.data).name.split(".")[0], f"{self.pairs}pairs", *filter(None, unusual)))

    @property
    def random(self) -> bool:
        """Whether the model is one of random weights."""
        return self.model.startswith(PREFIX)

    def token_pairs(self) -> list[TokenPair]:
        """Tokenize the first pairs of the data.

        Raises:
            ValueError: there are fewer.
        """
        longest = self.budget // 2
        if self.random:
            return random_pairs(self.model.removeprefix(PREFIX), self.data, self.pairs, longest)
        tokenizer = load_tokenizer(self.model, ModelOptions(model=self.model))
        pairs = tokenize_pairs(read_rows(self.data)[: self.pairs], tokenizer, max_length=longest).pairs
        if len(pairs) < self.pairs:
            raise ValueError(f"{self.data} has {len(pairs)} pairs, not {self.pairs}.")
        return pairs

    def policy(self, *, packing: bool, grad_mode: str = "auto", dtype: str | None = None) -> Policy:
        """Load the model with fp32 weights, computed in `dtype` (by default the case's)."""
        transformers.utils.logging.disable_progress_bar()  # of its weights, which are there in a moment
        settings: Any = {"dtype": dtype or self.dtype, "grad_mode": grad_mode}
        options, device = ModelOptions(model=self.model, **settings), torch.device(self.device)
        if self.random:
            return build_random_policy(options, device, packing=packing, hidden_file=self.hidden_file)
        return build_policy(options, LoraOptions(), device, packing=packing)

    def describe(self) -> dict[str, Any]:
        """Describe the case as a row holds it."""
        model = self.model if self.random else Path(self.model).name
        return {"case": self.name, "model": model, "data": Path(self.data).name, "dtype": self.dtype}


def fused(policy: Policy, batch: PairBatch) -> Tensor:
    """Score by the trainer's own forward."""
    return policy(batch).logps


def packed_logits(policy: Policy, batch: Any) -> Tensor:
    """Score the packed forward by the naive head: logits of every token of the batch."""
    with policy.autocast(), packed_call():
        hidden = backbone_of(policy.causal_lm)(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            fused_dpo_plan=batch.attention,
            fused_dpo_backend=policy.attention,
        ).last_hidden_state[0]
        logits = F.linear(hidden, head_of(policy.model).weight)
    token_logps = F.log_softmax(logits.float(), dim=-1)[batch.scored_rows].gather(1, batch.targets[:, None]).squeeze(1)
    lengths = batch.cu_scored.diff().long()
    number = torch.arange(len(lengths), device=lengths.device)
    sequence = torch.repeat_interleave(number, lengths, output_size=len(token_logps))
    return torch.zeros_like(number, dtype=torch.float32).index_add(0, sequence, token_logps)


def padded_logits(policy: Policy, batch: Any) -> Tensor:
    """Score a padded batch through the model's own forward, as trainers without packing do it."""
    with policy.autocast():
        output = policy.causal_lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    labels = batch.labels[:, 1:]
    token_logps = F.log_softmax(output.logits[:, :-1].float(), dim=-1)
    picked = token_logps.gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    return picked.masked_fill(labels == -100, 0.0).sum(1)


class Way(NamedTuple):
    """How pairs are laid out, and what scores them."""

    layout: dict[str, bool]
    score: Callable[[Policy, Any], Tensor] = fused
    grad_mode: str = "auto"
    """What the fused head takes; auto is filtered in bfloat16."""


OURS = {
    "shared": Way({}),
    "shared, exact": Way({}, grad_mode="exact"),
    "packed": Way({"prefix_sharing": False}),
    "packed, exact": Way({"prefix_sharing": False}, grad_mode="exact"),
    "padded": Way({"packing": False}),
    "packed logits": Way({"prefix_sharing": False}, packed_logits),
    "padded logits": Way({"packing": False}, padded_logits),
}


class Outcome(NamedTuple):
    """What a step computed beside the gradients; on the device."""

    loss: Tensor
    """Mean over the pairs."""
    logps: Tensor
    """fp32 [P, 2], of the chosen and rejected sequences in the order of the pairs."""


class OwnStep:
    """Forward and backward over the pairs through `fused_dpo_engine`, batches built on the host within the step.

    Args:
        case: the step.
        way: how.
        pairs: those of the case.
        ref_logps: fp32 [P, 2], what the reference is to give.
    """

    def __init__(self, case: Case, way: Way, pairs: list[TokenPair], ref_logps: Tensor) -> None:
        self.way, self.pairs, self.budget = way, pairs, case.budget
        self.packing = PackingOptions(tokens_per_batch=case.budget, **way.layout)
        self.model = case.policy(packing=self.packing.packing, grad_mode=way.grad_mode)
        self.head: HeadStats | None = None
        self.model.register_forward_hook(self._note_head)
        self.loss = DPOLoss(beta=BETA)
        plan = plan_pairs(pairs, range(len(pairs)), self.packing)
        self.passes = [(planned.indices, ref_logps[planned.indices].to(case.device)) for planned in plan]
        self.order = torch.tensor([index for indices, _ in self.passes for index in indices]).argsort().to(case.device)
        self.slots = SlotMetrics(case.budget)

    def __call__(self) -> Outcome:
        """Take the step; gradients of the one before are dropped first."""
        self.model.zero_grad()
        self.slots = SlotMetrics(self.budget)
        losses, scored = [], []
        for indices, ref in self.passes:
            batch = build_batch(self.pairs, indices, self.packing)
            self.slots.add(batch)
            batch = batch.to(self.model.device)
            logps = self.way.score(self.model, batch)
            output = self.loss(logps[0::2], logps[1::2], ref[:, 0], ref[:, 1], num_pairs=len(self.pairs))
            output.loss.backward()
            losses.append(output.loss.detach())
            scored.append(logps.detach().float().view(-1, 2))
        return Outcome(torch.stack(losses).sum(), torch.cat(scored)[self.order])

    def _note_head(self, _policy: Policy, _batch: Any, scores: SequenceLogps) -> None:
        """Keep what the fused head saw of the last forward pass; other ways do not call the policy."""
        self.head = scores.head

    def describe(self) -> dict[str, Any]:
        """Describe the last step: what the slots held, the gradient, and the columns that a filtered head kept."""
        row: dict[str, Any] = {
            "tokens": self.slots.tokens,
            "slots": self.slots.slots,
            "forward_passes": self.slots.passes,
            "padding": self.slots.padding,
            "saved_by_sharing": self.slots.shared,
            "grad_norm": gradient_norm(self.model),
        }
        if self.head is not None:
            row["kept_fraction"] = float(self.head.kept_fraction / self.head.tokens)
        if self.packing.packing:
            row["attention"] = self.model.attention_name
        return row


def gradient_norm(model: torch.nn.Module) -> float:
    """Compute the 2-norm of all gradients."""
    squares = [parameter.grad.float().square().sum() for parameter in model.parameters() if parameter.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def true_logps(case: Case) -> list[list[float]]:
    """Compute log-probs [P][2] of the case's sequences: logits in float32, one sequence at a time, softmax in float64.

    (Torch's softmax of 49,152 float32 logits is off by 9e-5 nat a token, a hundred times what it is to measure.)
    They are also the reference of every way: as in the first steps of a training run the policy is close to the
    reference, and every pair has a gradient. Against a reference far off, pairs would saturate and cost less.
    """
    policy, pairs = case.policy(packing=False, dtype="float32"), case.token_pairs()

    def score(ids: Any, prompt_length: int) -> Tensor:
        tokens = torch.from_numpy(ids).long().to(policy.device)
        hidden = backbone_of(policy.causal_lm)(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        logits = F.linear(hidden[prompt_length - 1 : -1], head_of(policy.model).weight)
        return logits.double().log_softmax(-1).gather(1, tokens[prompt_length:, None]).sum()

    with torch.no_grad():
        sequences = [score(ids, pair.prompt_length) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    return torch.stack(sequences).view(-1, 2).tolist()  # numbers travel between processes, tensors are shared
