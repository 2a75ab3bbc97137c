"""What other people's trainers compute from logits, in our words, with the settings that they take.

A stand-in loops over sequences and tokens, with log-softmax of the model's own logits: the truth to compare with.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_dpo.integrations import llama_factory, ms_swift, openrlhf, trl_legacy
from tests.kernels.support.peers import cut, source_of
from tests.kernels.support.tiny_pairs import PAD, pad, padded, responses


class Response(NamedTuple):
    """The scored tokens of a sequence."""

    columns: list[int]
    labels: list[int]
    logits: Tensor
    """[n, V], what predicts them."""

    @property
    def logps(self) -> Tensor:
        return self.logits.log_softmax(-1)[range(len(self.labels)), self.labels]


def scored_tokens(logits: Tensor, labels: Tensor) -> list[Response]:
    """Read the scored tokens of each row of a padded batch."""
    made = []
    for row, wanted in zip(logits, labels.tolist(), strict=True):
        columns = [c for c in range(1, len(wanted)) if wanted[c] != -100]
        made.append(Response(columns, [wanted[c] for c in columns], row[[c - 1 for c in columns]]))
    return made


def sums(rows: list[Response], alpha: float | None, place: Callable[[Response, int], int]) -> Tensor:
    """Sum each sequence, with a factor from the length of its pair's shorter response on."""
    made = []
    for number, row in enumerate(rows):
        partner = rows[(number + len(rows) // 2) % len(rows)]
        shorter = min(len(row.labels), len(partner.labels))
        factors = [1.0 if alpha is None or place(row, i) < shorter else alpha for i in range(len(row.labels))]
        made.append((row.logps * torch.tensor(factors)).sum())
    return torch.stack(made)


def halves(values: Any) -> tuple[Any, Any]:
    return values[: len(values) // 2], values[len(values) // 2 :]


def rows_of(labels: Tensor, logits: Tensor, positions: Tensor | None) -> list[Response]:
    """Scored tokens of a padded batch, or of sequences in one row."""
    if positions is None:
        return scored_tokens(logits, labels)
    starts = [*(positions[0] == 0).nonzero()[:, 0].tolist(), labels.shape[1]]
    return [scored_tokens(logits[:, a:b], labels[:, a:b])[0] for a, b in pairwise(starts)]


def own_llama_factory(trainer: Any, model: Any, batch: dict, is_ref_model: bool = False) -> dict[str, Tensor]:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    rows = scored_tokens(logits, batch["labels"])
    alpha = None if is_ref_model else trainer.ld_alpha
    logps = sums(rows, alpha, lambda row, i: row.columns[i] - row.columns[0])
    averages = logps / torch.tensor([len(row.labels) for row in rows])
    chosen, rejected = halves(averages if trainer.loss_type in ("ipo", "orpo", "simpo") else logps)
    means = [half.mean() for half in halves(logits)]
    return {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "chosen_logits": means[0],
        "rejected_logits": means[1],
        "chosen_logps_avg": halves(averages)[0],
    }


def own_ms_swift(trainer: Any, model: Any, batch: dict, is_ref_model: bool = False) -> dict[str, Tensor]:
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "text_position_ids")}
    if trainer.aux_loss_enabled:
        inputs["output_router_logits"] = True
    output = model(**inputs, use_cache=False)
    positions = batch.get("text_position_ids", batch.get("position_ids")) if trainer.template.padding_free else None
    rows = rows_of(batch["labels"], output.logits, positions)
    logps = sums(rows, None if is_ref_model else trainer.args.ld_alpha, lambda row, i: i)
    counts = torch.tensor([len(row.labels) for row in rows])
    chosen, rejected = halves(logps)
    made = {"chosen_logps": chosen, "rejected_logps": rejected}
    for side, half, count in zip(("chosen", "rejected"), halves(rows), halves(counts), strict=True):
        made[f"mean_{side}_logits"] = torch.cat([row.logits for row in half]).mean()
        made[f"{side}_completion_token_counts"] = count
    if not is_ref_model:
        made["nll_loss"] = -torch.cat([row.logps for row in halves(rows)[0]]).mean()
    if trainer.aux_loss_enabled:
        made["aux_loss"] = output.aux_loss
    return made


def own_trl(trainer: Any, model: Any, batch: dict, is_ref_model: bool = False) -> dict[str, Tensor]:
    """Of its padded batch only, right-padded after both ends were cut."""
    ids, labels = [], []
    for side in ("chosen", "rejected"):
        for number in range(len(batch["prompt_input_ids"])):
            one = [
                batch[f"{part}_input_ids"][number][batch[f"{part}_attention_mask"][number] == 1].tolist()
                for part in ("prompt", side)
            ]
            cut_at = slice(None)
            width = batch["prompt_input_ids"].shape[1] + max(
                batch[f"{each}_input_ids"].shape[1] for each in ("chosen", "rejected")
            )
            if trainer.max_length is not None and trainer.max_length < width:
                limit = trainer.max_length
                cut_at = slice(limit) if trainer.truncation_mode == "keep_start" else slice(-limit, None)
            ids.append((one[0] + one[1])[cut_at])
            labels.append(([-100] * len(one[0]) + one[1])[cut_at])
    router = {"output_router_logits": True} if trainer.aux_loss_enabled else {}
    output = model(input_ids=pad(ids, 0), attention_mask=pad([[1] * len(r) for r in ids], 0), use_cache=False, **router)
    rows = scored_tokens(output.logits, pad(labels, -100))
    counts = torch.tensor([len(row.labels) for row in rows])
    if trainer.args.ld_alpha is not None and not is_ref_model:
        first = min(row.columns[0] for row in rows) - 1 if trainer.use_logits_to_keep else 0

        def counted(row: Response) -> Response:
            kept = [i for i, c in enumerate(row.columns) if c - first < len(row.labels)]
            return Response([row.columns[i] for i in kept], [row.labels[i] for i in kept], row.logits[kept])

        made = []
        for number, row in enumerate(rows):
            shorter = min(counts[number], counts[(number + len(rows) // 2) % len(rows)])
            few = counted(row)
            factors = [1.0 if c - first < shorter else trainer.args.ld_alpha for c in few.columns]
            made.append((few.logps * torch.tensor(factors)).sum())
        logps = torch.stack(made)
    else:
        logps = sums(rows, None, lambda row, i: i)
        logps = logps / counts if "ipo" in trainer.loss_type else logps
    chosen, rejected = halves(logps)
    result = {"chosen_logps": chosen, "rejected_logps": rejected}
    for side, half in zip(("chosen", "rejected"), halves(rows), strict=True):
        result[f"mean_{side}_logits"] = torch.cat([row.logits for row in half]).mean()
    if trainer.args.rpo_alpha is not None or "sft" in trainer.loss_type:
        known = [row.logps[[i for i, token in enumerate(row.labels) if token != 0]] for row in halves(rows)[0]]
        result["nll_loss"] = -torch.cat(known).mean()
    if trainer.aux_loss_enabled:
        result["aux_loss"] = output.aux_loss
    return result


def own_openrlhf(trainer: Any, actor: Any, *batch: Any) -> dict[str, Tensor]:
    chosen_ids, c_mask, reject_ids, r_mask, lengths = batch
    ids, mask, lengths = trainer.concatenated_inputs(chosen_ids, c_mask, reject_ids, r_mask, lengths)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = actor.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    columns = torch.arange(ids.shape[1])
    labels = torch.where((mask == 1) & (columns >= torch.tensor(lengths)[:, None]), ids, -100)
    rows = scored_tokens(output.logits / actor.temperature, labels)
    chosen, rejected = halves(sums(rows, None, lambda row, i: i))
    means = torch.stack([row.logps.mean() for row in halves(rows)[0]])
    return as_dict((chosen, rejected, output.aux_loss if "aux_loss" in output else [], -means.mean()))


def as_dict(output: Any) -> dict[str, Tensor]:
    """Name the entries of a tuple of tensors."""
    if isinstance(output, dict):
        return output
    return {str(number): value for number, value in enumerate(output) if isinstance(value, Tensor)}


def trl_batch(side: str) -> tuple[dict[str, Tensor]]:
    """As its collator makes it, whatever `side` is: prompts padded on the left and responses on the right."""
    made = responses()
    pairs = len(made) // 2
    batch = {}
    for name, rows, at in (
        ("prompt", [p for p, _ in made[:pairs]], "left"),
        ("chosen", [r for _, r in made[:pairs]], "right"),
        ("rejected", [r for _, r in made[pairs:]], "right"),
    ):
        batch[f"{name}_input_ids"] = pad(rows, PAD, at)
        batch[f"{name}_attention_mask"] = pad([[1] * len(row) for row in rows], 0, at)
    return (batch,)


def openrlhf_batch(side: str) -> tuple[Any, ...]:
    """Ids and masks of chosen and rejected sequences, of different widths."""
    batch, pairs = padded(side), len(responses()) // 2
    lengths = [len(p) for p, _ in responses()[:pairs]]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return ids[:pairs], mask[:pairs], ids[pairs:, :-1], mask[pairs:, :-1], lengths


def settings_of(**settings: Any) -> Any:
    return SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext), **settings)


def llama_factory_trainer(loss_type: str = "sigmoid", ld_alpha: float | None = None) -> Any:
    return settings_of(finetuning_args=SimpleNamespace(use_ref_model=True), ld_alpha=ld_alpha, loss_type=loss_type)


def ms_swift_trainer(
    ld_alpha: float | None = None,
    padding_free: bool = False,
    aux_loss: bool = False,
    keep: bool = True,
    sequence_parallel_size: int = 1,
) -> Any:
    trainer = settings_of(
        args=SimpleNamespace(ld_alpha=ld_alpha, tuner_backend="peft"),
        template=SimpleNamespace(sequence_parallel_size=sequence_parallel_size, padding_free=padding_free),
        aux_loss_enabled=aux_loss,
        is_encoder_decoder=False,
        label_pad_token_id=-100,
    )
    trainer.get_use_logits_to_keep = lambda _: keep
    return trainer


def trl_trainer(
    loss_type: tuple[str, ...] = ("sigmoid",),
    ld_alpha: float | None = None,
    rpo_alpha: float | None = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_end",
    padding_free: bool = False,
    keep: bool = False,
    aux_loss: bool = False,
    use_weighting: bool = False,
) -> Any:
    def concatenated_inputs(batch: dict[str, Tensor], padding_value: int) -> dict[str, Tensor]:
        made = {}
        for kind, fill in (("input_ids", padding_value), ("attention_mask", 0)):
            made[f"prompt_{kind}"] = batch[f"prompt_{kind}"].repeat(2, 1)
            rows = [row.tolist() for side in ("chosen", "rejected") for row in batch[f"{side}_{kind}"]]
            made[f"completion_{kind}"] = pad(rows, fill)
        return made

    return settings_of(
        args=SimpleNamespace(ld_alpha=ld_alpha, rpo_alpha=rpo_alpha),
        loss_type=list(loss_type),
        max_length=max_length,
        truncation_mode=truncation_mode,
        padding_free=padding_free,
        use_logits_to_keep=keep,
        aux_loss_enabled=aux_loss,
        use_weighting=use_weighting,
        is_encoder_decoder=False,
        pad_token_id=PAD,
        padding_value=PAD,
        label_pad_token_id=-100,
        concatenated_inputs=concatenated_inputs,
    )


def openrlhf_trainer(ring_attn_group: Any = None, ds_tensor_parallel_size: int = 1) -> Any:
    def concatenated_inputs(chosen: Tensor, c_mask: Tensor, rejected: Tensor, r_mask: Tensor, lengths: list) -> tuple:
        ids = pad([row.tolist() for each in (chosen, rejected) for row in each], PAD)
        return ids, pad([row.tolist() for each in (c_mask, r_mask) for row in each], 0), lengths * 2

    def batch_logps(logps: Tensor, mask: Tensor, lengths: list) -> tuple[Tensor, Tensor]:
        kept = mask[:, 1:].bool() & (torch.arange(1, mask.shape[1]) >= torch.tensor(lengths)[:, None])
        return (logps * kept).sum(1), (logps * kept).sum(1) / kept.sum(1)

    return SimpleNamespace(
        strategy=SimpleNamespace(ring_attn_group=ring_attn_group, ds_tensor_parallel_size=ds_tensor_parallel_size),
        tokenizer=SimpleNamespace(pad_token_id=PAD),
        concatenated_inputs=concatenated_inputs,
        _get_batch_logps=batch_logps,
    )


class Actor(torch.nn.Module):
    """OpenRLHF's, without a forward: a model, or the engine around it, in `model`."""

    def __init__(self, model: Any, temperature: float = 1.0) -> None:
        super().__init__()
        self.model, self.temperature, self.packing_samples = model, temperature, False


def cut_llama_factory(trainer: Any) -> Callable[..., Any]:
    known = {"torch": torch, "IGNORE_INDEX": -100, "nested_detach": lambda batch, clone: dict(batch)}
    cut(source_of("llamafactory/train/trainer_utils.py"), ["get_batch_logps"], known)
    return cut(source_of("llamafactory/train/dpo/trainer.py"), ["concatenated_forward"], known)["concatenated_forward"]


def cut_ms_swift(trainer: Any) -> Callable[..., Any]:
    functions = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "is_mp": lambda: False}
    cut(source_of("trl/trainer/utils.py", "trl-0.28"), ["selective_log_softmax"], functions)
    cut(source_of("swift/utils/transformers_utils.py"), ["get_packed_seq_params"], functions)
    mixin = ["get_cu_seqlens", "prepare_logits_to_keep"]
    cut(source_of("swift/trainers/mixin.py"), mixin, functions)
    cut(source_of("swift/rlhf_trainers/rlhf_mixin.py"), ["get_per_token_logps", "_packed_sequence_sum"], functions)
    for name in (*mixin, "get_per_token_logps"):
        setattr(trainer, name, functions[name].__get__(trainer))
    trainer._packed_sequence_sum = functions["_packed_sequence_sum"]
    path = source_of("swift/rlhf_trainers/dpo_trainer.py")
    return cut(path, ["concatenated_forward"], functions)["concatenated_forward"]


def cut_trl(version: str) -> Callable[[Any], Callable[..., Any]]:
    def cut_version(trainer: Any) -> Callable[..., Any]:
        functions: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
        utils = ["flush_left", "flush_right", "pad_to_length", "selective_log_softmax"]
        cut(source_of("trl/trainer/utils.py", f"trl-{version}"), utils, functions)
        path = source_of("trl/trainer/dpo_trainer.py", f"trl-{version}")
        cut(path, ["concatenated_inputs", "concatenated_forward"], functions)
        trainer.concatenated_inputs = functions["concatenated_inputs"]
        return functions["concatenated_forward"]

    return cut_version


def cut_openrlhf(trainer: Any) -> Callable[..., Any]:
    functions: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
    cut(source_of("openrlhf/models/utils.py"), ["_logsumexp_by_chunk", "log_probs_from_logits"], functions)
    forward = cut(source_of("openrlhf/models/actor.py"), ["forward"], functions)["forward"]
    names = ["concatenated_forward", "concatenated_inputs", "_get_batch_logps"]
    cut(source_of("openrlhf/trainer/dpo_trainer.py"), names, functions)
    for name in names[1:]:
        setattr(trainer, name, functions[name].__get__(trainer))

    def concatenated_forward(trainer: Any, actor: Any, *batch: Any) -> Any:
        return functions["concatenated_forward"](trainer, forward.__get__(actor), *batch)

    return concatenated_forward


@dataclass(frozen=True)
class Peer:
    """A trainer: our function, the stand-in of theirs, and theirs."""

    ours: Callable[..., Any]
    stand_in: Callable[..., Any]
    theirs: Callable[[Any], Callable[..., Any]]
    """Gives their function for a trainer's settings, or skips."""
    trainer: Callable[..., Any]
    batch: Callable[[str], tuple[Any, ...]] = lambda side: (padded(side),)
    caller: dict[str, Any] = field(default_factory=dict)
    """Settings of the `Caller` that the patch makes."""
    model: Callable[[Any], Any] = lambda model: model
    """Wraps a model of transformers as the trainer holds it, such as in an actor."""


STATS = {"stats": ("mean_logit",)}
PEERS = {
    "llama_factory": Peer(
        llama_factory.concatenated_forward,
        own_llama_factory,
        cut_llama_factory,
        llama_factory_trainer,
        caller={"with_means": True},
    ),
    "ms_swift": Peer(ms_swift.concatenated_forward, own_ms_swift, cut_ms_swift, ms_swift_trainer, caller=STATS),
    **{
        f"trl-{version}": Peer(
            trl_legacy.concatenated_forward, own_trl, cut_trl(version), trl_trainer, trl_batch, STATS
        )
        for version in ("0.20", "0.24", "0.28")
    },
    "openrlhf": Peer(
        openrlhf.concatenated_forward, own_openrlhf, cut_openrlhf, openrlhf_trainer, openrlhf_batch, model=Actor
    ),
}
