"""The set-up test on the user's own model: what goes wrong in attention or head is silent everywhere else."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from fused_dpo import check_head, get_batch_logps
from fused_dpo_engine.attention.interface import ATTENTION_NAME
from fused_dpo_engine.batching.padding import IGNORE_INDEX
from fused_dpo_engine.batching.planning import build_batch, count_slots
from fused_dpo_engine.config.options import PackingOptions
from fused_dpo_engine.data.pairs import TokenPair
from fused_dpo_engine.errors import UserError
from fused_dpo_engine.model.policy import Policy


def pairs_to_test(pairs: Sequence[TokenPair], options: PackingOptions) -> list[int]:
    """Choose the two shortest pairs and the median one, if they fit; with eight scored tokens a side if there are such.

    The model's own half-precision logits are rounded by up to a tenth of a nat, which a mean over few tokens shows.
    """

    def key(index: int) -> tuple[bool, int, int]:
        pair = pairs[index]
        return min(pair.chosen_length, pair.rejected_length) < 8, pair.num_tokens, index

    ranked = sorted(range(len(pairs)), key=key)
    taken: list[int] = []
    for index in dict.fromkeys((*ranked[:2], ranked[len(ranked) // 2])):
        if not taken or count_slots(pairs, [*taken, index], options) <= options.tokens_per_batch:
            taken.append(index)
    return taken


def check_vocabulary(policy: Policy, pairs: Sequence[TokenPair]) -> None:
    """Refuse pairs with tokens that the model does not know.

    Raises:
        UserError: names the first of them.
    """
    size = policy.causal_lm.get_input_embeddings().weight.shape[0]
    for pair in pairs:
        largest = max(int(pair.chosen_ids.max()), int(pair.rejected_ids.max()))
        if largest >= size:
            raise UserError(
                f"{pair.where}: token id {largest} lies outside the model's {size} embeddings; the tokenizer does not "
                f"belong to this model."
            )


@torch.no_grad()
def self_test(
    policy: Policy,
    pairs: Sequence[TokenPair],
    options: PackingOptions,
    gathered: AbstractContextManager[Any] | None = None,
) -> None:
    """Compare the layout and head that training will use with the model's own forward, one sequence at a time.

    The model's own forward means its own attention (eager) and its own logits: packing, prefix sharing, the attention
    backend and the fused head are all on the other side. The head is compared by itself too, token by token.

    Args:
        policy: before it is compiled.
        pairs: at least one; all of them are scored.
        options: how training lays them out.
        gathered: within which the model can be called beside the policy; None where it always can.

    Raises:
        UserError: the head is read otherwise than the model applies it, its own log-probs are no numbers, or mean
            token log-probs differ by more than 0.001 in float32, or 0.1 in bfloat16 (where the model's own logits are
            rounded to 8 bits; sequences that see each other are off by several nats).
    """
    batch = build_batch(pairs, range(len(pairs)), options).to(policy.device)
    got = policy(batch).plain.tolist()
    bound = 0.1 if policy.compute_dtype.itemsize == 2 else 1e-3
    sequences = [(pair, *side) for pair in pairs for side in pair.sides]
    with gathered or nullcontext(), _own_attention(policy):
        for ours, (pair, ids, positions) in zip(got, sequences, strict=True):
            tokens = torch.tensor([ids.tolist()], device=policy.device)
            labels = torch.full_like(tokens, IGNORE_INDEX)
            labels[:, positions] = tokens[:, positions]
            with policy.autocast():
                logits = policy.causal_lm(input_ids=tokens, use_cache=False).logits
            own = float(get_batch_logps(logits, labels)[0])
            if not math.isfinite(own):
                raise UserError(
                    f"the model's own log-prob of {pair.where} is not finite, by its own attention and logits: its "
                    f"weights may be damaged, or --dtype float32 may help."
                )
            count = len(positions)
            if not abs(ours - own) / count <= bound:
                _check_head(policy, pair)  # says so if it is the head
                layout = "packed" if options.packing else "padded"
                raise UserError(
                    f"{type(policy.causal_lm).__name__} does not score {layout} sequences as it scores them one by "
                    f"one: mean token log-prob {ours / count:.4f} {layout}, {own / count:.4f} alone (bound {bound}); "
                    f"this architecture is not supported"
                    + ("; --no-packing trains it on padded batches, if those pass." if options.packing else ".")
                )
        _check_head(policy, pairs[0])


def _check_head(policy: Policy, pair: TokenPair) -> None:
    ids = torch.tensor(next(iter(pair.sides))[0].tolist(), device=policy.device)
    with _own_attention(policy), policy.autocast():
        try:
            check_head(policy.model, ids)
        except ValueError as error:
            raise UserError(str(error)) from error


@contextmanager
def _own_attention(policy: Policy) -> Iterator[None]:
    """Switch, within the block, to attention as the model's authors wrote it."""
    model = policy.causal_lm
    if model.config._attn_implementation != ATTENTION_NAME:
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
